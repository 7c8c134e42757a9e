"""EDM's UNets as functions of a state dict, in float64, written from the papers' description.

Nothing of the package is used: names and shapes of the weights, and the forward pass, follow from the architecture
alone (Song et al. 2021, appendix H; Dhariwal & Nichol 2021, section 3.1; Karras et al. 2022, appendix F.2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Architecture:
    """One of EDM's UNets; ``attention`` holds heights, ``adm`` says which of the two it is."""

    height: int
    width: int
    mults: tuple[int, ...]
    blocks: int
    attention: frozenset[int]
    adm: bool = False
    channels: int = 3
    classes: int = 0
    augment: int = 0
    noise: int = 1
    fourier: bool = False
    encoder: str = "standard"
    decoder: str = "standard"
    taps: tuple[int, ...] = (1, 1)

    @property
    def eps(self) -> float:
        return 1e-5 if self.adm else 1e-6

    @property
    def gain(self) -> float:
        """What sums are multiplied with."""
        return 1.0 if self.adm else math.sqrt(0.5)

    def heads(self, channels: int) -> int:
        return channels // 64 if self.adm else 1


@dataclass(frozen=True)
class Layer:
    """A residual block by its name, with its channels: in, out, and those of a skip connection among the former."""

    name: str
    inputs: int
    out: int
    attends: bool = False
    resize: str = ""
    joins: bool = False


def down(a: Architecture) -> list[Layer]:
    """The blocks of the way down."""
    now, layers = a.width * (a.mults[0] if a.adm else 1), []
    for level, mult in enumerate(a.mults):
        size = a.height >> level
        if level > 0:
            layers.append(Layer(f"{size}x{size}_down", now, now, resize="down"))
        for i in range(a.blocks):
            layers.append(Layer(f"{size}x{size}_block{i}", now, mult * a.width, size in a.attention))
            now = mult * a.width
    return layers


def up(a: Architecture) -> list[Layer]:
    """The blocks of the way up."""
    skips = [a.width * (a.mults[0] if a.adm else 1), *(layer.out for layer in down(a))]
    now, layers = skips[-1], []
    for level in range(len(a.mults) - 1, -1, -1):
        size, out = a.height >> level, a.mults[level] * a.width
        if level == len(a.mults) - 1:
            layers += [Layer(f"{size}x{size}_in0", now, now, True), Layer(f"{size}x{size}_in1", now, now)]
        else:
            layers.append(Layer(f"{size}x{size}_up", now, now, resize="up"))
        for i in range(a.blocks + 1):
            attends = size in a.attention and (a.adm or i == a.blocks)
            layers.append(Layer(f"{size}x{size}_block{i}", now + skips.pop(), out, attends, joins=True))
            now = out
    return layers


def shapes(a: Architecture) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a state dict's tensors."""
    wide, noise, found = 4 * a.width, a.noise * a.width, dict[str, tuple[int, ...]]()
    filter_ = (1, 1, len(a.taps), len(a.taps))

    def affine(name: str, *shape: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = shape, shape[:1]

    def block(name: str, layer: Layer) -> None:
        inputs, out = layer.inputs, layer.out
        affine(f"{name}.norm0", inputs)
        affine(f"{name}.conv0", out, inputs, 3, 3)
        affine(f"{name}.affine", out * (2 if a.adm else 1), wide)
        affine(f"{name}.norm1", out)
        affine(f"{name}.conv1", out, out, 3, 3)
        if layer.resize:
            found[f"{name}.conv0.resample_filter"] = found[f"{name}.skip.resample_filter"] = filter_
        if inputs != out or (layer.resize and not a.adm):
            affine(f"{name}.skip", out, inputs, 1, 1)
        if layer.attends and a.heads(out):
            affine(f"{name}.norm2", out)
            affine(f"{name}.qkv", 3 * out, out, 1, 1)
            affine(f"{name}.proj", out, out, 1, 1)

    affine("map_layer0", wide, noise)
    affine("map_layer1", wide, wide)
    if a.classes:
        found["map_label.weight"] = (wide if a.adm else noise, a.classes)
        if not a.adm:
            found["map_label.bias"] = (noise,)
    if a.augment:
        found["map_augment.weight"] = (noise, a.augment)
    if a.fourier:
        found["map_noise.freqs"] = (noise // 2,)
    first = a.width * (a.mults[0] if a.adm else 1)
    affine(f"enc.{a.height}x{a.height}_conv", first, a.channels, 3, 3)
    beside = a.channels
    for layer in down(a):
        block(f"enc.{layer.name}", layer)
        if layer.resize and a.encoder != "standard":
            level = layer.name.split("_")[0]
            if a.encoder == "skip":
                found[f"enc.{level}_aux_down.resample_filter"] = filter_
                affine(f"enc.{level}_aux_skip", layer.out, beside, 1, 1)
            else:
                found[f"enc.{level}_aux_residual.resample_filter"] = filter_
                affine(f"enc.{level}_aux_residual", layer.out, beside, 3, 3)
                beside = layer.out
    for layer in up(a):
        block(f"dec.{layer.name}", layer)
    if a.adm:
        affine("out_norm", a.mults[0] * a.width)
        affine("out_conv", a.channels, a.mults[0] * a.width, 3, 3)
        return found
    lowest = len(a.mults) - 1
    for level, mult in enumerate(a.mults):
        size = a.height >> level
        if level == 0 or a.decoder == "skip":
            affine(f"dec.{size}x{size}_aux_norm", mult * a.width)
            affine(f"dec.{size}x{size}_aux_conv", a.channels, mult * a.width, 3, 3)
        if level < lowest and a.decoder == "skip":
            found[f"dec.{size}x{size}_aux_up.resample_filter"] = filter_
    return found


def random_state(a: Architecture, seed: int = 0) -> State:
    """Weights under which every layer matters: activations of order 1, norms that are not the identity."""
    generator = torch.Generator().manual_seed(seed)
    taps = torch.tensor(a.taps, dtype=torch.float64)
    state = {}
    for name, shape in shapes(a).items():
        values = torch.randn(shape, generator=generator)
        if name.endswith("resample_filter"):
            values = (torch.outer(taps, taps) / taps.sum() ** 2).float()[None, None]
        elif name == "map_noise.freqs":
            values = 16 * values
        elif len(shape) > 1:
            values = values / math.sqrt(math.prod(shape[1:]))
        else:
            values = 0.3 * values + (1 if name.endswith(".weight") else 0)
        state[name] = values
    return state


def smaller(x: torch.Tensor, taps: Sequence[int], zeros: int) -> torch.Tensor:
    """Every second sample of x under the filter, with zeros around it."""
    x = F.pad(x, (zeros,) * 4)
    rows, columns = ((size - len(taps)) // 2 + 1 for size in x.shape[2:])
    out = 0.0
    for i, of_row in enumerate(taps):
        for j, of_column in enumerate(taps):
            part = x[:, :, i : i + 2 * rows - 1 : 2, j : j + 2 * columns - 1 : 2]
            out = out + of_row * of_column / sum(taps) ** 2 * part
    return out


def larger(x: torch.Tensor, taps: Sequence[int]) -> torch.Tensor:
    """The samples of x with zeros between them under the filter, four times."""
    height, width = x.shape[2:]
    around = len(taps) - 2
    full = x.new_zeros(*x.shape[:2], 2 * height + around, 2 * width + around)
    for i, of_row in enumerate(taps):
        for j, of_column in enumerate(taps):
            full[:, :, i : i + 2 * height : 2, j : j + 2 * width : 2] += of_row * of_column / sum(taps) ** 2 * 4 * x
    crop = around // 2
    return full[:, :, crop : crop + 2 * height, crop : crop + 2 * width]


def forward(
    state: State, a: Architecture, x: torch.Tensor, t: torch.Tensor, classes: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """What each layer of ``enc`` and ``dec`` returns, and the network under "out", in float64.

    ``classes`` are one-hot [B, N], or zeros for none.
    """
    w = {name: value.double() for name, value in state.items()}
    x, seen = x.double(), dict[str, torch.Tensor]()

    def linear(h: torch.Tensor, name: str) -> torch.Tensor:
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(h: torch.Tensor, name: str) -> torch.Tensor:
        grouped = h.reshape(len(h), min(32, h.shape[1] // 4), -1)
        grouped = grouped - grouped.mean(2, keepdim=True)
        h = (grouped / (grouped.square().mean(2, keepdim=True) + a.eps).sqrt()).reshape(h.shape)
        return h * w[f"{name}.weight"].view(-1, 1, 1) + w[f"{name}.bias"].view(-1, 1, 1)

    def conv(h: torch.Tensor, name: str) -> torch.Tensor:
        weight = w[f"{name}.weight"]
        return F.conv2d(h, weight, w[f"{name}.bias"], padding=weight.shape[2] // 2)

    def resized(h: torch.Tensor, how: str) -> torch.Tensor:
        if how == "down":
            return smaller(h, a.taps, (len(a.taps) - 1) // 2)
        return larger(h, a.taps) if how == "up" else h

    def attention(h: torch.Tensor, name: str) -> torch.Tensor:
        heads = a.heads(h.shape[1])
        mixed = conv(norm(h, f"{name}.norm2"), f"{name}.qkv").reshape(len(h), heads, -1, 3, h.shape[2] * h.shape[3])
        q, k, v = mixed[:, :, :, 0], mixed[:, :, :, 1], mixed[:, :, :, 2]  # [B, heads, D, HW]
        weights = (q.transpose(2, 3) @ k / math.sqrt(q.shape[2])).softmax(-1)
        return conv((v @ weights.transpose(2, 3)).reshape(h.shape), f"{name}.proj")

    def block(h: torch.Tensor, name: str, layer: Layer) -> torch.Tensor:
        left = conv(resized(silu(norm(h, f"{name}.norm0")), layer.resize), f"{name}.conv0")
        time = linear(embedding, f"{name}.affine")[:, :, None, None]
        if a.adm:
            scale, shift = time[:, : layer.out], time[:, layer.out :]
            left = norm(left, f"{name}.norm1") * (1 + scale) + shift
        else:
            left = norm(left + time, f"{name}.norm1")
        left = conv(silu(left), f"{name}.conv1")
        right = resized(h, layer.resize)
        right = conv(right, f"{name}.skip") if f"{name}.skip.weight" in w else right
        h = (left + right) * a.gain
        if f"{name}.qkv.weight" in w:
            h = (h + attention(h, name)) * a.gain
        seen[name] = h
        return h

    embedding = embed(w, a, t, classes)
    first = f"enc.{a.height}x{a.height}_conv"
    seen[first] = conv(x, first)
    skips, beside = [seen[first]], x
    for layer in down(a):
        h, level = block(skips[-1], f"enc.{layer.name}", layer), f"enc.{layer.name.split('_')[0]}"
        if layer.resize and a.encoder == "skip":
            seen[f"{level}_aux_down"] = beside = resized(beside, "down")
            seen[f"{level}_aux_skip"] = conv(beside, f"{level}_aux_skip")
            h = h + seen[f"{level}_aux_skip"]
        if layer.resize and a.encoder == "residual":
            name, zeros = f"{level}_aux_residual", (len(a.taps) - 1) // 2
            full = F.conv2d(beside, w[f"{name}.weight"], padding=1 + zeros)
            seen[name] = smaller(full, a.taps, 0) + w[f"{name}.bias"].view(-1, 1, 1)
            h = beside = (h + seen[name]) / math.sqrt(2)
        skips.append(h)
    h, out = skips[-1], None
    for layer in up(a):
        h = torch.cat((h, skips.pop()), 1) if layer.joins else h
        h, level = block(h, f"dec.{layer.name}", layer), f"dec.{layer.name.split('_')[0]}"
        if f"{level}_aux_norm.weight" in w and layer.name.endswith(f"_block{a.blocks}"):
            if f"{level}_aux_up.resample_filter" in w:
                seen[f"{level}_aux_up"] = out = resized(out, "up")
            seen[f"{level}_aux_conv"] = more = conv(silu(norm(h, f"{level}_aux_norm")), f"{level}_aux_conv")
            out = more if out is None else more + out
    seen["out"] = conv(silu(norm(h, "out_norm")), "out_conv") if a.adm else out
    return seen


def embed(w: State, a: Architecture, t: torch.Tensor, classes: torch.Tensor | None) -> torch.Tensor:
    """What every block's affine layer takes."""
    half = a.noise * a.width // 2
    if a.fourier:
        angles = 2 * math.pi * t.double()[:, None] * w["map_noise.freqs"]
    else:
        power = torch.arange(half).double() / (half if a.adm else half - 1)
        angles = t.double()[:, None] * 10000.0**-power
    pair = (angles.cos(), angles.sin()) if a.adm else (angles.sin(), angles.cos())
    emb = torch.cat(pair, 1)
    if classes is not None and not a.adm:
        emb = emb + math.sqrt(a.classes) * classes.double() @ w["map_label.weight"].T + w["map_label.bias"]
    emb = silu(emb @ w["map_layer0.weight"].T + w["map_layer0.bias"])
    emb = emb @ w["map_layer1.weight"].T + w["map_layer1.bias"]
    if classes is not None and a.adm:
        emb = emb + classes.double() @ w["map_label.weight"].T
    return silu(emb)


def silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + torch.exp(-x))
