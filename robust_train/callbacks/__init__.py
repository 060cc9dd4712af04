"""Callbacks: the only part of the package that knows Lightning. They wire events to the pure functions of the rooms."""
