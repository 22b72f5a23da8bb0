"""What the network refuses: images that do not fit its configuration, rows that do not fit the images."""

from __future__ import annotations

from torch import Tensor

from pbbench.errors import InputError
from pbbench.experiment.settings import ModelConfig


def check_rows(rows: slice | None, num_images: int, d: int) -> slice:
    """``rows`` with both ends filled in; None is every row. Raises InputError for an empty, strided or overlong slice."""
    total = num_images * d * d
    if rows is None:
        return slice(0, total)
    start, stop = rows.start or 0, total if rows.stop is None else rows.stop
    if rows.step not in (None, 1) or not 0 <= start < stop <= total:
        raise InputError(f"rows {rows} do not fit {num_images} images of {d}×{d} patches: 0 ≤ start < stop ≤ {total}")
    return slice(start, stop)


def check_images(x_t: Tensor, t: Tensor, config: ModelConfig) -> None:
    """Raises InputError unless x_t is N C H W with sides that can be divided and halved, and t has a timestep per image."""
    unit = config.patch_divider * 2 ** (len(config.dim_mults) - 1)
    if x_t.ndim != 4 or 0 in x_t.shape or x_t.shape[1] != config.channels or x_t.shape[2] % unit or x_t.shape[3] % unit:
        raise InputError(
            f"x_t has shape {tuple(x_t.shape)}; expected N × {config.channels} × H × W with H and W divisible by {unit} "
            f"(patch_divider {config.patch_divider}, {len(config.dim_mults)} levels)"
        )
    if t.shape != x_t.shape[:1]:
        raise InputError(f"t has shape {tuple(t.shape)}; expected one timestep per image, ({x_t.shape[0]},)")
