"""How an engine calls its network: the part of a tick between the state and the step.

A network is a function of x and of what its timestep, label and conditions make of it. What the timestep alone makes,
the *features* of a row of a table, is computed for all rows before the loop and gathered by row: for our own networks
(:class:`stepfusion.networks.time_conditioned.TimeConditioned`) the whole time path, for others the timestep itself.
What the conditions alone make is computed when an image enters its lane (:meth:`Evaluator.prepare`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from stepfusion.execution.streams import Turns
from stepfusion.networks.conditioned import ConditionedNetwork, ConditionSpec
from stepfusion.networks.levels import LevelledNetwork
from stepfusion.networks.time_conditioned import TimeConditioned

Network = Callable[..., Any]
Products = Callable[[], AbstractContextManager[None]]

ROWS_AT_ONCE = 64  # always so many, so that a row's bits do not depend on the length of its table


class Evaluator:
    """Calls a network in a form of its choice, eager until :meth:`compile_with` brings another.

    Args:
        network: ``network(x, timesteps)`` or, where `labelled`, ``network(x, timesteps, labels)``; conditions are
            keyword arguments.
        labelled: whether it takes labels.
        products: makes the context in which the network and its time path are called
            (:attr:`stepfusion.execution.plan.Plan.products`).
        told: the dtype of what the network is told of a level: int64 for timesteps, or float32.
        conditions: what the network is conditioned on.

    Attributes:
        hoisted: True if the time path of the network is computed once for each row of a table.
        form: what is left of the network then, a module ``(x, features[, labels], *prepared)``.
        compiled: the form itself, or what :meth:`compile_with` made of it.
        turns: which calls of the network must run one after the other, on whatever streams; None if they need not.
        network: ``network(x, features, labels, *prepared) -> out``: x [B, C, H, W] in the network's dtype, the
            features [B, ...] of each lane's row, its label, int64 [B], and its prepared conditions. It calls
            ``compiled``.
    """

    compiled: Callable[..., Tensor]
    network: Callable[..., Tensor]

    def __init__(
        self,
        network: Network,
        labelled: bool,
        products: Products = nullcontext,
        told: torch.dtype = torch.int64,
        conditions: Sequence[ConditionSpec] = (),
    ) -> None:
        self._network = network
        self._conditions = tuple(condition.name for condition in conditions)
        self.told = told
        self._labelled = labelled
        self._products = products
        self.turns: Turns | None = getattr(network, "turns", None)
        self.hoisted = _is_hoistable(network)
        self.form: nn.Module = self._form()
        self.compile_with(lambda form: form)

    def compile_with(self, compiler: Callable[[nn.Module], Callable[..., Tensor]]) -> None:
        """Call the network through what `compiler` makes of its form from now on."""
        self._compiler = compiler
        self.compiled = call = compiler(self.form)
        network = call if self._labelled else lambda x, features, labels, *prepared: call(x, features, *prepared)
        self.network = network if self._products is nullcontext else self._in_context(network)
        self.__dict__.pop("keeping", None)
        self.__dict__.pop("outer", None)

    def kept_shape(self, shape: Sequence[int]) -> tuple[int, int, int] | None:
        """Of what a network keeps of an image of a shape (C, H, W) to reuse it; None if it keeps nothing."""
        network = self._network
        if not isinstance(network, LevelledNetwork) or not self.hoisted:
            return None
        # A subclass that has its own `predict` has not told what it keeps.
        kinds = type(network).__mro__
        owners = [next(k for k in kinds if name in vars(k)) for name in ("predict", "predict_outer")]
        return network.kept_shape(shape) if owners[0] is owners[1] else None

    @cached_property
    def keeping(self) -> Callable[..., Tensor]:
        """``keeping(x, kept, features, labels, *prepared)``: as `network`; what is kept is written to ``kept``."""
        return self._reusing("predict_keeping")

    @cached_property
    def outer(self) -> Callable[..., Tensor]:
        """The same, which runs the outermost level alone with what is ``kept``."""
        return self._reusing("predict_outer")

    def _reusing(self, method: str) -> Callable[..., Tensor]:
        assert isinstance(self._network, TimeConditioned)
        form = self._compiler(_Reusing(self._network, self._labelled, method))

        def call(x: Tensor, kept: Tensor, features: Tensor, labels: Tensor, *prepared: Tensor) -> Tensor:
            given = (labels, *prepared) if self._labelled else prepared
            with self._products():
                return form(x, kept, features, *given)

        return call

    @property
    def declined(self) -> str | None:
        """Why the network does not run as it was to be compiled; None while it does."""
        reason: str | None = getattr(self.compiled, "failure", None) or getattr(self.compiled, "declined", None)
        return reason

    def features(self, timesteps: Tensor, *, gradients: bool = False) -> Tensor:
        """The features [R, ...] of the rows with these timesteps, int64 [R] (or what else the network is told).

        ``gradients``: autograd follows them if it is on.
        """
        if not isinstance(self._network, TimeConditioned) or not self.hoisted:
            return timesteps
        with self._products(), torch.set_grad_enabled(gradients and torch.is_grad_enabled()):
            return self._embedded(timesteps, self._network)

    def prepare(self, conditions: Mapping[str, Tensor], *, gradients: bool = False) -> tuple[Tensor, ...]:
        """What the network makes of conditions alone, [B, ...] each by name, on its device and in its dtype."""
        if isinstance(self._network, ConditionedNetwork) and self.hoisted:
            with self._products(), torch.set_grad_enabled(gradients and torch.is_grad_enabled()):
                return self._network.prepare(conditions)
        return tuple(conditions[name] for name in self._conditions)

    def _embedded(self, timesteps: Tensor, network: TimeConditioned) -> Tensor:
        """What the time path makes of timesteps [R]: [R, ...]."""
        own = _projects_for_lanes(network, self._labelled)
        parts = []
        for chunk in torch.split(timesteps, ROWS_AT_ONCE):
            padded = torch.cat((chunk, chunk.new_zeros(ROWS_AT_ONCE - len(chunk))))
            time = network.embed_time(padded)
            parts.append((time if own else network.condition(time))[: len(chunk)])
        return torch.cat(parts)

    def _in_context(self, network: Network) -> Network:
        def call(x: Tensor, features: Tensor, labels: Tensor, *prepared: Tensor) -> Any:
            with self._products():
                return network(x, features, labels, *prepared)

        return call

    def _form(self) -> nn.Module:
        network = self._network
        if isinstance(network, ConditionedNetwork) and self.hoisted:
            return _Conditioned(network, self._labelled)
        if isinstance(network, TimeConditioned) and self.hoisted:
            return _Labelled(network) if self._labelled else _Hoisted(network)
        return _Keywords(network, self._labelled, self._conditions) if self._conditions else _Whole(network)


class _Hoisted(nn.Module):
    """What is left of a network once its time path is hoisted: ``(x, projections)``."""

    def __init__(self, network: TimeConditioned) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, projections: Tensor) -> Tensor:
        return self.network.predict(x, projections)


class _Labelled(_Hoisted):
    """The same of a network with labels, whose projections need both: ``(x, time, labels)``."""

    def forward(self, x: Tensor, time: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        return self.network.predict(x, self.network.condition(time, labels))


class _Conditioned(nn.Module):
    """What is left of a network with conditions: ``(x, features[, labels], *prepared)``.

    The features are the projections, unless these need labels or conditions, too.
    """

    def __init__(self, network: TimeConditioned, labelled: bool) -> None:
        super().__init__()
        self.network = network
        self._labelled = labelled
        self._projects = _projects_for_lanes(network, labelled)

    def forward(self, x: Tensor, features: Tensor, *rest: Tensor) -> Tensor:
        projections, prepared = self._split(features, rest)
        return self.network.predict(x, projections, *prepared)

    def _split(self, features: Tensor, rest: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The projections, and what is prepared of the conditions."""
        labels, prepared = (rest[0], rest[1:]) if self._labelled else (None, rest)
        return self.network.condition(features, labels, *prepared) if self._projects else features, prepared


class _Reusing(_Conditioned):
    """A network that keeps what its inner levels made, or reuses it: ``(x, kept, features[, labels], *prepared)``.

    ``method`` is one of those in :mod:`stepfusion.networks.levels`.
    """

    def __init__(self, network: TimeConditioned, labelled: bool, method: str) -> None:
        super().__init__(network, labelled)
        self._method = method

    def forward(self, x: Tensor, kept: Tensor, features: Tensor, *rest: Tensor) -> Tensor:  # type: ignore[override]
        projections, prepared = self._split(features, rest)
        out: Tensor = getattr(self.network, self._method)(x, kept, projections, *prepared)
        return out


class _Whole(nn.Module):
    """A network as it is: ``(x, timesteps[, labels])``; unwraps the object that diffusers' models return."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, timesteps: Tensor, *labels: Tensor) -> Any:
        out = self.network(x, timesteps, *labels)
        return getattr(out, "sample", out)


class _Keywords(_Whole):
    """The same with conditions: ``(x, timesteps[, labels], *conditions)``, which the network takes by their names."""

    def __init__(self, network: Network, labelled: bool, names: Sequence[str]) -> None:
        super().__init__(network)
        self._labels, self._names = int(labelled), tuple(names)

    def forward(self, x: Tensor, timesteps: Tensor, *rest: Tensor) -> Any:
        conditions = dict(zip(self._names, rest[self._labels :], strict=True))
        out = self.network(x, timesteps, *rest[: self._labels], **conditions)
        return getattr(out, "sample", out)


def _projects_for_lanes(network: TimeConditioned, labelled: bool) -> bool:
    """Whether projections are a lane's own, and not those of its row alone."""
    return labelled or (isinstance(network, ConditionedNetwork) and network.projects_conditions)


def _is_hoistable(network: Network) -> bool:
    """True for our networks, unless someone watches or replaces their forward pass."""
    if not isinstance(network, TimeConditioned):
        return False
    watched = network._forward_hooks or network._forward_pre_hooks or "forward" in vars(network)
    owner = next(kind for kind in type(network).__mro__ if "forward" in vars(kind))
    return not watched and (owner in (TimeConditioned, ConditionedNetwork) or "predict" in vars(owner))
