"""A traced step on the replayed allocator: hand-computed peaks of its repeats, phases, and the optimizer's state in between."""

import pytest
import torch
from torch import nn

from pbbench.memory.prediction.fake import Step, predict
from pbbench.memory.prediction.steady import operators, steady_state
from pbbench.memory.tracer.live import LiveTrace

MIB = 2**20


def trained(width: int = 1024, *, optimizer: type[torch.optim.Optimizer] = torch.optim.SGD, **settings: float) -> LiveTrace:
    """One linear layer without bias: its weight is 4 MiB at width 1024, its input and output 4 MiB at 1024 rows."""

    def make() -> Step:
        layer = nn.Linear(width, width, bias=False)
        x = torch.zeros(1024, width)
        stepper = optimizer(layer.parameters(), lr=0.1, foreach=False, **settings)  # type: ignore[call-arg]

        def run() -> None:
            layer(x).sum().backward()
            stepper.step()
            stepper.zero_grad()

        return Step(run, layer, stepper, inputs=x)

    return predict(make, record_events=True)


def test_segments_are_what_is_reserved() -> None:
    """Weight, input, output and the weight's gradient are 4 MiB each: 20 MiB segments hold five such blocks. The loss and its
    gradient are 512 bytes each in a 2 MiB segment. Backward's gradient of the sum is expanded, not stored."""
    found = steady_state(trained())
    assert found.warm.reserved_bytes == 22 * MIB
    assert found.num_segments == 2
    assert found.phases.keys() == {"forward", "backward", "optimizer"}
    # Weight, input, output, the scalar (forward); then without the output, which backward does not need, the gradient.
    assert found.phases["forward"].allocated_bytes == 12 * MIB + 512
    assert found.warm.allocated_bytes == max(peak.allocated_bytes for peak in found.phases.values())
    assert found.fragmentation == pytest.approx(1 - found.warm.allocated_bytes / (22 * MIB))


def test_the_optimizers_state_is_made_in_the_first_step() -> None:
    """Two states of 4 MiB come when the optimizer begins, beside weight, input and gradient. Forward's output then has no block
    of its own left in the first segment from the second step on: a second segment."""
    found = steady_state(trained(optimizer=torch.optim.Adam))
    assert found.cold.reserved_bytes <= found.warm.reserved_bytes
    live = trained(optimizer=torch.optim.Adam)
    assert found.warm.allocated_bytes >= live.peak_bytes
    assert found.warm.allocated_bytes - live.peak_bytes < 2 * MIB


@pytest.mark.parametrize("width", [64, 513, 1000, 1025])
def test_allocated_is_never_below_the_live_bytes(width: int) -> None:
    live = trained(width)
    found = steady_state(live)
    assert live.peak_bytes <= found.warm.allocated_bytes <= found.warm.reserved_bytes
    for name, peak in live.phases.items():
        assert peak.peak_bytes <= found.phases[name].allocated_bytes


def test_a_step_that_replaces_what_it_found() -> None:
    """A buffer made anew in every step: repeats free the one before, and what is held does not grow."""

    def make() -> Step:
        layer = nn.Linear(8, 8)
        layer.register_buffer("kept", torch.zeros(2**20))

        def run() -> None:
            layer.kept = layer.kept + 1  # 4 MiB

        return Step(run, layer)

    found = steady_state(predict(make, record_events=True))
    assert found.warm.allocated_bytes == 8 * MIB + 512 + 512  # the old and the new, the weight, the bias
    assert found.warm.reserved_bytes == 22 * MIB


def test_a_trace_without_events_cannot_be_replayed() -> None:
    live = predict(lambda: Step(lambda: torch.zeros(4), nn.Linear(2, 2)))
    for function in (steady_state, operators):
        with pytest.raises(ValueError, match="record_events"):
            function(live)


def test_the_operators_are_named() -> None:
    assert {"mm", "sum"} <= set(operators(trained()))
