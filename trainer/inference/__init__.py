"""What is done with a trained net: predict, features, neighbours, export, import; and :func:`load`, for Python.

``load`` and the types that it gives are the stable part: see ``docs/python.md``.
"""

import typing

if typing.TYPE_CHECKING:
    from trainer.inference.trained_net import ClassShare, FeatureRow, InputRule, Picture, Prediction, TrainedNet, load

__all__ = ["ClassShare", "FeatureRow", "InputRule", "Picture", "Prediction", "TrainedNet", "load"]


def __getattr__(name: str) -> object:
    """Imports torch only where a name is asked for: a command that only looks at its options needs none."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from trainer.inference import trained_net

    return getattr(trained_net, name)
