"""Samplers by their names, and the options that each takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from stepfusion import _checks
from stepfusion.samplers.adams import deis, ipndm, plms
from stepfusion.samplers.ancestral import ddpm
from stepfusion.samplers.dpm_solver import dpmpp_2m, dpmpp_2m_sde, dpmpp_3m
from stepfusion.samplers.euler_method import dpmpp_1s, euler, euler_ancestral
from stepfusion.samplers.few_step import consistency, lcm, tcd
from stepfusion.samplers.grid import GRID_DEFAULTS
from stepfusion.samplers.heun_method import heun
from stepfusion.samplers.implicit import ddim, ddim_inversion
from stepfusion.samplers.lambda_bound import timesteps_in_bound
from stepfusion.samplers.path import FlowPath, Path, SigmaPath
from stepfusion.samplers.predictor_corrector import unipc
from stepfusion.samplers.reverse_sde import flow_sde
from stepfusion.samplers.schedule import NoiseSchedule
from stepfusion.samplers.singlestep import dpmpp_2s, dpmpp_3s
from stepfusion.samplers.table import StepTable
from stepfusion.samplers.timesteps import BY_LEVEL, largest_offset

SAMPLERS: dict[str, Callable[..., StepTable]] = {
    "ddim": ddim,
    "ddpm": ddpm,
    "dpmpp_2m": dpmpp_2m,
    "euler_ancestral": euler_ancestral,
    "euler": euler,
    "heun": heun,
    "dpmpp_1s": dpmpp_1s,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_2s": dpmpp_2s,
    "dpmpp_3s": dpmpp_3s,
    "dpmpp_3m": dpmpp_3m,
    "unipc": unipc,
    "deis": deis,
    "ipndm": ipndm,
    "plms": plms,
    "consistency": consistency,
    "lcm": lcm,
    "tcd": tcd,
    "flow_sde": flow_sde,
    "ddim_inversion": ddim_inversion,
}
#: The kinds of paths that samplers take which do not take all.
_ONLY_ON: dict[str, type[Path]] = {"ddpm": NoiseSchedule, "flow_sde": FlowPath}


def options_of(sampler: str) -> dict[str, Any]:
    """The options that a sampler takes, by name, each with what it is by default."""
    make = SAMPLERS[_checks.choice("sampler", sampler, SAMPLERS)]
    own = make.__kwdefaults__ or {}
    shared = {} if "clip" in own or make is ddim_inversion else GRID_DEFAULTS
    return {**shared, **own}


def samplers_of(path: Path) -> tuple[str, ...]:
    """The samplers that a path has, but those that climb from images to noise."""
    return tuple(name for name in OFFERED if isinstance(path, _ONLY_ON.get(name, Path)))


#: The default eta of the samplers that take one.
SAMPLERS_WITH_ETA: dict[str, float] = {
    name: options["eta"] for name in SAMPLERS for options in [options_of(name)] if "eta" in options
}
#: The samplers that start from noise: what commands and servers offer.
OFFERED = tuple(name for name in SAMPLERS if name != "ddim_inversion")
DEFAULT_STEPS = 50
#: Of samplers that need fewer.
_DEFAULT_STEPS = {"heun": 18, "consistency": 2, "lcm": 4, "tcd": 4}
#: Samplers of networks that were trained for few steps, and perhaps with a clip.
DISTILLED_SAMPLERS = ("consistency", "lcm", "tcd")
#: Samplers whose steps on a schedule are "leading" if nothing else is asked for; those of others are "trailing".
_LEADING = ("ddim", "ddpm", "ddim_inversion")
#: Exponential integrators, and UniPC and DEIS.
_SOLVERS = ("dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m", "dpmpp_2s", "dpmpp_3s", "unipc", "deis")
#: Samplers that divide x by the signal, and so have a bound whatever the network returns.
_DIVIDING = ("ipndm", "plms", "heun")
#: Samplers that take a model's "lambda_min_clipped", and have a bound by default.
_BOUNDED = (*_SOLVERS, *_DIVIDING)
#: Samplers that take a model's "final_alpha_cumprod".
_ENDING = (*_SOLVERS, "ddim", "ddim_inversion", "plms")


def default_sampler(schedule: Path) -> str:
    """The sampler of a path if none is asked for."""
    if isinstance(schedule, FlowPath):
        return "euler"
    return "heun" if isinstance(schedule, SigmaPath) else "ddim"


def make_table(
    schedule: Path,
    prediction: str,
    sampler: str | None = None,
    steps: int | None = None,
    *,
    defaults: Mapping[str, Any],
    **options: Any,
) -> StepTable:
    """The table of a sampler for a schedule and a prediction type.

    Args:
        steps: 50 by default, but 18 for "heun", all timesteps for "ddpm", and 2 or 4 for samplers of distilled
            networks.
        defaults: options of the model, used if ``options`` does not give them, the sampler takes them, and the
            caller's own options leave a place for them. Its clip is used only for samplers that clip by default, and
            for those of distilled networks. Its "sampler" is taken if none is asked for.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if sampler is None:
        sampler = defaults.get("sampler") or default_sampler(schedule)
    make = SAMPLERS[_checks.choice("sampler", sampler, SAMPLERS)]
    if not isinstance(schedule, _ONLY_ON.get(sampler, Path)):
        accepted_here = ", ".join(map(repr, samplers_of(schedule)))
        raise ValueError(f"sampler must be one of {accepted_here} on {schedule!r}, got {sampler!r}")
    if steps is None and not {"timesteps", "levels"} & options.keys() and sampler != "ddpm":
        steps = min(_DEFAULT_STEPS.get(sampler, DEFAULT_STEPS), schedule.max_steps)
    accepted = options_of(sampler)
    unknown = [name for name in options if name not in accepted]
    if unknown:
        raise TypeError(f"sampler {sampler!r} takes no option {unknown[0]!r}; it takes {', '.join(sorted(accepted))}")
    chosen = {name: value for name, value in defaults.items() if name in accepted and name not in options}
    if accepted.get("clip") is None and sampler not in DISTILLED_SAMPLERS:
        chosen.pop("clip", None)
    if sampler not in _BOUNDED:
        chosen.pop("lambda_min_clipped", None)
    if sampler not in _ENDING:
        chosen.pop("final_alpha_cumprod", None)
    spacing = "leading" if sampler in _LEADING else "trailing"
    _give_way(chosen, options, spacing)
    options = {**chosen, "prediction": prediction, **options}
    if "steps_offset" in chosen and isinstance(schedule, NoiseSchedule):
        options["steps_offset"] = min(chosen["steps_offset"], _room_for_offset(schedule, steps, options, sampler))
    return make(schedule, steps, **options)


def _give_way(chosen: dict[str, Any], options: Mapping[str, Any], spacing: str) -> None:
    """Take out of a model's options what the caller's own options leave no place for.

    Only what a caller gave may be refused: a model's "steps_offset" is an option of the spacing "leading", a list of
    timesteps needs no spacing at all, and a caller's clip is one in place of the model's threshold.
    """
    if "timesteps" in options or "levels" in options:
        for name in ("spacing", "steps_offset", "rho", "lambda_min_clipped"):
            chosen.pop(name, None)
    if chosen.get("spacing") in BY_LEVEL and ("compat" in options or "steps_offset" in options):
        del chosen["spacing"]
    if ({**chosen, **options}.get("spacing") or spacing) != "leading":
        chosen.pop("steps_offset", None)
    if {**chosen, **options}.get("spacing") != "karras":
        chosen.pop("rho", None)
    if "clip" in options and "threshold" not in options:
        chosen.pop("threshold", None)
    if options.get("v_posterior") and chosen.get("variance") == "fixed_large":
        del chosen["variance"]


def _room_for_offset(schedule: NoiseSchedule, steps: int | None, options: Mapping[str, Any], sampler: str) -> int:
    """The largest offset with which so many steps stay below T; 0 if ``steps`` are none, as the sampler will say."""
    bound, prediction = options.get("lambda_min_clipped"), options["prediction"]
    if sampler not in _BOUNDED:
        prediction = "sample"
    elif sampler in _DIVIDING:
        prediction = "epsilon"
    total = timesteps_in_bound(schedule, steps, None, prediction, bound) or schedule.num_timesteps
    steps = total if steps is None else steps
    return largest_offset(total, steps) if isinstance(steps, int) and 1 <= steps <= total else 0


def check_options(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Default options of a model; TypeError or ValueError if no sampler takes one of them."""
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise TypeError(f"options must be a dict, got {type(options).__name__}")
    known = sorted({"sampler"} | {name for sampler in SAMPLERS for name in options_of(sampler)})
    for name in options:
        if name not in known:
            raise ValueError(f"options must be options of the samplers ({', '.join(known)}), got {name!r}")
    if "sampler" in options:
        _checks.choice("sampler", options["sampler"], SAMPLERS)
    return dict(options)
