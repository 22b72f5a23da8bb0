"""The training stream: every image once an epoch, the same from any step, whoever prepares it and however many share it."""

import threading
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pbbench.data.images import ImageSet, open_images
from pbbench.data.loader import Order, training_loader
from pbbench.data.synthetic import scene
from pbbench.errors import InputError
from pbbench.experiment.experiment import Experiment, parse_experiment

SIZE = (16, 16)
KNOWN_INDICES = [3, 2, 1, 6, 0, 7, 4, 5, 7, 4, 5, 1, 6, 2, 0, 3]
KNOWN_FLIPS = [0, 1, 1, 1, 1, 0, 1, 0, 0, 0, 1, 1, 1, 0, 1, 0]


def experiment(
    batch_size: int = 4, seed: int = 0, accumulation: int = 1, flip: bool = True, workers: int = 0, **model
) -> Experiment:
    return parse_experiment(
        {
            "seed": seed,
            "model": {"dim": 8, "dim_mults": [1, 2], "image_size": list(SIZE), "patch_divider": 2} | model,
            "data": {"horizontal_flip": flip, "num_workers": workers},
            "training": {"batch_size": batch_size, "gradient_accumulation_steps": accumulation},
        },
        "test",
    )


def take(images: ImageSet, settings: Experiment, count: int, start_step: int = 0, **options) -> torch.Tensor:
    """The next ``count`` batches as one (count, N, 3, H, W)."""
    loader = training_loader(images, settings, start_step, **options)
    batches = torch.stack(list(islice(loader, count)))
    loader.close()  # type: ignore[attr-defined]
    return batches


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for number in range(10):
        Image.fromarray(scene(0, number, SIZE)).save(tmp_path / f"{number}.png")
    return tmp_path


def test_batches_are_uint8_images_of_the_set():
    images = open_images("synthetic", SIZE, 10)
    batches = take(images, experiment(flip=False), 3)
    assert batches.shape == (3, 4, 3, *SIZE)
    assert batches.dtype == torch.uint8
    known = {image.numpy().tobytes() for image in images}  # type: ignore[attr-defined]
    assert all(image.numpy().tobytes() in known for image in batches.flatten(0, 1))


@pytest.mark.parametrize("num_images", [1, 3, 7, 100])
def test_every_epoch_shows_every_image_once_in_an_order_of_its_own(num_images):
    order = Order(num_images, seed=5, flip=True)
    epochs = [order.take(epoch * num_images, num_images) for epoch in range(6)]
    for indices, flips in epochs:
        assert sorted(indices) == list(range(num_images))
        assert flips.shape == (num_images,)
    if num_images == 100:
        assert len({indices.tobytes() for indices, _ in epochs}) == 6
        assert len({flips.tobytes() for _, flips in epochs}) == 6


def test_the_stream_is_the_same_wherever_it_is_cut():
    whole = Order(7, seed=1, flip=True).take(0, 60)
    for start, count in ((0, 1), (6, 2), (5, 30), (13, 9), (59, 1)):
        part = Order(7, seed=1, flip=True).take(start, count)
        for mine, other in zip(part, whole, strict=True):
            np.testing.assert_array_equal(mine, other[start : start + count])


def test_a_flip_belongs_to_the_seed_the_epoch_and_the_image():
    indices, flips = Order(50, seed=2, flip=True).take(0, 100)
    flipped = dict(zip(indices[:50], flips[:50], strict=True))
    other = dict(zip(*Order(50, seed=3, flip=True).take(0, 50), strict=True))
    assert flipped != other
    assert flipped != dict(zip(indices[50:], flips[50:], strict=True))
    _, many = Order(10_000, seed=0, flip=True).take(0, 10_000)
    assert abs(many.mean() - 0.5) < 0.02
    assert not Order(50, seed=2, flip=False).take(0, 100)[1].any()


def test_flipped_images_are_mirrored_and_nothing_else():
    images = open_images("synthetic", SIZE, 40)
    plain, flipped = take(images, experiment(40, flip=False), 1)[0], take(images, experiment(40, flip=True), 1)[0]
    mirrored = 0
    for one, other in zip(plain, flipped, strict=True):
        assert torch.equal(one, other) or torch.equal(one.flip(-1), other)
        mirrored += not torch.equal(one, other)
    assert 8 < mirrored < 32
    torch.testing.assert_close(
        images.batch(range(40)), open_images("synthetic", SIZE, 40).batch(range(40))
    )  # the set is unharmed


def test_the_order_is_known_for_good():
    """A run that is continued with another version of NumPy or torch must see the images it would have seen."""
    indices, flips = Order(8, seed=0, flip=True).take(0, 16)
    assert indices.tolist() == KNOWN_INDICES
    assert flips.astype(int).tolist() == KNOWN_FLIPS


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("limit", [2**30, 0], ids=["in memory", "as used"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_starting_at_any_step_continues_the_uninterrupted_run(files, limit, workers, accumulation):
    images = open_images(str(files), SIZE, memory_limit_bytes=limit)
    settings = experiment(workers=workers, accumulation=accumulation)
    whole = take(images, settings, 12)
    for step in (1, 3) if workers == 0 else (2,):
        torch.testing.assert_close(take(images, settings, 12 - step * accumulation, step), whole[step * accumulation :])


def test_who_prepares_the_batches_does_not_matter(files):
    held, used = (open_images(str(files), SIZE, memory_limit_bytes=limit) for limit in (2**30, 0))
    expected = take(held, experiment(), 8)
    for workers in (0, 1, 2):
        torch.testing.assert_close(take(used, experiment(workers=workers), 8), expected)


@pytest.mark.parametrize("num_processes", [2, 3])
def test_several_processes_see_together_what_one_sees_with_their_batches_joined(num_processes):
    images = open_images("synthetic", SIZE, 10)
    alone = take(images, experiment(4 * num_processes), 5, 2)
    shared = [
        take(images, experiment(4), 5, 2, process_index=index, num_processes=num_processes) for index in range(num_processes)
    ]
    torch.testing.assert_close(torch.cat(shared, dim=1), alone)


def test_a_set_smaller_than_a_batch_fills_it():
    batch = take(open_images("synthetic", SIZE, 3), experiment(8, flip=False), 1)[0]
    kinds, counts = torch.unique(batch.flatten(1), dim=0, return_counts=True)
    assert sorted(counts.tolist()) == [2, 3, 3]
    assert len(kinds) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_file_neither_ends_nor_changes_a_run_and_is_recorded(files, workers, caplog):
    """The first readable image after it stands in, whichever process comes upon it; the parent process learns its name."""
    whole = open_images(str(files), SIZE, memory_limit_bytes=0)
    names = [entry.name for entry in whole._store._entries]  # type: ignore[attr-defined]
    expected = take(whole, experiment(5, flip=False), 4)
    path = files / names[6]
    replaced, stand_in = whole[6].clone(), whole[7].clone()
    path.write_bytes(path.read_bytes()[:-40])
    images = open_images(str(files), SIZE, memory_limit_bytes=0)
    assert images.skipped == []
    batches = take(images, experiment(5, flip=False, workers=workers), 4)
    assert [name for name, _ in images.skipped] == [names[6]]
    assert caplog.text.count(f"{names[6]} cannot be read") == 1
    lost = (expected == replaced).flatten(2).all(dim=2)
    assert lost.sum() == 2  # two epochs
    torch.testing.assert_close(batches[~lost], expected[~lost])
    assert all(torch.equal(image, stand_in) for image in batches[lost])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_disk_that_goes_away_ends_the_run_with_one_line(files, workers):
    images = open_images(str(files), SIZE, memory_limit_bytes=0)
    for path in files.iterdir():
        path.unlink()
    with pytest.raises(InputError, match="can be read any more") as caught:
        take(images, experiment(workers=workers), 1)
    assert "\n" not in str(caught.value)


def test_the_set_must_be_of_the_experiment():
    images = open_images("synthetic", SIZE, 3)
    with pytest.raises(InputError, match=r"model.channels is 1, .* set model.channels=3"):
        training_loader(images, experiment(channels=1))
    with pytest.raises(InputError, match=r"model.image_size is \(32, 32\)"):
        training_loader(images, experiment(image_size=32))


@pytest.mark.parametrize(("limit", "workers"), [(2**30, 0), (0, 0), (0, 2)])
def test_random_states_of_the_training_process_are_left_alone(files, limit, workers):
    images = open_images(str(files), SIZE, memory_limit_bytes=limit)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    take(images, experiment(workers=workers), 3)
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_before)


def test_closing_the_stream_ends_its_thread():
    before = set(threading.enumerate())  # other tests' threads, which may end meanwhile
    loader = training_loader(open_images("synthetic", SIZE, 3), experiment())
    next(loader)
    (thread,) = set(threading.enumerate()) - before
    loader.close()  # type: ignore[attr-defined]
    assert not thread.is_alive()


@pytest.mark.cuda
@pytest.mark.parametrize(("limit", "workers"), [(2**30, 0), (0, 2)])
def test_batches_lie_in_pinned_memory_for_a_gpu(files, limit, workers):
    images = open_images(str(files), SIZE, memory_limit_bytes=limit)
    loader = training_loader(images, experiment(workers=workers), pin_memory=True)
    assert all(batch.is_pinned() for batch in islice(loader, 3))
    loader.close()  # type: ignore[attr-defined]
