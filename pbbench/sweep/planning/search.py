"""What fits in a given memory: the largest batch of each divider, and the fastest way to run the batch that was asked for, or
the optimizer step.

Every candidate is predicted (``forecast_step``), never guessed; the searches only decide which to predict. The largest batch is
closed in on from both sides. The fastest setting is chosen among precision, recomputation and patches a pass (of an optimizer
step: among micro-batches and patches a pass) by an estimate of the time (``relative_cost``), which ranks and is no measurement;
a sweep measures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, NamedTuple

from pbbench.experiment.experiment import Experiment, merge, parse_experiment
from pbbench.experiment.settings import Precision, Recompute, resolve_patch_batch_size
from pbbench.sweep.grid import Cell
from pbbench.sweep.planning.calibration import Calibration
from pbbench.sweep.planning.forecast import STEPS, forecast_step, path_of

MOST_IMAGES = 65_536
RECOMPUTE: tuple[Recompute, ...] = ("none", "cheap", "full")


@dataclass(frozen=True)
class Machine:
    """The rates behind ``relative_cost``: orders of magnitude of a data-centre GPU. They only rank settings."""

    flops_per_second: float = 40e12
    """float32 with TF32; half precision runs at twice that."""
    bytes_per_second: float = 2e12
    seconds_per_kernel: float = 4e-6
    overlapping: bool = True
    """Kernels are launched while others compute."""


@dataclass(frozen=True)
class Fit:
    """A setting that fits: its predicted bytes and what is left of the limit."""

    patch_divider: int
    batch_size: int
    gradient_accumulation_steps: int
    patch_batch_size: int
    mixed_precision: str
    recompute: str
    predicted_live_bytes: int
    predicted_reserved_bytes: int
    with_known_terms_bytes: int
    """Reserved, with workspaces and context where the calibration knows them."""
    needed_bytes: int
    """What is held against the limit: live bytes in a search for a CPU, else those with the known terms."""
    margin_bytes: int
    relative_cost: float
    """Estimated time per image; only its order means something."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Search:
    """Searches for one step ("train_step" or "sample_step") of an experiment under ``limit_bytes``; predictions are kept.

    ``live``: the limit is one on live bytes, as on a CPU, instead of reserved ones.
    """

    def __init__(
        self,
        experiment: Experiment,
        step: str,
        limit_bytes: int,
        calibration: Calibration,
        settings: Any = None,
        *,
        live: bool = False,
    ) -> None:
        assert step in STEPS
        self.experiment = merged(experiment, {"sweep": {"equal": "images", "equal_seconds": None, "equal_memory": None}})
        self.step, self.limit, self.live = step, limit_bytes, live
        self.calibration, self.settings = calibration, settings
        self._known: dict[tuple[Any, ...], _Predicted] = {}
        self._counted: dict[tuple[Any, ...], tuple[int, int, int]] = {}

    def largest_batch(self, divider: int) -> Fit | None:
        """The largest batch that fits with the experiment's patches a pass, precision and recomputation; None: none does."""
        training, sampling = self.experiment.training, self.experiment.sampling
        section: Any = training if self.step == "train_step" else sampling

        def fit(batch: int) -> Fit:
            patches = resolve_patch_batch_size(section.patch_batch_size, batch, divider)
            return self._fit(divider, batch, patches, section.mixed_precision, training.recompute)

        best = largest(lambda batch: fit(batch).needed_bytes, self.limit, MOST_IMAGES)
        return fit(best) if best else None

    def fastest(self, divider: int, batch: int, precisions: Sequence[Precision]) -> Fit | None:
        """The setting of least estimated time that fits, for this divider and batch; None: none fits."""
        best: Fit | None = None
        recomputes: tuple[Recompute, ...] = RECOMPUTE if self.step == "train_step" else ("none",)
        for precision, recompute in product(precisions, recomputes):
            for patches in divisors(batch * divider**2):  # equal passes; the fewer, the faster
                found = self._fit(divider, batch, patches, precision, recompute)
                if best is not None and found.relative_cost >= best.relative_cost:
                    break
                if found.margin_bytes >= 0:
                    best = found
                    break
        return best

    def quickest_step(self, divider: int) -> Fit:
        """How one optimizer step of the experiment takes the least estimated time of the ways that fit: among micro-batches,
        their number times their size unchanged, and patches a pass; of equal times that of the fewest micro-batches. Where
        none fits (a negative margin), the way that needs least."""
        training = self.experiment.training
        images = training.batch_size * training.gradient_accumulation_steps
        batches = divisors(images)

        def able(patches: int) -> list[int]:
            return [batch for batch in batches if batch * divider**2 % patches == 0]

        def fit(batch: int, patches: int) -> Fit:
            return self._fit(divider, batch, patches, training.mixed_precision, training.recompute, images // batch)

        # The time falls with the patches a pass alone. All of them at once is a case of its own: no gradients wait meanwhile.
        every, *fewer = divisors(batches[0] * divider**2)
        tried = [fit(batches[0], every)]
        if tried[0].margin_bytes < 0 and fewer:
            tried.append(first_fitting(fewer, lambda patches: fit(able(patches)[-1], patches)))
        chosen = min(tried, key=lambda found: found.needed_bytes)
        if chosen.margin_bytes >= 0:
            chosen = first_fitting(able(chosen.patch_batch_size), lambda batch: fit(batch, chosen.patch_batch_size))
        return chosen

    def _fit(
        self, divider: int, batch: int, patches: int, precision: Precision, recompute: Recompute, micro: int | None = None
    ) -> Fit:
        """``micro``: micro-batches of an optimizer step; None: the experiment's."""
        micro = micro or (self.experiment.training.gradient_accumulation_steps if self.step == "train_step" else 1)
        key = (divider, batch, patches, precision, recompute, micro)
        if key not in self._known:
            self._known[key] = self._predict(*key)
        live, reserved, weights = self._known[key]
        whole = reserved + self.calibration.known_bytes
        needed = live if self.live else whole
        passes = -(-batch * divider**2 // patches)
        flops, kernels, _ = self._count(divider, recompute, precision)
        cost = relative_cost(flops * batch, passes, kernels, weights, precision, self.step) / batch
        sizes = (live, reserved, whole, needed, self.limit - needed)
        return Fit(divider, batch, micro, patches, precision, recompute, *sizes, cost)

    def _predict(
        self, divider: int, batch: int, patches: int, precision: Precision, recompute: Recompute, micro: int
    ) -> _Predicted:
        over = {"training": {"recompute": recompute, "gradient_accumulation_steps": micro}}
        experiment = merged(self.experiment, over | {"model": {"patch_divider": divider}})
        cell = Cell("search", "measure", divider, patches, batch, precision)
        found = forecast_step(experiment, cell, self.step, settings=self.settings)
        return _Predicted(found.live.peak_bytes, found.steady.warm.reserved_bytes, found.live.by_category["parameter"])

    def _count(self, divider: int, recompute: Recompute, precision: Precision) -> tuple[int, int, int]:
        key = (divider, recompute, precision)
        if key not in self._counted:
            self._counted[key] = one_pass(self.experiment, self.step, *key)
        return self._counted[key]


class _Predicted(NamedTuple):
    """Peaks of a step, and bytes of the weights."""

    live: int
    reserved: int
    weights: int


def merged(experiment: Experiment, over: dict[str, Any]) -> Experiment:
    """The experiment with other settings, what had been found to fit left out."""
    values = merge(experiment.model_dump(mode="json"), over)
    values["sweep"]["fitted"] = {}
    return parse_experiment(values, "--memory-limit")


def first_fitting(options: Sequence[int], fit: Callable[[int], Fit]) -> Fit:
    """The first of ``options`` that fits, where each needs no more than the one before; the last where none does. Tries the
    first and the last, then halves what is between."""
    found = fit(options[0])
    if found.margin_bytes >= 0:
        return found
    found, low, high = fit(options[-1]), 0, len(options) - 1
    while found.margin_bytes >= 0 and high - low > 1:
        middle = (low + high) // 2
        between = fit(options[middle])
        if between.margin_bytes >= 0:
            found, high = between, middle
        else:
            low = middle
    return found


def divisors(number: int) -> list[int]:
    """The largest first."""
    return [n for n in range(number, 0, -1) if number % n == 0]


def one_pass(
    experiment: Experiment, step: str, divider: int, recompute: Recompute, precision: Precision = "no"
) -> tuple[int, int, int]:
    """Floating-point operations of the step by torch's formulas, the operators that make a tensor, without the optimizer's,
    and the bytes of the weights: on fake tensors, for one image in one pass. Per image no batch or chunk changes the first,
    and none the second per pass."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from pbbench.sweep import workload

    training = {"recompute": recompute, "gradient_accumulation_steps": 1}
    resolved = merged(experiment, {"training": training, "model": {"patch_divider": divider}})
    cell = Cell("flops", "measure", divider, divider**2, 1, precision)
    build: Callable[..., Any] = workload.training_workload if step == "train_step" else workload.sampling_workload
    with path_of(resolved), FakeTensorMode():
        work = build(resolved, cell, torch.device("cpu"))
        with workload.FlopCount() as flops:
            live = work.trace(record_events=True)
    events = live.events or []
    made = sum(e.delta > 0 and e.allocation.born > 0 and e.allocation.phase != "optimizer" for e in events)
    return flops.total, made, live.by_category["parameter"]


def relative_cost(
    flops: int, passes: int, kernels: int, weight_bytes: int, precision: str, step: str, machine: Machine = Machine()
) -> float:
    """A roofline's estimate of a step's seconds: each pass takes its arithmetic or the launches of its kernels, whichever is
    longer, and reads the weights again (training also writes and adds up their gradients). It ranks settings, no more."""
    rate = machine.flops_per_second * (1 if precision == "no" else 2)
    traffic = weight_bytes * (6 if step == "train_step" else 1) / machine.bytes_per_second
    arithmetic, launches = flops / passes / rate, kernels * machine.seconds_per_kernel
    return passes * ((max(arithmetic, launches) if machine.overlapping else arithmetic + launches) + traffic)


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
