"""The commands of ``python -m pipeline``: one module each, with ``add_parser`` and ``run``."""
