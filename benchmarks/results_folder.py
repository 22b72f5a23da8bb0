"""What every benchmark does with what it found: the option --out, and the files there, the machine's description among them."""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pbbench.records.files import write_json, write_text


def parser(doc: str | None, out: str) -> argparse.ArgumentParser:
    """A command line that explains itself by the file's own words, with ``--out``."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, default=Path(out))
    return made


def machine_name(machine: dict[str, Any]) -> str:
    return machine["gpu"] or f"{machine['cpu']}, {machine['cpu_threads']} threads"


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def publish(out: Path, name: str, found: dict[str, Any], text: str, machine: dict[str, Any]) -> None:
    """NAME.json for programs, NAME.md for people, environment.json."""
    write_json(out / "environment.json", machine)
    write_json(out / f"{name}.json", found)
    write_text(out / f"{name}.md", text)
