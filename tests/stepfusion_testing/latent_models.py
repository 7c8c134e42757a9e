"""Tiny networks of diffusers and transformers, with random weights, and a tokenizer of a few words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)


def randomised(network: Network, scale: float = 0.2) -> Network:
    """The network in eval mode and without gradients, with every weight random: norms and biases too."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return network.eval().requires_grad_(False)


# A tokenizer of a few words

START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = ("c a", "ca t</w>", "d o", "do g</w>", "o n</w>", "s a", "sa t</w>")


def write_tokenizer(directory: Path, *, length: int = 77, pad: str = END, style: str = "old") -> Path:
    """A directory with CLIP's files: every byte, every byte at a word's end, a few merges, start and end.

    Args:
        directory: is made.
        length: of a prompt in tokens.
        pad: the padding token: "!" in SD2's and SDXL's second tokenizer.
        style: "old", as SD1 and SD2 have it: special_tokens_map.json counts; "new", as SDXL has it:
            tokenizer_config.json lists the added tokens; "whole": all in tokenizer.json, as transformers saves.
    """
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    directory.mkdir(parents=True)
    letters = list(bytes_to_unicode().values())
    tokens = [
        *letters,
        *(letter + "</w>" for letter in letters),
        *("".join(m.split(" ")) for m in MERGES),
        START,
        END,
    ]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    (directory / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]) + "\n", encoding="utf-8")
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    ends = {role: {"content": text, **flags} for role, text in (("bos_token", START), ("eos_token", END))}
    config: dict[str, Any] = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "pad_token": END}
    if style == "old":
        config |= {key: {"__type": "AddedToken", **value} for key, value in ends.items()}
        config["unk_token"] = {"__type": "AddedToken", "content": END, **flags}
        special = {**ends, "pad_token": pad, "unk_token": {"content": END, **flags}}
        (directory / "special_tokens_map.json").write_text(json.dumps(special), encoding="utf-8")
    else:
        added = {text: {"content": text, **flags, "special": True} for text in dict.fromkeys((pad, START, END))}
        config["added_tokens_decoder"] = {str(vocabulary[text]): token for text, token in added.items()}
        config |= {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if style == "whole":
        tokenizer = CLIPTokenizer.from_pretrained(str(directory), local_files_only=True)
        for path in directory.iterdir():
            path.unlink()
        tokenizer.save_pretrained(str(directory))
    return directory


def text_model(*, projection: int | None = None, layers: int = 3, size: int = 32, eos: int | None = None) -> Any:
    """A CLIPTextModel of transformers, or one with a projection, for such a tokenizer."""
    import transformers

    ends = 2 * 256 + len(MERGES)
    config = transformers.CLIPTextConfig(
        vocab_size=ends + 2,
        hidden_size=size,
        intermediate_size=2 * size,
        projection_dim=projection or 16,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=77,
        hidden_act="quick_gelu" if projection is None else "gelu",
        bos_token_id=ends,
        eos_token_id=ends + 1 if eos is None else eos,
    )
    kind = transformers.CLIPTextModel if projection is None else transformers.CLIPTextModelWithProjection
    model = randomised(kind(config), 0.05)
    model.config.architectures = [kind.__name__]
    return model


def condition_unet(*, large: bool = False) -> Any:
    """A UNet2DConditionModel of Stable Diffusion's form, or of SDXL's if it is ``large``."""
    import diffusers

    attends = ["CrossAttnDownBlock2D", "DownBlock2D"], ["UpBlock2D", "CrossAttnUpBlock2D"]
    options: dict[str, Any] = {"attention_head_dim": 2}
    if large:
        attends = ["DownBlock2D", "CrossAttnDownBlock2D"], ["CrossAttnUpBlock2D", "UpBlock2D"]
        options = {
            "attention_head_dim": [2, 4],
            "transformer_layers_per_block": [1, 2],
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 40,
        }
    network = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=2,
        norm_num_groups=4,
        cross_attention_dim=32,
        down_block_types=attends[0],
        up_block_types=attends[1],
        **options,
    )
    return randomised(network)
