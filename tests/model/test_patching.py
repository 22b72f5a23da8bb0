"""Images to patches and back, against loops that spell out the order."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pbbench.errors import InputError
from pbbench.model.patching import global_content, merge, patch_position, row_chunks, row_images, split, write_rows

SIZES = [(16, 16), (8, 24)]


def images(count: int, height: int, width: int) -> torch.Tensor:
    return torch.arange(count * 3 * height * width, dtype=torch.float32).view(count, 3, height, width)


@pytest.mark.parametrize("d", [1, 2, 4])
@pytest.mark.parametrize("size", SIZES)
def test_rows_are_patch_major(d: int, size: tuple[int, int]) -> None:
    x = images(3, *size)
    patches = split(x, d)
    h, w = size[0] // d, size[1] // d
    assert patches.shape == (3 * d * d, 3, h, w)
    for i in range(d):
        for j in range(d):
            for n in range(3):
                expected = x[n, :, i * h : (i + 1) * h, j * w : (j + 1) * w]
                assert torch.equal(patches[(i * d + j) * 3 + n], expected)
    assert torch.equal(merge(patches, d), x)


@given(num_images=st.integers(1, 4), d=st.integers(1, 4), patch_batch_size=st.integers(1, 70))
@settings(max_examples=60, deadline=None)
def test_chunks_of_any_size_carry_the_same_patches(num_images: int, d: int, patch_batch_size: int) -> None:
    x = images(num_images, 2 * d, 3 * d)
    whole = split(x, d)
    out = torch.full_like(x, torch.nan)
    chunks = row_chunks(num_images * d * d, patch_batch_size)
    for rows in chunks:
        patches = split(x, d, rows)
        assert 1 <= len(patches) <= patch_batch_size
        assert torch.equal(patches, whole[rows])
        write_rows(out, patches, rows, d)
    assert torch.equal(out, x)
    assert len(chunks) == -(-num_images * d * d // min(patch_batch_size, num_images * d * d))


def test_one_patch_index_is_a_view() -> None:
    x = images(3, 16, 16)
    assert split(x, 2, slice(3, 6)).untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


def test_without_a_patch_batch_size_all_rows_go_at_once() -> None:
    assert row_chunks(12, None) == [slice(0, 12)]
    assert row_chunks(12, 5) == [slice(0, 5), slice(5, 10), slice(10, 12)]


@pytest.mark.parametrize("wrong", [0, -2])
def test_a_patch_batch_size_below_one_is_refused(wrong: int) -> None:
    with pytest.raises(InputError, match=f"patch_batch_size is {wrong}"):
        row_chunks(12, wrong)


@pytest.mark.parametrize("rows", [slice(0, 0), slice(4, 2), slice(0, 13), slice(-3, None), slice(0, 12, 2)])
def test_rows_that_do_not_fit_are_refused(rows: slice) -> None:
    with pytest.raises(InputError, match="do not fit 3 images"):
        split(images(3, 16, 16), 2, rows)


def test_position_and_image_of_straddling_rows() -> None:
    rows, device = slice(2, 7), torch.device("cpu")  # 3 images: image 2 of patch 0, all of patch 1, image 0 of patch 2
    assert row_images(rows, 3, device).tolist() == [2, 0, 1, 2, 0]
    assert patch_position(rows, 3, 2, device).argmax(dim=1).tolist() == [0, 1, 1, 1, 2]
    assert patch_position(rows, 3, 2, device).sum(dim=1).tolist() == [1] * 5


@pytest.mark.parametrize("d", [1, 2, 4])
@pytest.mark.parametrize("size", SIZES)
def test_global_content_is_the_image_at_the_patches_size(d: int, size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size)
    torch.testing.assert_close(global_content(x, d), F.adaptive_avg_pool2d(x, (size[0] // d, size[1] // d)))
