"""The command line: parse, call one function, print. Heavy imports happen inside the command that needs them.

Results go to stdout (``--json``: JSON and nothing else), progress and notes to stderr. Exit codes: 0 done; 1 done, but
something in it failed or a gate was crossed; 2 bad input; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from pbbench import __version__
from pbbench.cli.measure import compare, doctor, predict, report, sweep
from pbbench.cli.model import convert, fid, prepare, sample, score, train
from pbbench.cli.options import ManyValues, run_app

app = typer.Typer(
    name="pbbench",
    help="What patch-wise diffusion costs and saves: memory, speed and image quality per patch divider.",
    invoke_without_command=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for command in (sweep, predict, report, compare, train, sample, score, fid, convert, doctor):  # as --help lists them
    app.command(cls=ManyValues)(command)
data = typer.Typer(help="Prepare sets of images for quick loading.", invoke_without_command=True, rich_markup_mode=None)
data.command(cls=ManyValues)(prepare)
app.add_typer(data, name="data")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pbbench {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    _help_without_a_command(context)


@data.callback()
def _help_without_a_command(context: typer.Context) -> None:
    """Words that end at a group print its help, as --help does."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit


def main() -> None:
    sys.exit(run_app(app))
