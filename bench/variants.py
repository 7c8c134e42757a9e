"""The launches that the machine-code bench looks at: every kernel as the engine and the networks launch it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from stepfusion import kernels


@dataclass(frozen=True)
class Variant:
    """A launch to look at: for sm_90, or for every target."""

    name: str
    launch: Callable[[], object]
    every_target: bool = False


_OF_THE_NETWORK = ("out_uncond", "x_net")


def _int64(lanes: int) -> torch.Tensor:
    return torch.zeros(lanes, dtype=torch.int64)


def _noise(how: str, x: torch.Tensor) -> dict[str, torch.Tensor]:
    if how == "drawn":
        return {"seeds": _int64(len(x)), "indices": _int64(len(x))}
    return {"noise": torch.zeros(x.shape)} if how == "given" else {}


def step(
    dtype: torch.dtype = torch.bfloat16,
    noise: str = "none",
    *,
    shape: tuple[int, ...] = (2, 1, 64, 64),
    learned: bool = False,
    guidance: bool = False,
    copies: int = 1,
    x0: bool = False,
    history: int = 0,
    known: bool = False,
    nhwc: bool = False,
) -> Variant:
    """A launch of the table walker, in place and with flags, as the engine makes it."""

    def launch() -> None:
        lanes = shape[0]
        x = torch.zeros(shape)
        out = torch.zeros((lanes, (1 + learned) * shape[1], *shape[2:]), dtype=dtype)
        extra: dict[str, torch.Tensor] = _noise(noise, x)
        if guidance:
            extra |= {"out_uncond": torch.zeros_like(out), "guidance": torch.ones(lanes)}
        if copies:
            extra["x_net"] = torch.zeros((copies * lanes, *shape[1:]), dtype=dtype)
        if x0:
            extra["x0"] = torch.zeros_like(x)
        if history:
            extra["history"] = torch.zeros((history, *shape))
        if known:
            extra["known"] = torch.zeros_like(x)
        if nhwc:
            extra |= {n: t.to(memory_format=torch.channels_last) for n, t in extra.items() if n in _OF_THE_NETWORK}
            out = out.to(memory_format=torch.channels_last)
        table, timesteps = torch.zeros(50, len(kernels.COLUMNS)), _int64(50)
        kernels.diffusion_step(x, out, _int64(lanes), table, timesteps, x_next=x, flags=_int64(lanes), **extra)

    words = [_shape(shape), _name(dtype), f"noise {noise}"]
    options = {"learned": learned, "guided": guidance, "x0": x0, f"history {history}": history > 0, "known": known}
    options["nhwc"] = nhwc
    words += [word for word, on in options.items() if on]
    return Variant(", ".join([*words, f"{copies} copies"]), launch)


def _forward(dtype: torch.dtype, noise: str, shape: tuple[int, ...] = (2, 1, 64, 64)) -> Variant:
    def launch() -> None:
        x, table = torch.zeros(shape, dtype=dtype), torch.zeros(1000)
        kernels.q_sample(x, _int64(len(x)), table, table, **_noise(noise, x))

    return Variant(f"{_shape(shape)}, {_name(dtype)}, noise {noise}", launch)


def _posterior(dtype: torch.dtype, shape: tuple[int, ...] = (2, 1, 64, 64)) -> Variant:
    def launch() -> None:
        x, table = torch.zeros(shape, dtype=dtype), torch.zeros(1000)
        kernels.q_posterior_mean_variance(x, x, _int64(len(x)), table, table, table, table)

    return Variant(f"{_shape(shape)}, {_name(dtype)}", launch)


def _normal(shape: tuple[int, ...], stream: int) -> Variant:
    lanes = _int64(shape[0])
    return Variant(
        f"{_shape(shape)}, stream {stream}", lambda: kernels.normal(lanes, lanes, lanes, shape[1:], stream)
    )


def _transition(
    dtype: torch.dtype,
    shape: tuple[int, ...] = (2, 1, 64, 64),
    *,
    learned: bool = False,
    guidance: bool = False,
    nhwc: bool = False,
) -> Variant:
    """The log-probability of a step, as a rollout and its replay ask for it."""

    def launch() -> None:
        x, memory = torch.zeros(shape), torch.channels_last if nhwc else torch.contiguous_format
        channels = (1 + learned) * shape[1]
        out = torch.zeros((shape[0], channels, *shape[2:]), dtype=dtype).contiguous(memory_format=memory)
        table, transitions = torch.zeros(50, len(kernels.COLUMNS)), torch.zeros(50, 2, dtype=torch.float64)
        extra = {"out_uncond": out, "guidance": torch.ones(len(x))} if guidance else {}
        kernels.transition_logprob(x, x, out, _int64(len(x)), table, transitions, **extra)

    words = [_shape(shape), _name(dtype)]
    words += [word for word, on in (("learned", learned), ("guided", guidance), ("nhwc", nhwc)) if on]
    return Variant(", ".join(words), launch)


def _pixels(dtype: torch.dtype, shape: tuple[int, ...]) -> Variant:
    return Variant(f"{_shape(shape)}, {_name(dtype)}", lambda: kernels.to_uint8(torch.zeros(shape, dtype=dtype)))


def _group_norm(
    dtype: torch.dtype,
    size: int,
    channels: int,
    skip: int = 0,
    groups: int = 32,
    *,
    modulated: bool = False,
    silu: bool = True,
) -> Variant:
    """A launch as in a residual block, on images of size x size; modulated: with time, scale and shift."""

    def launch() -> None:
        x, other = (
            torch.zeros(2, c, size, size, dtype=dtype).contiguous(memory_format=torch.channels_last)
            for c in (channels, skip)
        )
        parameters = torch.zeros(channels + skip, dtype=dtype)
        projections = torch.zeros(2, 4 * len(parameters), dtype=dtype).chunk(4, dim=1)
        extra = dict(zip(("time", "scale", "shift"), projections, strict=False)) if modulated else {}
        kernels.group_norm_silu(
            x, parameters, parameters, groups, 1e-6, skip=other if skip else None, silu=silu, **extra
        )

    words = [f"{size}x{size}", f"{channels}+{skip} channels" if skip else f"{channels} channels", _name(dtype)]
    words += [word for word, on in (("modulated", modulated), ("no silu", not silu)) if on]
    return Variant(", ".join(words), launch)


def _add_group_norm(
    dtype: torch.dtype, size: int, channels: int, skip: int = 0, *, residual: bool = True, groups: int = 32
) -> Variant:
    """The first norm of a residual block, which adds up its input as well."""

    def launch() -> None:
        x, other = (
            torch.zeros(2, c, size, size, dtype=dtype).contiguous(memory_format=torch.channels_last)
            for c in (channels, skip)
        )
        parameters = torch.zeros(channels + skip, dtype=dtype)
        bias = torch.zeros(channels + skip).expand(2, channels + skip)
        added = x if residual else None, other if skip else None
        kernels.add_group_norm_silu(
            x, parameters, parameters, groups, 1e-6, residual=added[0], skip=added[1], time=bias
        )

    words = [f"{size}x{size}", f"{channels}+{skip} channels" if skip else f"{channels} channels", _name(dtype)]
    return Variant(", ".join([*words, *["residual"] * residual, "input"]), launch)


def _add_bias(dtype: torch.dtype, size: int, channels: int, resize: str = "") -> Variant:
    """What a residual block leaves to be added, if a resampling follows."""

    def launch() -> None:
        x = torch.zeros(2, channels, size, size, dtype=dtype).contiguous(memory_format=torch.channels_last)
        add = {"": kernels.add_bias, "doubled": kernels.add_bias_doubled, "padded": kernels.add_bias_padded}[resize]
        add(x, torch.zeros(channels), x)

    words = [f"{size}x{size}", f"{channels} channels", _name(dtype)]
    return Variant(", ".join([*words, *[resize] * bool(resize)]), launch)


def _layer_norm(dtype: torch.dtype, channels: int, tokens: int = 256, *, adds: bool = False) -> Variant:
    """A modulated norm of a transformer, whose modulations are columns of one wider tensor."""

    def launch() -> None:
        x = torch.zeros(2, tokens, channels, dtype=dtype)
        shift, scale, gate = torch.zeros(2, 3 * channels, dtype=dtype).chunk(3, dim=1)
        if adds:
            kernels.add_layer_norm_modulate(x, scale, shift, 1e-6, branch=x, gate=gate)
        else:
            kernels.layer_norm_modulate(x, scale, shift, 1e-6)

    words = [f"{tokens} tokens", f"{channels} channels", _name(dtype)]
    return Variant(", ".join([*words, *["residual"] * adds]), launch)


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def variants() -> list[Variant]:
    """Every kind of launch: dtypes, sources of noise, optional arguments, large, small, ragged and single lanes."""
    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    noises = ("none", "given", "drawn")
    large, fashion, cifar, ragged = (2, 1, 64, 64), (2, 1, 28, 28), (2, 3, 32, 32), (2, 1, 65, 80)
    everywhere = [
        step(brain, "none"),
        step(brain, "drawn"),
        step(brain, "drawn", shape=fashion),
        step(brain, "drawn", learned=True),
        _forward(brain, "drawn"),
        _posterior(brain),
        _transition(brain),
        _normal(large, kernels.STREAM_INITIAL),
        *(_pixels(single, (2, channels, 64, 64)) for channels in (1, 3, 4)),
        _group_norm(brain, 256, 128),
        _group_norm(brain, 128, 256, 128),
        _group_norm(brain, 16, 256, modulated=True),
        _add_group_norm(brain, 32, 128),
        _add_bias(brain, 32, 256),
        _layer_norm(brain, 1152),
        _layer_norm(brain, 1152, adds=True),
    ]
    return [replace(variant, every_target=True) for variant in everywhere] + [
        step(brain, "given"),
        *(step(dtype, noise) for dtype in (half, single) for noise in noises),
        *(step(brain, noise, shape=fashion) for noise in noises[:2]),
        *(step(brain, noise, shape=ragged) for noise in noises),
        step(brain, "drawn", shape=cifar),
        step(brain, "drawn", shape=(1, 3, 64, 64)),
        step(half, "none", shape=(1, 1, 1, 1)),
        step(brain, "given", learned=True, guidance=True, copies=2, x0=True, history=1),
        step(brain, "drawn", guidance=True, copies=2),
        step(brain, "none", copies=0),
        step(single, "none", copies=0, x0=True),
        step(brain, "none", x0=True),
        *(step(dtype, noise, history=depth) for dtype in (brain, single) for noise in noises for depth in (1, 2, 3)),
        step(brain, "drawn", shape=ragged, history=3),
        step(brain, "drawn", shape=(2, 3, 64, 64), history=2, nhwc=True),
        step(brain, "drawn", shape=(2, 3, 64, 64), nhwc=True),
        step(brain, "none", shape=(2, 3, 64, 64), nhwc=True),
        step(brain, "drawn", known=True),
        step(brain, "given", known=True),
        step(single, "drawn", x0=True, known=True),
        step(single, "drawn", x0=True, history=3, known=True),
        _forward(brain, "given"),
        *(_forward(dtype, noise) for dtype in (half, single) for noise in noises[1:]),
        _forward(brain, "drawn", fashion),
        *(_posterior(dtype) for dtype in (half, single)),
        _posterior(brain, fashion),
        *(_transition(dtype) for dtype in (half, single)),
        *(_transition(brain, shape) for shape in (fashion, ragged)),
        _transition(brain, (2, 3, 128, 128), learned=True, guidance=True),
        _transition(brain, (2, 3, 64, 64), guidance=True, nhwc=True),
        _normal(fashion, kernels.STREAM_STEP),
        _pixels(brain, large),
        _pixels(single, (2, 2, 64, 64)),
        _pixels(single, cifar),
        *(_group_norm(dtype, 32, 128) for dtype in (half, brain, single)),
        _group_norm(brain, 64, 512, 512),
        _group_norm(brain, 64, 512, 256),
        _group_norm(single, 128, 256, 128),
        _group_norm(half, 16, 512, 256),
        _group_norm(brain, 32, 256, modulated=True),
        _group_norm(brain, 4, 256, silu=False),
        _group_norm(brain, 14, 256, 128),
        _group_norm(brain, 256, 500, groups=125),
        _group_norm(brain, 64, 128, modulated=True),
        *(_add_group_norm(dtype, 64, 256) for dtype in (half, brain, single)),
        _add_group_norm(brain, 64, 256, 128),
        _add_group_norm(brain, 16, 256, 256, residual=False),
        *(_add_bias(dtype, 32, 128, resize) for dtype in (brain, single) for resize in ("", "doubled", "padded")),
        *(_layer_norm(dtype, 1152, adds=adds) for dtype in (half, single) for adds in (False, True)),
        *(_layer_norm(brain, channels, adds=True) for channels in (384, 768, 1024, 1536, 4096)),
        _layer_norm(brain, 1152, 255),
    ]
