"""Custody: what the data were, and whether they still are."""
