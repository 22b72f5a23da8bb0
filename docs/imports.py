"""The rooms of pbbench and the imports between them, found in the source, as the tables of architecture.md.

``python docs/imports.py`` prints the imports, with each room's files and lines; ``--write`` puts both tables into the page.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
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


def arrows(files: Mapping[str, set[str]]) -> Counter[tuple[str, str]]:
    """(room, another room) → how many of the first one's imports are of the other's files."""
    pairs = Counter((room_of(one), room_of(other)) for one, found in files.items() for other in found)
    return Counter(
        {pair: count for pair, count in pairs.items() if pair[0] != pair[1] and not {"pbbench", "scripts"} & set(pair)}
    )


def imports_table(files: Mapping[str, set[str]], sizes: bool = False) -> str:
    """Markdown: a line per room, a column per room that others import; each room stands after all that it imports, so that
    nothing can stand right of the diagonal. ``sizes``: with files and lines.
    """
    counts = arrows(files)
    needs = {room: sorted(to for one, to in counts if one == room) for room in sorted({room_of(name) for name in files})}
    order = [room for room in TopologicalSorter(needs).static_order() if room not in ("pbbench", "scripts")]
    columns = [room for room in order if any(to == room for _, to in counts)]
    head = ["room", *(("files", "lines") if sizes else ()), *columns]
    rows = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for room in order:
        cells = [room, *(size_of(room) if sizes else ()), *(str(counts[room, to] or "") for to in columns)]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def size_of(room: str) -> tuple[str, str]:
    """Files and lines."""
    place = ROOT / "pbbench" / room
    paths = list(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    return str(len(paths)), f"{sum(len(path.read_text(encoding='utf-8').splitlines()) for path in paths):,}"


def rooms_table() -> str:
    """Markdown: every folder of the package with the first line of its ``__init__.py``, rooms within rooms below theirs."""
    rows = ["| room | what it is for |", "|---|---|"]
    for init in sorted((ROOT / "pbbench").rglob("*/__init__.py")):
        says = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) or ""
        rows.append(f"| `{init.parent.relative_to(ROOT)}` | {says.splitlines()[0].rstrip('.')} |")
    return "\n".join(rows)


def up_to_date(page: str) -> str:
    """The page with today's tables between their markers."""
    for name, text in (("rooms", rooms_table()), ("imports", imports_table(imports_of(ROOT)))):
        begin, end = f"<!-- {name}: python docs/imports.py --write -->", f"<!-- end of {name} -->"
        before, _, rest = page.partition(begin)
        _, found, after = rest.partition(end)
        assert found, f"the page has no {begin} … {end}"
        page = f"{before}{begin}\n\n{text}\n\n{end}{after}"
    return page


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(up_to_date(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(imports_table(imports_of(ROOT), sizes=True))
