"""Replays a step of a rollout: its log-probability under a network that may have changed, with its gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stepfusion import kernels
from stepfusion.execution.evaluator import ROWS_AT_ONCE, Network
from stepfusion.kernels import reference
from stepfusion.kernels.launch import plain_torch
from stepfusion.lanes.request import check_table
from stepfusion.lanes.rollout import Rollout, kept_states
from stepfusion.lanes.runners import Runners
from stepfusion.model_spec import ModelSpec


@dataclass(frozen=True)
class _Lanes:
    """Steps to replay, a lane each: as many as sampling would have.

    Attributes:
        rows: int64 [B] on the CPU. x, x_next: float32 [B, ...], the states before and after them.
        labels, guidance, conditions, null_conditions: of each lane, as a rollout has them.
    """

    rows: Tensor
    x: Tensor
    x_next: Tensor
    labels: Tensor
    guidance: Tensor | None
    conditions: Mapping[str, Tensor]
    null_conditions: Mapping[str, Tensor]

    @classmethod
    def of(cls, rollout: Rollout, steps: Tensor, lanes: Tensor, device: torch.device) -> _Lanes:
        """Each image's step ``steps`` [n], the images in the order of ``lanes`` [B]; nothing else is copied."""
        where = lanes.to(rollout.device)
        rows = torch.tensor(rollout.rows, dtype=torch.int64)[steps][lanes]
        kept = kept_states(rollout.rows)
        before = torch.tensor([kept.index(row) for row in rows.tolist()], dtype=torch.int64, device=rollout.device)

        def of_each(x: Tensor) -> Tensor:
            return x[where].to(device)

        return cls(
            rows,
            rollout.states[before, where].to(device),
            rollout.states[before + 1, where].to(device),
            of_each(rollout.labels),
            None if rollout.guidance is None else of_each(rollout.guidance),
            {name: of_each(x) for name, x in rollout.conditions.items()},
            {name: of_each(x) for name, x in rollout.null_conditions.items()},
        )


class Replay:
    """Calls a network on the states of a rollout as lanes do: the same inputs, in the same numbers of lanes.

    Args:
        runners: of the engine: its model, its plan, its buckets.
        network: whose parameters the log-probabilities depend on, as it is now.
    """

    def __init__(self, runners: Runners, network: Network) -> None:
        self._runners = calling = runners.calling(network)
        self._spec, self._plan, self._evaluator = calling.spec, calling.plan, calling.evaluator

    def logprobs(self, rollout: Rollout, steps: Tensor) -> Tensor:
        """The log-probabilities float64 [n] of each image's step ``steps``, int64 [n] on the CPU."""
        count, width = len(rollout), self._runners.batch
        with plain_torch(gradients=torch.is_grad_enabled()):
            parts = [
                self._of(rollout, steps, range(count)[first : first + width]) for first in range(0, count, width)
            ]
            return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64, device=self._plan.device)

    def _of(self, rollout: Rollout, steps: Tensor, images: range) -> Tensor:
        """The same of at most a batch of images, padded with copies of the first of them to a bucket."""
        padding = [images[0]] * (self._runners.bucket(len(images)) - len(images))
        device, table = self._plan.device, rollout.table
        lanes = _Lanes.of(rollout, steps, torch.tensor([*images, *padding], dtype=torch.int64), device)
        ops = reference if table.whole_image else self._plan.ops
        scales = torch.tensor(
            [table.in_scale(row) for row in lanes.rows.tolist()], dtype=torch.float32, device=device
        )
        shown = (scales.view(-1, *[1] * (lanes.x.ndim - 1)) * lanes.x).to(self._plan.dtype)
        if ops is kernels and self._evaluator.hoisted:  # as runners show it
            shown = shown.to(memory_format=torch.channels_last)
        values = table.on(device)
        out, out_uncond = self._evaluate(lanes, shown, self._features(lanes.rows, values.told))
        if table.learned_variance and out.shape == lanes.x.shape:
            raise ValueError(
                f"the network returned shape {list(out.shape)}, and {table!r} needs a learned variance too"
            )
        logprobs: Tensor = ops.transition_logprob(
            lanes.x,
            lanes.x_next,
            out,
            lanes.rows.to(device),
            values.coefficients,
            table.transitions.to(device),
            out_uncond=out_uncond,
            guidance=lanes.guidance,
        )
        return logprobs[: len(images)]

    def _evaluate(self, lanes: _Lanes, shown: Tensor, features: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the network returns for all lanes, and with guidance what it returns without a condition."""
        call, (labels, nothing) = self._evaluator.network, self._labels(lanes.labels)
        prepared = self._prepared(lanes.conditions)
        if lanes.guidance is None:
            return call(shown, features, labels, *prepared), None
        null = self._prepared(lanes.null_conditions)
        if self._runners.invariant:  # one after the other, as lanes of an invariant engine do
            return call(shown, features, labels, *prepared), call(shown, features, nothing, *null)
        both = [torch.cat(pair) for pair in zip(prepared, null, strict=True)]
        doubled = torch.cat((shown, shown)), torch.cat((features, features)), torch.cat((labels, nothing))
        out, out_uncond = call(*doubled, *both).chunk(2)
        return out, out_uncond

    def _features(self, rows: Tensor, told: Tensor) -> Tensor:
        """The features of rows [B]: those of the chunks that they lie in, each as sampling computes it."""
        chunks = torch.split(torch.arange(len(told)), ROWS_AT_ONCE)
        needed = sorted({row // ROWS_AT_ONCE for row in rows.tolist()})
        places = torch.cat([chunks[chunk] for chunk in needed])
        features = self._evaluator.features(told[places.to(told.device)], gradients=True)
        return features[torch.searchsorted(places, rows).to(told.device)]

    def _labels(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The labels of all lanes, and those of no condition."""
        if labels.is_floating_point():  # contexts
            labels = labels.to(self._plan.dtype)
            return labels, torch.zeros_like(labels)
        null = self._spec.null_label
        return labels, labels if null is None else torch.full_like(labels, null)

    def _prepared(self, conditions: Mapping[str, Tensor]) -> list[Tensor]:
        """What the network makes of conditions, one image's at a time, as when it enters a lane."""
        cast = {
            spec.name: conditions[spec.name].to(torch.int64 if spec.integer else self._plan.dtype)
            for spec in self._spec.conditions
        }
        lanes = range(max((len(x) for x in cast.values()), default=0))
        each = [
            self._evaluator.prepare({name: x[i : i + 1] for name, x in cast.items()}, gradients=True) for i in lanes
        ]
        return [torch.cat(tensors) for tensors in zip(*each, strict=True)]


def check_rollout(spec: ModelSpec, rollout: Rollout) -> None:
    """TypeError or ValueError unless ``rollout`` is one of this model."""
    if not isinstance(rollout, Rollout):
        raise TypeError(f"rollout must be a Rollout, got {type(rollout).__name__}")
    check_table(spec, rollout.table)
    if (shape := tuple(rollout.images.shape[1:])) != spec.shape:
        raise ValueError(f"rollout is of images {list(shape)}, and the model's are {list(spec.shape)}")
    if (names := set(rollout.conditions)) != (wanted := {one.name for one in spec.conditions}):
        raise ValueError(f"rollout has the conditions {sorted(names)}, and the model's are {sorted(wanted)}")


def steps_of(rollout: Rollout, step: int | Sequence[int] | Tensor) -> Tensor:
    """Places among the chosen rows, int64 [n] on the CPU; TypeError or ValueError naming ``step``."""
    steps = torch.as_tensor(step).cpu()
    if steps.is_floating_point() or steps.is_complex() or steps.dtype == torch.bool:
        raise TypeError(f"step must be an integer, or one for each image, got {step!r}"[:200])
    count, last = len(rollout), len(rollout.rows) - 1
    if tuple(steps.shape) not in ((), (count,)):
        raise ValueError(f"step must be one integer or one for each of the {count} images, got {list(steps.shape)}")
    if steps.numel() and not (steps.min() >= 0 and steps.max() <= last):
        raise ValueError(f"step must be in [0, {last}], a place among the rollout's rows, got {step}"[:200])
    return steps.to(torch.int64).expand(count)
