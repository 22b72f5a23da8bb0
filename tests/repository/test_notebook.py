"""The notebook runs from top to bottom on a run folder and shows its table and figures; it is committed without outputs."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from make_run import make_run
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "tradeoff.ipynb"


def executed(run: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The text and image types of the notebook's outputs, run on ``run``."""
    monkeypatch.setenv("PBBENCH_RUN", str(run))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": NOTEBOOK.parent}}).execute()
    shown = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error"
            shown.append(output.get("text") or str(output.get("data", {}).get("text/plain", "")))
            shown += [kind for kind in output.get("data", {}) if kind.startswith("image/")]
    return shown


def test_notebook_shows_the_tradeoff_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = executed(make_run(tmp_path, dividers=(1, 2), device="cuda"), monkeypatch)
    text = "\n".join(shown)
    assert "train_peak_bytes" in text
    assert "What each divider costs" in text
    assert "activation_share" in text
    assert shown.count("image/png") == 2


def test_notebook_is_committed_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not [cell for cell in notebook.cells if cell.get("outputs") or cell.get("execution_count")]
