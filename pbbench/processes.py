"""The processes of a torchrun that share work out by the image: which one this is, how they meet, and who speaks.

Training has accelerate for its gradients; sampling and scoring need no more than a rank, a barrier and a way to bring rows
together, and so no GPU library beside gloo. Importing this imports no torch: the command line asks here who may print.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PATIENCE = timedelta(days=7)
"""How long processes wait for each other: one may have a batch of images more to draw. One that dies ends the wait at once,
for its connections close, and torchrun ends the others."""
TOLD_WITHIN = timedelta(seconds=10)
"""How long a process that may not speak stays, lest its end be the end of the one that does."""


_groups = itertools.count()


@dataclass(frozen=True)
class Processes:
    """This process's number among all."""

    rank: int = 0
    count: int = 1

    def share(self, num_images: int, batch_size: int) -> range:
        """This process's images of 0 … ``num_images`` − 1: a run of whole batches, those that one process would make."""
        batches = -(-num_images // batch_size)
        first, end = (batches * rank // self.count for rank in (self.rank, self.rank + 1))
        return range(first * batch_size, min(end * batch_size, num_images))

    def wait_for_all(self) -> None:
        """Returns once every process has come here."""
        if self.count > 1:
            import torch.distributed

            torch.distributed.barrier()

    def any_of_all(self, flag: bool) -> bool:
        """Whether ``flag`` is true in any process; every process has to come here."""
        if self.count == 1:
            return flag
        import torch.distributed

        flags = torch.tensor(int(flag))
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        return bool(flags)

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """In process 0 the rows (N, D, on the CPU) of all processes, in the order of their numbers; in the others none."""
        if self.count == 1:
            return rows
        import torch.distributed

        counts = torch.zeros(self.count, dtype=torch.int64)
        counts[self.rank] = len(rows)
        torch.distributed.all_reduce(counts)
        if self.rank > 0:
            if len(rows):
                torch.distributed.send(rows, 0)
            return rows[:0]
        whole = rows.new_empty(int(counts.sum()), *rows.shape[1:])
        parts = whole.split(counts.tolist())
        parts[0].copy_(rows)
        for source, part in enumerate(parts[1:], start=1):
            if len(part):
                torch.distributed.recv(part, source)
        return whole

    @contextmanager
    def first_here_first(self) -> Iterator[None]:
        """The first process of each machine does what is inside, then the others, who find it done (a download, say)."""
        first_here = self.count == 1 or os.environ.get("LOCAL_RANK", "0") == "0"
        if not first_here:
            self.wait_for_all()
        yield
        if first_here:
            self.wait_for_all()

    def device(self, name: str) -> torch.device:
        """ "cuda" as this process's own GPU of its machine."""
        import torch

        on_gpu = name == "cuda" and self.count > 1
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device(name)


def is_main_process() -> bool:
    """Whether this process prints what all have done: the only one, or the first of a torchrun."""
    return os.environ.get("RANK", "0") == "0"


def world_size() -> int:
    """The processes of the torchrun this one belongs to; 1 where there is none."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined_processes() -> Iterator[Processes]:
    """Join the processes of the torchrun this one belongs to; alone where there is none."""
    count = world_size()
    if count == 1:
        yield Processes()
        return
    import torch.distributed as dist

    # Addresses are exchanged through the store, which outlives the group: one that is joined later must not meet the old ones.
    store, rank, count = next(iter(dist.rendezvous("env://")))
    store = dist.PrefixStore(f"pbbench/group {next(_groups)}", store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=PATIENCE)
    try:
        with failing_in_turn():
            yield Processes(rank, count)
    finally:
        dist.destroy_process_group()


@contextmanager
def failing_in_turn() -> Iterator[None]:
    """Around work that processes do together: note who failed first before the connections close, for what the others then
    complain of is only that."""
    try:
        yield
    except Exception:
        _failed_first()
        raise


@contextmanager
def telling_a_failure() -> Iterator[bool]:
    """Whether this process is to say why it failed: of a torchrun's processes the first that did, so that a mistake that all
    meet is told once, and one that a single process meets is told at all. The others stay until it has spoken."""
    first = _failed_first()
    try:
        yield first
    finally:
        store = _store()
        with contextlib.suppress(RuntimeError):  # too late, or torchrun has ended
            if store is not None and first:
                store.set(_key("told"), "yes")
            elif store is not None:
                store.wait([_key("told")], TOLD_WITHIN)


def _failed_first() -> bool:
    return _claimed(_key("failed"))


@cache
def _claimed(key: str) -> bool:
    """True without torchrun's store to agree by: a line too many is better than none."""
    with contextlib.suppress(RuntimeError):  # torchrun has ended
        store = _store()
        return store is None or store.add(key, 1) == 1
    return True


def _key(what: str) -> str:
    return f"pbbench/{what}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _store() -> Any:
    """The store that torchrun keeps for its processes (accelerate launch starts them by torchrun); None without it."""
    if world_size() == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    return _connected(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))


@cache
def _connected(address: str, port: int) -> Any:
    from torch.distributed import TCPStore

    try:
        return TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=TOLD_WITHIN)
    except RuntimeError:
        return None
