"""How a measured phase ended: well, out of memory with what the allocator said, or failed for another reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from pbbench.errors import one_line
from pbbench.memory.meters.cuda import describe_out_of_memory


@dataclass(frozen=True)
class Ok:
    """The phase ran to its end."""

    status: ClassVar[str] = "ok"


@dataclass(frozen=True)
class OutOfMemory:
    """There was no memory left. Bytes are those the error names, as precise as its two decimals; None is what it does not say.

    source: allocator (torch's, on the GPU), cuda (the runtime, outside torch's allocator), library (cuBLAS, cuDNN...) or host
    (RAM). retries: how often the allocator has emptied its cache and tried again in this process.
    """

    status: ClassVar[str] = "out_of_memory"
    source: str
    requested: int | None
    free: int | None
    allocated: int | None
    reserved: int | None
    retries: int | None
    capacity: int | None
    process: int | None
    allowed: int | None
    message: str


@dataclass(frozen=True)
class Failed:
    """Anything else that ended the phase."""

    status: ClassVar[str] = "failed"
    type: str
    message: str


Outcome = Ok | OutOfMemory | Failed


def outcome_of(error: BaseException, cuda: Any = torch.cuda) -> OutOfMemory | Failed:
    """The outcome of a phase that this error ended."""
    memory = describe_out_of_memory(error, cuda)
    if memory is not None:
        return OutOfMemory(**memory)
    return Failed(type(error).__name__, one_line(error))
