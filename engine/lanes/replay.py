"""Replays a step of a rollout: its log-probability under a network that may have changed, with its gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stepfusion import kernels
from stepfusion.execution.evaluator import ROWS_AT_ONCE, Evaluator, Network
from stepfusion.execution.plan import Plan, eager_plan
from stepfusion.kernels import reference
from stepfusion.kernels.launch import plain_torch
from stepfusion.lanes.rollout import Rollout, kept_states
from stepfusion.lanes.runners import Runners
from stepfusion.model_spec import ModelSpec


class Replay:
    """Calls a network on the states of a rollout as lanes do: the same inputs, in the same numbers of lanes.

    Args:
        runners: of the engine: its model, its plan, its buckets.
        network: whose parameters the log-probabilities depend on, as it is now.
    """

    def __init__(self, runners: Runners, network: Network) -> None:
        self._runners = runners
        self._spec: ModelSpec = runners.spec
        self._plan: Plan = eager_plan(runners.plan, network)
        self._evaluator: Evaluator = runners.evaluator_of(network)

    def logprobs(self, rollout: Rollout, steps: Tensor) -> Tensor:
        """The log-probabilities float64 [n] of each image's step ``steps``, int64 [n] on the CPU."""
        with plain_torch(gradients=torch.is_grad_enabled()):
            width = self._runners.batch
            parts = [
                self._of_lanes(rollout[first : first + width], steps[first : first + width])
                for first in range(0, len(rollout), width)
            ]
            return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64, device=self._plan.device)

    def _of_lanes(self, rollout: Rollout, steps: Tensor) -> Tensor:
        """The same of at most a batch, padded with copies of the first image to the lanes that sampling would have."""
        count, device, table = len(rollout), self._plan.device, rollout.table
        padding = torch.zeros(self._runners.bucket(count) - count, dtype=torch.int64)
        lanes = torch.cat((torch.arange(count), padding))
        rows = torch.tensor(rollout.rows, dtype=torch.int64)[steps][lanes]
        places = {state: place for place, state in enumerate(kept_states(rollout.rows))}
        before = torch.tensor([places[row] for row in rows.tolist()])
        padded = lanes.to(rollout.device), before.to(rollout.device)
        x, x_next = (rollout.states[padded[1] + i, padded[0]].to(device) for i in range(2))
        there = rollout[lanes].to(device)
        on_device = rows.to(device)
        values = table.on(device)
        ops = reference if table.whole_image else self._plan.ops
        scales = torch.tensor([table.in_scale(row) for row in rows.tolist()], dtype=torch.float32, device=device)
        shown = (scales.view(-1, *[1] * (x.ndim - 1)) * x).to(self._plan.dtype)
        if ops is kernels and self._evaluator.hoisted:  # as runners show it
            shown = shown.to(memory_format=torch.channels_last)
        out, out_uncond = self._evaluate(there, rows, shown, values.told)
        logprobs: Tensor = ops.transition_logprob(
            x,
            x_next,
            out,
            on_device,
            values.coefficients,
            table.transitions.to(device),
            out_uncond=out_uncond,
            guidance=None if out_uncond is None else there.guidance,
        )
        return logprobs[:count]

    def _evaluate(self, rollout: Rollout, rows: Tensor, shown: Tensor, told: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the network returns for all lanes, and with guidance what it returns without a condition."""
        features = self._features(rows, told)
        labels = self._labels(rollout)
        if rollout.guidance is None:
            prepared = self._prepared(rollout.conditions, len(rollout))
            return self._evaluator.network(shown, features, labels[0], *prepared), None
        halves = [self._prepared(half, len(rollout)) for half in (rollout.conditions, rollout.null_conditions)]
        call = self._evaluator.network
        if self._runners.invariant:  # one after the other, as lanes of an invariant engine do
            outputs = [call(shown, features, *one) for one in ((labels[i], *halves[i]) for i in range(2))]
        else:
            both = [torch.cat(pair) for pair in zip(*halves, strict=True)]
            doubled = torch.cat((shown, shown)), torch.cat((features, features)), torch.cat(labels)
            outputs = list(call(*doubled, *both).chunk(2))
        return outputs[0], outputs[1]

    def _features(self, rows: Tensor, told: Tensor) -> Tensor:
        """The features of rows [B]: those of the chunks that they lie in, each as sampling computes it."""
        chunks = (rows // ROWS_AT_ONCE).unique()
        places = torch.cat([torch.arange(c * ROWS_AT_ONCE, (c + 1) * ROWS_AT_ONCE) for c in chunks.tolist()])
        places = places[places < len(told)].to(told.device)
        features = self._evaluator.features(told[places], gradients=True)
        return features[torch.searchsorted(places, rows.to(told.device))]

    def _labels(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """The labels of all lanes, and those of no condition."""
        labels = rollout.labels
        if labels.is_floating_point():  # contexts
            labels = labels.to(self._plan.dtype)
            return labels, torch.zeros_like(labels)
        null = self._spec.null_label
        return labels, labels if null is None else torch.full_like(labels, null)

    def _prepared(self, conditions: object, count: int) -> list[Tensor]:
        """What the network makes of conditions, one image's at a time, as when it enters a lane."""
        assert isinstance(conditions, dict)
        if not conditions:
            return []
        each = [self._prepared_one({name: x[i : i + 1] for name, x in conditions.items()}) for i in range(count)]
        return [torch.cat(tensors) for tensors in zip(*each, strict=True)]

    def _prepared_one(self, conditions: dict[str, Tensor]) -> tuple[Tensor, ...]:
        cast = {
            spec.name: conditions[spec.name].to(torch.int64 if spec.integer else self._plan.dtype)
            for spec in self._spec.conditions
        }
        return self._evaluator.prepare(cast, gradients=True)


def steps_of(rollout: Rollout, step: int | Sequence[int] | Tensor) -> Tensor:
    """Places among the chosen rows, int64 [n] on the CPU; TypeError or ValueError naming ``step``."""
    steps = torch.as_tensor(step).cpu()
    if steps.is_floating_point() or steps.is_complex() or steps.dtype == torch.bool:
        raise TypeError(f"step must be an integer, or one for each image, got {step!r}"[:200])
    if tuple(steps.shape) not in ((), (len(rollout),)):
        raise ValueError(
            f"step must be one integer or one for each of the {len(rollout)} images, got {list(steps.shape)}"
        )
    steps = steps.to(torch.int64).expand(len(rollout))
    if len(steps) and not (0 <= int(steps.min()) and int(steps.max()) < len(rollout.rows)):
        raise ValueError(
            f"step must be in [0, {len(rollout.rows) - 1}], a place among the rollout's rows, got {step}"[:200]
        )
    return steps
