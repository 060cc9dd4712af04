"""Where per-example gradients come from: one file an engine."""
