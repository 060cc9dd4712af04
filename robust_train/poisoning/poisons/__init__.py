"""Simulated poisons, for measuring only: one file each, a pure function first, then a frozen dataclass."""
