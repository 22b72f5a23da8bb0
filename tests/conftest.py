"""What every test starts from: a fixed seed, one thread, small configurations, and reasons for what is skipped.

torch is not imported here unless a test needs it, so that the tests of reports and settings stay quick.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch; the processes that tests start inherit it

import pytest

from pbbench.experiment.settings import ModelConfig


def pytest_configure(config: pytest.Config) -> None:
    """Files are handed to processes (``-n 2``) in the order given below, not those with the most tests first."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests begin, so that none is left to one process at the end; tests marked ``cuda`` are skipped where
    there is no GPU."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])
    needing = [item for item in items if item.get_closest_marker("cuda")]
    if not needing:
        return
    import torch

    if not torch.cuda.is_available():
        for item in needing:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU; torch.cuda.is_available() is False here"))


@pytest.fixture(autouse=True)
def _repeatable() -> None:
    """The same random numbers in any order of tests; one thread, because tiny tensors gain nothing from more."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(0)
        torch.set_num_threads(1)


@pytest.fixture
def tiny_config() -> ModelConfig:
    """The smallest model with every part: two levels, 2 × 2 patches of 8 × 8 pixels."""
    return ModelConfig(dim=8, dim_mults=(1, 2), image_size=16, patch_divider=2)


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest experiment with every part, as a file for the command line."""
    from command_line import TINY

    path = tmp_path_factory.mktemp("experiment") / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.fixture
def diary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Cells are stand-ins that write here; the machine is not looked at; the report is not drawn."""
    import fake_sweeps

    from pbbench.sweep import process, run

    path = tmp_path / "diary.jsonl"
    monkeypatch.setattr(process, "COMMAND", fake_sweeps.command(path))
    monkeypatch.setattr(run.environments, "probe", lambda device: fake_sweeps.ENVIRONMENT)
    monkeypatch.setattr("pbbench.report.write_report", lambda out: (out / "report.html").write_text("drawn"))
    return path


@pytest.fixture(scope="session")
def fixtures() -> Path:
    return Path(__file__).parent / "fixtures"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder beside the repository with the reference's full files; tests that need it are skipped without it."""
    folder = Path(__file__).resolve().parents[1].parent / "shared"
    if not (folder / "reference").is_dir():
        pytest.skip(f"the reference's full files are not at {folder} (tests/fixtures holds a small set)")
    return folder


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the exact format torch-fidelity loads: its own network, built with loading patched out, saved."""
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = tmp_path_factory.mktemp("weights") / "random-inception.pth"
    with torch.random.fork_rng(), pytest.MonkeyPatch.context() as patch:
        torch.manual_seed(0)
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], verbose=False)
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d):  # torch's default would let the signal fade over 48 layers
                torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        torch.save(network.state_dict(), path)
    return path
