"""Where imports may point, room by room, and that nothing goes in a circle: this file is the place to read the arrows.

``docs/imports.py`` finds the imports (also those inside functions and for types alone) and prints them as a table.
"""

import subprocess
import sys
from pathlib import Path

import imports
import pytest

ROOT = Path(__file__).parents[2]
EVERYONE = {"errors", "processes", "signals"}
"""Files that every room may use: the one error a user's mistake raises, the processes of a torchrun, Ctrl-C and SIGTERM."""
ARROWS = {
    "errors": set(),
    "processes": set(),
    "signals": set(),
    "experiment": set(),
    "records": {"experiment"},
    "memory": set(),
    "model": {"experiment"},
    "data": {"experiment"},
    "training": {"experiment", "records", "model", "data"},
    "quality": {"experiment", "records", "model", "data", "training"},
    "report": {"experiment", "records"},
    "sweep": {"experiment", "records", "memory", "model", "data", "training", "quality", "report"},
    "doctor": {"experiment", "records", "model", "quality"},
    "cli": {"experiment", "records", "memory", "data", "training", "quality", "report", "sweep", "doctor"},
}
"""Room → the rooms it may import. Memory stands alone but for the error."""
FILES = imports.imports_of(ROOT)


@pytest.mark.parametrize("room", [*ARROWS, "pbbench"])
def test_imports_point_one_way(room):
    allowed = ARROWS.get(room, set()) | EVERYONE | {room, "pbbench"}
    for file, imported in FILES.items():
        if imports.room_of(file) == room:
            assert {imports.room_of(name) for name in imported} <= allowed, f"{file} imports {sorted(imported)}"


def test_no_arrow_is_left_over():
    used = {(imports.room_of(file), imports.room_of(name)) for file, imported in FILES.items() for name in imported}
    assert {(room, other) for room, others in ARROWS.items() for other in others} <= used


def test_every_room_has_its_arrows():
    assert {imports.room_of(file) for file in FILES if file.startswith("pbbench")} == {*ARROWS, "pbbench"}


def test_no_file_imports_itself_on_a_way_round():
    """Benchmarks and experiments included."""
    assert imports.circle(FILES) is None


def test_a_circle_is_found():
    assert imports.circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("pbbench", ("torch", "numpy", "pydantic")),
        ("pbbench.cli", ("torch", "pandas", "matplotlib", "diffusers", "accelerate")),
        ("pbbench.sweep.run", ("torch", "pandas", "matplotlib")),
        ("pbbench.report.pages.write", ("torch",)),
        ("pbbench.report.compare.runs", ("torch", "matplotlib")),
        ("pbbench.doctor.examine", ("torch", "pandas")),
        ("pbbench.memory.allocator", ("torch", "numpy")),
        ("pbbench.processes", ("torch",)),
        ("pbbench.memory.meters.phases", ("pbbench.model", "pbbench.experiment", "accelerate", "diffusers", "torchvision")),
    ],
)
def test_what_an_import_does_not_bring(module, unwanted):
    code = f"import sys, {module}; print([m for m in {unwanted!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
