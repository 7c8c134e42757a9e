"""Checkpoints of guided-diffusion and improved-diffusion: ``.pt`` state dicts, described by command-line flags.

A file says nothing of its architecture: that stands in the flags with which its authors run it. They are given, or
read from a JSON file beside it, or known where the file has a published name. Every key, shape and dtype that the
flags imply is then checked before anything is used, and the weights are renamed to :class:`ADMUNet`'s.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepfusion import _checks
from stepfusion.checkpoints.archive import stored_in_archive
from stepfusion.checkpoints.json_file import read_object
from stepfusion.checkpoints.loaded import LoadedModel
from stepfusion.checkpoints.weights import check_state
from stepfusion.errors import CheckpointError
from stepfusion.networks import ADMUNet, ADMUNetConfig
from stepfusion.networks.blocks import Attention

_ADM = {
    "attention_resolutions": "32,16,8",
    "class_cond": True,
    "learn_sigma": True,
    "noise_schedule": "linear",
    "num_channels": 256,
    "num_head_channels": 64,
    "num_res_blocks": 2,
    "resblock_updown": True,
    "use_scale_shift_norm": True,
}
_LSUN = {**_ADM, "image_size": 256, "class_cond": False, "dropout": 0.1}

#: The flags of the published models, by the names of their files (guided-diffusion's README).
PUBLISHED: dict[str, dict[str, Any]] = {
    "64x64_diffusion": {
        **_ADM,
        "image_size": 64,
        "num_channels": 192,
        "num_res_blocks": 3,
        "noise_schedule": "cosine",
        "use_new_attention_order": True,
        "dropout": 0.1,
    },
    "128x128_diffusion": {**_ADM, "image_size": 128, "num_head_channels": -1, "num_heads": 4},
    "256x256_diffusion": {**_ADM, "image_size": 256},
    "256x256_diffusion_uncond": {**_ADM, "image_size": 256, "class_cond": False},
    "512x512_diffusion": {**_ADM, "image_size": 512},
    "lsun_bedroom": _LSUN,
    "lsun_cat": _LSUN,
    "lsun_horse": _LSUN,
    "lsun_horse_nodropout": {**_LSUN, "dropout": 0.0},
}

_NETWORK_FLAGS = {
    "image_size": 64,
    "num_channels": 128,
    "num_res_blocks": 2,
    "num_heads": 4,
    "num_heads_upsample": -1,
    "num_head_channels": -1,
    "attention_resolutions": "16,8",
    "channel_mult": "",
    "dropout": 0.0,
    "class_cond": False,
    "use_scale_shift_norm": True,
    "resblock_updown": False,
    "learn_sigma": False,
}
_OTHER_FLAGS = {
    "use_new_attention_order": False,
    "diffusion_steps": 1000,
    "noise_schedule": "linear",
    "predict_xstart": False,
    "sigma_small": False,
    "rescale_timesteps": False,
}
_TRAINING_FLAGS = ("use_checkpoint", "use_fp16", "use_kl", "rescale_learned_sigmas")  # change no sample
_SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}

_THEIR_NAMES = (
    (re.compile(r"time_embedding\.linear_1"), "time_embed.0"),
    (re.compile(r"time_embedding\.linear_2"), "time_embed.2"),
    (re.compile(r"class_embedding"), "label_emb"),
    (re.compile(r"conv_norm_out"), "out.0"),
    (re.compile(r"conv_out"), "out.2"),
    (re.compile(r"\.norm1\."), ".in_layers.0."),
    (re.compile(r"\.conv1\."), ".in_layers.2."),
    (re.compile(r"\.time_emb_proj\."), ".emb_layers.1."),
    (re.compile(r"\.norm2\."), ".out_layers.0."),
    (re.compile(r"\.conv2\."), ".out_layers.3."),
    (re.compile(r"\.conv_shortcut\."), ".skip_connection."),
    (re.compile(r"\.group_norm\."), ".norm."),
    (re.compile(r"\.to_out\.0\."), ".proj_out."),
    (re.compile(r"\.to_[qkv]\."), ".qkv."),
    (re.compile(r"(input_blocks\.\d+\.0)\.conv\."), r"\1.op."),
)


@dataclass(frozen=True)
class GuidedDiffusionModel(LoadedModel):
    """What a checkpoint of guided-diffusion or improved-diffusion holds, as an engine wants it.

    Attributes:
        network: in eval mode, float32, on the CPU.
        scheduler_config: its diffusion, in the words of a diffusers scheduler config.
        path: the file.
        class_names, null_label: None: these files name no classes, and their models know no null label.
    """

    network: ADMUNet
    scheduler_config: dict[str, Any]
    path: Path
    class_names: None = None
    null_label: None = None


def load_guided_diffusion(
    source: str | os.PathLike[str], *, model: str | None = None, **flags: Any
) -> GuidedDiffusionModel:
    """Read a ``.pt`` checkpoint of guided-diffusion or improved-diffusion. No pickled code is executed.

    Args:
        source: the file.
        model: a published model whose flags it has: a name of :data:`PUBLISHED`. By default the flags stand in a JSON
            object beside the file (``name.json`` for ``name.pt``), or the file has a published model's name.
        flags: flags of their command line that are other than those, e.g. ``image_size=64, learn_sigma=True``; what
            no one says is as in guided-diffusion's scripts. improved-diffusion's own scripts also have
            ``rescale_timesteps=True`` by default.

    Raises:
        CheckpointError: the file does not fit the flags, or a flag is unknown or has a wrong value; it is named.
    """
    path = Path(source)
    if not path.is_file():
        raise CheckpointError(f"{path} is {'not a file' if path.exists() else 'missing'}")
    chosen = {**_NETWORK_FLAGS, **_OTHER_FLAGS, **_described(path, model, flags)}
    try:
        config = _network_config(chosen)
        scheduler_config = _scheduler_config(chosen)
        legacy = not _checks.boolean("use_new_attention_order", chosen["use_new_attention_order"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"flags of {path}: {error}") from None
    with torch.device("meta"):
        network = ADMUNet(config)
    theirs = check_state(stored_in_archive(path), their_shapes(network), path, "flags")
    network.load_state_dict(our_weights(theirs, network, legacy=legacy), strict=True, assign=True)
    return GuidedDiffusionModel(network.eval(), scheduler_config, path)


def their_shapes(network: ADMUNet) -> dict[str, tuple[int, ...]]:
    """The names and shapes that the weights of `network` have in their checkpoints."""
    shapes = {}
    for key, value in network.state_dict().items():
        shape = tuple(value.shape)
        if re.search(r"\.to_[qkv]\.", key):
            shape = (3 * shape[0], *shape[1:])
        if re.search(r"\.to_([qkv]|out\.0)\.weight$", key):
            shape = (*shape, 1)  # theirs is a convolution over positions
        shapes[_their_name(key)] = shape
    return shapes


def our_weights(theirs: Mapping[str, Tensor], network: ADMUNet, *, legacy: bool) -> dict[str, Tensor]:
    """The state dict of `network` from the tensors of a checkpoint.

    Their attention makes q, k and v in one convolution. Its 3 C outputs are, head after head, the q, k and v of that
    head where `legacy`, and the q of all heads, then k, then v in the new order.
    """
    ours = {}
    for key in network.state_dict():
        tensor = theirs[_their_name(key)]
        if found := re.fullmatch(r"(.*)\.to_([qkv])\.(weight|bias)", key):
            attention = network.get_submodule(found[1])
            assert isinstance(attention, Attention)
            order = (attention.heads, 3, attention.head_dim) if legacy else (3, attention.heads, attention.head_dim)
            parts = tensor.reshape(*order, *tensor.shape[1:2])
            tensor = parts.select(1 if legacy else 0, "qkv".index(found[2])).flatten(0, 1)
        elif key.endswith(".to_out.0.weight"):
            tensor = tensor[:, :, 0]
        ours[key] = tensor.contiguous()
    return ours


def _their_name(key: str) -> str:
    for ours, theirs in _THEIR_NAMES:
        key = ours.sub(theirs, key)
    return key


def _described(path: Path, model: str | None, flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that someone gave."""
    beside = path.with_suffix(".json")
    if model is not None:
        base = PUBLISHED[_checks.choice("model", model, PUBLISHED)]
    elif beside.exists():
        base = read_object(beside)
    else:
        base = PUBLISHED.get(path.stem, {})
    described = {**base, **flags}
    known = {*_NETWORK_FLAGS, *_OTHER_FLAGS, *_TRAINING_FLAGS}
    for name in described:
        if name not in known:
            raise CheckpointError(f"flags of {path}: {name!r} is unknown; accepted are {', '.join(sorted(known))}")
    if not described:
        raise CheckpointError(
            f"{path} does not say its architecture: give the flags it is run with, or model= one of "
            f"{', '.join(PUBLISHED)}, or write them to {beside}"
        )
    return described


def _network_config(flags: Mapping[str, Any]) -> ADMUNetConfig:
    values = {name: flags[name] for name in _NETWORK_FLAGS}
    values["attention_resolutions"] = _numbers("attention_resolutions", values["attention_resolutions"])
    values["channel_mult"] = _numbers("channel_mult", values["channel_mult"]) or None
    for name in ("num_heads_upsample", "num_head_channels"):
        values[name] = None if values[name] == -1 else values[name]
    steps = _checks.integer("diffusion_steps", flags["diffusion_steps"], 1, 1 << 20)
    if _checks.boolean("rescale_timesteps", flags["rescale_timesteps"]):
        values["timestep_scale"] = 1000 / steps
    return ADMUNetConfig(**values)


def _scheduler_config(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The diffusion of their scripts; ``linear`` scales its end points by 1000 / T."""
    steps = _checks.integer("diffusion_steps", flags["diffusion_steps"], 1, 1 << 20)
    schedule = _checks.choice("noise_schedule", flags["noise_schedule"], _SCHEDULES)
    fixed = "fixed_small" if _checks.boolean("sigma_small", flags["sigma_small"]) else "fixed_large"
    predicts_x0 = _checks.boolean("predict_xstart", flags["predict_xstart"])
    ends = {"beta_start": 1000 / steps * 1e-4, "beta_end": 1000 / steps * 0.02} if schedule == "linear" else {}
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": steps,
        "beta_schedule": _SCHEDULES[schedule],
        **ends,
        "prediction_type": "sample" if predicts_x0 else "epsilon",
        "variance_type": "learned_range" if flags["learn_sigma"] else fixed,
        "clip_sample": True,
    }


def _numbers(name: str, value: Any) -> Any:
    """A list as their command line writes it, "32,16,8", or as Python or JSON does."""
    if not isinstance(value, str):
        return value
    try:
        numbers = [float(part) for part in value.split(",") if part]
    except ValueError:
        raise ValueError(f"{name} must be numbers with commas between them, got {value!r}") from None
    return tuple(int(number) if number.is_integer() else number for number in numbers)
