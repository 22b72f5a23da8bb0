"""The numbers that torch's CUDA caching allocator works with, and the settings that change them.

They are those of the native backend from torch 2.11 to 2.15 (``c10/core/AllocatorConfig.h``), which differ only in the
settings they know. A setting that would change the result and is not modelled is refused by name: a replay that ignored it
would be wrong without saying so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from pbbench.errors import InputError

MIB = 2**20
_SETTINGS_SINCE = {
    (2, 11): frozenset({"backend", "expandable_segments", "max_split_size_mb", "max_non_split_rounding_mb"}),
    (2, 15): frozenset({"large_segment_size_mb"}),
}
"""Modelled settings by the first torch version in which they are modelled; a later version has those of the earlier ones."""
WITHOUT_EFFECT = {
    "pinned_use_background_threads",
    "pinned_use_cuda_host_register",
    "pinned_num_register_threads",
    "pinned_reserve_segment_size_mb",
    "release_lock_on_cudamalloc",
}
"""Settings of host memory and of locks: they move no byte on the device."""


@dataclass(frozen=True)
class AllocatorSettings:
    """Bytes everywhere. ``AllocatorSettings()`` is what torch does when nothing is set."""

    expandable_segments: bool = False
    max_split_bytes: int | None = None
    """Blocks of this size and above are not split and serve only requests of this size and above; None: no such limit."""
    max_non_split_rounding_bytes: int = 20 * MIB
    """By how much (less one byte) a block may exceed a request of ``max_split_bytes`` or more that it serves whole."""
    large_segment_bytes: int = 20 * MIB
    """A new segment for a request above ``small_request_bytes`` and below ``min_large_bytes``; large expandable pages."""
    small_segment_bytes: int = 2 * MIB
    """A new segment for a request up to ``small_request_bytes``; the pages of small expandable segments."""
    round_bytes: int = 512
    small_request_bytes: int = 1 * MIB
    min_large_bytes: int = 10 * MIB
    round_large_bytes: int = 2 * MIB

    @classmethod
    def parse(cls, text: str = "", torch_version: str | None = None) -> AllocatorSettings:
        """What PYTORCH_ALLOC_CONF (or PYTORCH_CUDA_ALLOC_CONF) says, as torch of that version reads it (None: the newest).

        Raises InputError for what is not modelled, each setting by its name, and for values torch would refuse.
        """
        known = _known_settings(torch_version)
        pairs = _pairs(text)
        unmodelled = [f"{key}:{value}" for key, value in pairs if key not in known | WITHOUT_EFFECT]
        unmodelled += [f"{key}:{value}" for key, value in pairs if key == "backend" and value != "native"]
        if unmodelled:
            raise InputError(
                f"the replay of torch's allocator does not model {', '.join(unmodelled)}; "
                f"it models {', '.join(sorted(known))}: remove the others from PYTORCH_ALLOC_CONF"
            )
        settings = cls()
        for key, value in pairs:
            settings = settings._with(key, value)
        return settings

    def _with(self, key: str, value: str) -> AllocatorSettings:
        if key == "expandable_segments":
            if value not in ("True", "False"):
                raise InputError(f"expandable_segments must be True or False, not {value!r}")
            return replace(self, expandable_segments=value == "True")
        least = {
            "large_segment_size_mb": self.min_large_bytes + MIB,
            "max_split_size_mb": self.large_segment_bytes,  # a larger large_segment_size_mb before it raises its minimum
            "max_non_split_rounding_mb": self.large_segment_bytes,
        }.get(key)
        if least is None:
            return self
        if not value.isascii() or not value.isdigit() or int(value) * MIB < least:
            raise InputError(f"{key} must be a whole number of at least {least // MIB} (MiB), not {value!r}")
        field = key.removesuffix("_mb").removesuffix("_size") + "_bytes"
        changes: dict[str, Any] = {field: int(value) * MIB}
        return replace(self, **changes)

    def rounded(self, requested_bytes: int) -> int:
        """The size of the block that a request is looked for: whole units of 512 bytes."""
        return -(-requested_bytes // self.round_bytes) * self.round_bytes

    def segment_bytes(self, size: int) -> int:
        """The size of the segment that is taken from the driver where no free block fits (not expandable)."""
        if size <= self.small_request_bytes:
            return self.small_segment_bytes
        if size < self.min_large_bytes:
            return self.large_segment_bytes
        return -(-size // self.round_large_bytes) * self.round_large_bytes

    def splits(self, block_bytes: int, size: int, *, small: bool) -> bool:
        """Whether a block that serves a request of ``size`` gives its remainder back to the pool."""
        if small or self.expandable_segments:
            return block_bytes - size >= self.round_bytes
        return block_bytes - size > self.small_request_bytes and (self.max_split_bytes is None or size < self.max_split_bytes)


def _known_settings(torch_version: str | None) -> frozenset[str]:
    if torch_version is None:
        return frozenset().union(*_SETTINGS_SINCE.values())
    try:
        major, minor = (int(part) for part in torch_version.split(".")[:2])
    except ValueError:
        raise InputError(f"{torch_version!r} is not a version of torch; give it as in 2.15.0") from None
    if (major, minor) < min(_SETTINGS_SINCE):
        oldest = ".".join(map(str, min(_SETTINGS_SINCE)))
        raise InputError(f"the allocator of torch {torch_version} is not modelled; use torch {oldest} or later")
    return frozenset().union(*(names for since, names in _SETTINGS_SINCE.items() if since <= (major, minor)))


def _pairs(text: str) -> list[tuple[str, str]]:
    """``key:value`` parts, separated by commas; a value in brackets may hold commas and colons. White space is ignored."""
    pairs: list[tuple[str, str]] = []
    rest = "".join(text.split())
    while rest:
        key, colon, rest = rest.partition(":")
        if rest.startswith("["):
            inside, bracket, rest = rest.partition("]")
            value, comma, rest = inside + bracket, rest[:1], rest[1:]
            complete = bool(bracket) and comma in ("", ",")
        else:
            value, _, rest = rest.partition(",")
            complete = bool(value)
        if not (key and colon and complete):
            raise InputError(f"cannot read the allocator settings {text!r}; write them as key:value,key:value")
        pairs.append((key, value))
    return pairs
