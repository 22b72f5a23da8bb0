"""What the doctor finds on machines that exist only here, and on this one; its exit code says whether a sweep can run."""

import json
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from fake_devices import CUDA, FakeCuda, FakeNvml

from pbbench import cli
from pbbench.cli.options import run_app
from pbbench.doctor import examine as doctor
from pbbench.doctor import machine as checks
from pbbench.doctor import network
from pbbench.doctor.examine import network_checks
from pbbench.errors import InputError
from pbbench.experiment.sizes import format_bytes
from pbbench.memory.meters.capabilities import driver_capabilities, gpu_capabilities, host_capabilities
from pbbench.model import kernels
from pbbench.model.lean import _NormSiLU
from pbbench.records.environment import collect

MiB, GiB = 2**20, 2**30
PID = 7


class Nvml(FakeNvml):
    """The functions that only the doctor asks for."""

    def nvmlSystemGetDriverVersion(self):  # noqa: N802
        self._may_fail("nvmlSystemGetDriverVersion")
        return "580.10"

    def nvmlSystemGetCudaDriverVersion_v2(self):  # noqa: N802
        return 13020

    def nvmlDeviceGetCount(self):  # noqa: N802
        return 1

    def nvmlDeviceGetName(self, handle):  # noqa: N802
        return "NVIDIA H200"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):  # noqa: N802
        self._may_fail("nvmlDeviceGetTotalEnergyConsumption")
        return 123_456


@pytest.fixture(scope="module")
def here():
    """The environment of this machine on its CPU."""
    return collect("cpu")


def on_gpu(here, **changes):
    gpu = {"device": "cuda", "gpu": "NVIDIA H200", "gpu_memory_bytes": 139 * GiB, "allocator_backend": "native"}
    return {**here, **gpu, "cuda": "13.2", "commit": "0123456789abcdef", "dirty": False, **changes}


def seen_with(nvml, **changes):
    host = {**host_capabilities(), "gpu_error": None, "gpu_free_bytes": 130 * GiB, "gpu_total_bytes": 139 * GiB, "gpu_count": 1}
    return {**host, **driver_capabilities(nvml), **gpu_capabilities(CUDA, cuda=FakeCuda(), nvml=nvml, pid=PID), **changes}


def examined(here, nvml, environment=None, asked="auto", **changes):
    """Name → check, of a GPU machine with this NVML."""
    environment, seen = environment or on_gpu(here), seen_with(nvml, **changes)
    assert nvml.opened == 0, "every nvmlInit needs its nvmlShutdown"
    found = doctor.gpu_checks(environment, seen, asked) + doctor.meter_checks(environment, seen)
    return {check.name: check for check in found + doctor.setting_checks(environment)}


def test_a_gpu_machine_where_everything_can_be_read(here):
    found = examined(here, Nvml([(PID, 300 * MiB)]))
    assert {check.state for check in found.values()} == {"ok"}
    assert found["GPU"].meaning == "NVIDIA H200, 130 GiB of 139 GiB free"
    assert found["driver"].meaning == "driver 580.10, CUDA up to 13.2"
    assert found["NVML process memory"].meaning.startswith("300 MiB held by this process")
    assert found["other GPU processes"].meaning == "none"
    assert doctor.can_run(list(found.values()))


@pytest.mark.parametrize(
    ("nvml", "name", "told", "helps"),
    [
        (Nvml([(4242, 300 * MiB)]), "NVML process memory", "does not list process 7", "--pid=host"),
        (Nvml([(PID, None)]), "NVML process memory", "without its memory", "measured all the same"),
        (Nvml([], nvmlDeviceGetComputeRunningProcesses_v3=4), "NVML process memory", "no permission", "more rights"),
        (Nvml([(PID, 1)], nvmlDeviceGetMemoryInfo=3), "NVML device memory", "does not support it", "measured all the same"),
        (Nvml([(PID, 1)], nvmlDeviceGetTotalEnergyConsumption=3), "energy counter", "NVML: error 3", "Volta"),
        (Nvml([(PID, 1)], nvmlInit=12), "NVML process memory", "no NVIDIA driver library", "measured all the same"),
        (Nvml([(PID, 1)], nvmlInit=12), "energy counter", "NVML: error 12", "Volta"),
    ],
    ids=["container", "none", "permission", "device", "energy", "no library", "no library, energy"],
)
def test_what_nvml_hides_is_missing_with_its_reason_and_keeps_no_sweep_from_running(here, nvml, name, told, helps):
    found = examined(here, nvml)
    assert found[name].state == "missing"
    assert told in found[name].meaning
    assert helps in found[name].remedy
    assert doctor.can_run(list(found.values()))


def test_a_lost_gpu_is_told_and_not_raised():
    class Lost(Nvml):
        def nvmlDeviceGetHandleByUUID(self, uuid):  # noqa: N802
            raise self.NVMLError(self.NVML_ERROR_GPU_IS_LOST)

    found = gpu_capabilities(CUDA, cuda=FakeCuda(), nvml=Lost([(PID, 1)]), pid=PID)
    assert (found["process_bytes"], found["energy_mj"], found["others"], found["energy_reason"]) == (
        None,
        None,
        None,
        "error 15",
    )


def test_mig_hides_the_slice(here):
    nvml = Nvml([(PID, 1)])
    nvml.mig = 1
    found = examined(here, nvml)
    assert (found["MIG"].state, found["NVML device memory"].state) == ("limited", "missing")
    assert "CUDA_VISIBLE_DEVICES" in found["NVML device memory"].remedy


@pytest.mark.parametrize(
    ("processes", "state", "told"),
    [
        ([(PID, 1), (8, 1), (9, 1)], "limited", "2 more on this GPU"),
        ([(4242, 1)], "limited", "this one may be among them"),
        ([], "ok", "none"),
    ],
)
def test_who_else_is_on_the_gpu(here, processes, state, told):
    check = examined(here, Nvml(processes))["other GPU processes"]
    assert check.state == state
    assert told in check.meaning
    refused = Nvml(processes, nvmlDeviceGetComputeRunningProcesses_v3=4)
    assert "not known" in examined(here, refused)["other GPU processes"].meaning


@pytest.mark.parametrize(
    ("build", "asked", "state", "told"),
    [
        ("13.2", "auto", "limited", "torch does not see it"),
        ("14.0", "auto", "limited", "torch is built for CUDA 14.0, driver 580.10, CUDA up to 13.2"),
        (None, "auto", "limited", "built without CUDA"),
        ("13.2", "cpu", "ok", "left alone"),
    ],
)
def test_a_gpu_that_is_not_used_says_why(here, build, asked, state, told):
    check = examined(here, Nvml([]), {**here, "device": "cpu", "cuda": build}, asked)["GPU"]
    assert check.state == state
    assert "NVIDIA H200 is there" in check.meaning
    assert told in check.meaning


def test_a_gpu_that_torch_sees_and_cannot_use_keeps_a_sweep_from_running(here):
    found = examined(here, Nvml([]), gpu_error="CUDA error: out of memory")
    assert (found["GPU"].state, "out of memory" in found["GPU"].meaning) == ("missing", True)
    assert not doctor.can_run(list(found.values()))


def test_settings_that_change_figures_are_told(here):
    changed = on_gpu(
        here,
        allocator_backend="cudaMallocAsync",
        allocator_settings="backend:cudaMallocAsync",
        tf32={"matmul": True, "cudnn": True},
        platform="Linux-6.6-microsoft-standard-WSL2",
        dirty=True,
    )
    found = examined(here, Nvml([(PID, 1)]), changed)
    assert found["CUDA allocator"].state == "limited"
    assert "backend:cudaMallocAsync" in found["CUDA allocator"].meaning
    assert found["TF32"].meaning == "on for matrix products and convolutions"
    assert (found["WSL"].state, found["commit"].state) == ("limited", "limited")
    no_clone = on_gpu(here, commit=None, reasons={"commit": "the package does not run from a git clone"})
    assert "git clone" in examined(here, Nvml([]), no_clone)["commit"].meaning


def test_resident_memory_that_cannot_be_reset_is_limited(here, tmp_path):
    (tmp_path / "status").write_text("VmHWM:\t 2048 kB\n")
    (tmp_path / "clear_refs").mkdir()  # cannot be written, not even by root
    found = doctor.meter_checks(here, {**driver_capabilities(Nvml([])), **host_capabilities(tmp_path)})
    assert [check.state for check in found] == ["ok", "limited"]
    assert "clear_refs" in found[1].meaning


def test_the_inception_weights_are_looked_for_without_a_download(monkeypatch, tmp_path, inception_file):
    monkeypatch.delenv("PBBENCH_INCEPTION_WEIGHTS", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("pbbench.quality.weights._open_url", lambda *_: pytest.fail("it went to the network"))
    missing = checks.inception_check()
    assert (missing.state, missing.remedy.startswith("fetch https://")) == ("missing", True)
    monkeypatch.setenv("PBBENCH_INCEPTION_WEIGHTS", str(tmp_path / "absent.pth"))
    absent = checks.inception_check()
    assert (absent.state, "there is no file" in absent.meaning) == ("missing", True)
    monkeypatch.setenv("PBBENCH_INCEPTION_WEIGHTS", str(inception_file))
    assert checks.inception_check().state == "limited"


def test_packages_that_are_not_installed():
    needed, *extras = checks.package_checks(lambda name: None if name in ("accelerate", "wandb") else SimpleNamespace())
    assert (needed.state, needed.remedy, doctor.can_run([needed])) == ("missing", "pip install accelerate", False)
    assert {check.name: check.state for check in extras}["wandb"] == "missing"
    assert doctor.can_run(extras)
    assert all(check.state == "ok" for check in checks.package_checks(lambda _: SimpleNamespace()))


@pytest.mark.parametrize(("free", "state"), [(64 * GiB, "ok"), (2 * GiB, "limited"), (512 * MiB, "missing")])
def test_free_memory_is_the_machines_or_what_the_container_allows(tmp_path, free, state):
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    for folder in (proc, cgroup):
        folder.mkdir()
    (proc / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable:   {free // 1024} kB\n")
    assert checks.memory_check(proc, cgroup).state == state
    (cgroup / "memory.max").write_text("max\n")
    (cgroup / "memory.current").write_text(f"{200 * GiB}\n")
    assert checks.memory_check(proc, cgroup).state == state
    (proc / "meminfo").write_text(f"MemAvailable: {500 * GiB // 1024} kB\n")
    (cgroup / "memory.max").write_text(f"{200 * GiB + free - 100 * MiB}\n")
    (cgroup / "memory.stat").write_text(f"anon 5\ninactive_file {100 * MiB}\n")
    check = checks.memory_check(proc, cgroup)
    assert (check.state, check.meaning.partition(":")[0]) == (state, f"{format_bytes(free)} free (the container's limit)")
    assert checks.memory_check(tmp_path / "absent", cgroup).state == "limited"


@pytest.mark.parametrize(("free", "state"), [(64 * GiB, "ok"), (GiB, "limited"), (MiB, "missing")])
def test_disk_is_that_of_the_results_folder(monkeypatch, tmp_path, free, state):
    usage = namedtuple("usage", "total used free")
    asked = []
    monkeypatch.setattr(checks, "disk_usage", lambda folder: asked.append(folder) or usage(0, 0, free))
    check = checks.disk_check(tmp_path / "results" / "not yet there")
    assert (check.state, asked, list(tmp_path.iterdir())) == (state, [tmp_path], [])
    assert doctor.can_run([check]) == (state != "missing")


def test_a_folder_that_cannot_be_written_keeps_a_sweep_from_running(monkeypatch, tmp_path):
    def refuse(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(checks.tempfile, "TemporaryFile", refuse)
    check = checks.disk_check(tmp_path)
    assert (check.state, "Read-only file system" in check.meaning) == ("missing", True)
    assert not doctor.can_run([check])


def test_a_busy_machine_makes_times_rough():
    assert checks.load_check(lambda: (0.0, 9.0, 9.0)).state == "ok"
    assert checks.load_check(lambda: (1000.0, 0.0, 0.0)).state == "limited"


def test_a_torch_that_does_not_start_is_a_line_and_exit_code_1(monkeypatch, capsys):
    def broken(_):
        raise InputError("cannot look at this machine: ModuleNotFoundError: No module named 'torch'")

    monkeypatch.setattr(doctor, "probe", broken)
    assert run_app(cli.app, ["doctor", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["can_run"], told["checks"][0]["name"]) == (False, "environment")


def test_a_device_that_is_not_there_leaves_the_rest_examined(monkeypatch, here, capsys):
    def no_gpu(device):
        if device == "cuda":
            raise InputError("device 'cuda' is not there: this torch was built without CUDA; use --device cpu")
        return here

    monkeypatch.setattr(doctor, "probe", no_gpu)
    monkeypatch.setattr(doctor, "_capabilities", lambda device: {**host_capabilities(), "gpus": []})
    monkeypatch.setenv("COLUMNS", "200")
    assert run_app(cli.app, ["doctor", "--device", "cuda"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "A sweep cannot run here: device: device 'cuda' is not there" in said
    assert "live tensor bytes" in said
    assert run_app(cli.app, ["doctor", "--device", "cpu"]) == 0
    assert "A sweep can run here." in capsys.readouterr().out
    assert run_app(cli.app, ["doctor", "--device", "tpu"]) == 2


def test_this_machine_end_to_end(capsys):
    code = run_app(cli.app, ["doctor", "--device", "cpu", "--json"])
    said = capsys.readouterr()
    told = json.loads(said.out)
    assert code == (0 if told["can_run"] else 1)
    found = {check["name"]: check for check in told["checks"]}
    assert found["live tensor bytes"]["state"] == "ok"
    assert found["resident memory"]["meaning"]
    assert {"torch", "GPU", "Inception weights", "packages", "host memory", "disk", "CPU load"} <= set(found)
    assert all(check["remedy"] for check in told["checks"] if check["state"] == "missing")
    assert said.err == ""


@pytest.mark.cuda
def test_a_real_gpu_is_examined_without_this_process_touching_it():
    import torch

    before = torch.cuda.is_initialized()
    found = {check.name: check for check in doctor.examine("cuda")}
    assert torch.cuda.is_initialized() == before
    assert found["GPU"].state == "ok"
    assert {found[name].state for name in ("CUDA allocator", "network", "fused operators")} == {"ok"}
    assert all(found[name].meaning for name in ("NVML process memory", "NVML device memory", "energy counter", "MIG"))


def told(failed, not_fused=None):
    return {check.name: check for check in network_checks({"failed": failed, "not_fused": not_fused})}


def test_the_network_is_tried_on_a_gpu_in_every_precision(monkeypatch):
    """The pass itself runs here on the CPU, through it all; what a GPU refuses is told by precision."""
    nothing = {"no": None, "bf16": None, "fp16": None}
    assert network.failures(torch.device("cpu")) == nothing

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("query is not correctly aligned (strideM)\nand more")

    with monkeypatch.context() as patch:
        patch.setattr("torch.nn.functional.scaled_dot_product_attention", refuse)
        found = network.failures(torch.device("cpu"))
    assert all("strideM" in why for why in found.values())
    assert (told(found)["network"].state, told(found)["network"].needed) == ("missing", True)
    only = told(nothing | {"fp16": "no kernel image"})["network"]
    assert (only.state, only.needed, only.meaning) == ("limited", False, "fp16: no kernel image")
    assert {check.state for check in told(nothing).values()} == {"ok"}
    (ended,) = network_checks("RuntimeError: illegal memory access")
    assert (ended.state, "illegal memory access" in ended.meaning) == ("missing", True)


@pytest.mark.parametrize(("part", "where"), [("output", "forward"), ("gradient", "backward")])
def test_a_gpu_that_computes_something_else_is_told(monkeypatch, part, where):
    """A norm that is wrong in 16 bits, in one direction."""
    method = getattr(_NormSiLU, where)

    def wrong(context, x, *args):
        out = method(context, x, *args)
        if x.dtype != torch.bfloat16:
            return out
        return out * 1.5 if where == "forward" else (out[0] * 1.5, *out[1:])

    monkeypatch.setattr(_NormSiLU, where, staticmethod(wrong))
    found = network.failures(torch.device("cpu"))
    assert found == {"no": None, "bf16": f"the {part} at 8×8 is not what the CPU computes", "fp16": None}


def test_why_nothing_is_fused_is_told():
    check = told({"no": None}, network.not_fused(torch.device("cpu")))["fused operators"]
    assert (check.state, "older than Ampere" in check.meaning) == ("limited", True)
    with kernels.everywhere():
        assert network.not_fused(torch.device("cpu")) is None
