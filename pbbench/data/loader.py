"""The endless stream of training batches: every batch is a function of (seed, step), so training can restart anywhere.

The stream is one permutation of the images after another, one per epoch, cut into batches without regard to where an epoch
ends: nothing is dropped, and a set smaller than a batch works. The order of the images comes from (seed, epoch), the flip of an
image from (seed, epoch, image). The batch of all processes together is cut from the stream and each process takes its rows,
so N processes with batches of B see what one process with batches of N·B sees.

A set held in memory is gathered by a thread that keeps a few batches ahead; any other is decoded by worker processes.
"""

from __future__ import annotations

import itertools
import sys
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from pbbench.data.entries import Unreadable
from pbbench.data.images import ImageSet
from pbbench.errors import InputError
from pbbench.experiment.experiment import Experiment

_AHEAD = 4  # batches prepared before they are asked for


class Order:
    """Which image stands at which position of the endless stream, and whether it is flipped there."""

    def __init__(self, num_images: int, seed: int, flip: bool) -> None:
        self.num_images, self.seed, self.flip = num_images, seed, flip
        self._drawn: dict[int, tuple[NDArray[np.int64], NDArray[np.bool_]]] = {}  # this epoch and the one before

    def _epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        if epoch not in self._drawn:
            self._drawn = {**dict(list(self._drawn.items())[-1:]), epoch: self._draw(epoch)}
        return self._drawn[epoch]

    def _draw(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """(order, flips): flips[i] belongs to image i. Raw bits and a stable sort: the same with every version of NumPy."""
        bits = np.random.PCG64(np.random.SeedSequence((self.seed, epoch)))
        order = np.argsort(bits.random_raw(self.num_images), kind="stable")
        flips = (bits.random_raw(self.num_images) >> np.uint64(63)).astype(bool) & self.flip
        return order, flips

    def take(self, start: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """(image indices, flips) of the positions ``start`` … ``start + count`` − 1."""
        indices, flips = [], []
        while count:
            epoch, rank = divmod(start, self.num_images)
            order, epoch_flips = self._epoch(epoch)
            part = order[rank : rank + count]
            indices.append(part)
            flips.append(epoch_flips[part])
            start, count = start + len(part), count - len(part)
        return np.concatenate(indices), np.concatenate(flips)


Prepared = tuple[torch.Tensor | None, list[Unreadable]]
"""A batch (None: no image of the set can be read any more) and the files that proved unreadable on the way."""


class _Batches(Dataset[Prepared]):
    """This process's batches by number, for the thread or the worker processes that prepare them."""

    def __init__(self, images: ImageSet, order: Order, batch_size: int, process_index: int, num_processes: int) -> None:
        self.images, self.order, self.batch_size = images, order, batch_size
        self.process_index, self.num_processes = process_index, num_processes

    def __getitem__(self, number: int) -> Prepared:
        start = (number * self.num_processes + self.process_index) * self.batch_size
        indices, flips = self.order.take(start, self.batch_size)
        known = len(self.images.skipped)
        try:
            batch = self.images.batch(indices)  # N C H W
        except InputError:  # raised where the batch is asked for: across processes an error would arrive as a traceback
            return None, self.images.skipped[known:]
        pixels = batch.numpy()  # NumPy's copies stay on this thread; torch's would wake the cores that training computes on
        pixels[flips] = pixels[flips, :, :, ::-1]
        return batch, self.images.skipped[known:]


def training_loader(
    images: ImageSet,
    experiment: Experiment,
    start_step: int = 0,
    *,
    process_index: int = 0,
    num_processes: int = 1,
    pin_memory: bool = False,
) -> Iterator[torch.Tensor]:
    """Endless uint8 (N, 3, H, W) batches from ``start_step`` (optimizer steps already done) on: per optimizer step
    ``gradient_accumulation_steps`` of them, N = ``training.batch_size``.

    ``pin_memory`` puts them where a GPU can copy them from while it computes. Close the iterator to end its thread or workers.
    Raises InputError where the experiment's channels or size are not those of the images, or no image can be read any more."""
    model, training = experiment.model, experiment.training
    if model.channels != 3:
        raise InputError(f"model.channels is {model.channels}, but the images have 3 (red, green, blue); set model.channels=3")
    if model.size != images.size:
        raise InputError(f"model.image_size is {model.size}, but the images were opened at {images.size}")
    order = Order(len(images), experiment.seed, experiment.data.horizontal_flip)
    batches = _Batches(images, order, training.batch_size, process_index, num_processes)
    first = start_step * training.gradient_accumulation_steps
    if images.in_memory:
        return _checked(_by_thread(batches, first, pin_memory), images)
    return _checked(_by_workers(batches, first, experiment.data.num_workers, pin_memory), images)


def _checked(prepared: Generator[Prepared, None, None], images: ImageSet) -> Iterator[torch.Tensor]:
    with closing(prepared):
        for batch, unreadable in prepared:
            images.record(unreadable)
            if batch is None:
                raise InputError(f"no image of {images.description} can be read any more; is the disk still there?")
            yield batch


def _by_thread(batches: _Batches, first: int, pin_memory: bool) -> Generator[Prepared, None, None]:
    def prepare(number: int) -> Prepared:
        batch, unreadable = batches[number]
        return batch.pin_memory() if pin_memory and batch is not None else batch, unreadable

    with ThreadPoolExecutor(1, thread_name_prefix="batches") as thread:
        ahead = deque(thread.submit(prepare, first + k) for k in range(_AHEAD))
        for number in itertools.count(first + _AHEAD):
            prepared = ahead.popleft().result()
            ahead.append(thread.submit(prepare, number))
            yield prepared


def _by_workers(batches: _Batches, first: int, workers: int, pin_memory: bool) -> Generator[Prepared, None, None]:
    yield from DataLoader(
        batches,
        batch_size=None,
        sampler=range(first, sys.maxsize),
        num_workers=workers,
        prefetch_factor=_AHEAD if workers else None,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else its iterator would draw from the global generator and shift training's noise
    )
