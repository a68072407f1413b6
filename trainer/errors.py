"""Errors that a user can act on: what is wrong, the value, what was expected, the fix."""


class TrainerError(Exception):
    """Root of every error the trainer raises on purpose; the command line prints one line and exits with ``status``."""

    status = 2  # it would come again


class RecipeError(TrainerError):
    """A recipe has an unknown field or a value that cannot be used."""


class RunError(TrainerError):
    """A run folder is missing, in use, incomplete, or belongs to another recipe."""


class CheckpointError(TrainerError):
    """A checkpoint is missing, truncated, or does not fit the network."""


class DamagedError(CheckpointError):
    """A checkpoint's file is missing, truncated or changed; one that cannot be read is not called so."""


class DivergedError(TrainerError):
    """The loss or a gradient is not finite; the update was not applied."""


class PeerError(TrainerError):
    """Another process has ended, or is not doing the same work (batch, recipe, version)."""


class LostError(PeerError):
    """Another process is gone, without a word: the run can be tried again from its last checkpoint."""

    status = 4


class ExportError(TrainerError):
    """Weights cannot be written to, or taken from, a file of the merged layout."""


class BenchError(TrainerError):
    """A benchmark's options contradict each other, or a result of one cannot be read or written."""
