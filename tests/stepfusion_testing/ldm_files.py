"""Weights of diffusers and transformers under the names that CompVis, Stability AI and OpenCLIP have for them."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_TEXT = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def ldm_unet(state: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """A UNet's weights under the names of CompVis, without a prefix."""
    return {_unet_name(name, state, layers): tensor for name, tensor in state.items()}


def _unet_name(name: str, state: Mapping[str, Tensor], layers: int) -> str:
    for end, old in _ENDS.items():
        if name.startswith(end + "."):
            return old + name.removeprefix(end)
    kind, *rest = name.split(".")
    if kind == "mid_block":
        number = 1 if rest[0] == "attentions" else 2 * int(rest[1])
        return f"middle_block.{number}.{_in_block(rest[0], '.'.join(rest[2:]))}"
    level, part, layer, inside = int(rest[0]), rest[1], int(rest[2]), ".".join(rest[3:])
    first = level * (layers + 1)
    if part == "downsamplers":
        return f"input_blocks.{1 + first + layers}.0.op.{rest[-1]}"
    if part == "upsamplers":
        attends = any(other.startswith(f"up_blocks.{level}.attentions") for other in state)
        return f"output_blocks.{first + layers}.{1 + attends}.conv.{rest[-1]}"
    block = f"input_blocks.{1 + first + layer}" if kind == "down_blocks" else f"output_blocks.{first + layer}"
    return f"{block}.{int(part == 'attentions')}.{_in_block(part, inside)}"


def _in_block(part: str, inside: str) -> str:
    if part == "attentions":
        return inside
    module, _, kind = inside.rpartition(".")
    return f"{_RESNET[module]}.{kind}"


def ldm_vae(state: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """An autoencoder's weights under the names of CompVis, without a prefix; attention as 1x1 convolutions."""
    renamed = {}
    for name, tensor in state.items():
        new = re.sub(r"down_blocks\.(\d+)", r"down.\1", name)
        new = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}", new)
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", new)
        new = new.replace(".resnets.", ".block.").replace("downsamplers.0", "downsample")
        new = new.replace("upsamplers.0", "upsample").replace("conv_shortcut", "nin_shortcut")
        new = new.replace("conv_norm_out", "norm_out")
        if "mid_block.attentions.0." in new:
            for today, old in _ATTENTION.items():
                new = new.replace(f"mid_block.attentions.0.{today}.", f"mid.attn_1.{old}.")
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        renamed[new] = tensor
    return renamed


def open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A text model's weights under the names of OpenCLIP, without a prefix."""
    plain = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    ends = {
        "embeddings.position_embedding.weight": "positional_embedding",
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "final_layer_norm.weight": "ln_final.weight",
        "final_layer_norm.bias": "ln_final.bias",
    }
    renamed = {"logit_scale": torch.ones(())}
    for name, tensor in plain.items():
        if name in ends:
            renamed[ends[name]] = tensor
        elif name == "text_projection.weight":
            renamed["text_projection"] = tensor.T.contiguous()
        elif match := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name):
            layer, module, kind = match.groups()
            block = f"transformer.resblocks.{layer}"
            if module == "self_attn.q_proj":
                three = [plain[f"encoder.layers.{layer}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
                renamed[f"{block}.attn.in_proj_{kind}"] = torch.cat(three)
            elif module in _TEXT:
                renamed[f"{block}.{_TEXT[module]}.{kind}"] = tensor
    return renamed
