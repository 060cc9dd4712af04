"""How each example's gradient is bounded: one file a method."""
