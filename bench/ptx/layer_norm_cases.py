"""Modulated layer norms: published widths and ragged ones, with and without the gated residual."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from stepfusion import kernels
from stepfusion.bench.ptx.agreement import within
from stepfusion.bench.ptx.executor import NVIDIA, Executor
from stepfusion.bench.ptx.inputs import BRAIN, DTYPES, HALF, SINGLE, Case, unchanged, words
from stepfusion.kernels import reference
from stepfusion.kernels.tolerance import ROUNDINGS, tolerance

_EPS = 1e-6


@dataclass(frozen=True)
class LayerNorm:
    """One call of layer_norm_modulate, or of add_layer_norm_modulate if it ``adds``.

    Attributes:
        mean, std: of x. wide: modulations are float32, whatever x is. offset: elements by which x is shifted; the
            launcher copies it then, for the kernel wants 16 bytes.
    """

    tokens: int
    channels: int
    dtype: torch.dtype = BRAIN
    adds: bool = False
    wide: bool = False
    batch: int = 2
    mean: float = 0.0
    std: float = 1.0
    offset: int = 0

    def __str__(self) -> str:
        options = [name for name in ("adds", "wide", "offset") if getattr(self, name)]
        options += [f"mean {self.mean}"] * (self.mean != 0) + [f"std {self.std}"] * (self.std != 1)
        size = (self.batch, self.tokens, self.channels)
        return words("layer norm", self.dtype, size, *options)

    def check(self, executor: Executor) -> None:
        """float64's results within rounding; inputs are left alone. Modulations are columns of a wider tensor."""
        columns = torch.randn(self.batch, 8 + 3 * self.channels).to(torch.float32 if self.wide else self.dtype)
        shift, scale, gate = columns[:, 8:].chunk(3, dim=1)
        given = {"x": self._tokens(self.offset), "shift": shift, "scale": scale}
        if self.adds:
            given |= {"branch": self._tokens(0), "gate": gate}
        before = {name: tensor.clone() for name, tensor in given.items()}
        h = given["x"]
        with executor.running():
            if self.adds:
                out, h = kernels.add_layer_norm_modulate(**given, eps=_EPS)
            else:
                out = kernels.layer_norm_modulate(**given, eps=_EPS)
        unchanged(given, before)
        if self.adds:
            added = gate.double()[:, None] * given["branch"].double()
            wanted = given["x"].double() + added
            largest = float((given["x"].double().abs() + added.abs()).max())
            within("sum", h, wanted, tolerance(self.dtype, largest, 2))
        exact = h.double(), scale.double(), shift.double()
        wanted = reference.layer_norm_modulate(*exact, _EPS)
        within("out", out, wanted, bound(*exact, _EPS, self.dtype))

    def _tokens(self, offset: int) -> torch.Tensor:
        """[B, N, D], ``offset`` elements behind a well-aligned address."""
        values = torch.randn(self.batch, self.tokens, self.channels) * self.std + self.mean
        memory = torch.zeros(values.numel() + offset, dtype=self.dtype)[offset:].view(values.shape)
        return memory.copy_(values)


def bound(h: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float, dtype: torch.dtype) -> float:
    """The tolerance, from the largest term: |h| / sigma of a token, times the factor, and the shift."""
    terms = h.abs() / (h.var(2, correction=0, keepdim=True) + eps).sqrt()
    terms = terms * (1 + scale).abs()[:, None] + shift.abs()[:, None]
    return tolerance(dtype, float(terms.max()), ROUNDINGS["layer_norm_modulate"])


def _quick() -> list[tuple[LayerNorm, tuple[str, ...]]]:
    hopper = ("sm_90",)
    return [
        (LayerNorm(5, 72), NVIDIA),
        (LayerNorm(3, 96, HALF, adds=True), NVIDIA),
        (LayerNorm(4, 1152, BRAIN, adds=True), hopper),
        (LayerNorm(3, 1152, SINGLE, wide=True, batch=1), hopper),
        (LayerNorm(3, 4096, BRAIN, adds=True, wide=True, batch=1), hopper),
        (LayerNorm(5, 7, SINGLE, mean=1e3, std=0.1, offset=1), hopper),
        (LayerNorm(3, 1, HALF, batch=1), hopper),
    ]


def _every() -> Iterator[LayerNorm]:
    for dtype in DTYPES:
        for channels in (1, 2, 3, 5, 7, 64, 100, 384, 768, 1024, 1152, 1280, 1536, 2047):
            plain = LayerNorm(5, channels, dtype)
            yield plain
            yield replace(plain, tokens=4, adds=True, wide=True, batch=1)
        yield LayerNorm(3, 16384, dtype, adds=True, batch=1)
        yield LayerNorm(6, 96, dtype, mean=1e3 if dtype == SINGLE else 5.0, std=0.1, offset=1)


def layer_norm_cases() -> list[Case]:
    """Every case, each once."""
    quick = _quick()
    targets = dict(quick)
    full = dict.fromkeys([case for case, _ in quick] + list(_every()))
    return [Case(str(case), case.check, targets.get(case, ())) for case in full]
