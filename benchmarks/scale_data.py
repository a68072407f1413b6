"""Rows of ``scale.py``: preparing, opening and loading data."""

from growth import Operation

OPERATIONS: list[Operation] = []
