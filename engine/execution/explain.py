"""The text of :meth:`stepfusion.Engine.explain`: which path runs each part, and why."""

from __future__ import annotations

from collections.abc import Sequence

from stepfusion.execution.plan import REFERENCE_ONLY, Plan
from stepfusion.execution.warm_cache import cache_fact
from stepfusion.model_spec import ModelSpec
from stepfusion.samplers.path import FlowPath, Path, SigmaPath


def line(name: str, value: str, reason: str) -> str:
    """One decision: what was decided, how, and why."""
    return f"{name:<14} {value:<13} {reason}"


def engine_lines(
    plan: Plan, spec: ModelSpec, exported: str | None, failures: Sequence[str], lanes: str, around: Sequence[str] = ()
) -> list[str]:
    """All lines of an engine; ``exported`` names a bundle; ``failures``, ``lanes``, ``around`` are lines of below."""
    return [
        *plan.lines(),
        path_line(spec.schedule, spec.prediction),
        *whole_image_lines(plan),
        *([] if exported is None else [f"{'exported':<14} {exported}"]),
        *failures,
        *cache_lines(plan),
        lanes,
        guidance_line(spec),
        *([line("conditions", "", ", ".join(one.name for one in spec.conditions))] if spec.conditions else []),
        *around,
    ]


def path_line(path: Path, prediction: str) -> str:
    """The path from images to noise, and what the network is told and shown of a level."""
    told = "told the timestep, an integer"
    if isinstance(path, SigmaPath):
        told = f"told {path.told_scale:g} * log(sigma), a float32"
    elif isinstance(path, FlowPath):
        told = f"told {'' if path.told_scale == 1 else f'{path.told_scale:g} * '}t, a float32"
    shown = "x / sqrt(sigma^2 + sigma_data^2)" if _is_preconditioned(path, prediction) else "x as it is"
    return line("path", path.name, f"the network is {told}, shown {shown}, and returns {prediction}")


def _is_preconditioned(path: Path, prediction: str) -> bool:
    return bool(isinstance(path, SigmaPath) and path.in_scale(prediction, [path.sigma_max])[0] != 1)


def whole_image_lines(plan: Plan) -> list[str]:
    """What happens to dynamic thresholding and to rescaled guidance if the step is fused."""
    if plan.backend.value == "reference":
        return []
    value = "refused" if plan.backend.asked else "reference"
    return [line(name, value, why) for name, (_, why) in REFERENCE_ONLY.items()]


def cache_lines(plan: Plan) -> list[str]:
    """What was compiled although the cache was filled ahead of time; no line if it was not."""
    fact = cache_fact(plan.device)
    return [] if fact is None else [line("cache", *fact)]


def failure_lines(uncaptured: str | None, declined: str | None) -> list[str]:
    """What was to be captured or compiled and was not, and why."""
    lines = []
    if uncaptured is not None:
        lines.append(line("", "eager", f"no tick was captured: {uncaptured}"))
    if declined is not None:
        lines.append(line("", "declined", declined))
    return lines


def around_lines(prompts: object, decode: object) -> list[str]:
    """What encodes prompts and what decodes latents; no line for what there is not."""
    lines = []
    missing = getattr(prompts, "missing", None)
    if missing is not None:
        lines.append(line("text encoder", "none", missing))
    elif prompts is not None:
        lines.append(line("text encoder", "", _explained(prompts)))
    if decode is not None:
        lines.append(line("decoder", "", _explained(decode)))
    return lines


def _explained(part: object) -> str:
    """What a part says of itself, or what it is called."""
    return str(getattr(part, "explanation", getattr(part, "__name__", type(part).__name__)))


def lanes_line(batch: int | None, *, invariant: bool) -> str:
    """The buckets of lanes; ``batch`` is None if it is found later."""
    if batch is None:
        bucket = "buckets of lanes up to what fits, found before the first images"
    elif invariant:
        bucket = f"one bucket of {batch} lanes: bits depend on neither batch size nor neighbours"
    else:
        bucket = f"buckets of 1 to {batch} lanes: noise is identical, images agree to rounding between buckets"
    return line("lanes", "", bucket)


def guidance_line(spec: ModelSpec) -> str:
    """Whether lanes can be guided."""
    if spec.null_label is not None:
        return line("guidance", "", "classifier-free, by the null label")
    if spec.conditions:
        return line("guidance", "", "classifier-free, by a negative prompt or conditions that stand for none")
    return line("guidance", "", "none: the model has no null label")
