"""What compiled kernels do, whatever they are written in, and for which tensors."""

import ctypes
from typing import Protocol

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}  # as by_type() in kernels.cpp numbers them
SIZES, BETA = (3, 5, 7), 0.75  # of the response normalization; the paper's are 5 and 0.75
Factors = tuple[float, float, float]  # momentum, weight decay times rate, rate


class Norm(ctypes.Structure):
    """``struct Norm`` of ``kernels.cpp``."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("maps", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("alpha", ctypes.c_double),
        ("k", ctypes.c_double),
        ("rectify", ctypes.c_bool),
    )


class Kernels(Protocol):
    """What compiled kernels do, in C++ or in Triton."""

    def norm_forward(self, x: Tensor, norm: Norm) -> Tensor:
        """The normalized maps, like x, which is dense: ``norm.rows`` rows of ``norm.maps`` maps."""

    def norm_backward(self, x: Tensor, gradient: Tensor, norm: Norm) -> Tensor:
        """The gradient to x; ``gradient`` has x's dtype and strides."""

    def update(self, w: Tensor, v: Tensor, g: Tensor, factors: Factors, guard: Tensor | None) -> None:
        """``v = momentum v - decay w - rate g; w = w + v`` in place, of dense tensors of one dtype and layout.

        Args:
            w: weights.
            v: velocity.
            g: gradient.
            factors: momentum, decay times rate, rate.
            guard: a scalar on the same device; where it is 0, nothing is done.
        """
