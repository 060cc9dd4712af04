"""Filters: one file each; what a filter sees and returns is in base.py."""
