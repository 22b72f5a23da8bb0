"""The imports between pbbench's rooms, found in the source: ``python docs/imports.py`` prints the table of architecture.md."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("pbbench", "benchmarks", "experiments")


def imports_of(root: Path) -> dict[str, set[str]]:
    """Every module of the repository (dotted, as it is imported) → those of them that it imports, wherever in the file."""
    files: dict[str, Path] = {}
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            name = ".".join(path.relative_to(root).with_suffix("").parts) if folder == "pbbench" else path.stem
            files[name.removesuffix(".__init__")] = path
    return {name: _imported(path, set(files)) - {name} for name, path in files.items()}


def room_of(module: str) -> str:
    """``pbbench.memory.meters.nvml`` → memory; the package itself → pbbench; a script outside it → scripts."""
    package, _, rest = module.partition(".")
    return "scripts" if package != "pbbench" else rest.partition(".")[0] or package


def circle(files: Mapping[str, set[str]]) -> list[str] | None:
    """One way round on which a module imports itself; None where there is none."""
    try:
        TopologicalSorter(files).prepare()
    except CycleError as error:
        return list(reversed(error.args[1]))
    return None


def _imported(path: Path, known: set[str]) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else str(node.module) for name in names}
    return found & known


def table(files: Mapping[str, set[str]]) -> str:
    """Markdown: a line per room, files, lines, and the rooms it imports with the number of import statements' targets."""
    rooms = sorted({room_of(name) for name in files} - {"pbbench", "scripts"})
    counts = Counter((room_of(a), room_of(b)) for a, found in files.items() for b in found)
    rows = ["| room | files | lines | imports (files of the other room that are read) |", "|---|---:|---:|---|"]
    for room in rooms:
        place = ROOT / "pbbench" / room
        paths = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
        lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)
        to = ", ".join(f"{other} {counts[room, other]}" for other in rooms if other != room and counts[room, other])
        rows.append(f"| {room} | {len(paths)} | {lines:,} | {to or '–'} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table(imports_of(ROOT)))
