"""Inputs that nobody meant, for everything that reads what a stranger may have made: ``python -m tests.fuzz``.

Each module here has ``TARGETS``, and a line in :data:`MODULES`.
"""

MODULES = ("tests.fuzz.data_sets", "tests.fuzz.images", "tests.fuzz.runs")
