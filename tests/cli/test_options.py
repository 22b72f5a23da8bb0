"""The command line's own rules: several values per option, one line per mistake, exit codes."""

import subprocess
import sys
import time

import pytest
import typer

from pbbench import cli
from pbbench.cli.options import ManyValues, run_app, whole_numbers
from pbbench.errors import InputError

seen: dict = {}
app = typer.Typer(add_completion=False)


@app.command(cls=ManyValues)
def main(
    dividers: list[str] = typer.Option([], "--dividers"),  # noqa: B008
    settings: list[str] = typer.Option([], "--set", metavar="KEY=VALUE"),  # noqa: B008
    flag: bool = typer.Option(False, "--flag"),
) -> None:
    seen.update(dividers=list(dividers), settings=list(settings), flag=flag)


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (["--dividers", "1", "2", "4"], ["1", "2", "4"]),
        (["--dividers", "1,2,4"], ["1", "2", "4"]),
        (["--dividers=1,2", "--dividers", "4"], ["1", "2", "4"]),
        (["--dividers", "1", "2", "--flag"], ["1", "2"]),
        (["--dividers", "-2"], ["-2"]),
        (["--flag"], []),
    ],
)
def test_values_by_spaces_commas_or_repeats(words, values):
    assert run_app(app, words) == 0
    assert seen["dividers"] == values


def test_a_setting_may_hold_commas():
    assert run_app(app, ["--set", "model.dim_mults=[1,2]", "seed=3", "--flag"]) == 0
    assert seen["settings"] == ["model.dim_mults=[1,2]", "seed=3"]
    assert seen["flag"] is True


@pytest.mark.parametrize("words", [["--dividers"], ["--dividers="], ["--dividers", "1,,2"], ["--dividers", "--flag"]])
def test_a_missing_value_is_told_with_an_example(words, capsys):
    assert run_app(app, words) == 2
    assert "--dividers 1 2 4 8" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 2.60 EiB\nfor an array"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
        ),
    ],
)
def test_too_little_memory_is_one_line(error, capsys):
    failing = typer.Typer(add_completion=False)

    @failing.command()
    def fail() -> None:
        raise error

    assert run_app(failing, []) == 2
    told = capsys.readouterr().err
    assert told.startswith("pbbench: out of memory (")
    assert "batch_size" in told
    assert told.count("\n") == 1


def test_a_mistake_of_the_programs_own_keeps_its_traceback():
    failing = typer.Typer(add_completion=False)

    @failing.command()
    def fail() -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run_app(failing, [])


@pytest.mark.parametrize("words", [["--unknown"], ["--flag=maybe"], ["word"]])
def test_typers_own_complaints_are_one_line(words, capsys):
    assert run_app(app, words) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("value", ["0", "-2", "x", "1.5", "", "²"])
def test_whole_numbers_name_the_value(value):
    with pytest.raises(InputError, match="whole number above 0"):
        whole_numbers("--dividers", [value])


def test_help_is_quick_and_imports_nothing_heavy():
    code = "import sys, pbbench.cli; print([m for m in ('torch', 'pandas', 'matplotlib', 'diffusers') if m in sys.modules])"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert time.perf_counter() - start < 5  # half a second alone; a loaded machine is allowed ten times that


def test_every_command_has_help(capsys):
    for command in cli.app.registered_commands:
        assert command.callback is not None
        assert run_app(cli.app, [command.name or command.callback.__name__, "--help"]) == 0
        assert len(capsys.readouterr().out) > 100


@pytest.mark.parametrize("words", [[], ["data"]])
def test_words_that_end_at_a_group_print_its_help(words, capsys):
    assert run_app(cli.app, [*words, "--help"]) == 0
    help_text = capsys.readouterr().out
    assert run_app(cli.app, words) == 0
    assert capsys.readouterr().out == help_text
    assert "\nCommands:\n" in help_text
