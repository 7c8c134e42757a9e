"""The runners of one engine: which are needed, who makes them, how many lanes they may have."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from stepfusion import _checks
from stepfusion.errors import BackendError
from stepfusion.execution.cuda_graph import CapturePolicy
from stepfusion.execution.decoder import Decode
from stepfusion.execution.evaluator import Evaluator, Network
from stepfusion.execution.forking import check_process
from stepfusion.execution.plan import REFERENCE_ONLY, Plan, eager_plan
from stepfusion.execution.streams import Reached
from stepfusion.kernels import STREAM_INITIAL, reference
from stepfusion.kernels.coefficients import HISTORY
from stepfusion.kernels.launch import plain_torch
from stepfusion.lanes.batch_size import default_batch, free_bytes, largest_batch, peak_bytes
from stepfusion.lanes.conditions import Prompts, blank_options, prompts_on
from stepfusion.lanes.device_tables import DeviceTables
from stepfusion.lanes.editing import in_latents, noised
from stepfusion.lanes.pictures import with_tensors
from stepfusion.lanes.prepared import PreparedConditions
from stepfusion.lanes.request import Request, Tables, make_request
from stepfusion.lanes.runner import Part, Runner, RunnerKey, as_int64
from stepfusion.lanes.transfer import upload
from stepfusion.model_spec import ModelSpec
from stepfusion.options import ExecutionOptions, SamplingOptions
from stepfusion.samplers.table import StepTable

_IDLE = 4  # runners kept for the next requests

Kept = tuple[int, ...] | None  # shape of what the network keeps of an image, if rows reuse it


class Runners:
    """Checks requests against a model and its plan, and makes and lends the runners that move their lanes.

    Args:
        spec, plan, evaluator: the model, how it is run, and what calls its network.
        options: of which ``batch`` and ``invariant`` are read.
        prompts: makes conditions of texts, if the model has an encoder.
        encode: makes latents of images, if the model's are latents and there is an encoder.
        image_shape: says the shape (C, H, W) of an image, if that is another than of what is sampled.

    Attributes:
        policy: captures ticks; None if the plan has no CUDA graphs.
        pool: idle runners.
    """

    def __init__(
        self,
        spec: ModelSpec,
        plan: Plan,
        evaluator: Evaluator,
        options: ExecutionOptions,
        prompts: Prompts | None = None,
        encode: Decode | None = None,
        image_shape: Callable[[], Sequence[int]] | None = None,
    ) -> None:
        self.spec, self.plan, self.evaluator, self.invariant = spec, plan, evaluator, options.invariant
        check_process()
        self._process = os.getpid()
        self.policy = CapturePolicy() if plan.captures else None
        self._ops = plan.ops
        self.pool = RunnerPool(_IDLE)
        self._prompts, self._encode = prompts_on(prompts, plan.device), encode
        self._image_shape = (lambda: spec.shape) if image_shape is None else image_shape
        self._prepared = (
            PreparedConditions(evaluator, spec.conditions, plan.device, plan.dtype) if spec.conditions else None
        )
        self._batch = default_batch(options, plan.device)
        self._fitting: dict[Kept, int] = {}  # the most lanes that keep this, if free memory decides it
        # Weights are copied and cast on the stream of this thread, and others will read them.
        self._weights = Reached(plan.device) if plan.device.type == "cuda" else None

    def calling(self, network: Network) -> Runners:
        """Runners of the same model that call ``network`` as it is now: eager, in the dtype of its parameters.

        Nothing of its weights is kept from one of these to the next, so that they may change in between.

        Raises:
            TypeError, ValueError: it is not callable, or its parameters lie on another device.
        """
        plan = eager_plan(self.plan, network)
        execution = ExecutionOptions(batch=self.batch, invariant=self.invariant)
        labelled = self.spec.num_classes is not None
        evaluator = Evaluator(network, labelled, plan.products, self.spec.told_dtype, self.spec.conditions)
        return Runners(self.spec, plan, evaluator, execution, self._prompts, self._encode)

    @property
    def takes_prompts(self) -> bool:
        """Whether conditions are made of texts."""
        return self._prompts is not None and getattr(self._prompts, "missing", None) is None

    @property
    def batch(self) -> int:
        """The most lanes at a time; found by a trial at the first call if free memory decides it."""
        return self._most(None)

    @property
    def batch_is_known(self) -> bool:
        """False until the trial that finds :attr:`batch`."""
        return self._batch is not None or None in self._fitting

    def batch_for(self, request: Request) -> int:
        """The most lanes at a time for a request: fewer may fit if lanes keep what its rows reuse."""
        return self._most(self._kept(request))

    def bucket(self, images: int, request: Request | None = None) -> int:
        """The lanes for so many images: the smallest power of two that holds them, at most what fits of a request."""
        most = self.batch if request is None else self.batch_for(request)
        return most if self.invariant else min(most, 1 << max(0, images - 1).bit_length())

    @plain_torch(gradients=False)
    def request(self, n: int | Request | None, table: Tables | None, options: SamplingOptions) -> Request:
        """A checked request, or the one that is given, if it was made for this model.

        Raises:
            TypeError, ValueError: naming the argument. BackendError: the step was asked for from kernels that cannot
                take it. RuntimeError: this process was forked from one that had computed.
        """
        if os.getpid() != self._process:
            check_process()
        if isinstance(n, Request):
            return self._given(n, table, options)
        if options.get("image") is not None:
            options = with_tensors(options, self._image_shape)
        if self._encode is not None:
            options = in_latents(options, self._encode, self.spec, self.plan.device)
        request = make_request(self.spec, n, table, options, self._prompts)
        if request.table.reuses is not None and self._kept(request) is None:
            raise ValueError("reuse needs a UNet2D or UNet2DCondition of two levels or more, called by its parts")
        backend = self.plan.backend
        if request.table.whole_image and backend.value != "reference" and backend.asked:
            asked = (why for column, why in REFERENCE_ONLY.items() if (request.table.column(column) != 0).any())
            what, why_not = next(asked)
            raise BackendError(f"backend={backend.value!r} cannot run {what}: {why_not}")
        return request

    def _given(self, request: Request, table: Tables | None, options: SamplingOptions) -> Request:
        """A request that was made before, without further arguments."""
        for name in [*(["table"] if table is not None else []), *options]:
            raise ValueError(f"a request has its options already, got {name} beside it")
        if request.spec is not self.spec and request.spec != self.spec:
            raise ValueError(
                "a request is sampled by an engine of the model that it was made for, and this is another"
            )
        return request

    @plain_torch(gradients=False)
    def noised(self, request: Request) -> Request:
        """The request with the states that its image gives it to start from."""
        if request.image is None:
            return request
        device, table = self.plan.device, request.table
        numbers = [[s.row, as_int64(s.seed), s.index] for s in request.lane_starts]
        values = torch.tensor(numbers, dtype=torch.int64).reshape(-1, 3).t().contiguous()
        rows, seeds, indices = upload(values, device)
        start = noised(request.image.to(device), rows, seeds, indices, table, self.plan.ops)
        return replace(request, image=None, start=start)

    @plain_torch(gradients=False)
    def first_state(self, name: str, value: int | torch.Tensor, table: Tables | None = None) -> torch.Tensor:
        """A state [C, H, W] as given, or the one that image 0 of a seed starts from; ``name`` is the argument's.

        A ``table`` of one sampler says how noisy that is: on a path where it is not standard normal.
        """
        device = self.plan.device
        if isinstance(value, torch.Tensor):
            _checks.images(name, value, self.spec.shape)
            return value.to(device)
        seed = torch.tensor([as_int64(_checks.integer(name, value, 0, (1 << 64) - 1))], device=device)
        zero = torch.zeros_like(seed)
        noise: torch.Tensor = self._ops.normal(seed, zero, zero, self.spec.shape, STREAM_INITIAL)[0]
        scale = table.start_scales[0] if isinstance(table, StepTable) else 1.0
        return noise if scale == 1.0 else scale * noise

    @plain_torch(gradients=False)
    def latents_of(self, images: torch.Tensor) -> torch.Tensor:
        """Latents of images float [n, C', H', W'] of the model's size; as they are if they are what is sampled."""
        if self._encode is None:
            return images
        latents = in_latents({"image": images}, self._encode, self.spec, self.plan.device)["image"]
        return latents if isinstance(latents, torch.Tensor) else images

    def key(self, request: Request, lanes: int, *, logprobs: bool = False) -> RunnerKey:
        """What a runner with so many lanes is made for if it is to serve this request."""
        spec, plan = self.spec, self.plan
        return RunnerKey(
            lanes,
            spec.shape,
            plan.device,
            plan.dtype,
            guided=request.guided,
            null_label=spec.null_label,
            separate=self.invariant,  # one batch size for guided and unguided calls, or bits would differ
            learned_variance=request.table.learned_variance,
            history=request.table.history,
            known=request.known is not None,
            whole_image=request.table.whole_image,
            # room for the longest table at once: growing would throw captured ticks away
            capacity=0 if self.policy is None else spec.schedule.max_steps,
            context_size=spec.context_size if request.mixed else None,
            conditions=() if self._prepared is None else self._prepared.layout,
            kept=self._kept(request),
            logprobs=logprobs,
        )

    def _kept(self, request: Request) -> Kept:
        """The shape of what the network keeps of an image, if rows of this request reuse it."""
        if request.table.reuses is None or self.plan.network.value == "openvino":
            return None
        return self.evaluator.kept_shape(self.spec.shape)

    def make(self, key: RunnerKey, tables: DeviceTables | None = None) -> Runner:
        """A new runner; dynamic thresholding and rescaled guidance run on the reference path."""
        if self._weights is not None:
            self._weights.wait()
        ops = reference if key.whole_image else self._ops
        return Runner(self.evaluator, key, ops, self.policy, tables, self._prepared)

    @property
    def prompts(self) -> Prompts | None:
        """What makes conditions of texts, on the plan's device."""
        return self._prompts

    def shrink(self, lanes: int) -> None:
        """Have at most so many lanes from now on, because memory ran out, and drop the idle runners."""
        self.pool.clear()
        self._batch = lanes

    def _most(self, kept: Kept) -> int:
        if self._batch is not None:
            return self._batch
        if kept not in self._fitting:
            self._fitting[kept] = self._fitting_batch(kept)
        return self._fitting[kept]

    def _fitting_batch(self, kept: Kept) -> int:
        """The largest batch that the free memory allows, by trial of all that a tick of this model may need.

        That is guidance if the model has something that stands for no condition, the longest history, and a known
        region; and what lanes keep, if rows reuse it.
        """
        spec = self.spec
        guided = spec.null_label is not None or bool(spec.conditions)
        request = self.request(1, spec.table("ddim", 1), blank_options(spec, 2.0 if guided else 1.0))
        part = Part.WHOLE if kept is None else Part.BOTH  # lanes at whole rows beside lanes at others
        self.pool.clear()  # what idle runners hold is free for others
        tables = DeviceTables(self.evaluator, self.plan.device, self.key(request, 1).capacity or len(request.table))
        tables.hold(request.table)  # once, and what it takes for a while is not a tick's

        def peak(lanes: int) -> int:
            key = replace(self.key(request, lanes), history=len(HISTORY), known=True, kept=kept)

            def run() -> None:
                with torch.no_grad():
                    self.make(key, tables).tick(part=part)

            run()  # what is paid once is paid before measuring
            return peak_bytes(run, self.plan.device)

        return largest_batch(peak, free_bytes(self.plan.device))


@dataclass(frozen=True)
class _Idle:
    """A runner that nobody has, and the end of what was launched on it."""

    key: RunnerKey
    runner: Runner
    reached: Reached | None  # None on a device without streams


class RunnerPool:
    """Idle runners by what they are made for: a request borrows one, requests of other threads get their own.

    At most ``keep`` runners stay idle; the one that was idle longest goes first.
    """

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._lock = threading.Lock()
        self._idle: list[_Idle] = []

    @property
    def idle(self) -> list[Runner]:
        """The idle runners, the one that was idle longest first."""
        with self._lock:
            return [idle.runner for idle in self._idle]

    def take(self, key: RunnerKey, make: Callable[[RunnerKey], Runner]) -> Runner:
        """An idle runner with this key, or a new one."""
        found = self._find(key)
        if found is None:
            return make(key)
        if found.reached is not None:
            # Its last user may have launched on another stream, and its launches may still be under way.
            found.reached.wait(found.runner.buffers)
        return found.runner

    def give(self, key: RunnerKey, runner: Runner) -> None:
        """Bring a runner back, its lanes in whatever state."""
        runner.park()
        idle = _Idle(key, runner, runner.reached())
        with self._lock:
            self._idle.append(idle)
            del self._idle[: -self._keep]

    def clear(self) -> None:
        """Drop every idle runner, and the memory it holds."""
        with self._lock:
            self._idle.clear()

    def _find(self, key: RunnerKey) -> _Idle | None:
        with self._lock:
            for position in reversed(range(len(self._idle))):
                if self._idle[position].key == key:
                    return self._idle.pop(position)
        return None
