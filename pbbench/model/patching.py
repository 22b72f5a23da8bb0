"""Images to patches and back: pure functions, no parameters.

An image is divided into d × d patches; patch (i, j), row i and column j, has the index k = i·d + j. Patches of a batch are
numbered patch-major, as released: **row k·N + n is patch k of image n**. A chunk of rows is one index, a part, or more.

Shapes: images N C H W; patches R C h w with h = H / d, w = W / d and R rows, of P = N·d² in all.
Nothing here builds more than the rows asked for: that is where the memory of patch-wise generation is saved.

Source: Arakawa et al., "Memory Efficient Diffusion Probabilistic Models via Patch-based Generation", CVPRW 2023.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from pbbench.errors import InputError


def row_chunks(num_rows: int, patch_batch_size: int | None) -> list[slice]:
    """Consecutive slices of at most ``patch_batch_size`` rows that cover ``num_rows``: the chunk loop of sampling and training.

    None, or a number above ``num_rows``, gives one chunk: all patches in one pass, as released. Raises InputError below 1.
    """
    if patch_batch_size is not None and patch_batch_size < 1:
        raise InputError(f"patch_batch_size is {patch_batch_size}; it must be at least 1 (or None for all patches in one pass)")
    step = min(patch_batch_size or num_rows, num_rows)
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


def check_rows(rows: slice, num_images: int, d: int) -> slice:
    """``rows`` with both ends filled in. Raises InputError for an empty, strided or overlong slice."""
    total = num_images * d * d
    start, stop = rows.start or 0, total if rows.stop is None else rows.stop
    if rows.step not in (None, 1) or not 0 <= start < stop <= total:
        raise InputError(f"rows {rows} do not fit {num_images} images of {d}×{d} patches: 0 ≤ start < stop ≤ {total}")
    return slice(start, stop)


def segments(rows: slice, num_images: int, d: int) -> Iterator[tuple[int, int, slice]]:
    """The rows as pieces of one patch index each: (i, j, images), in row order."""
    for k in range(rows.start // num_images, (rows.stop - 1) // num_images + 1):
        first = k * num_images
        yield k // d, k % d, slice(max(rows.start - first, 0), min(rows.stop - first, num_images))


def patch_of(images: Tensor, i: int, j: int, d: int) -> Tensor:
    """Patch (i, j) of every image: a view, N C h w."""
    h, w = images.shape[-2] // d, images.shape[-1] // d
    return images[:, :, i * h : (i + 1) * h, j * w : (j + 1) * w]


def _grid(images: Tensor, d: int) -> Tensor:
    """The patches of ``images`` (N C H W, contiguous: a view) by row and column, d d N C h w."""
    N, C, H, W = images.shape
    return images.reshape(N, C, d, H // d, d, W // d).permute(2, 4, 0, 1, 3, 5)


def split(images: Tensor, d: int, rows: slice | None = None) -> Tensor:
    """The patches of ``images`` (N C H W) in patch-major order, or those of ``rows`` only: R C h w.

    A chunk of one patch index comes as a view of ``images``; nothing is copied for it.
    """
    N, C, H, W = images.shape
    if rows is None:
        return _grid(images, d).reshape(d * d * N, C, H // d, W // d)
    pieces = [patch_of(images, i, j, d)[n] for i, j, n in segments(check_rows(rows, N, d), N, d)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def merge(patches: Tensor, d: int) -> Tensor:
    """All patches (P C h w, patch-major) back into images (N C H W): the inverse of ``split``."""
    P, C, h, w = patches.shape
    return patches.reshape(d, d, -1, C, h, w).permute(2, 3, 0, 4, 1, 5).reshape(P // (d * d), C, d * h, d * w)


def write_rows(out: Tensor, patches: Tensor, rows: slice, d: int) -> None:
    """Write the patches of ``rows`` (R C h w) to their places in the images ``out`` (N C H W), in place."""
    N, done = out.shape[0], 0
    if len(patches) == N * d * d and out.is_contiguous():  # all of them: one copy, not one for each
        _grid(out, d).copy_(patches.view(d, d, N, *patches.shape[1:]))
        return
    for i, j, n in segments(check_rows(rows, N, d), N, d):
        patch_of(out, i, j, d)[n] = patches[done : done + n.stop - n.start]
        done += n.stop - n.start


def row_images(rows: slice, num_images: int, device: torch.device) -> Tensor:
    """The image n of each row: R, int64."""
    return torch.arange(rows.start, rows.stop, device=device) % num_images


def row_patches(rows: slice, num_images: int, device: torch.device) -> Tensor:
    """The patch index k of each row: R, int64."""
    return torch.arange(rows.start, rows.stop, device=device) // num_images


def patch_position(rows: slice, num_images: int, d: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Where the patch of each row lies: one-hot of its index k, R × d²."""
    k = row_patches(rows, num_images, device)
    return (k[:, None] == torch.arange(d * d, device=device)).to(dtype)


def global_content(x_t: Tensor, d: int) -> Tensor:
    """What the whole noisy image looks like at a patch's size: the mean of each d × d pixels, N C H W → N C h w."""
    return F.avg_pool2d(x_t, d) if d > 1 else x_t


def network_input(
    x_t: Tensor, content: Tensor | None, rows: slice, d: int, *, with_content: bool = True, border: int = 0, nhwc: bool = False
) -> Tensor:
    """What the network sees of each row, R 2C h w: the patch and the global content.

    content: ``global_content(x_t, d)``; None: made for these rows only. ``with_content`` False: the patch alone, R C h w.
    ``border``: so many pixels of the noisy image on every side of the patch as well (zeros beyond the image's edge), and
    zeros around the global content: h + 2·border by w + 2·border in all. ``nhwc``: in channels_last.
    """
    N, C, H, W = x_t.shape
    h, w = H // d, W // d
    shape = (rows.stop - rows.start, 2 * C if with_content else C, h + 2 * border, w + 2 * border)
    lies = torch.channels_last if nhwc else torch.contiguous_format
    x = torch.empty(shape, dtype=x_t.dtype, device=x_t.device, memory_format=lies)
    x = x.zero_() if border else x
    if with_content and content is None and len(x) >= N:
        content = global_content(x_t, d)
    if len(x) == N * d * d and not border:  # all of them: one copy, not one for each
        x.view(d, d, N, *x.shape[1:])[:, :, :, :C] = _grid(x_t, d)
        if content is not None:
            x.view(d * d, N, *x.shape[1:])[:, :, C:] = content
        return x
    done = 0
    for i, j, n in segments(rows, N, d):
        piece = x[done : done + n.stop - n.start]
        done += len(piece)
        top, left = i * h - border, j * w - border  # of the window, which may begin beyond the edge
        lines = slice(max(top, 0), min(top + h + 2 * border, H))
        columns = slice(max(left, 0), min(left + w + 2 * border, W))
        seen = x_t[n, :, lines, columns]
        piece[:, :C, lines.start - top : lines.stop - top, columns.start - left : columns.stop - left] = seen
        if with_content:
            inner = piece[:, C:, border : border + h, border : border + w]
            inner[:] = global_content(x_t[n], d) if content is None else content[n]
    return x
