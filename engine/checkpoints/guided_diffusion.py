"""Checkpoints of guided-diffusion and improved-diffusion: ``.pt`` state dicts, described by command-line flags.

A file says nothing of its architecture: that stands in the flags with which its authors run it. They are given, or
read from a JSON file beside it, or known if the file has a published name. Every key, shape and dtype that the
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

from stepfusion.checkpoints.archive import stored_in_archive
from stepfusion.checkpoints.guided_flags import read_flags
from stepfusion.checkpoints.loaded import LoadedModel
from stepfusion.checkpoints.other_libraries import of_another_library
from stepfusion.checkpoints.weight_names import names_of_today
from stepfusion.checkpoints.weights import check_state
from stepfusion.errors import CheckpointError
from stepfusion.networks import ADMUNet
from stepfusion.networks.blocks import Attention
from stepfusion.networks.meta import Unfilled

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


@dataclass(frozen=True, repr=False)
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
        model: a published model whose flags it has: a name of
            :data:`stepfusion.checkpoints.guided_flags.PUBLISHED`. By default the flags stand in a JSON object beside
            the file (``name.json`` for ``name.pt``), or the file has a published model's name.
        flags: flags of their command line that are other than those, e.g. ``image_size=64, learn_sigma=True``; what
            no one says is as in guided-diffusion's scripts. improved-diffusion's own have ``rescale_timesteps=True``
            by default, which is asked for if the number of diffusion steps makes a difference.

    Raises:
        CheckpointError: the file does not fit the flags, or is of another library; or a flag is unknown, has a wrong
            value, or is needed; it is named.
    """
    path = Path(source)
    if not path.is_file():
        raise CheckpointError(f"{path} is {'not a file' if path.exists() else 'missing'}")
    stored = stored_in_archive(path, of_another_library)
    chosen = read_flags(path, model, flags)
    try:
        config, scheduler_config = chosen.network_config(), chosen.scheduler_config()
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"flags of {path}: {error}") from None
    with torch.device("meta"), Unfilled():
        network = ADMUNet(config)
    named = names_of_today(stored, their_shapes(network), path)
    theirs = check_state(named, their_shapes(network), path, "flags")
    ours = our_weights(theirs, network, legacy=not chosen.use_new_attention_order)
    network.load_state_dict(ours, strict=True, assign=True)
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
    head if `legacy`, and the q of all heads, then k, then v in the new order.
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
