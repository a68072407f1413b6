"""Errors that a user can act on, and text of others made fit for one line."""


class ClusterError(Exception):
    """Anything that keeps a command from doing its work. The command line prints it as one line and exits 2."""


def last_line(text: str, nothing: str = "no reason given") -> str:
    """The last line of `text` that says something, at most 300 characters; `nothing` if there is none.

    The reason is the last line of a traceback, and Ray puts a full stop on a line of its own behind it.
    """
    lines = [line.strip() for line in text.splitlines() if any(map(str.isalnum, line))]
    return lines[-1][:300] if lines else nothing
