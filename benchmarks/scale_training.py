"""Rows of ``scale.py``: a run's steps, evaluation, report and predictions."""

from growth import Operation

OPERATIONS: list[Operation] = []
