"""The network in its plainest form: one function of a dict of weights, all patches at once, every intermediate kept.

It is the oracle of ``test_unet.py``. It shares no code with the package, uses the released code's names, and follows the
description of the released model line by line; it saves nothing.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


def plain_unet(p: Weights, x_t: Tensor, t: Tensor, d: int, groups: int = 8) -> Tensor:
    """Denoise x_t (N C H W) at the timesteps t (N) with d × d patches, stacked patch-major in one pass."""
    N, _, H, W = x_t.shape
    h, w = H // d, W // d
    content = F.adaptive_avg_pool2d(x_t, (h, w))
    stacked, positions = [], []
    for k in range(d * d):
        i, j = k // d, k % d
        patch = x_t[:, :, i * h : (i + 1) * h, j * w : (j + 1) * w]
        stacked.append(torch.cat((patch, content), dim=1))
        one_hot = torch.zeros(N, d * d)
        one_hot[:, k] = 1
        positions.append(one_hot)
    x = torch.cat(stacked)
    e = embedding(p, t.repeat(d * d), torch.cat(positions))

    levels = len({key.split(".")[2] for key in p if key.startswith("_patched_encoder._downsLayers.")})
    x = F.conv2d(x, p["_patched_encoder._init_conv.weight"], p["_patched_encoder._init_conv.bias"], padding=3)
    skips = []
    for level in range(levels):
        name = f"_patched_encoder._downsLayers.{level}"
        x = residual_block(p, f"{name}.0", x, e, groups)
        x = residual_block(p, f"{name}.1", x, e, groups)
        x = x + linear_attention(p, f"{name}.2", x)
        skips.append(x)
        if level < levels - 1:
            x = F.conv2d(x, p[f"{name}.3.weight"], p[f"{name}.3.bias"], stride=2, padding=1)

    x = residual_block(p, "_patched_decoder.mid_block1", x, e, groups)
    x = x + attention(p, "_patched_decoder.mid_attn", x)
    x = residual_block(p, "_patched_decoder.mid_block2", x, e, groups)
    for up in range(levels - 1):
        name = f"_patched_decoder.ups.{up}"
        x = torch.cat((x, skips[levels - 1 - up]), dim=1)
        x = residual_block(p, f"{name}.0", x, e, groups)
        x = residual_block(p, f"{name}.1", x, e, groups)
        x = x + linear_attention(p, f"{name}.2", x)
        x = F.conv_transpose2d(x, p[f"{name}.3.weight"], p[f"{name}.3.bias"], stride=2, padding=1)
    x = residual_block(p, "_patched_decoder.final_conv.0", x, None, groups)
    x = F.conv2d(x, p["_patched_decoder.final_conv.1.weight"], p["_patched_decoder.final_conv.1.bias"])

    out = torch.zeros(N, x.shape[1], H, W)
    for k in range(d * d):
        i, j = k // d, k % d
        out[:, :, i * h : (i + 1) * h, j * w : (j + 1) * w] = x[k * N : (k + 1) * N]
    return out


def linear(p: Weights, name: str, x: Tensor) -> Tensor:
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def embedding(p: Weights, t: Tensor, position: Tensor) -> Tensor:
    dim = p["_embedding._time_embedding_layer.1.weight"].shape[0]
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half) / (half - 1))
    angles = t[:, None].float() * frequencies[None]
    time = torch.cat((torch.sin(angles), torch.cos(angles)), dim=1)
    time = F.gelu(linear(p, "_embedding._time_embedding_layer.1", time))
    position = F.gelu(linear(p, "_embedding._pos_embedding_layer.0", position))
    return linear(p, "_embedding._mapping.0", torch.cat((time, position), dim=1))


def block(p: Weights, name: str, x: Tensor, groups: int, scale_shift: Tensor | None = None) -> Tensor:
    x = F.conv2d(x, p[f"{name}.proj.weight"], p[f"{name}.proj.bias"], padding=1)
    grouped = x.reshape(x.shape[0], groups, -1)
    mean, variance = grouped.mean(dim=2, keepdim=True), grouped.var(dim=2, keepdim=True, unbiased=False)
    x = ((grouped - mean) / torch.sqrt(variance + 1e-5)).reshape(x.shape)
    x = x * p[f"{name}.norm.weight"][:, None, None] + p[f"{name}.norm.bias"][:, None, None]
    if scale_shift is not None:
        scale, shift = scale_shift.chunk(2, dim=1)
        x = x * (scale + 1)[:, :, None, None] + shift[:, :, None, None]
    return x * torch.sigmoid(x)


def residual_block(p: Weights, name: str, x: Tensor, e: Tensor | None, groups: int) -> Tensor:
    scale_shift = None if e is None else linear(p, f"{name}.mlp.1", e * torch.sigmoid(e))
    y = block(p, f"{name}.block1", x, groups, scale_shift)
    y = block(p, f"{name}.block2", y, groups)
    if f"{name}.res_conv.weight" in p:
        x = F.conv2d(x, p[f"{name}.res_conv.weight"], p[f"{name}.res_conv.bias"])
    return y + x


def layer_norm(p: Weights, name: str, x: Tensor) -> Tensor:
    mean, variance = x.mean(dim=1, keepdim=True), x.var(dim=1, keepdim=True, unbiased=False)
    return (x - mean) / torch.sqrt(variance + 1e-5) * p[f"{name}.g"] + p[f"{name}.b"]


def heads_of(p: Weights, name: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of the normalised x, each N × 4 heads × 32 × pixels."""
    qkv = F.conv2d(layer_norm(p, f"{name}.fn.norm", x), p[f"{name}.fn.fn.to_qkv.weight"])
    q, k, v = qkv.chunk(3, dim=1)
    return tuple(y.reshape(x.shape[0], 4, 32, -1) for y in (q, k, v))  # type: ignore[return-value]


def linear_attention(p: Weights, name: str, x: Tensor) -> Tensor:
    q, k, v = heads_of(p, name, x)
    q = torch.softmax(q, dim=2) * 32**-0.5
    k = torch.softmax(k, dim=3)
    context = torch.einsum("nhdp,nhep->nhde", k, v)
    out = torch.einsum("nhde,nhdp->nhep", context, q)
    out = out.reshape(x.shape[0], 128, *x.shape[2:])
    out = F.conv2d(out, p[f"{name}.fn.fn.to_out.0.weight"], p[f"{name}.fn.fn.to_out.0.bias"])
    return layer_norm(p, f"{name}.fn.fn.to_out.1", out)


def attention(p: Weights, name: str, x: Tensor) -> Tensor:
    q, k, v = heads_of(p, name, x)
    weights = torch.softmax(torch.einsum("nhdi,nhdj->nhij", q * 32**-0.5, k), dim=3)
    out = torch.einsum("nhij,nhdj->nhdi", weights, v).reshape(x.shape[0], 128, *x.shape[2:])
    return F.conv2d(out, p[f"{name}.fn.fn.to_out.weight"], p[f"{name}.fn.fn.to_out.bias"])
