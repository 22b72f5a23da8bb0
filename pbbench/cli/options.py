"""How pbbench reads its command line: options that take several values, and one clear line for a mistake.

``--dividers 1 2 4``, ``--dividers 1,2,4`` and repeated ``--dividers`` mean the same. typer offers only the last, so the words
are rewritten before it sees them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import typer
from typer.core import TyperCommand

from pbbench.errors import InputError
from pbbench.experiment.sizes import byte_count
from pbbench.processes import is_main_process, telling_a_failure

NUMBER = re.compile(r"-\d+(\.\d*)?$")


class ManyValues(TyperCommand):
    """A command whose list options take their values separated by spaces, by commas, or repeated.

    Values end at the next option; ``-2`` is a value (and refused later, by name). KEY=VALUE options may hold commas in a value:
    there only spaces separate.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        many = {name: p for p in self.params if getattr(p, "multiple", False) for name in p.opts}
        words: list[str] = []
        queue = list(args)
        while queue:
            word = queue.pop(0)
            if word == "--":
                words += [word, *queue]
                break
            name, equals, first = word.partition("=")
            if name not in many or not word.startswith("--"):
                words.append(word)
                continue
            values = [first] if equals else []
            while not equals and queue and (not queue[0].startswith("-") or NUMBER.match(queue[0])):
                values.append(queue.pop(0))
            if many[name].metavar != "KEY=VALUE":
                values = [part.strip() for value in values for part in value.split(",")]
            if not ctx.resilient_parsing and (not values or "" in values):
                what = "there is an empty value" if values else "a value is missing"
                raise InputError(f"{name}: {what}; for example {EXAMPLES[name]}")
            for value in values:
                words += [name, value]
        return super().parse_args(ctx, words)


EXAMPLES = {
    "--dividers": "--dividers 1 2 4 8",
    "--batch-size": "--batch-size 8 32",
    "--patch-batch-size": "--patch-batch-size 1 index all",
    "--set": "--set training.num_steps=1000",
    "--metrics": "--metrics fid kid prc",
    "--precisions": "--precisions no bf16",
}


def whole_numbers(name: str, values: Iterable[str] | None) -> list[int]:
    """Each value as a whole number above 0. Raises InputError that names the value."""
    numbers = []
    for value in values or ():
        if not value.isdecimal() or int(value) == 0:
            raise InputError(f"{name}: {value!r} is not a whole number above 0")
        numbers.append(int(value))
    return numbers


def memory_size(name: str, text: str | None) -> int | None:
    """ "8GiB", "500 MB" or a number of bytes, as bytes; None stays None. Raises InputError that names the option."""
    try:
        return None if text is None else byte_count(text)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def run_app(app: typer.Typer, words: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 1 something in it failed, 2 bad input, 130 Ctrl-C.

    Of several processes (torchrun) one tells why they failed."""
    try:
        code = app(args=words, standalone_mode=False, prog_name="pbbench")
    except InputError as error:
        return _complain(str(error))
    except (KeyboardInterrupt, typer.Abort):
        if is_main_process():
            typer.echo("pbbench: stopped", err=True)
        return 130
    except Exception as error:  # typer carries its own click, whose errors have no public base class
        message: Callable[[], str] | None = getattr(error, "format_message", None)
        if message is not None:
            return _complain(" ".join(message().split()))
        from pbbench.memory.meters.outcome import describe_out_of_memory

        memory = describe_out_of_memory(error)
        if memory is not None:
            remedy = "take fewer images or patches at once (batch_size, patch_batch_size), smaller images or a smaller model"
            return _complain(f"out of memory ({memory['message'][:200]}); {remedy}")
        with telling_a_failure() as mine:
            if mine:
                raise
        return 1
    return int(code or 0)


def _complain(message: str) -> int:
    with telling_a_failure() as mine:
        if mine:
            typer.echo(f"pbbench: {message}", err=True)
    return 2
