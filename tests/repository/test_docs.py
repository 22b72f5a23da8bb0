"""What people read keeps its word: every path, every test and every name in a file that a page points to exists; tables made
by a command are today's."""

import ast
import re
from functools import cache
from pathlib import Path

import imports
import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "results").glob("*/README.md")),
]
PATH = re.compile(r"(?<![\w/.<-])(?:pbbench|tests|docs|benchmarks|experiments|notebooks|\.ci)/[\w./-]*[\w/](?![*<{\w])")
NAMED = re.compile(r"`([\w./-]+\.py)::(\w+)`")


def paths_in(text: str) -> set[str]:
    return set(PATH.findall(text))


@cache
def names_in(path: Path) -> set[str]:
    """What a file defines at its top: functions, classes, constants."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_path_and_name_exists(page):
    text = page.read_text(encoding="utf-8")
    assert [path for path in sorted(paths_in(text)) if not (ROOT / path).exists()] == []
    for path, name in NAMED.findall(text):
        assert name in names_in(ROOT / path), f"{path} has no {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    links = re.findall(r"\]\((?!http)([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_paths_are_found_and_patterns_are_not():
    text = "see `tests/memory/test_host.py::test_x`, [x](pbbench/cli) and tests/<room>/, results/x, /srv/docs/x, pbbench/*/x."
    assert paths_in(text) == {"tests/memory/test_host.py", "pbbench/cli"}


def test_every_fault_names_its_test():
    rows = [line for line in (ROOT / "docs/faults.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 20
    for row in rows:
        named = NAMED.findall(row.rsplit("|", 2)[1])
        assert named, row
        assert all(path.startswith("tests/") and name.startswith("test_") for path, name in named), row


def test_the_tables_of_rooms_and_imports_are_todays():
    page = imports.PAGE.read_text(encoding="utf-8")
    assert page == imports.up_to_date(page), "run python docs/imports.py --write"
