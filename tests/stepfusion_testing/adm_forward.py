"""The ADM UNet as a function of a checkpoint's own state dict, in float64, written from the papers' description.

Nothing of the package is used: names and shapes of the weights, and the forward pass, follow from the architecture
alone (Ho et al. 2020; Nichol & Dhariwal 2021; Dhariwal & Nichol 2021, section 3.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F

State = dict[str, torch.Tensor]
CLASSES = 1000


@dataclass(frozen=True)
class Architecture:
    """What the flags say; ``attention`` holds levels, ``heads`` is a number or, negative, minus a head's channels."""

    width: int
    mults: tuple[float, ...]
    blocks: int
    attention: frozenset[int]
    heads: int
    updown: bool
    scale_shift: bool = True
    classes: bool = False
    learn_sigma: bool = True
    new_order: bool = False


def layers(a: Architecture) -> dict[str, list[str]]:
    """Each stage of the network as a list of layers: "conv a b", "res a b", "attn c", "down c" or "up c"."""
    channels = [int(m * a.width) for m in a.mults]
    now, stages, skips = channels[0], {"input_blocks.0": [f"conv 3 {channels[0]}"]}, [channels[0]]
    down = 0

    def block(level: int, inputs: int) -> list[str]:
        out = channels[level]
        return [f"res {inputs} {out}", *([f"attn {out}"] if level in a.attention else [])]

    for level, out in enumerate(channels):
        for _ in range(a.blocks):
            down += 1
            stages[f"input_blocks.{down}"] = block(level, now)
            now = out
            skips.append(now)
        if level + 1 < len(channels):
            down += 1
            stages[f"input_blocks.{down}"] = [f"down {now}"]
            skips.append(now)
    stages["middle_block"] = [f"res {now} {now}", f"attn {now}", f"res {now} {now}"]
    up = 0
    for level in range(len(channels) - 1, -1, -1):
        for i in range(a.blocks + 1):
            stages[f"output_blocks.{up}"] = block(level, now + skips.pop())
            now = channels[level]
            if level > 0 and i == a.blocks:
                stages[f"output_blocks.{up}"].append(f"up {now}")
            up += 1
    return stages


def shapes(a: Architecture) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a checkpoint's tensors."""
    time, found = 4 * a.width, dict[str, tuple[int, ...]]()

    def affine(name: str, *shape: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = shape, shape[:1]

    def residual(name: str, inputs: int, out: int) -> None:
        affine(f"{name}.in_layers.0", inputs)
        affine(f"{name}.in_layers.2", out, inputs, 3, 3)
        affine(f"{name}.emb_layers.1", 2 * out if a.scale_shift else out, time)
        affine(f"{name}.out_layers.0", out)
        affine(f"{name}.out_layers.3", out, out, 3, 3)
        if inputs != out:
            affine(f"{name}.skip_connection", out, inputs, 1, 1)

    affine("time_embed.0", time, a.width)
    affine("time_embed.2", time, time)
    if a.classes:
        found["label_emb.weight"] = (CLASSES, time)
    for stage, parts in layers(a).items():
        for i, part in enumerate(parts):
            kind, *numbers = part.split()
            name, sizes = f"{stage}.{i}", [int(n) for n in numbers]
            if kind == "conv":
                affine(name, sizes[1], sizes[0], 3, 3)
            elif kind == "res":
                residual(name, *sizes)
            elif kind == "attn":
                affine(f"{name}.norm", sizes[0])
                affine(f"{name}.qkv", 3 * sizes[0], sizes[0], 1)
                affine(f"{name}.proj_out", sizes[0], sizes[0], 1)
            elif a.updown:
                residual(name, sizes[0], sizes[0])
            else:
                affine(f"{name}.{'op' if kind == 'down' else 'conv'}", sizes[0], sizes[0], 3, 3)
    first = int(a.mults[0] * a.width)
    affine("out.0", first)
    affine("out.2", 6 if a.learn_sigma else 3, first, 3, 3)
    return found


def random_state(a: Architecture, seed: int = 0) -> State:
    """Weights under which every layer matters: activations of order 1, norms that are not the identity."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes(a).items():
        values = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            values = values / math.sqrt(math.prod(shape[1:]))
        elif name.endswith(".weight"):
            values = 1 + 0.3 * values
        else:
            values = 0.3 * values
        state[name] = values
    return state


def forward(
    state: State, a: Architecture, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """The output of every stage, and of the network under "out", in float64."""
    w = {name: value.double() for name, value in state.items()}
    angles = t.double()[:, None] * torch.exp(torch.arange(a.width // 2).double() / (a.width // 2) * -math.log(10000))
    time = torch.cat((angles.cos(), angles.sin()), 1) @ w["time_embed.0.weight"].T + w["time_embed.0.bias"]
    time = silu(time) @ w["time_embed.2.weight"].T + w["time_embed.2.bias"]
    if labels is not None:
        time = time + w["label_emb.weight"][labels]

    def norm(h: torch.Tensor, name: str) -> torch.Tensor:
        grouped = h.reshape(len(h), 32, -1)
        grouped = grouped - grouped.mean(2, keepdim=True)
        h = (grouped / (grouped.square().mean(2, keepdim=True) + 1e-5).sqrt()).reshape(h.shape)
        view = (-1, *(1,) * (h.ndim - 2))
        return h * w[f"{name}.weight"].view(view) + w[f"{name}.bias"].view(view)

    def conv(h: torch.Tensor, name: str, **how: int) -> torch.Tensor:
        return F.conv2d(h, w[f"{name}.weight"], w[f"{name}.bias"], **how)

    def residual(h: torch.Tensor, name: str, resize: str) -> torch.Tensor:
        left = silu(norm(h, f"{name}.in_layers.0"))
        left, h = resized(left, resize), resized(h, resize)
        left = conv(left, f"{name}.in_layers.2", padding=1)
        emb = silu(time) @ w[f"{name}.emb_layers.1.weight"].T + w[f"{name}.emb_layers.1.bias"]
        emb = emb[:, :, None, None]
        if a.scale_shift:
            scale, shift = emb.tensor_split(2, 1)
            left = norm(left, f"{name}.out_layers.0") * (1 + scale) + shift
        else:
            left = norm(left + emb, f"{name}.out_layers.0")
        left = conv(silu(left), f"{name}.out_layers.3", padding=1)
        return left + (conv(h, f"{name}.skip_connection") if f"{name}.skip_connection.weight" in w else h)

    def attention(h: torch.Tensor, name: str) -> torch.Tensor:
        batch, channels, height, width = h.shape
        heads = a.heads if a.heads > 0 else channels // -a.heads
        size = channels // heads
        tokens = norm(h.reshape(batch, channels, -1), f"{name}.norm")
        qkv = w[f"{name}.qkv.weight"][:, :, 0] @ tokens + w[f"{name}.qkv.bias"][:, None]
        attended = []
        for head in range(heads):
            if a.new_order:
                q, k, v = (qkv[:, i * channels + head * size :][:, :size] for i in range(3))
            else:
                q, k, v = (qkv[:, (3 * head + i) * size :][:, :size] for i in range(3))
            weights = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(size), dim=2)  # [B, queries, keys]
            attended.append(v @ weights.transpose(1, 2))
        mixed = w[f"{name}.proj_out.weight"][:, :, 0] @ torch.cat(attended, 1) + w[f"{name}.proj_out.bias"][:, None]
        return h + mixed.reshape(batch, channels, height, width)

    def run(h: torch.Tensor, stage: str, parts: list[str]) -> torch.Tensor:
        for i, part in enumerate(parts):
            name, kind = f"{stage}.{i}", part.split()[0]
            if kind == "conv":
                h = conv(h, name, padding=1)
            elif kind == "attn":
                h = attention(h, name)
            elif kind == "res" or a.updown:
                h = residual(h, name, kind)
            elif kind == "down":
                h = conv(h, f"{name}.op", stride=2, padding=1)
            else:
                h = conv(resized(h, "up"), f"{name}.conv", padding=1)
        return h

    outputs, skips, h = dict[str, torch.Tensor](), list[torch.Tensor](), x.double()
    for stage, parts in layers(a).items():
        h = run(torch.cat((h, skips.pop()), 1) if stage.startswith("output") else h, stage, parts)
        outputs[stage] = h
        if stage.startswith("input"):
            skips.append(h)
    outputs["out"] = conv(silu(norm(h, "out.0")), "out.2", padding=1)
    return outputs


def silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + torch.exp(-x))


def resized(x: torch.Tensor, how: str) -> torch.Tensor:
    """Means of 2 x 2 squares, or every pixel as such a square."""
    if how == "down":
        return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
    if how == "up":
        return x.repeat_interleave(2, -1).repeat_interleave(2, -2)
    return x
