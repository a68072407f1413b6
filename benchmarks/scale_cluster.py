"""Rows of ``scale.py``: the cluster's commands, against a dashboard that is played here."""

from growth import Operation

OPERATIONS: list[Operation] = []
