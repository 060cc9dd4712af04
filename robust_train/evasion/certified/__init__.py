"""Robustness that is proved: bounds of what a network can say within a ball, and randomized smoothing."""
