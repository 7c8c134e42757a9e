"""What a diffusers scheduler config says: the schedule, and how to sample with it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, Field

from stepfusion.errors import CheckpointError
from stepfusion.files.strict_model import StrictModel
from stepfusion.samplers.path import Path
from stepfusion.samplers.path_config import PATH_SCHEDULERS
from stepfusion.samplers.schedule import NoiseSchedule
from stepfusion.samplers.scheduler_keys import (
    DISTILLED,
    HONOURED_KEYS,
    NEUTRAL_VALUES,
    OTHER_SOLVERS,
    SPACING_KEYS,
    Scheduler,
    scheduler_of,
)

_VARIANCES = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "fixed_large_log": "fixed_large",
    "learned_range": "learned_range",
    None: "fixed_small",  # of a solver's config loaded into DDPMScheduler, which then takes its variance as it is
}
_UNBOUNDED = float(np.finfo(np.float32).max)


def _not_nan(value: float) -> float:
    if math.isnan(value) or value == math.inf:
        raise ValueError(f"lambda_min_clipped must be a number or -Infinity, got {value}")
    return value


class SamplerConfig(StrictModel):
    """The keys of a scheduler config that say how to sample, with the defaults of diffusers' DDPMScheduler."""

    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    predict_epsilon: bool | None = None
    clip_sample: bool = True
    clip_sample_range: float | None = 1.0
    variance_type: Literal[
        "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned_range", "learned", None
    ] = "fixed_small"
    timestep_spacing: Literal["leading", "trailing", "linspace"] = "leading"
    steps_offset: Annotated[int, Field(ge=0, le=1 << 20)] = 0
    set_alpha_to_one: bool = True
    thresholding: bool = False
    dynamic_thresholding_ratio: float | None = 0.995
    sample_max_value: float | None = 1.0
    lambda_min_clipped: Annotated[float, Field(allow_inf_nan=True), AfterValidator(_not_nan)] | None = None
    lower_order_final: bool = True
    euler_at_final: bool = False
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    use_beta_sigmas: bool | None = False
    use_lu_lambdas: bool | None = False
    original_inference_steps: Annotated[int, Field(ge=1, le=1 << 20)] = 50
    timestep_scaling: float = 10.0


def read_config(config: Mapping[str, Any]) -> tuple[Path, str, dict[str, Any]]:
    """The path, the prediction type, and the samplers' options, by their names in
    :mod:`stepfusion.samplers.registry`; "sampler" is the sampler to take if none is asked for.

    Options that the config leaves out have the defaults of its scheduler in diffusers. What its settings mean is
    taken over, its quirks are not: ask for those with ``compat="diffusers"``. Which keys are read, and why others are
    not, stands in :mod:`stepfusion.samplers.scheduler_keys`.

    Raises:
        CheckpointError: a scheduler or a setting that is unknown or not supported, named.

    Warns:
        UserWarning: the scheduler's own solver is not what samples by default, or has no table here.
    """
    try:
        if isinstance(config, Mapping) and (other := PATH_SCHEDULERS.get(str(config.get("_class_name")))):
            return other.read(config)
        schedule = NoiseSchedule.from_config(config)
        name, scheduler = scheduler_of(config)
        _check_neutral(config, scheduler)
        given = {key: config[key] for key in config if key in HONOURED_KEYS}
        read = SamplerConfig.of({**_defaults(scheduler), **given})
        prediction = _prediction(config, read)
        options = _options(name, scheduler, read, schedule)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"scheduler config: {str(error).removeprefix('scheduler config has ')}") from error
    if name in OTHER_SOLVERS:
        own = own_sampler(name, config, scheduler)
        how = f"; its own images come with {own}" if own else ", for it has no table here"
        warnings.warn(
            f"this model's scheduler is {name}: it is sampled by DDIM unless another sampler is asked for{how}",
            UserWarning,
            stacklevel=2,
        )
    return schedule, prediction, options


def own_sampler(name: str, config: Mapping[str, Any], scheduler: Scheduler) -> str | None:
    """How the sampler that gives a scheduler's own images is asked for; None if there is no table of it."""
    algorithm, order = config.get("algorithm_type", "dpmsolver++"), config.get("solver_order", 2)
    if name in ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"):
        kind = "m" if name == "DPMSolverMultistepScheduler" else "s"
        samplers = {("dpmsolver++", 1): "dpmpp_1s", ("sde-dpmsolver++", 2): "dpmpp_2m_sde"}
        samplers |= {("dpmsolver++", 2): f"dpmpp_2{kind}", ("dpmsolver++", 3): f"dpmpp_3{kind}"}
        known = kind == "m" or algorithm == "dpmsolver++"
        return f"sampler={samplers[algorithm, order]!r}" if known and (algorithm, order) in samplers else None
    if name in ("UniPCMultistepScheduler", "DEISMultistepScheduler"):
        return f"{scheduler.sampler} with order={order}" if order in (1, 2, 3) else None
    return scheduler.sampler


def _defaults(scheduler: Scheduler) -> dict[str, Any]:
    return {key: value for key, value in scheduler.defaults.items() if key in HONOURED_KEYS}


def _check_neutral(config: Mapping[str, Any], scheduler: Scheduler) -> None:
    """ValueError if the scheduler reads a key whose value no table here honours."""
    for key, values in NEUTRAL_VALUES.items():
        if key in scheduler.reads and key in config and config[key] not in values:
            accepted = " or ".join({False: "false", None: "null"}.get(value, repr(value)) for value in values)
            raise ValueError(f"{key} must be {accepted}, for nothing here samples otherwise, got {config[key]!r}")


def _prediction(config: Mapping[str, Any], read: SamplerConfig) -> str:
    """The prediction type; configs before it was a key say ``predict_epsilon``."""
    if read.predict_epsilon is None:
        return read.prediction_type
    told = "epsilon" if read.predict_epsilon else "sample"
    if "prediction_type" in config and read.prediction_type != told:
        raise ValueError(f"predict_epsilon says {told!r}, and prediction_type {read.prediction_type!r}")
    return told


def _options(name: str, scheduler: Scheduler, read: SamplerConfig, schedule: NoiseSchedule) -> dict[str, Any]:
    if name in DISTILLED:
        return _of_distilled(scheduler, read)
    options: dict[str, Any] = {
        "variance": _variance(name, read),
        "spacing": read.timestep_spacing,
        "steps_offset": read.steps_offset,
        "clip": _positive("clip_sample_range", read.clip_sample_range) if read.clip_sample else None,
    }
    chosen = [key for key in SPACING_KEYS if key in scheduler.reads and getattr(read, key)]
    if len(chosen) > 1:
        raise ValueError(f"{chosen[0]} and {chosen[1]} exclude each other, got both")
    if chosen:
        options["spacing"] = SPACING_KEYS[chosen[0]]
    if read.thresholding:
        options |= _threshold(read)
    if not read.set_alpha_to_one or _ends_at_the_first_level(name, read):
        options["final_alpha_cumprod"] = float(schedule.alphas_cumprod[0])
    return options | _of_dpm_solver(read)


def _of_distilled(scheduler: Scheduler, read: SamplerConfig) -> dict[str, Any]:
    """The options of "lcm" or "tcd", which visit timesteps of their own."""
    options: dict[str, Any] = {"sampler": scheduler.sampler, "original_steps": read.original_inference_steps}
    options["clip"] = _positive("clip_sample_range", read.clip_sample_range) if read.clip_sample else None
    if scheduler.sampler == "lcm":
        options["timestep_scaling"] = _positive("timestep_scaling", read.timestep_scaling)
    return options | (_threshold(read) if read.thresholding else {})


def _variance(name: str, read: SamplerConfig) -> str:
    """The variance of DDPM; "learned" means something else to diffusers' DDPM than to the networks' authors."""
    if read.variance_type != "learned":
        return _VARIANCES[read.variance_type]
    if "DDPM" in name:
        accepted = ", ".join(repr(value) for value in _VARIANCES)
        raise ValueError(f"variance_type must be one of {accepted}, got 'learned'")
    return "fixed_small"  # a solver that draws no variance only learns from it that the network returns one


def _threshold(read: SamplerConfig) -> dict[str, Any]:
    ratio = _positive("dynamic_thresholding_ratio", read.dynamic_thresholding_ratio)
    if ratio > 1:
        raise ValueError(f"dynamic_thresholding_ratio must be a finite number in (0, 1], got {ratio}")
    largest = _UNBOUNDED if read.sample_max_value is None else read.sample_max_value
    if largest < 1:
        raise ValueError(f"sample_max_value must be a finite number in [1, inf], got {largest}")
    return {"threshold": ratio, "sample_max_value": largest}


def _of_dpm_solver(read: SamplerConfig) -> dict[str, Any]:
    """What ``dpmpp_2m`` takes; by default "lower_order_final" means fewer than 15 steps there as here."""
    options: dict[str, Any] = {}
    if read.lambda_min_clipped is not None and math.isfinite(read.lambda_min_clipped):
        options["lambda_min_clipped"] = read.lambda_min_clipped
    if read.euler_at_final or not read.lower_order_final:
        options["lower_order_final"] = read.euler_at_final
    return options


def _ends_at_the_first_level(name: str, read: SamplerConfig) -> bool:
    """True for a solver whose last row ends at the level of timestep 0, and not at the image."""
    reads = ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "EulerDiscreteScheduler")
    return read.final_sigmas_type == "sigma_min" and name in (*reads, "UniPCMultistepScheduler")


def _positive(name: str, value: float | None) -> float:
    if value is None or value <= 0:
        raise ValueError(f"{name} must be a finite number in (0, inf], got {value}")
    return value
