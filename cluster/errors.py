"""Errors that a user can act on."""


class ClusterError(Exception):
    """Anything that keeps a command from doing its work; the command line prints it as one line and exits 2."""
