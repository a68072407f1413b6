"""Errors that a user can act on: what is wrong, the value, what was expected, the fix."""


class PipelineError(Exception):
    """Root of every error the pipeline raises on purpose; the command line prints it as one line and exits 2.

    Subclasses carry one message string only, so that they survive pickling between Ray workers.
    """


class ConfigError(PipelineError):
    """An option or a config field has a value that cannot be used."""


class SourceError(PipelineError):
    """The input is missing, is not what its source expects, or is damaged."""


class PictureError(PipelineError):
    """One picture cannot be decoded or is refused; it goes to the quarantine list with this message as reason."""


class DatasetError(PipelineError):
    """A data set folder is missing, incomplete, or does not match its manifest."""


class OutputError(PipelineError):
    """The output folder is in use, holds something else, or cannot be written."""
