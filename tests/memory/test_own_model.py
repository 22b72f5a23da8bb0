"""Models from elsewhere: what a step is predicted to hold on fake tensors is what it holds when it runs, to the byte."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pbbench import memory
from pbbench.memory import Step

Make = Callable[[], Step]


def resnet_training() -> Step:
    from torchvision.models import resnet18

    model = resnet18(num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    images, labels = torch.randn(2, 3, 32, 32), torch.randint(0, 10, (2,))

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return Step(step, model, optimizer, inputs=(images, labels))


def resnet_evaluation() -> Step:
    from torchvision.models import resnet18

    model, images = resnet18(num_classes=10).eval(), torch.randn(2, 3, 32, 32)

    def step() -> None:
        with torch.no_grad():
            model(images)

    return Step(step, model, inputs=images)


def diffusers_unet() -> nn.Module:
    from diffusers import UNet2DModel

    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    return UNet2DModel(16, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8, attention_head_dim=8, **blocks)


def unet_training() -> Step:
    model = diffusers_unet()
    optimizer = torch.optim.AdamW(model.parameters())
    x_t, noise, t = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16), torch.randint(0, 100, (2,))

    def step() -> None:
        optimizer.zero_grad()
        F.mse_loss(model(x_t, t).sample, noise).backward()
        optimizer.step()

    return Step(step, model, optimizer, inputs=(x_t, noise, t))


def unet_sampling() -> Step:
    from diffusers import DDIMScheduler

    model, scheduler = diffusers_unet().eval(), DDIMScheduler(num_train_timesteps=100)
    scheduler.set_timesteps(3)
    noise = torch.randn(2, 3, 16, 16)

    def step() -> None:
        x_t = noise
        with torch.no_grad():
            for t in (66, 33, 0):  # numbers: a fake tensor of timesteps could not be read
                x_t = scheduler.step(model(x_t, t).sample, t, x_t).prev_sample

    return Step(step, model, inputs=noise)


MODELS = [resnet_training, resnet_evaluation, unet_training, unet_sampling]


@pytest.mark.parametrize("make", MODELS)
def test_predicted_is_what_the_real_step_holds(make: Make) -> None:
    """Every figure of the trace: peak, categories, modules and phases."""
    predicted, real = memory.predict(make), make()
    if real.optimizer is not None:
        real.run()  # the prediction is of a warm step
    assert predicted == memory.trace(real.run, modules=real.modules, optimizer=real.optimizer, inputs=real.inputs)
    assert predicted.by_category["activation"] > 0


def test_a_report_of_a_model_from_elsewhere() -> None:
    step = unet_training()
    report = memory.measure(
        step.run, device="cpu", repeats=2, modules=step.modules, optimizer=step.optimizer, inputs=step.inputs
    )
    assert report.outcome.status == "ok"
    assert report.live == memory.predict(unet_training)
    assert sum(report.attribution.values()) == report.live.peak_bytes


def test_a_step_that_reads_a_tensors_value_is_refused() -> None:
    def make() -> Step:
        step = unet_sampling()
        timesteps = torch.tensor([66, 33, 0])
        return Step(lambda: timesteps.tolist() and step.run(), step.modules)

    with pytest.raises(Exception, match="_local_scalar_dense"):
        memory.predict(make)
