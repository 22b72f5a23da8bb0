"""The README keeps its word: its two lines, every command, preset and column. (What it points to: test_docs.py.)"""

import re
from pathlib import Path

import pytest

from pbbench import cli
from pbbench.experiment.presets import preset_names
from pbbench.records.rows import COLUMNS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def commands(app, group=""):
    """Every command's words, those of groups after the group's name."""
    names = [group + (command.name or command.callback.__name__) for command in app.registered_commands]
    return names + [name for inner in app.registered_groups for name in commands(inner.typer_instance, f"{inner.name} ")]


@pytest.mark.parametrize("name", commands(cli.app))
def test_every_command_has_a_place(name):
    assert f"`pbbench {name}" in README


def test_the_presets_it_names_exist():
    for name in re.findall(r"(?:experiments/|--preset )([a-z0-9-]+)(?:\.toml|\b)", README):
        assert name in preset_names()


def test_the_columns_it_names_exist():
    table = README.partition("## How to read a row")[2].partition("\n## ")[0]
    named = re.findall(r"`([a-z_]+)`", "".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `")))
    assert len(named) > 15
    assert set(named) <= set(COLUMNS)


def test_ci_runs_the_readmes_own_test_line():
    line = README.partition("<!-- test line -->")[2].partition("```sh\n")[2].splitlines()[0]
    assert line.endswith("-m pytest -q -n 2 --dist loadfile")
    assert "<!-- test line -->" in (ROOT / ".ci" / "run").read_text()
