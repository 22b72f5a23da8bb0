"""Whether a map goes through the fused operators or through aten."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""float64, which is for tests, has aten alone."""

_asked: list[bool] = []
"""What ``everywhere`` and ``nowhere`` ask for, innermost last. Not kept by thread: backward on a GPU has one of its own."""


def usable(x: Tensor) -> bool:
    """Do the operators take this map? Yes for a GPU's where Triton works, no for a CPU's; the contexts below override it."""
    if x.dtype not in DTYPES:
        return False
    if _asked:
        return _asked[-1]
    return x.is_cuda and _triton_is_here() and (isinstance(x, FakeTensor) or _works_on(x.device))


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


@cache
def _works_on(device: torch.device) -> bool:
    """Launches a kernel there once: Triton supports cards from Ampere on, and needs a C compiler to make its launcher."""
    from pbbench.model.kernels.softmax import softmax_heads

    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        with _disable_current_modes():
            softmax_heads(torch.zeros(1, 4, 1, 1, device=device), 4, 1.0)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the reason, aten does it too
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        warnings.warn(f"Triton does not work on {device}, so steps take aten's kernels and longer: {reason}", stacklevel=2)
        return False
    return True
