"""The one exception a user's mistake raises: what is wrong, where, and what to do, in one line.

The command line prints it and exits with code 2; a library user can catch it as a ``ValueError``. A disk that is full or
read-only is told in the same way, under a class of its own: a sweep stops there instead of failing cell after cell.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Any


class InputError(ValueError):
    """Bad input (a file, an option, a setting). The message is one line and names a remedy."""


def one_line(error: BaseException) -> str:
    """The error's message folded to a single line, headed by its class where it says nothing itself."""
    text = " ".join(str(error).split())
    return text or type(error).__name__


class StorageError(InputError):
    """A file could not be written. What was written before is whole, so the work can go on once there is room."""


def _no_room(error: BaseException) -> bool:
    """Disk or quota full; safetensors says so in words only."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)


def is_storage_failure(error: BaseException) -> bool:
    """Whether an error says that the disk, and not the program, is at fault."""
    return isinstance(error, StorageError) or _no_room(error) or getattr(error, "errno", None) == errno.EROFS


@contextmanager
def writing_to(path: str | PathLike[str], *kinds: type[Exception]) -> Iterator[None]:
    """Turn what the system raises while ``path`` is written (OSError, and ``kinds``) into a StorageError of one line."""
    caught: Any = (OSError, *kinds)
    try:
        yield
    except caught as error:
        remedy = "make room, then go on (a sweep or a training with --resume)" if _no_room(error) else "choose another folder"
        raise StorageError(f"cannot write to {path} ({one_line(error)[:150]}); {remedy}") from None
