"""The launches that the machine-code bench looks at: every kernel as the engine and the networks launch it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from stepfusion import kernels


@dataclass(frozen=True)
class Variant:
    """A launch to look at: for sm_90, or for every target; ``quick`` if each run of the tests compiles it."""

    name: str
    launch: Callable[[], object]
    every_target: bool = False
    quick: bool = False


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


def _add_projection(
    dtype: torch.dtype, size: int, channels: int, x: int, skip: int = 0, *, doubles: bool = False
) -> Variant:
    """The product of a shortcut, of ``x`` and ``skip`` channels."""

    def launch() -> None:
        image, *given = (
            torch.zeros(2, c, size, size, dtype=dtype).contiguous(memory_format=torch.channels_last)
            for c in (channels, x, skip)
        )
        weight, options = torch.zeros(channels, x + skip, dtype=dtype), {"skip": given[1] if skip else None}
        if doubles:
            kernels.add_projection_doubled(image, given[0], weight, **options, bias=torch.zeros(channels))
        else:
            kernels.add_projection_(image, given[0], weight, **options)

    words = [f"{size}x{size}", f"{x}+{skip} to {channels} channels", _name(dtype)]
    return Variant(", ".join([*words, *["doubled"] * doubles]), launch)


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


_HALF, _BRAIN, _SINGLE = torch.float16, torch.bfloat16, torch.float32
_NOISES = ("none", "given", "drawn")
_LARGE, _FASHION, _CIFAR, _RAGGED, _RGB = (
    (2, 1, 64, 64),
    (2, 1, 28, 28),
    (2, 3, 32, 32),
    (2, 1, 65, 80),
    (2, 3, 64, 64),
)


def variants() -> list[Variant]:
    """Every kind of launch: dtypes, sources of noise, optional arguments, large, small, ragged and single lanes."""
    return [
        *(replace(variant, every_target=True, quick=True) for variant in _everywhere()),
        *(replace(variant, quick=True) for variant in _quick()),
        *_steps(),
        *_norms(),
        *_others(),
    ]


def _everywhere() -> list[Variant]:
    """Every kernel, as it runs most."""
    return [
        step(_BRAIN, "none"),
        step(_BRAIN, "drawn"),
        step(_BRAIN, "drawn", shape=_FASHION),
        step(_BRAIN, "drawn", learned=True),
        _forward(_BRAIN, "drawn"),
        _posterior(_BRAIN),
        _transition(_BRAIN),
        _normal(_LARGE, kernels.STREAM_INITIAL),
        *(_pixels(_SINGLE, (2, channels, 64, 64)) for channels in (1, 3, 4)),
        _group_norm(_BRAIN, 256, 128),
        _group_norm(_BRAIN, 128, 256, 128),
        _group_norm(_BRAIN, 16, 256, modulated=True),
        _add_group_norm(_BRAIN, 32, 128),
        _add_bias(_BRAIN, 32, 256),
        _add_projection(_BRAIN, 64, 256, 256, 128),
        _layer_norm(_BRAIN, 1152),
        _layer_norm(_BRAIN, 1152, adds=True),
    ]


def _quick() -> list[Variant]:
    """What every limit of the tests needs: for the step all noises in two dtypes and ragged, and every option."""
    return [
        step(_BRAIN, "given"),
        *(step(_SINGLE, noise) for noise in _NOISES),
        *(step(_BRAIN, noise, shape=_RAGGED) for noise in _NOISES),
        step(_HALF, "none", shape=(1, 1, 1, 1)),
        step(_BRAIN, "given", learned=True, guidance=True, copies=2, x0=True, history=1),
        step(_BRAIN, "none", x0=True),
        *(step(_BRAIN, "none", history=depth) for depth in (1, 2, 3)),
        step(_BRAIN, "drawn", history=3),
        *(step(_BRAIN, noise, shape=_RGB, nhwc=True) for noise in ("none", "drawn")),
        *(step(_BRAIN, noise, known=True) for noise in ("given", "drawn")),
        step(_SINGLE, "drawn", x0=True, known=True),
        step(_SINGLE, "drawn", x0=True, history=3, known=True),
        _forward(_SINGLE, "given"),
        _transition(_BRAIN, (2, 3, 128, 128), learned=True, guidance=True),
        _pixels(_SINGLE, (2, 2, 64, 64)),
        _group_norm(_SINGLE, 32, 128),
        _group_norm(_BRAIN, 256, 500, groups=125),
        *(_add_group_norm(dtype, 64, 256) for dtype in (_BRAIN, _SINGLE)),  # of the first, one launch of four tiles
        _add_group_norm(_BRAIN, 128, 256),
        _group_norm(_BRAIN, 64, 256),
        *(_add_bias(_BRAIN, 32, 128, resize) for resize in ("doubled", "padded")),
        _add_projection(_BRAIN, 64, 256, 256, 256, doubles=True),
        _add_projection(_HALF, 16, 512, 512, doubles=True),
        _layer_norm(_SINGLE, 1152),
        *(_layer_norm(_BRAIN, channels, adds=True) for channels in (768, 1024)),
    ]


def _steps() -> list[Variant]:
    """The other dtypes, shapes and options of the step."""
    return [
        *(step(_HALF, noise) for noise in _NOISES),
        *(step(_BRAIN, noise, shape=_FASHION) for noise in _NOISES[:2]),
        step(_BRAIN, "drawn", shape=_CIFAR),
        step(_BRAIN, "drawn", shape=(1, 3, 64, 64)),
        step(_BRAIN, "drawn", guidance=True, copies=2),
        step(_BRAIN, "none", copies=0),
        step(_SINGLE, "none", copies=0, x0=True),
        *(step(_BRAIN, "given", history=depth) for depth in (1, 2, 3)),
        *(step(_BRAIN, "drawn", history=depth) for depth in (1, 2)),
        *(step(_SINGLE, noise, history=depth) for noise in _NOISES for depth in (1, 2, 3)),
        step(_BRAIN, "drawn", shape=_RAGGED, history=3),
        step(_BRAIN, "drawn", shape=_RGB, history=2, nhwc=True),
    ]


def _norms() -> list[Variant]:
    """The other dtypes, widths and options of both norms."""
    return [
        *(_group_norm(dtype, 32, 128) for dtype in (_HALF, _BRAIN)),
        _group_norm(_BRAIN, 64, 512, 512),
        _group_norm(_BRAIN, 64, 512, 256),
        _group_norm(_SINGLE, 128, 256, 128),
        _group_norm(_HALF, 16, 512, 256),
        _group_norm(_BRAIN, 32, 256, modulated=True),
        _group_norm(_BRAIN, 4, 256, silu=False),
        _group_norm(_BRAIN, 14, 256, 128),
        _group_norm(_BRAIN, 64, 128, modulated=True),
        _add_group_norm(_HALF, 64, 256),
        _add_group_norm(_BRAIN, 64, 256, 128),
        _add_group_norm(_BRAIN, 64, 256, 256),
        _add_group_norm(_BRAIN, 32, 512, 256),
        _add_group_norm(_BRAIN, 16, 256, 256, residual=False),
        _layer_norm(_HALF, 1152),
        *(_layer_norm(dtype, 1152, adds=True) for dtype in (_HALF, _SINGLE)),
        *(_layer_norm(_BRAIN, channels, adds=True) for channels in (384, 1536, 4096)),
        _layer_norm(_BRAIN, 1152, 255),
    ]


def _others() -> list[Variant]:
    """The other dtypes and shapes of the other kernels."""
    return [
        _forward(_BRAIN, "given"),
        *(_forward(_HALF, noise) for noise in _NOISES[1:]),
        _forward(_SINGLE, "drawn"),
        _forward(_BRAIN, "drawn", _FASHION),
        *(_posterior(dtype) for dtype in (_HALF, _SINGLE)),
        _posterior(_BRAIN, _FASHION),
        *(_transition(dtype) for dtype in (_HALF, _SINGLE)),
        *(_transition(_BRAIN, shape) for shape in (_FASHION, _RAGGED)),
        _transition(_BRAIN, _RGB, guidance=True, nhwc=True),
        _normal(_FASHION, kernels.STREAM_STEP),
        _pixels(_BRAIN, _LARGE),
        _pixels(_SINGLE, _CIFAR),
        _add_bias(_BRAIN, 32, 128),
        *(_add_bias(_SINGLE, 32, 128, resize) for resize in ("", "doubled", "padded")),
    ]
