"""What fits in a given memory: the largest batch of each divider, and the fastest way to run the batch that was asked for.

Every candidate is predicted (``forecast_step``), never guessed; the searches only decide which to predict. The largest batch is
closed in on from both sides. The fastest setting is chosen among precision, recomputation and patches a pass by an estimate of
the time (``relative_cost``), which ranks and is no measurement; a sweep measures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from pbbench.config import Experiment, merge, parse_experiment
from pbbench.settings import Precision, Recompute, resolve_patch_batch_size
from pbbench.sweep.calibration import Calibration
from pbbench.sweep.forecast import STEPS, forecast_step
from pbbench.sweep.grid import Cell

MOST_IMAGES = 65_536
RECOMPUTE: tuple[Recompute, ...] = ("none", "cheap", "full")


@dataclass(frozen=True)
class Machine:
    """The rates behind ``relative_cost``: orders of magnitude of a data-centre GPU. They only rank settings."""

    flops_per_second: float = 40e12
    """float32 with TF32; half precision runs at twice that."""
    bytes_per_second: float = 2e12
    seconds_per_kernel: float = 4e-6


@dataclass(frozen=True)
class Fit:
    """A setting that fits: its predicted bytes and what is left of the limit."""

    patch_divider: int
    batch_size: int
    patch_batch_size: int
    mixed_precision: str
    recompute: str
    predicted_reserved_bytes: int
    with_known_terms_bytes: int
    """Reserved, with workspaces and context where the calibration knows them."""
    margin_bytes: int
    relative_cost: float
    """Estimated time per image; only its order means something."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Search:
    """Searches for one step ("train_step" or "sample_step") of an experiment under ``limit_bytes``; predictions are kept."""

    def __init__(
        self, experiment: Experiment, step: str, limit_bytes: int, calibration: Calibration, settings: Any = None
    ) -> None:
        assert step in STEPS
        self.experiment, self.step, self.limit = experiment, step, limit_bytes
        self.calibration, self.settings = calibration, settings
        self._known: dict[tuple[Any, ...], tuple[int, int, int]] = {}

    def largest_batch(self, divider: int) -> Fit | None:
        """The largest batch that fits with the experiment's patches a pass, precision and recomputation; None: none does."""
        training, sampling = self.experiment.training, self.experiment.sampling
        section: Any = training if self.step == "train_step" else sampling

        def fit(batch: int) -> Fit:
            patches = resolve_patch_batch_size(section.patch_batch_size, batch, divider)
            return self._fit(divider, batch, patches, section.mixed_precision, training.recompute)

        best = largest(lambda batch: fit(batch).with_known_terms_bytes, self.limit, MOST_IMAGES)
        return fit(best) if best else None

    def fastest(self, divider: int, batch: int, precisions: Sequence[Precision]) -> Fit | None:
        """The setting of least estimated time that fits, for this divider and batch; None: none fits."""
        best: Fit | None = None
        rows = batch * divider**2
        sizes = [n for n in range(rows, 0, -1) if rows % n == 0]  # equal passes; the fewer, the faster
        recomputes: tuple[Recompute, ...] = RECOMPUTE if self.step == "train_step" else ("none",)
        for precision, recompute in product(precisions, recomputes):
            for patches in sizes:
                found = self._fit(divider, batch, patches, precision, recompute)
                if best is not None and found.relative_cost >= best.relative_cost:
                    break
                if found.margin_bytes >= 0:
                    best = found
                    break
        return best

    def _fit(self, divider: int, batch: int, patches: int, precision: str, recompute: Recompute) -> Fit:
        key = (divider, batch, patches, precision, recompute)
        if key not in self._known:
            self._known[key] = self._predict(*key)
        reserved, kernels, weights = self._known[key]
        whole = reserved + self.calibration.known_bytes
        passes = -(-batch * divider**2 // patches)
        flops = self._flops(divider, recompute) * batch
        cost = relative_cost(flops, passes, kernels, weights, precision, self.step) / batch
        return Fit(divider, batch, patches, precision, recompute, reserved, whole, self.limit - whole, cost)

    def _predict(self, divider: int, batch: int, patches: int, precision: str, recompute: str) -> tuple[int, int, int]:
        """Reserved bytes, operators of one pass, and bytes of the weights."""
        over = {"training": {"recompute": recompute}, "model": {"patch_divider": divider}}
        experiment = parse_experiment(merge(self.experiment.model_dump(mode="json"), over), "--memory-limit")
        cell = Cell("search", "measure", divider, patches, batch, precision)  # type: ignore[arg-type]
        found = forecast_step(experiment, cell, self.step, settings=self.settings)
        events = found.live.events or []
        kernels = sum(e.delta > 0 and e.allocation.born > 0 and e.allocation.phase != "optimizer" for e in events)
        return found.steady.warm.reserved_bytes, kernels, found.live.by_category["parameter"]

    def _flops(self, divider: int, recompute: Recompute) -> int:
        """Floating-point operations per image of the step, by torch's formulas."""
        key = ("flops", divider, recompute)
        if key not in self._known:
            self._known[key] = (flops_per_image(self.experiment, self.step, divider, recompute), 0, 0)
        return self._known[key][0]


def flops_per_image(experiment: Experiment, step: str, divider: int, recompute: Recompute) -> int:
    """Counted on fake tensors, for one image in one pass; no batch or chunk changes them."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from pbbench.sweep import workload

    over = {"training": {"recompute": recompute, "gradient_accumulation_steps": 1}, "model": {"patch_divider": divider}}
    resolved = parse_experiment(merge(experiment.model_dump(mode="json"), over), "--memory-limit")
    cell = Cell("flops", "measure", divider, divider**2, 1, "no")
    build: Callable[..., Any] = workload.training_workload if step == "train_step" else workload.sampling_workload
    with FakeTensorMode():
        work = build(resolved, cell, torch.device("cpu"))
        with workload.FlopCount() as flops:
            work.run()
    return flops.total


def relative_cost(
    flops: int, passes: int, kernels: int, weight_bytes: int, precision: str, step: str, machine: Machine = Machine()
) -> float:
    """A roofline's estimate of a step's seconds: each pass takes its arithmetic or the launches of its kernels, whichever is
    longer, and reads the weights again (training also writes and adds up their gradients). It ranks settings, no more."""
    rate = machine.flops_per_second * (1 if precision == "no" else 2)
    traffic = weight_bytes * (6 if step == "train_step" else 1) / machine.bytes_per_second
    return passes * (max(flops / passes / rate, kernels * machine.seconds_per_kernel) + traffic)


def largest(bytes_of: Callable[[int], int], limit: int, most: int) -> int:
    """The largest whole number in 1 … ``most`` whose bytes are at most ``limit``, where more never needs less; 0: none is.

    The two ends close in by the straight line through them, which for memory is nearly right at once; where it is not, by
    halves.
    """
    before, fits, fails = (0, 0), (0, 0), None
    at, tries = 1, 0
    while fits[0] < most and (fails is None or fails[0] - fits[0] > 1):
        point = (at, bytes_of(at))
        if point[1] <= limit:
            before, fits = fits, point
        else:
            fails = point
        tries += 1
        low, other = fits, fails or before
        slope = (other[1] - low[1]) / (other[0] - low[0]) if other[0] != low[0] else 0.0
        further = int((limit - low[1]) / slope) if slope > 0 else max(1, low[0])
        at = low[0] + max(1, further)
        if fails is None:
            at = min(at, most)
        elif tries % 3 == 0 or at >= fails[0]:
            at = (low[0] + fails[0]) // 2
    return fits[0]
