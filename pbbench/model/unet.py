"""PatchUNet: the network that denoises one patch, told where it lies and what the whole image looks like.

``forward`` reads like the paper's figure: split the noisy image, give every patch its position and the global content,
run the same U-Net on them, merge. How many patches go through in one pass is the caller's choice (``patch_batch_size``)
and changes nothing but memory and speed: patches meet only in x_t, which carries no gradient, and in the loss's mean.

Shapes: N images, C channels, H × W pixels, d the patch divider, R rows (patches) of a pass, h = H / d, w = W / d.
Source: Arakawa et al., CVPRW 2023 (arXiv 2304.07087); widths and blocks as in the released code.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from pbbench.errors import InputError
from pbbench.experiment.settings import ModelConfig, Recompute
from pbbench.model import patching
from pbbench.model.embedding import Embedding
from pbbench.model.layers import LinearAttention, ResidualBlock, SelfAttention
from pbbench.model.lean import recomputing
from pbbench.model.patching import merge, network_input, patch_position, row_chunks, row_images, row_patches
from pbbench.model.placement import nhwc, small_weights_cast


class Level(nn.Module):
    """Two residual blocks and linear attention at one resolution.

    Maps travel on a stack, the current one on top: a level takes it off, so that no caller holds a map that has been used.
    """

    recompute = False  # True: only the input is kept for backward, and the level runs again there

    def __init__(self, in_channels: int, out_channels: int, groups: int, embedding_width: int) -> None:
        super().__init__()
        self.residual1 = ResidualBlock(in_channels, out_channels, groups, embedding_width)
        self.residual2 = ResidualBlock(out_channels, out_channels, groups, embedding_width)
        self.attention = LinearAttention(out_channels)

    def forward(self, maps: list[Tensor], embedding: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return recomputing(lambda x, e: self._blocks([x], e), maps.pop(), embedding)
        return self._blocks(maps, embedding)

    def _blocks(self, maps: list[Tensor], embedding: Tensor) -> Tensor:
        x = self.residual1(maps.pop(), embedding)
        x = self.residual2(x, embedding)
        return self.attention(x)


class EncoderLevel(Level):
    """A level, and ``downsample`` to half the resolution (not after the last)."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, embedding_width: int, last: bool) -> None:
        super().__init__(in_channels, out_channels, groups, embedding_width)
        self.downsample = nn.Identity() if last else nn.Conv2d(out_channels, out_channels, 4, stride=2, padding=1)


class DecoderLevel(Level):
    """A level on (x, skip), and ``upsample`` to twice the resolution."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, embedding_width: int) -> None:
        super().__init__(2 * in_channels, out_channels, groups, embedding_width)
        self.upsample = nn.ConvTranspose2d(out_channels, out_channels, 4, stride=2, padding=1)


class PatchUNet(nn.Module):
    """The patch-wise U-Net of a ``ModelConfig``.

    The weights do not depend on the image's size: any height and width divisible by d · 2^(levels − 1) can be given;
    ``config.size`` is the one that sampling uses.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        dim, groups, levels = config.dim, config.resnet_block_groups, len(config.dim_mults)
        width = 4 * dim
        widths = [config.init_dim or dim // 3 * 2, *(dim * mult for mult in config.dim_mults)]

        self.embedding = Embedding(dim, config.num_patches if config.position_conditioning else None)
        self.border = 3 if config.border_context else 0  # pixels around a patch that the stem's window reaches
        self.stem = nn.Conv2d((2 if config.global_content else 1) * config.channels, widths[0], 7, padding=3 - self.border)
        self.encoder = nn.ModuleList(
            EncoderLevel(narrow, wide, groups, width, last=level == levels - 1)
            for level, (narrow, wide) in enumerate(pairwise(widths))
        )
        self.middle1 = ResidualBlock(widths[-1], widths[-1], groups, width)
        self.middle_attention = SelfAttention(widths[-1])
        self.middle2 = ResidualBlock(widths[-1], widths[-1], groups, width)
        self.decoder = nn.ModuleList(
            DecoderLevel(wide, narrow, groups, width) for narrow, wide in reversed(list(pairwise(widths[1:])))
        )
        self.head = ResidualBlock(dim, dim, groups, embedding_width=None)
        self.projection = nn.Conv2d(dim, config.out_channels or config.channels, 1)

    def set_recompute(self, recompute: Recompute) -> PatchUNet:
        """What backward computes again instead of keeping it (``TrainingConfig.recompute``); returns itself."""
        for module in self.modules():
            if isinstance(module, ResidualBlock | SelfAttention):
                module.recompute = recompute != "none"
            elif isinstance(module, Level):
                module.recompute = recompute == "full"
        return self

    def forward(self, x_t: Tensor, t: Tensor, patch_batch_size: int | None = None, rows: slice | None = None) -> Tensor:
        """Denoise.

        Args:
            x_t: noisy images, N C H W. No gradient flows to them.
            t: timesteps, N, int64.
            patch_batch_size: patches per pass; None: all N·d². Outputs and gradients are the same within rounding.
            rows: only these patches (patch-major rows, see ``patching``), in one pass. The training step calls the
                model once per chunk with it and runs backward after each.

        Returns: images N C H W, or with ``rows`` the patches R C h w, in the dtype of x_t.
        Raises: InputError where the shapes do not fit the model, or both ways to chunk are given.
        """
        _check_images(x_t, t, self.config)
        N, d, device, x_t = x_t.shape[0], self.config.patch_divider, x_t.device, x_t.detach()
        if rows is not None:
            if patch_batch_size is not None:
                raise InputError("give rows (one chunk) or patch_batch_size (all chunks in turn), not both")
            rows = patching.check_rows(rows, N, d)
            position = patch_position(rows, N, d, device, x_t.dtype)  # R × d²
            embedding = self.embedding(t[row_images(rows, N, device)], position)
            return self._denoise(x_t, None, rows, embedding)

        # What does not depend on the chunk is computed once: N small images, N and d² embeddings.
        content = patching.global_content(x_t, d) if self.config.global_content else None  # N C h w
        when = self.embedding.when(t)  # N × 4·dim
        where = self.embedding.where(patch_position(slice(0, d * d), 1, d, device, x_t.dtype))  # d² × 4·dim
        chunks = row_chunks(N * d * d, patch_batch_size)
        passes = (
            self._denoise(x_t, content, chunk, when[row_images(chunk, N, device)] + where[row_patches(chunk, N, device)])
            for chunk in chunks
        )
        if torch.is_grad_enabled():
            return merge(torch.cat(list(passes)), d)
        out = x_t.new_empty(N, self.projection.out_channels, *x_t.shape[2:])  # N C H W
        for chunk in chunks:
            patching.write_rows(out, next(passes), chunk, d)  # nothing stacked: a chunk's patches go straight to their places
        return out

    def _denoise(self, x_t: Tensor, content: Tensor | None, rows: slice, embedding: Tensor) -> Tensor:
        """One pass: the patches of ``rows``, with their conditioning, through the network. Returns R C h w."""
        see = partial(network_input, with_content=self.config.global_content, border=self.border, nhwc=nhwc(self.stem.weight))
        with small_weights_cast(self):  # the network's input has no name here, so that it is dropped once it is read
            return self._network(see(x_t, content, rows, self.config.patch_divider), embedding).to(x_t.dtype)

    def _network(self, x: Tensor, embedding: Tensor) -> Tensor:
        """The U-Net proper: ``network_input`` → R C h w. The skip of the first level is not kept."""
        embedding = nn.functional.silu(embedding)  # R × 4·dim, as every block reads it
        maps = [self.stem(x)]  # a stack: the skips, and on top the current map
        del x
        for level, encode in enumerate(self.encoder):
            maps.append(encode(maps, embedding))
            if level > 0:
                maps.append(maps[-1])  # one to go on with, one to come back to
            maps.append(encode.downsample(maps.pop()))  # type: ignore[operator]
        maps.append(self.middle1(maps.pop(), embedding))
        maps.append(self.middle_attention(maps.pop()))
        maps.append(self.middle2(maps.pop(), embedding))
        for decode in self.decoder:
            maps.append(torch.cat((maps.pop(), maps.pop()), dim=1))  # (x, skip)
            maps.append(decode.upsample(decode(maps, embedding)))  # type: ignore[operator]
        return self.projection(self.head(maps.pop()))


def _check_images(x_t: Tensor, t: Tensor, config: ModelConfig) -> None:
    """Raises InputError unless x_t is N C H W with sides that can be divided and halved, and t has a timestep per image."""
    unit = config.patch_divider * 2 ** (len(config.dim_mults) - 1)
    if x_t.ndim != 4 or 0 in x_t.shape or x_t.shape[1] != config.channels or x_t.shape[2] % unit or x_t.shape[3] % unit:
        raise InputError(
            f"x_t has shape {tuple(x_t.shape)}; expected N × {config.channels} × H × W with H and W divisible by {unit} "
            f"(patch_divider {config.patch_divider}, {len(config.dim_mults)} levels)"
        )
    if t.shape != x_t.shape[:1]:
        raise InputError(f"t has shape {tuple(t.shape)}; expected one timestep per image, ({x_t.shape[0]},)")
