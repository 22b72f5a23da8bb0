"""Which images are trained on and which are kept back, decided once for training, scoring and the held-out loss."""

from __future__ import annotations

from pbbench.data.images import ImageSet, open_images
from pbbench.experiment.experiment import Experiment


def training_and_held_out(experiment: Experiment) -> tuple[ImageSet, ImageSet | None]:
    """(training images, held-out images) of ``experiment.data``; None where none are held out.

    The last ``data.num_held_out`` images are kept back, at most a tenth of the set. A set's order has nothing to do with what
    its images show (see ``open_images``), so both parts are random choices.
    """
    data = experiment.data
    images = open_images(data.source, experiment.model.size, data.num_images, experiment.data_seed)
    held_out = min(data.num_held_out, len(images) // 10)
    if not held_out:
        return images, None
    return images.subset(0, len(images) - held_out), images.subset(len(images) - held_out, len(images))
