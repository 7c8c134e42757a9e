"""What an engine does for policy gradients: rollouts, and the log-probabilities of their steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import torch

from stepfusion.execution.evaluator import Network
from stepfusion.execution.plan import choose_device
from stepfusion.lanes.recording import record
from stepfusion.lanes.replay import Replay, check_rollout, steps_of
from stepfusion.lanes.request import Tables
from stepfusion.lanes.rollout import Rollout
from stepfusion.lanes.runners import Runners
from stepfusion.options import SamplingOptions


class PolicyMethods:
    """The methods of :class:`stepfusion.Engine` that treat its network as a policy (docs/rollouts.md).

    Attributes:
        runners: what checks requests and makes the runners that move their lanes.
    """

    runners: Runners

    def rollout(
        self,
        n: int | None = None,
        table: Tables | None = None,
        *,
        rows: Sequence[int] | None = None,
        network: Network | None = None,
        keep_on: str | torch.device | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Rollout:
        """Make images, and keep the steps that made them: states, and the log-probability of each step.

        Args:
            n, table, options: as for :meth:`sample`, but one table for all images, without ``reuse`` and ``mask``.
            rows: of the table, those to keep; by default every row that adds noise.
            network: the policy to sample from, eager and as it is now; its bits are then those of
                :meth:`step_logprob`. By default the engine's own, as :meth:`explain` says it runs.
            keep_on: the device of what is kept, "cpu" to leave a GPU's memory alone; by default the engine's.

        Returns:
            the images (:attr:`Rollout.images <stepfusion.Rollout.images>`, equal to what :meth:`sample` returns for
            the same network), and their steps.

        Raises:
            TypeError, ValueError: naming the argument, or the row whose step has no probability: rows without noise,
                and rows that take a part of their mean from earlier ones (multistep and two-stage solvers).
            NonFiniteError: naming image and step.
        """
        runners = self.runners if network is None else self.runners.calling(network)
        kept = runners.plan.device if keep_on is None else _kept_on(keep_on)
        return record(runners, runners.request(n, table, options), rows, kept)

    def step_logprob(
        self, network: Network, rollout: Rollout, step: int | Sequence[int] | torch.Tensor
    ) -> torch.Tensor:
        """The log-probability of a step of every image under a network, which autograd follows.

        It equals :attr:`Rollout.logprobs <stepfusion.Rollout.logprobs>` to the bit if the rollout was made with this
        ``network``, whose weights are the same, and both had as many images or the engine is ``invariant``. Guidance,
        labels and conditions are those of the rollout. The network is called in the engine's buckets, outside
        autocast, in the mode (training or eval) in which it is.

        Args:
            network: as :class:`stepfusion.Engine` takes it, on the engine's device, float32, bfloat16 or float16.
            rollout: of an engine of the same model; on any device.
            step: a place among ``rollout.rows``, for all images, or int64 [n], one for each.

        Returns:
            float64 [n], in nats, on the engine's device.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        check_rollout(self.runners.spec, rollout)
        return Replay(self.runners, network).logprobs(rollout, steps_of(rollout, step))


def _kept_on(device: str | torch.device) -> torch.device:
    """The device of this name; ValueError naming ``keep_on``."""
    try:
        return choose_device(device)[0]
    except ValueError as error:
        raise ValueError(f"keep_on: {error}") from None
