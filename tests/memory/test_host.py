"""The process's resident peak: of a phase, of a phase within a phase, and where the mark cannot be reset."""

import subprocess
import sys
from pathlib import Path

import pytest

from pbbench.memory.meters import host
from pbbench.memory.meters.host import HostPeak

MiB = 2**20
linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc/self/clear_refs")


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    (tmp_path / "clear_refs").touch()
    return tmp_path


def mark(proc: Path, kib: int) -> None:
    (proc / "status").write_text(f"Name:\tpython\nVmPeak:\t  999999 kB\nVmHWM:\t  {kib} kB\nVmRSS:\t 5 kB\n")


def test_reads_the_mark_in_bytes_and_resets_it_first(proc: Path) -> None:
    mark(proc, 5000)
    phase = HostPeak(proc)
    phase.begin()
    assert (proc / "clear_refs").read_text() == "5"
    mark(proc, 700)
    assert phase.end() == {"peak_rss_bytes": 700 * 1024}


def test_an_inner_reset_keeps_the_outer_peak(proc: Path) -> None:
    mark(proc, 100)
    outer, inner = HostPeak(proc), HostPeak(proc)
    outer.begin()
    mark(proc, 900)
    inner.begin()
    mark(proc, 200)
    assert inner.end() == {"peak_rss_bytes": 200 * 1024}
    assert outer.end() == {"peak_rss_bytes": 900 * 1024}


def test_an_inner_peak_is_the_outer_ones_too(proc: Path) -> None:
    mark(proc, 100)
    outer, inner = HostPeak(proc), HostPeak(proc)
    outer.begin()
    inner.begin()
    mark(proc, 800)
    inner.end()
    mark(proc, 300)
    assert outer.end() == {"peak_rss_bytes": 800 * 1024}


def test_a_mark_that_cannot_be_reset_still_tells_a_new_peak(proc: Path) -> None:
    (proc / "clear_refs").unlink()
    (proc / "clear_refs").mkdir()  # writing fails, also for root
    mark(proc, 500)
    phase = HostPeak(proc)
    phase.begin()
    mark(proc, 600)
    assert phase.end() == {"peak_rss_bytes": 600 * 1024}
    phase = HostPeak(proc)
    phase.begin()
    reason = phase.end()["peak_rss_bytes"]
    assert "clear_refs" in reason
    assert str(600 * 1024) in reason


def test_without_proc_the_systems_own_peak_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource
    from types import SimpleNamespace

    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=300))
    phase = HostPeak(tmp_path / "none")
    monkeypatch.setattr(host.sys, "platform", "linux")
    phase.begin()
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=400))
    assert phase.end() == {"peak_rss_bytes": 400 * 1024}
    monkeypatch.setattr(host.sys, "platform", "darwin")
    phase = HostPeak(tmp_path / "none")
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=1))
    phase.begin()
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=4000))
    assert phase.end() == {"peak_rss_bytes": 4000}


def test_a_system_without_any_peak_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)  # importing it now raises ImportError, as on Windows
    phase = HostPeak(tmp_path / "none")
    phase.begin()
    reason = phase.end()["peak_rss_bytes"]
    assert "no peak resident memory" in reason


@linux
def test_a_block_of_known_size_in_a_fresh_process() -> None:
    """64 MiB inside a phase, after 256 MiB had come and gone before it."""
    code = """
import mmap
from pbbench.memory.meters.host import HostPeak
def fill(size):
    block = mmap.mmap(-1, size)
    for position in range(0, size, 4096):
        block[position] = 1
    block.close()
fill(256 * 2**20)
empty = HostPeak(); empty.begin(); base = empty.end()["peak_rss_bytes"]
full = HostPeak(); full.begin(); fill(64 * 2**20); peak = full.end()["peak_rss_bytes"]
print(peak - base)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert abs(int(done.stdout) - 64 * MiB) <= 4 * MiB
