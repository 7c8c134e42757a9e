"""The names that a UNet's weights have in files of CompVis and Stability AI, as diffusers has them.

There, the blocks on the way down are numbered through, and those on the way up: with L residual blocks on a level,
``input_blocks.1`` to ``input_blocks.L`` are those of the first one, and ``input_blocks.(L + 1)`` is its downsampling.
"""

from __future__ import annotations

import re
from collections.abc import Collection

_BLOCK = re.compile(r"(input_blocks|middle_block|output_blocks)[._](\d+)[._](?:(\d+)[._])?(.+)")
_DOWNSAMPLING = re.compile(r"input_blocks\.(\d+)\.0\.op\.weight")
_ENDS = (
    (re.compile(r"input_blocks[._]0[._]0(?=[._]|$)"), "conv_in"),
    (re.compile(r"time_embed[._]0(?=[._]|$)"), "time_embedding.linear_1"),
    (re.compile(r"time_embed[._]2(?=[._]|$)"), "time_embedding.linear_2"),
    (re.compile(r"label_emb[._]0[._]0(?=[._]|$)"), "add_embedding.linear_1"),
    (re.compile(r"label_emb[._]0[._]2(?=[._]|$)"), "add_embedding.linear_2"),
    (re.compile(r"out[._]0(?=[._]|$)"), "conv_norm_out"),
    (re.compile(r"out[._]2(?=[._]|$)"), "conv_out"),
)
_RESNET = (
    (re.compile(r"in_layers[._]0(?=[._]|$)"), "norm1"),
    (re.compile(r"in_layers[._]2(?=[._]|$)"), "conv1"),
    (re.compile(r"emb_layers[._]1(?=[._]|$)"), "time_emb_proj"),
    (re.compile(r"out_layers[._]0(?=[._]|$)"), "norm2"),
    (re.compile(r"out_layers[._]3(?=[._]|$)"), "conv2"),
    (re.compile(r"skip_connection(?=[._]|$)"), "conv_shortcut"),
)
_ATTENTION = re.compile(r"(?:norm|proj_in|proj_out|transformer_blocks)(?=[._]|$)")
_CONVOLUTION = re.compile(r"(?:conv|op)(?=[._]|$)")


def layers_of_a_level(names: Collection[str]) -> int | None:
    """How many residual blocks a level of a UNet has; None if it has one level, or the names are others.

    Args:
        names: of its weights, without a prefix.
    """
    found = [int(match[1]) for name in names if (match := _DOWNSAMPLING.fullmatch(name))]
    return min(found) - 1 if found else None


def unet_name(name: str, layers: int) -> str | None:
    """The name of a weight or a module in diffusers; None if there is no such name.

    Args:
        name: without a prefix, with points between its parts, or underscores, as LoRA files of kohya have them. What
            follows the parts that are renamed stays as it is.
        layers: of a level.
    """
    for pattern, now in _ENDS:
        if match := pattern.match(name):
            return now + name[match.end() :]
    match = _BLOCK.fullmatch(name)
    if match is None:
        return None
    kind, first, rest = match[1], int(match[2]), match[4]
    if kind == "middle_block":
        rest = rest if match[3] is None else f"{match[3]}.{rest}"
        place = f"attentions.{(first - 1) // 2}" if first % 2 else f"resnets.{first // 2}"
        return _inside(f"mid_block.{place}", rest)
    if match[3] is None:
        return None
    level, layer = divmod(first - (kind == "input_blocks"), layers + 1)
    block = f"{'down' if kind == 'input_blocks' else 'up'}_blocks.{level}"
    if convolution := _CONVOLUTION.match(rest):
        sampler = "downsamplers" if kind == "input_blocks" else "upsamplers"
        return f"{block}.{sampler}.0.conv{rest[convolution.end() :]}"
    place = "resnets" if match[3] == "0" else "attentions"
    return _inside(f"{block}.{place}.{layer}", rest)


def _inside(block: str, rest: str) -> str | None:
    """The name of a part of a residual block or of a transformer."""
    if "resnets" not in block:
        return f"{block}.{rest}" if _ATTENTION.match(rest) else None
    for pattern, now in _RESNET:
        if match := pattern.match(rest):
            return f"{block}.{now}{rest[match.end() :]}"
    return None
