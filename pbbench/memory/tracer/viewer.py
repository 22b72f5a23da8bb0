"""PyTorch's own memory snapshot of a block of code, for its viewer (https://pytorch.org/memory_viz).

The file is a pickle that torch writes. It is written here and never read: nothing of pbbench opens one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

MAX_ENTRIES = 100_000
"""Allocations and frees that torch keeps, the newest; a training step of the paper's network makes some 10,000 a chunk."""


@contextmanager
def memory_snapshot(path: Path, *, cuda: Any = torch.cuda) -> Iterator[None]:
    """Record what torch's CUDA allocator does in the block, with the Python stack of each call, and write it to ``path``.

    Also where the block fails, because that is when it is wanted; whole or not at all. A recording that someone else has
    started ends with the block: torch knows one at a time. ``cuda``: a stand-in for torch.cuda, for tests.
    """
    cuda.memory._record_memory_history(stacks="python", max_entries=MAX_ENTRIES)
    try:
        yield
    finally:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            cuda.memory._dump_snapshot(str(aside))
            os.replace(aside, path)
        finally:
            cuda.memory._record_memory_history(enabled=None)
            aside.unlink(missing_ok=True)
