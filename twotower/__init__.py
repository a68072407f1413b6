"""What pipeline, trainer and cluster share: the version, how much a command says, and how a setting is declared."""

__version__ = "0.1.0"
