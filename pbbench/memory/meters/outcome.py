"""How a measured phase ended: well, out of memory with what the error says of it, or failed for another reason."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch

from pbbench.errors import one_line
from pbbench.memory.meters.cuda import RETRIES

_UNITS = {"bytes": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_AMOUNT = r"([\d.]+) (bytes|KiB|MiB|GiB)"
_FIGURES = {
    "requested": re.compile(rf"(?:Tried to allocate|Requested size:) {_AMOUNT}"),
    "capacity": re.compile(rf"total capacity of {_AMOUNT}"),
    "free": re.compile(rf"of which {_AMOUNT} is free"),
    "process": re.compile(rf"this process has {_AMOUNT} memory in use"),
    "allocated": re.compile(rf"{_AMOUNT} is allocated by PyTorch"),
    "cached": re.compile(rf"{_AMOUNT} is reserved by PyTorch but unallocated"),
    "allowed": re.compile(rf"{_AMOUNT} allowed"),
}
_HOST = re.compile(r"DefaultCPUAllocator: (?:can't allocate memory: you tried to allocate (\d+) bytes|not enough memory)")
_LIBRARY = re.compile(
    r"(CUBLAS|CUDNN|CUSOLVER|CUSPARSE|CUFFT)_STATUS_ALLOC_FAILED|CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION"
)


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
    capacity: int | None
    free: int | None
    process: int | None
    allocated: int | None
    allowed: int | None
    reserved: int | None
    retries: int | None
    message: str


@dataclass(frozen=True)
class Failed:
    """Anything else that ended the phase."""

    status: ClassVar[str] = "failed"
    type: str
    message: str


Outcome = Ok | OutOfMemory | Failed


def outcome_of(error: BaseException, cuda: Any = torch.cuda) -> OutOfMemory | Failed:
    """The outcome of a phase that this error ended. Out of memory may stand behind it, as its cause."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        source = _source(link)
        if source is not None:
            return _out_of_memory(source, str(link), cuda)
        link = link.__cause__ or link.__context__
    return Failed(type(error).__name__, one_line(error))


def describe_out_of_memory(error: BaseException, cuda: Any = torch.cuda) -> dict[str, Any] | None:
    """The fields of ``OutOfMemory`` where an error says that there was no memory left; None where it is something else."""
    outcome = outcome_of(error, cuda)
    return asdict(outcome) if isinstance(outcome, OutOfMemory) else None


def _source(error: BaseException) -> str | None:
    """Whose memory has run out; None where it has not."""
    message = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "allocator"
    if isinstance(error, MemoryError) or _HOST.search(message):
        return "host"
    if _LIBRARY.search(message):
        return "library"
    return "cuda" if re.search("CUDA (driver )?error: out of memory", message) else None


def _out_of_memory(source: str, message: str, cuda: Any) -> OutOfMemory:
    figures = {name: _bytes(pattern.search(message)) for name, pattern in _FIGURES.items()}
    if source == "host" and (host := _HOST.search(message)):
        figures["requested"] = int(host[1]) if host[1] else None
    cached, allocated = figures.pop("cached"), figures["allocated"]
    reserved = allocated + cached if allocated is not None and cached is not None else None
    retries = None
    if source != "host" and cuda.is_available() and cuda.is_initialized():
        with suppress(RuntimeError):  # after a CUDA error every later call fails
            retries = cuda.memory_stats().get(RETRIES)
    return OutOfMemory(source, **figures, reserved=reserved, retries=retries, message=" ".join(message.split())[:500])


def _bytes(match: re.Match[str] | None) -> int | None:
    return round(float(match[1]) * _UNITS[match[2]]) if match else None
