"""LoRA weights (Hu et al. 2022), added to the weights of a network when it is loaded: W + scale * alpha / rank * B A.

Nothing of a LoRA remains in the network, so that it costs nothing when images are sampled.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepfusion import _checks
from stepfusion.errors import CheckpointError
from stepfusion.files.json_files import check_depth
from stepfusion.latents.filled import shown
from stepfusion.latents.ldm_names import unet_name

METADATA_KEY = "lora_adapter_metadata"

_TEXT = "text_model."
#: The parts of a pipeline by the prefixes of diffusers, which have points inside, and of kohya, which have none.
_PREFIXES = {"unet.": "unet", "text_encoder.": "text_encoder", "text_encoder_2.": "text_encoder_2"}
_FLAT_PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
TEXT_PARTS = ("text_encoder", "text_encoder_2")
_OLD = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_ROLES = {"lora_A": "down", "lora_B": "up"}
_SUFFIXES = (
    re.compile(r"(?P<module>.+)\.(?P<role>lora_A|lora_B)(?:\.default)?\.weight"),
    re.compile(r"(?P<module>.+)\.(?:lora|lora_linear_layer)\.(?P<role>down|up)\.weight"),
    re.compile(r"(?P<module>.+)\.lora_(?P<role>down|up)\.weight"),
    re.compile(r"(?P<module>.+)\.(?P<role>alpha)"),
)
_PROCESSOR = re.compile(
    r"(?P<module>.+?)(?:\.processor)?\.(?P<name>to_q|to_k|to_v|to_out)_lora\.(?P<role>down|up)\.weight"
)


@dataclass
class _Pair:
    """What a file has for one weight: A [r, ...], B [O, r, ...], and alpha."""

    key: str  # as the file has it, for messages
    down: Tensor | None = None
    up: Tensor | None = None
    alpha: Tensor | None = None


def merge_lora(
    parts: Mapping[str, Mapping[str, Tensor]],
    lora: Mapping[str, Tensor],
    *,
    scale: float = 1.0,
    metadata: Mapping[str, str] | None = None,
) -> dict[str, dict[str, Tensor]]:
    """Add LoRA weights to the networks of a pipeline.

    Args:
        parts: the state dicts of "unet" (``UNet2DConditionModel``), "text_encoder" and "text_encoder_2"
            (``CLIPTextModel``, ``CLIPTextModelWithProjection``), or of those that there are.
        lora: the tensors of a LoRA file by name: as diffusers and PEFT write them (``unet.….lora_A.weight``), as
            diffusers did in 2023 (``….lora.down.weight``, ``….processor.to_q_lora.down.weight``), or as kohya's
            scripts do (``lora_unet_….lora_down.weight`` and ``….alpha``), where a UNet may have CompVis' names, too.
        scale: how strongly it is added; 1 as it was trained, negative to take it away.
        metadata: of the safetensors file; diffusers puts alphas there.

    Returns:
        The state dicts, in the order of `parts`: what was changed is new and has its old dtype, computed in float64;
        everything else is what was given.

    Raises:
        CheckpointError: a tensor is unknown, has no counterpart, or does not fit its weight; the first one is named.
        TypeError, ValueError: scale is no finite number.
    """
    scale = _checks.number("scale", scale, -1e4, 1e4)
    settings = _settings(metadata or {})
    found = _Modules(parts)
    pairs: dict[tuple[str, str], _Pair] = {}
    for key, tensor in lora.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.is_meta:
            raise CheckpointError(f"the LoRA's {shown(key)} must be a floating-point tensor")
        part, name, role = found.place(key)
        pair = pairs.setdefault((part, name), _Pair(key))
        if getattr(pair, role) is not None:
            raise CheckpointError(f"the LoRA has {shown(key)}, and the same under another name")
        setattr(pair, role, tensor)
    merged = {part: dict(state) for part, state in parts.items()}
    for (part, name), pair in pairs.items():
        factor = scale * _factor(pair, settings.get(part, {}))
        merged[part][name] = _merged(merged[part][name], pair, factor)
    return merged


def part_of(key: str) -> str:
    """The part of a pipeline that a tensor of a LoRA file is for: "unet", "text_encoder" or "text_encoder_2".

    Raises:
        CheckpointError: its name is of no known form.
    """
    return _parted(_split(key)[0])[0]


class _Modules:
    """The weights of a pipeline by the names that LoRA files have for them."""

    def __init__(self, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._parts = parts
        self._flat: dict[str, dict[str, str]] = {}
        for part, state in parts.items():
            names = [name.removesuffix(".weight") for name in state if name.endswith(".weight")]
            self._flat[part] = {name.removeprefix(_TEXT).replace(".", "_"): name + ".weight" for name in names}
        conv = re.compile(r"down_blocks\.0\.resnets\.(\d+)\.conv1\.weight")
        numbers = [int(match[1]) for name in parts.get("unet", {}) if (match := conv.fullmatch(name))]
        self._layers = max(numbers, default=0) + 1

    def place(self, key: str) -> tuple[str, str, str]:
        """The part of the pipeline, the name of the weight, and "down", "up" or "alpha"."""
        module, role = _split(key)
        part, inside = _parted(module)
        name = self._find(part, inside, key)
        if name is None:
            raise CheckpointError(f"the LoRA has {shown(key)}, and the {part} has no weight for it")
        return part, name, role

    def _find(self, part: str, module: str, key: str) -> str | None:
        if part not in self._parts:
            raise CheckpointError(f"the LoRA has {shown(key)}, and the pipeline has no {part}")
        flat = self._flat[part]
        for name in (module, unet_name(module, self._layers) if part == "unet" else None):
            for end in ("", ".0"):  # to_out is the first of two modules
                known = None if name is None else flat.get((name + end).replace(".", "_").removeprefix("text_model_"))
                if known is not None:
                    return known
        return None


def _parted(module: str) -> tuple[str, str]:
    """The part of the pipeline, and the module inside of it; what has no prefix is the UNet's."""
    for prefix, part in (_PREFIXES | _FLAT_PREFIXES).items():
        if module.startswith(prefix):
            return part, module.removeprefix(prefix)
    return "unet", module


def _split(key: object) -> tuple[str, str]:
    """The module of a tensor, and its role."""
    text = key if isinstance(key, str) else ""
    if match := _PROCESSOR.fullmatch(text):
        name = match["name"] if ".self_attn" not in match["module"] else _OLD[match["name"]]
        return f"{match['module']}.{name}", match["role"]
    for pattern in _SUFFIXES:
        if match := pattern.fullmatch(text):
            return match["module"], _ROLES.get(match["role"], match["role"])
    raise CheckpointError(
        f"the LoRA has {shown(key)}, which is not known; accepted are lora_A and lora_B, lora.down and lora.up, "
        "lora_down and lora_up, and alpha"
    )


def _settings(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """What diffusers notes of each part: alpha, and whether it is divided by the root of the rank."""
    text = metadata.get(METADATA_KEY)
    if text is None:
        return {}
    try:
        check_depth(text.encode())
        noted = json.loads(text)
    except (ValueError, RecursionError, AttributeError) as error:
        raise CheckpointError(f"the LoRA's {METADATA_KEY} is not JSON: {str(error)[:200]}") from None
    settings: dict[str, dict[str, Any]] = {}
    for name, value in noted.items() if isinstance(noted, dict) else ():
        part, _, key = name.partition(".")
        settings.setdefault(part, {})[key] = value
    for part, noted in settings.items():
        for key in ("use_dora", "alpha_pattern", "lora_bias"):
            if noted.get(key):
                raise CheckpointError(
                    f"the LoRA's {METADATA_KEY} has {key} for {shown(part)}, which is not implemented"
                )
        alpha = noted.get("lora_alpha", 1)
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise CheckpointError(f"the LoRA's lora_alpha must be a finite number, got {alpha!r:.100}")
    return settings


def _factor(pair: _Pair, noted: Mapping[str, Any]) -> float:
    """alpha / rank; without an alpha it is the rank."""
    if pair.down is None or pair.up is None:
        raise CheckpointError(f"the LoRA has {shown(pair.key)} without its counterpart")
    rank = pair.down.shape[0] if pair.down.ndim else 0
    if pair.alpha is None and "lora_alpha" not in noted:
        return 1.0
    if pair.alpha is not None and pair.alpha.numel() != 1:
        raise CheckpointError(f"the LoRA's alpha beside {shown(pair.key)} must be one number")
    alpha = float(noted["lora_alpha"] if pair.alpha is None else pair.alpha)
    return alpha / max(math.sqrt(rank) if noted.get("use_rslora") else rank, 1)


def _merged(weight: Tensor, pair: _Pair, factor: float) -> Tensor:
    """A weight [O, ...] with the product of B [O, r] and A [r, ...] added; convolutions have A's kernel."""
    down, up = pair.down, pair.up
    assert down is not None
    assert up is not None
    rank = down.shape[0] if down.ndim else 0
    fits = (
        min(weight.ndim, down.ndim, up.ndim) >= 2
        and rank > 0
        and tuple(up.shape[:2]) == (weight.shape[0], rank)
        and up.numel() == weight.shape[0] * rank
        and _without_ones(down.shape[1:]) == _without_ones(weight.shape[1:])
        and down.shape[1] == weight.shape[1]
    )
    if not fits:
        raise CheckpointError(
            f"the LoRA's {shown(pair.key)} does not fit its weight {list(weight.shape)}: A is {list(down.shape)}, "
            f"B is {list(up.shape)}"
        )
    product = up.double().flatten(1) @ down.double().flatten(1)
    merged = torch.add(weight.double(), product.reshape(weight.shape), alpha=factor).to(weight.dtype)
    if not merged.isfinite().all():
        raise CheckpointError(f"the LoRA's {shown(pair.key)} makes weights that are not finite")
    return merged


def _without_ones(shape: torch.Size) -> list[int]:
    """A kernel's shape; one of a pixel is that of a matrix."""
    return [size for size in shape if size != 1]
