"""The processes of a torchrun that share work out by the image: which one this is, and a place where all of them meet.

Training has accelerate for this; sampling needs no more than a rank and a barrier, and so no GPU library beside gloo.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed


@dataclass(frozen=True)
class Processes:
    """This process's number among all."""

    rank: int = 0
    count: int = 1

    def wait_for_all(self) -> None:
        """Returns once every process has come here."""
        if self.count > 1:
            torch.distributed.barrier()

    def device(self, name: str) -> torch.device:
        """ "cuda" as this process's own GPU of its machine."""
        on_gpu = name == "cuda" and self.count > 1
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device(name)


@contextmanager
def joined_processes() -> Iterator[Processes]:
    """Join the processes of the torchrun this one belongs to; alone where there is none."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes()
        return
    torch.distributed.init_process_group("gloo")
    try:
        yield Processes(torch.distributed.get_rank(), count)
    finally:
        torch.distributed.destroy_process_group()
