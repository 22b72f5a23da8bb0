"""Imports point one way (cli → sweep → training, quality, memory → model → config; report → records only), and stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "pbbench"
SETTINGS = {"config", "settings", "sweep_settings", "variants"}
BASE = SETTINGS | {"errors", "sizes", "records", "environment", "options", "processes"}
MAY_IMPORT = {
    "errors": set(),
    "variants": set(),
    "settings": set(),
    "sizes": {"errors"},
    "sweep_settings": {"settings", "sizes", "variants"},
    "config": SETTINGS | {"errors"},
    "records": {"errors"},
    "processes": set(),
    "options": {"errors", "sizes", "processes", "memory"},
    "environment": {"errors"},
    "model": {"errors", "config", "settings"},
    "memory": {"errors"},
    "training": {"errors", "config", "settings", "records", "processes", "model"},
    "quality": {"errors", "config", "records", "processes", "model"},
    "report": {"errors", "records"},
    "sweep": BASE | {"model", "memory", "training", "quality", "report"},
    "checks": {"errors", "records", "quality"},
    "doctor": BASE | {"checks"},
    "cli": BASE | {"sweep", "training", "report", "doctor"},
}


def rooms_imported(file: Path) -> set[str]:
    """The rooms of pbbench that a file imports anywhere, also inside its functions."""
    rooms = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name} has a relative import"
            names = [f"pbbench.{a.name}" for a in node.names] if node.module == "pbbench" else [node.module or ""]
        rooms |= {name.split(".")[1] for name in names if name.startswith("pbbench.")}
    return rooms


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_one_way(file):
    room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room == "__init__":
        assert rooms_imported(file) == set()
        return
    allowed = MAY_IMPORT[room] | {room, "__version__"}
    assert rooms_imported(file) <= allowed, f"{file} reaches into {rooms_imported(file) - allowed}"


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("pbbench", ("torch", "numpy", "pydantic")),
        ("pbbench.cli", ("torch", "pandas", "matplotlib", "diffusers", "accelerate")),
        ("pbbench.sweep.run", ("torch", "pandas", "matplotlib")),
        ("pbbench.report.write", ("torch",)),
        ("pbbench.report.compare", ("torch", "matplotlib")),
        ("pbbench.doctor", ("torch", "pandas")),
        ("pbbench.memory.allocator", ("torch", "numpy")),
        ("pbbench.processes", ("torch",)),
        ("pbbench.memory.meter", ("pbbench.model", "pbbench.config", "accelerate", "diffusers", "torchvision")),
    ],
)
def test_what_an_import_does_not_bring(module, unwanted):
    code = f"import sys, {module}; print([m for m in {unwanted!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
