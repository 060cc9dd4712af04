"""Attacks: one file each, a pure function first, then the frozen dataclass that holds its settings."""
