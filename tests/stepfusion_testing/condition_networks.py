"""Networks with conditions for exports: one of few operators, tiny UNets of Stable Diffusion's kinds, a tiny DiT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import stepfusion as sf
from stepfusion.networks import (
    ConditionedNetwork,
    ConditionSpec,
    DiT,
    DiTConfig,
    UNet2DCondition,
    UNet2DConditionConfig,
)
from stepfusion_testing.exports import cpu_engine

_UNET: dict[str, Any] = {
    "sample_size": 4,
    "in_channels": 2,
    "out_channels": 2,
    "block_out_channels": (8,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 6,
    "attention_head_dim": 2,
}
_LARGE: dict[str, Any] = {
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 30,
}
#: Changes of the config and arguments of the network.
UNETS: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "stable diffusion": ({}, {}),
    "sdxl": (_LARGE, {"num_time_ids": 6}),
    "inpainting": ({"in_channels": 5}, {"concatenated_channels": 3}),
    "everything": ({**_LARGE, "in_channels": 5}, {"num_time_ids": 6, "concatenated_channels": 3}),
}


class Mixed(ConditionedNetwork):
    """Takes labels, a text and, as integers, sizes, and compiles in seconds."""

    in_channels, sample_size, num_classes = 2, 4, 4
    projects_conditions = True
    conditions = (ConditionSpec("text", (5, 6)), ConditionSpec("sizes", (2,), integer=True))

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.text, self.size, self.label = nn.Linear(6, 4), nn.Linear(2, 2), nn.Embedding(4, 2)

    def prepare(self, conditions: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        text = self.text(conditions["text"])
        return text, self.size(conditions["sizes"].to(text.dtype) / 10)

    def embed_time(self, timesteps: Tensor) -> Tensor:
        angles = timesteps.float()[:, None] / 1000
        return torch.cat((angles.sin(), angles.cos()), dim=1).to(self.text.weight.dtype)

    def condition(self, time: Tensor, class_labels: Tensor | None = None, *prepared: Tensor) -> Tensor:
        return time + prepared[1] + self.label(class_labels)

    def predict(self, x: Tensor, projections: Tensor, *prepared: Tensor) -> Tensor:
        keys, values = prepared[0].chunk(2, dim=-1)
        pixels = (x + projections[:, :, None, None]).flatten(2).transpose(1, 2)
        attended = (pixels @ keys.transpose(1, 2)).softmax(dim=-1) @ values
        return x + attended.transpose(1, 2).reshape(x.shape)


class ByKeyword(nn.Module):
    """A network that is not ours around one, with the same conditions."""

    def __init__(self, network: Mixed) -> None:
        super().__init__()
        self.inner = network

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor, *, sizes: Tensor, text: Tensor) -> Tensor:
        return self.inner(x, timesteps, labels, text=text, sizes=sizes)


def mixed_engine(network: nn.Module | None = None, **arguments: Any) -> sf.Engine:
    """An engine of a :class:`Mixed` network, or of one around it, eager and on a CPU."""
    settings = {"prediction": "epsilon", "null_label": 3, **arguments}
    return cpu_engine(Mixed().eval() if network is None else network, **settings)


def condition_network(name: str) -> torch.nn.Module:
    """One of :data:`UNETS`, or "dit": labels and a learned variance. Always the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "dit":
            sizes: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1}
            channels = {"in_channels": 2, "out_channels": 4, "sample_size": 4, "num_embeds_ada_norm": 3}
            network: torch.nn.Module = DiT(DiTConfig(**sizes, **channels))
        else:
            changes, arguments = UNETS[name]
            network = UNet2DCondition(UNet2DConditionConfig(**{**_UNET, **changes}), sequence_length=5, **arguments)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return network.eval()


def condition_engine(name: str, **arguments: Any) -> sf.Engine:
    """An engine of it, eager and on a CPU."""
    return cpu_engine(condition_network(name), **{"prediction": "epsilon", **arguments})


def options_of(engine: sf.Engine, images: int = 3) -> dict[str, Any]:
    """Labels, conditions and guidance for a request, as the engine's network takes them; some for all images."""
    generator, options = torch.Generator().manual_seed(1), dict[str, Any]()
    if engine.num_classes is not None:
        options["labels"] = [image % engine.num_classes for image in range(images)]
    for option, shape in (("conditions", (images,)), ("null_conditions", ())):
        values = {one.name: torch.randn(*shape, *one.shape, generator=generator) for one in engine.spec.conditions}
        if values:
            whole = [one.name for one in engine.spec.conditions if one.integer]
            options[option] = {k: (10 * v).long().abs() if k in whole else v for k, v in values.items()}
    return {**options, "guidance": 2.0} if engine.spec.conditions or engine.null_label is not None else options
