"""Whether a map goes through the fused operators or through aten."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""float64, which is for tests, has aten alone."""

_asked: list[bool] = []
"""What ``everywhere`` and ``nowhere`` ask for, innermost last. Not kept by thread: backward on a GPU has one of its own."""


def usable(x: Tensor) -> bool:
    """Do the operators take this map? Yes for a GPU's where there is Triton, no for a CPU's; the contexts below override it."""
    if x.dtype not in DTYPES:
        return False
    return _asked[-1] if _asked else x.is_cuda and _triton_is_here()


@contextmanager
def everywhere() -> Iterator[None]:
    """Within it the operators take maps on every device: fake ones, to predict and to count what a GPU would do, and a CPU's in
    Triton's interpreter (TRITON_INTERPRET=1, set before Triton is imported)."""
    with _asking(True):
        yield


@contextmanager
def nowhere() -> Iterator[None]:
    """Within it everything is aten's."""
    with _asking(False):
        yield


@contextmanager
def _asking(answer: bool) -> Iterator[None]:
    _asked.append(answer)
    try:
        yield
    finally:
        _asked.pop()


@cache
def _triton_is_here() -> bool:
    return importlib.util.find_spec("triton") is not None
