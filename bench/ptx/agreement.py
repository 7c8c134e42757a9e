"""How an executed kernel is held to its reference: equal bits, or what rounding alone can explain."""

from __future__ import annotations

import torch


class Disagreement(Exception):
    """A result that is not the reference's."""


def same_bits(name: str, got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal bit for bit; any NaN equals any other.

    Raises:
        Disagreement: naming the tensor, how many elements differ, and the first.
    """
    if got.dtype != want.dtype or got.shape != want.shape:
        raise Disagreement(f"{name}: {got.dtype} {list(got.shape)} instead of {want.dtype} {list(want.shape)}")
    equal = (got == want) & (got.signbit() == want.signbit()) | (got.isnan() & want.isnan())
    _demand(name, equal, got, want, "differ")


def within(name: str, got: torch.Tensor, want: torch.Tensor, bound: float) -> None:
    """At most ``bound`` from the float64 ``want``, and infinite or NaN in the same places.

    Raises:
        Disagreement: naming the tensor, how many elements are beyond, and the first.
    """
    got, want = got.double(), want.double()
    near = ((got - want).abs() <= bound) | (got == want) | (got.isnan() & want.isnan())
    _demand(name, near, got, want, f"are more than {bound:.3g} apart")


def _demand(name: str, agree: torch.Tensor, got: torch.Tensor, want: torch.Tensor, words: str) -> None:
    if not agree.all():
        place = (~agree).nonzero()[0].tolist()
        example = f"first at {place}: {got[tuple(place)].item()} instead of {want[tuple(place)].item()}"
        raise Disagreement(f"{name}: {int((~agree).sum())} of {agree.numel()} {words}, {example}")


def largest(x: torch.Tensor) -> float:
    """The largest finite magnitude of a tensor; 0 if it has none."""
    finite = x[x.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0
