"""Inception's weights: the order of the sources, no code ever run from a file, a clear word where there are none."""

from __future__ import annotations

import hashlib
import http.server
import os
import pickle
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pbbench.errors import InputError
from pbbench.quality import weights
from pbbench.quality.weights import WEIGHTS_NAME, WEIGHTS_VARIABLE, MissingWeightsError, resolve_inception_weights


@pytest.fixture(autouse=True)
def nothing_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, no variable, no network; returns the cached file's place."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch-home"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.delenv(WEIGHTS_VARIABLE, raising=False)
    monkeypatch.setattr(weights, "WEIGHTS_URL", "http://127.0.0.1:9/" + WEIGHTS_NAME)
    place = tmp_path / "torch-home" / "hub" / "checkpoints" / WEIGHTS_NAME
    assert weights.hub_cache() == place
    return place


def copy(source: Path, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    os.link(source, target)
    return target


# Sources


def test_the_address_is_torch_fidelitys_own() -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    address = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/" + WEIGHTS_NAME
    assert address == URL_INCEPTION_V3
    assert URL_INCEPTION_V3.removesuffix(".pth").rpartition("-")[2] == weights.PUBLISHED_SHA256


def test_option_before_variable_before_cache(
    inception_file: Path, tmp_path: Path, nothing_there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy(inception_file, nothing_there)
    assert resolve_inception_weights().origin == "torch hub's cache"
    monkeypatch.setenv(WEIGHTS_VARIABLE, str(copy(inception_file, tmp_path / "variable.pth")))
    assert resolve_inception_weights().path.name == "variable.pth"
    found = resolve_inception_weights(inception_file)
    assert found.path == inception_file
    assert found.sha256 == hashlib.sha256(inception_file.read_bytes()).hexdigest()
    assert not found.published  # the name in the cache proves nothing


def test_what_was_named_is_never_passed_over(
    inception_file: Path, nothing_there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy(inception_file, nothing_there)
    with pytest.raises(InputError, match=r"--inception-weights: there is no file at .*absent\.pth"):
        resolve_inception_weights("absent.pth")
    monkeypatch.setenv(WEIGHTS_VARIABLE, "absent-too.pth")
    with pytest.raises(InputError, match=rf"{WEIGHTS_VARIABLE}: there is no file at .*absent-too\.pth") as caught:
        resolve_inception_weights()
    assert not isinstance(caught.value, MissingWeightsError)  # a stand-in must not hide the mistake


# Nothing there


def refused(*_: Any, **__: Any) -> Any:
    raise urllib.error.URLError("Name or service not known")


def hangs(*_: Any, **__: Any) -> Any:
    time.sleep(3)
    raise urllib.error.URLError("too late")


@pytest.mark.parametrize("network", [refused, hangs])
def test_without_a_network_one_line_within_seconds(network: Any, nothing_there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where name resolution hangs, which urlopen's own time-out does not cover."""
    monkeypatch.setattr(urllib.request, "urlopen", network)
    started = time.monotonic()
    with pytest.raises(MissingWeightsError) as caught:
        resolve_inception_weights(timeout_seconds=0.3)
    assert time.monotonic() - started < 2
    message = str(caught.value)
    assert "\n" not in message
    for part in (WEIGHTS_NAME, "--inception-weights FILE", f"{WEIGHTS_VARIABLE}=FILE", str(nothing_there)):
        assert part in message


def test_messages_do_not_name_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    with pytest.raises(MissingWeightsError, match=r" ~/torch-home/hub/checkpoints/") as caught:
        resolve_inception_weights(allow_download=False)
    assert str(tmp_path) not in str(caught.value)


def test_download_can_be_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: pytest.fail("it asked the network"))
    with pytest.raises(MissingWeightsError, match="switched off"):
        resolve_inception_weights(allow_download=False)


# The download


class Server(http.server.BaseHTTPRequestHandler):
    """Serves ``body``; says ``length`` and stops after the body, or stalls."""

    body = b""
    length = 0
    stall = 0.0

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(self.length))
        self.end_headers()
        self.wfile.write(self.body)
        time.sleep(self.stall)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Server]]:
    handler = type("Handler", (Server,), {})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        monkeypatch.setattr(weights, "WEIGHTS_URL", f"http://127.0.0.1:{running.server_address[1]}/{WEIGHTS_NAME}")
        yield handler
        running.shutdown()


def serve(handler: type[Server], body: bytes, length: int | None = None, stall: float = 0) -> None:
    handler.body, handler.length, handler.stall = body, len(body) if length is None else length, stall


def test_download_is_checked_and_kept(
    server: type[Server], inception_file: Path, nothing_there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = inception_file.read_bytes()
    serve(server, body)
    monkeypatch.setattr(weights, "PUBLISHED_SHA256", hashlib.sha256(body).hexdigest()[:8])
    told: list[tuple[int, int]] = []
    found = resolve_inception_weights(progress=lambda *state: told.append(state))
    assert found.published
    assert found.path == nothing_there
    assert nothing_there.read_bytes() == body
    assert told[-1] == (len(body), len(body))
    assert [path.name for path in nothing_there.parent.iterdir()] == [WEIGHTS_NAME]
    serve(server, b"")
    assert resolve_inception_weights().origin == "torch hub's cache"


@pytest.mark.parametrize(
    ("body", "length", "stall", "reason"),
    [(b"something else", 14, 0, "damaged"), (b"half", 1000, 0, "damaged|failed"), (b"half", 1000, 3, "failed.*timed out")],
)
def test_bad_downloads_leave_nothing(
    server: type[Server], nothing_there: Path, body: bytes, length: int, stall: float, reason: str
) -> None:
    serve(server, body, length, stall)
    with pytest.raises(MissingWeightsError, match=reason):
        resolve_inception_weights(timeout_seconds=0.5)
    assert list(nothing_there.parent.iterdir()) == []


# Foreign files


class Payload:
    """What a hostile pickle does on loading: here it only leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def hostile(path: Path, state: dict[str, Any]) -> None:
    torch.save(state | {"extra": Payload(path.parent / "mark")}, path)


def hostile_plain(path: Path, state: dict[str, Any]) -> None:
    path.write_bytes(pickle.dumps(Payload(path.parent / "mark")))


def shape_changed(path: Path, state: dict[str, Any]) -> None:
    torch.save(state | {"fc.bias": torch.zeros(1000)}, path)


def wrapped(path: Path, state: dict[str, Any]) -> None:
    torch.save({"state_dict": {"fc.bias": torch.zeros(1008)}, "epoch": 3}, path)


def one_missing(path: Path, state: dict[str, Any]) -> None:
    torch.save({name: value for name, value in state.items() if name != "fc.bias"}, path)


def cut_short(path: Path, state: dict[str, Any]) -> None:
    torch.save({"fc.bias": torch.zeros(100_000)}, path)
    path.write_bytes(path.read_bytes()[:200_000])


FOREIGN = [
    (hostile, "not a torch file of plain tensors"),
    (hostile_plain, "not a torch file of plain tensors"),
    (shape_changed, "holds other tensors"),
    (wrapped, "holds other tensors"),
    (one_missing, "holds other tensors"),
    (cut_short, "damaged or not a torch file"),
    (lambda path, _: path.write_bytes(b""), "damaged or not a torch file"),
    (lambda path, _: path.write_text("<html>Not found</html>"), "not a torch file"),
    (lambda path, _: path.mkdir(), "there is no file"),
]


@pytest.mark.parametrize(("make", "reason"), FOREIGN)
def test_foreign_files_are_refused_and_nothing_in_them_runs(
    make: Any, reason: str, inception_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = torch.load(inception_file, weights_only=True, mmap=True)
    path = tmp_path / "foreign.pth"
    make(path, state)
    with pytest.raises(InputError, match=reason) as caught:
        resolve_inception_weights(path)
    assert "\n" not in str(caught.value)
    assert "--inception-weights FILE" in str(caught.value)  # the remedy
    assert not (tmp_path / "mark").exists()


def test_damaged_cache_is_named_with_its_remedy(nothing_there: Path) -> None:
    nothing_there.parent.mkdir(parents=True)
    nothing_there.write_bytes(b"half a download")
    with pytest.raises(InputError, match=r"torch hub's cache: .* delete it or"):
        resolve_inception_weights()


def test_the_network_gets_the_files_own_numbers(inception_file: Path) -> None:
    state = torch.load(inception_file, weights_only=True)
    network = weights.build_inception(resolve_inception_weights(inception_file))
    assert not network.training
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
