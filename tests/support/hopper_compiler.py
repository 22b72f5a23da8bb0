"""Triton's launches compiled for Hopper instead of run: needs no GPU and no driver, only Triton's own ptxas.

Kernels are specialised exactly as a launch would (steps of 1, multiples of 16, absent tensors), which the interpreter does not
do, and the compiler refuses what the interpreter accepts.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class Compiled:
    name: str
    constants: dict[str, int]
    programs: int
    ptx: str
    cubin: bytes

    @property
    def vectors(self) -> set[int]:
        """Bytes that a thread loads from global memory at a time."""
        found = re.findall(r"ld\.global[\w.:]*?(?:\.v(\d))?\.b(\d+)", self.ptx)
        return {int(count or 1) * int(bits) // 8 for count, bits in found}


class _Hopper:
    """What Triton asks its driver for before it compiles."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiled_for_hopper(cache: Path) -> Iterator[list[Compiled]]:
    """Within it launches are compiled and noted, each version of a kernel once, and none runs. ``cache``: an empty folder."""
    from triton import knobs
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    found: dict[str, Compiled] = {}

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **constants: Any) -> Any:
        kernel = launched(self, *args, grid=grid, warmup=True, **constants)
        ptx = kernel.asm["ptx"]
        found.setdefault(
            kernel.hash, Compiled(f"{self.fn.__module__}.{self.__name__}", constants, grid[0], ptx, kernel.asm["cubin"])
        )
        notes[:] = found.values()
        return kernel

    notes: list[Compiled] = []
    launched = JITFunction.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knobs.cache, "dir", str(cache))
        patch.setattr(JITFunction, "run", run)
        patch.setattr(driver, "_active", _Hopper())
        yield notes


def resources(kernel: Compiled, folder: Path) -> dict[str, int]:
    """Registers a thread (REG), bytes of its stack (STACK: what did not fit the registers), of shared memory (SHARED)."""
    import triton

    path = folder / "kernel.cubin"
    path.write_bytes(kernel.cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    said = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED):(\d+)", said)}
