"""Single files of Stable Diffusion, as CompVis and Stability AI publish them: all networks of a pipeline in one.

Names are converted to those of diffusers and transformers, which are what everything else here reads. A file holds no
config and no tokenizer; :mod:`stepfusion.latents.single_file_configs` has the configs of each family.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stepfusion.errors import CheckpointError
from stepfusion.latents.filled import shown
from stepfusion.latents.ldm_names import layers_of_a_level, unet_name

UNET, VAE = "model.diffusion_model.", "first_stage_model."
#: Where the text encoders are, in each family: CLIP as transformers has it, or OpenCLIP.
_CLIP = {"sd1": "cond_stage_model.transformer.", "sdxl": "conditioner.embedders.0.transformer."}
_OPEN_CLIP = {
    "sd2": "cond_stage_model.model.",
    "sdxl": "conditioner.embedders.1.model.",
    "sdxl-refiner": "conditioner.embedders.0.model.",
}
FAMILIES = ("sd1", "sd2", "sdxl", "sdxl-refiner")
#: By the length of a text's states, for files without text encoders.
_BY_CONTEXT = {768: "sd1", 1024: "sd2", 2048: "sdxl", 1280: "sdxl-refiner"}

_CONTEXT = re.compile(re.escape(UNET) + r"input_blocks\.\d+\.1\.transformer_blocks\.0\.attn2\.to_k\.weight")
#: Training state, schedules, and what no network here has.
_LEFT_OUT = ("model_ema.", "denoiser.", "first_stage_model.loss.", "cond_stage_model.logit_scale")
_LEFT_OUT_OF_TEXT = ("logit_scale", "attn_mask")

_VAE_LEVEL = re.compile(r"(encoder|decoder)\.(down|up)\.(\d+)\.(block\.(\d+)|downsample|upsample)\.(.+)")
_VAE_MIDDLE = re.compile(r"(encoder|decoder)\.mid\.(?:block_([12])|attn_1)\.(.+)")
_VAE_ENDS = re.compile(
    r"(?:(encoder|decoder)\.(conv_in|conv_out|norm_out)|quant_conv|post_quant_conv)\.(weight|bias)"
)
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}

_RESBLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")
_IN_RESBLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


@dataclass(frozen=True)
class SingleFile:
    """The networks of a single file, under the names of diffusers and transformers.

    Attributes:
        family: "sd1", "sd2", "sdxl" or "sdxl-refiner".
        unet: of ``UNet2DConditionModel``.
        vae: of ``AutoencoderKL``; empty if the file has none.
        text_encoder: of ``CLIPTextModel``; empty if the family or the file has none.
        text_encoder_2: of ``CLIPTextModelWithProjection``, likewise.
    """

    family: str
    unet: dict[str, Tensor]
    vae: dict[str, Tensor] = field(default_factory=dict)
    text_encoder: dict[str, Tensor] = field(default_factory=dict)
    text_encoder_2: dict[str, Tensor] = field(default_factory=dict)


def is_single_file(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether tensors of these names are such a file's."""
    return any(name.startswith(UNET + "input_blocks.") for name in shapes)


def family_of(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The family of a single file: by its text encoders, or without any by the length of a text's states.

    Args:
        shapes: of the tensors, by name.

    Raises:
        CheckpointError: it is none of these families.
    """
    if not is_single_file(shapes):
        raise CheckpointError(f"the file has no UNet: no tensor is named {UNET}input_blocks...")
    for family in ("sdxl", "sdxl-refiner", "sd2"):
        if any(name.startswith(_OPEN_CLIP[family]) for name in shapes):
            return family
    if any(name.startswith(_CLIP["sd1"]) for name in shapes):
        return "sd1"
    lengths = {shape[-1] for name, shape in shapes.items() if _CONTEXT.fullmatch(name) and len(shape) == 2}
    known = [_BY_CONTEXT[length] for length in lengths if length in _BY_CONTEXT]
    if len(lengths) == len(known) == 1:
        return known[0]
    raise CheckpointError(
        f"the file is of none of the families {', '.join(FAMILIES)}: it has no text encoder, and the states of a "
        f"text have {', '.join(map(str, sorted(lengths))) or 'no'} entries"
    )


def split_single_file(tensors: Mapping[str, Tensor]) -> SingleFile:
    """Convert the names of a single file's tensors; what is no weight of a network is left out.

    Args:
        tensors: by their names in the file.

    Raises:
        CheckpointError: it is of no known family, or a tensor is unknown; the first one is named.
    """
    family = family_of({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    clip, open_clip = _CLIP.get(family), _OPEN_CLIP.get(family)
    groups: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in (UNET, VAE, clip, open_clip) if prefix}
    for name, tensor in tensors.items():
        if "." not in name or name.startswith(_LEFT_OUT):
            continue
        prefix = next((prefix for prefix in groups if name.startswith(prefix)), None)
        if prefix is None:
            raise CheckpointError(f"the file ({family}) has the tensor {shown(name)}, which is not known")
        groups[prefix][name.removeprefix(prefix)] = tensor
    opened = convert_open_clip(groups[open_clip], without_last=family == "sd2") if open_clip else {}
    first = opened if family == "sd2" else dict(groups.get(clip or "", {}))
    second = {} if family == "sd2" else opened
    return SingleFile(family, convert_unet(groups[UNET]), convert_vae(groups[VAE]), first, second)


def convert_unet(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A UNet's tensors, without the prefix ``model.diffusion_model.``, under the names of ``UNet2DConditionModel``.

    Raises:
        CheckpointError: a tensor is unknown.
    """
    layers = layers_of_a_level(tensors)
    converted = {}
    for name, tensor in tensors.items():
        now = unet_name(name, layers if layers is not None else len(tensors))
        if now is None:
            raise CheckpointError(f"the UNet has the tensor {shown(name)}, which is not known")
        converted[now] = tensor
    return converted


def convert_vae(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An autoencoder's tensors, without the prefix ``first_stage_model.``, under the names of ``AutoencoderKL``.

    Raises:
        CheckpointError: a tensor is unknown.
    """
    levels = [int(match[3]) for name in tensors if (match := _VAE_LEVEL.fullmatch(name)) and match[2] == "up"]
    converted = {}
    for name, tensor in tensors.items():
        now = _vae_name(name, max(levels, default=0))
        if now is None:
            raise CheckpointError(f"the autoencoder has the tensor {shown(name)}, which is not known")
        linear = ".attentions." in now and tensor.ndim > 2 and set(tensor.shape[2:]) == {1}
        converted[now] = tensor.flatten(1) if linear else tensor
    return converted


def convert_open_clip(tensors: Mapping[str, Tensor], *, without_last: bool = False) -> dict[str, Tensor]:
    """OpenCLIP's text tensors, without their prefix, under the names of ``CLIPTextModelWithProjection``.

    Args:
        tensors: queries, keys and values of a layer are one tensor there.
        without_last: leave out the last layer and the projection, as Stable Diffusion 2 does.

    Raises:
        CheckpointError: a tensor is unknown.
    """
    numbers = [int(match[1]) for name in tensors if (match := _RESBLOCK.fullmatch(name))]
    converted: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in _LEFT_OUT_OF_TEXT or (without_last and name == "text_projection"):
            continue
        match = _RESBLOCK.fullmatch(name)
        if match is None:
            converted |= _open_clip_end(name, tensor)
        elif not without_last or int(match[1]) < max(numbers):
            converted |= _open_clip_layer(f"text_model.encoder.layers.{int(match[1])}", match[2], name, tensor)
    return converted


def _vae_name(name: str, last: int) -> str | None:
    if match := _VAE_ENDS.fullmatch(name):
        return name.replace("norm_out", "conv_norm_out")
    if match := _VAE_LEVEL.fullmatch(name):
        half, way, level, part, block, rest = match.groups()
        number = int(level) if way == "down" else last - int(level)
        start = f"{half}.{way}_blocks.{number}"
        if block is None:
            return f"{start}.{part}rs.0.{rest}"
        return f"{start}.resnets.{block}.{rest.replace('nin_shortcut', 'conv_shortcut')}"
    if match := _VAE_MIDDLE.fullmatch(name):
        half, block, rest = match.groups()
        if block is not None:
            return f"{half}.mid_block.resnets.{int(block) - 1}.{rest}"
        module, _, kind = rest.rpartition(".")
        if module in _VAE_ATTENTION:
            return f"{half}.mid_block.attentions.0.{_VAE_ATTENTION[module]}.{kind}"
    return None


def _open_clip_end(name: str, tensor: Tensor) -> dict[str, Tensor]:
    if name == "text_projection":
        return {"text_projection.weight": tensor.T}
    ends = {
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "ln_final.weight": "text_model.final_layer_norm.weight",
        "ln_final.bias": "text_model.final_layer_norm.bias",
    }
    if name not in ends:
        raise CheckpointError(f"the text encoder has the tensor {shown(name)}, which is not known")
    return {ends[name]: tensor}


def _open_clip_layer(layer: str, part: str, name: str, tensor: Tensor) -> dict[str, Tensor]:
    if part in ("attn.in_proj_weight", "attn.in_proj_bias") and tensor.ndim and len(tensor) % 3 == 0:
        kind = part.rpartition("_")[2]
        three = torch.chunk(tensor, 3)
        return {f"{layer}.self_attn.{letter}_proj.{kind}": one for letter, one in zip("qkv", three, strict=True)}
    module, _, kind = part.rpartition(".")
    if module not in _IN_RESBLOCK:
        raise CheckpointError(f"the text encoder has the tensor {shown(name)}, which is not known")
    return {f"{layer}.{_IN_RESBLOCK[module]}.{kind}": tensor}
