"""Weights of the released code (Arakawa et al. 2023) in this project's network.

The release keeps the same tensors under other names; a table maps them. What it stores beside the network (schedules,
optimizer) is ignored, and so is ``_patched_decoder._embedder``, which it never uses. Nothing is unpickled: checkpoints
are opened with ``weights_only`` or as safetensors.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pbbench.errors import InputError, one_line
from pbbench.experiment.experiment import parse_experiment
from pbbench.experiment.settings import DiffusionConfig, ModelConfig
from pbbench.model.unet import PatchUNet

OBJECTIVES = {"pred_noise": "epsilon", "pred_x0": "sample"}
SAME_FIELDS = ("dim", "dim_mults", "image_size", "channels", "patch_divider", "init_dim", "resnet_block_groups")
MODEL_FIELDS = {**{name: name for name in SAME_FIELDS}, "out_dim": "out_channels"}
"""The release's name → ours; absent or null: the release's default, which is also ours."""

# Our module → the release's, outermost first.
NAMES = (
    (r"^embedding\.time\.", "_embedding._time_embedding_layer.1."),
    (r"^embedding\.position\.", "_embedding._pos_embedding_layer.0."),
    (r"^embedding\.join\.", "_embedding._mapping.0."),
    (r"^stem\.", "_patched_encoder._init_conv."),
    (r"^middle1\.", "_patched_decoder.mid_block1."),
    (r"^middle_attention\.out\.", "_patched_decoder.mid_attn.fn.fn.to_out."),
    (r"^middle_attention\.", "_patched_decoder.mid_attn."),
    (r"^middle2\.", "_patched_decoder.mid_block2."),
    (r"^head\.", "_patched_decoder.final_conv.0."),
    (r"^projection\.", "_patched_decoder.final_conv.1."),
    (r"^encoder\.", "_patched_encoder._downsLayers."),
    (r"^decoder\.", "_patched_decoder.ups."),
    # inside a level
    (r"\.residual1\.", ".0."),
    (r"\.residual2\.", ".1."),
    (r"\.attention\.", ".2."),
    (r"\.(down|up)sample\.", ".3."),
    # inside a residual block
    (r"\.(block[12])\.conv\.", r".\1.proj."),
    (r"\.modulation\.", ".mlp.1."),
    (r"\.shortcut\.", ".res_conv."),
    # inside an attention
    (r"\.norm\.scale$", ".fn.norm.g"),
    (r"\.norm\.shift$", ".fn.norm.b"),
    (r"\.qkv\.", ".fn.fn.to_qkv."),
    (r"(\.[23])\.out\.", r"\1.fn.fn.to_out.0."),
    (r"\.out_norm\.scale$", ".fn.fn.to_out.1.g"),
    (r"\.out_norm\.shift$", ".fn.fn.to_out.1.b"),
)
NETWORK_PREFIXES = ("_embedding.", "_patched_encoder.", "_patched_decoder.")
UNUSED_PREFIX = "_patched_decoder._embedder."


def reference_name(name: str) -> str:
    """The release's name of one of ``PatchUNet``'s parameters."""
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def parse_reference_config(config: Mapping[str, Any]) -> tuple[ModelConfig, DiffusionConfig]:
    """A reference configuration (its JSON as a dict) as ours: omitted fields take the release's defaults, unknown ones are
    ignored.

    ``config`` has the sections ``model`` and ``diffusion``, or is one flat section with the fields of both.
    Raises InputError for values that do not fit and for learned variances, which the network here does not have.
    """
    model = config.get("model", config)
    diffusion = config.get("diffusion", {} if "model" in config else config)
    if not isinstance(model, Mapping) or not isinstance(diffusion, Mapping):
        raise InputError("the reference configuration's sections 'model' and 'diffusion' must be JSON objects")
    if model.get("learned_variance"):
        raise InputError("the reference configuration has learned_variance, which is not supported; only fixed variances are")
    objective = diffusion.get("objective") or "pred_noise"
    if objective not in OBJECTIVES:
        raise InputError(f"the reference configuration's objective is {objective!r}; known are {', '.join(OBJECTIVES)}")
    ours = {
        "model": {MODEL_FIELDS[key]: value for key, value in model.items() if key in MODEL_FIELDS and value is not None},
        "diffusion": {
            "num_train_timesteps": diffusion.get("timesteps") or 1000,
            "loss_type": diffusion.get("loss_type") or "l1",
            "prediction_type": OBJECTIVES[objective],
        },
    }
    experiment = parse_experiment(ours, "reference configuration")
    return experiment.model, experiment.diffusion


def load_reference(state_dict: Mapping[str, Any], config: Mapping[str, Any]) -> PatchUNet:
    """A ``PatchUNet`` with the release's weights, in float32 on the CPU.

    Args:
        state_dict: the U-Net's entries under the release's names, with or without ``denoise_fn.`` before them. Other
            entries are ignored.
        config: the ``model`` section of the reference's JSON.
    Raises: InputError naming the entries that are missing, have another shape, or have no place in this model.
    """
    weights = {key.removeprefix("denoise_fn."): value for key, value in state_dict.items()}
    model = PatchUNet(parse_reference_config(config)[0])
    missing, misshaped, known = [], [], set()
    for name, parameter in model.named_parameters():
        key = reference_name(name)
        known.add(key)
        value = weights.get(key)
        if not isinstance(value, Tensor):
            missing.append(key)
        elif value.shape != parameter.shape:
            misshaped.append(f"{key} is {tuple(value.shape)}, expected {tuple(parameter.shape)}")
        else:
            with torch.no_grad():
                parameter.copy_(value)
    left = [k for k in weights if k.startswith(NETWORK_PREFIXES) and not k.startswith(UNUSED_PREFIX) and k not in known]
    for problem, keys in (("lack", missing), ("do not fit", misshaped), ("have more than the configuration describes", left)):
        if keys:
            shown = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            raise InputError(
                f"the reference weights {problem}: {shown}; check that the configuration belongs to this checkpoint"
            )
    return model


def read_reference_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint of the released trainer (``.pt``) or the network's weights alone (``.pt``, ``.safetensors``).

    Returns ``{"model": state dict, "ema": state dict, "step": int | None}``; where the file holds one set of weights, both
    are it. Raises InputError where the file is absent, is no such checkpoint, or would execute code when opened.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no checkpoint at {path}; give the model-last.pt that the released trainer wrote")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise InputError(
            f"{path} is not a checkpoint of plain tensors; anything else could execute code and is not opened"
        ) from None
    except Exception as error:  # a damaged file raises anything from KeyError to RuntimeError
        raise InputError(f"cannot read the checkpoint {path}: {one_line(error)[:160]}") from None
    if not isinstance(content, Mapping):
        raise InputError(f"{path} holds a {type(content).__name__}, not a state dict or a checkpoint of the released trainer")
    model = content.get("model", content)
    ema = content.get("ema", model)
    if not all(isinstance(part, Mapping) and any(isinstance(v, Tensor) for v in part.values()) for part in (model, ema)):
        raise InputError(f"{path} holds no weights under 'model' and 'ema', where the released trainer keeps them")
    step = content.get("step")
    return {"model": dict(model), "ema": dict(ema), "step": step if isinstance(step, int) else None}
