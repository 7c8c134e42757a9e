"""Samplers by their names, and the options that each takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from stepfusion import _checks
from stepfusion.samplers.ancestral import ddpm
from stepfusion.samplers.dpm_solver import dpmpp_2m, timesteps_in_bound
from stepfusion.samplers.euler import euler_ancestral
from stepfusion.samplers.implicit import ddim, ddim_inversion
from stepfusion.samplers.path import Path
from stepfusion.samplers.schedule import NoiseSchedule
from stepfusion.samplers.table import StepTable
from stepfusion.samplers.timesteps import largest_offset

SAMPLERS: dict[str, Callable[..., StepTable]] = {
    "ddim": ddim,
    "ddpm": ddpm,
    "dpmpp_2m": dpmpp_2m,
    "euler_ancestral": euler_ancestral,
    "ddim_inversion": ddim_inversion,
}
#: The default eta of the samplers that take one.
SAMPLERS_WITH_ETA: dict[str, float] = {
    name: options["eta"]
    for name, make in SAMPLERS.items()
    for options in [make.__kwdefaults__ or {}]
    if "eta" in options
}
#: The samplers that start from noise: what commands and servers offer.
OFFERED = tuple(name for name in SAMPLERS if name != "ddim_inversion")
DEFAULT_STEPS = 50


def default_sampler(schedule: Path) -> str:
    """The sampler of a path if none is asked for."""
    return "ddim"


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
        steps: 50 by default, but all timesteps for "ddpm".
        defaults: options of the model, used if ``options`` does not give them, the sampler takes them, and the
            caller's own options leave a place for them. Its clip is used only for samplers that clip by default.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    sampler = default_sampler(schedule) if sampler is None else sampler
    make = SAMPLERS[_checks.choice("sampler", sampler, SAMPLERS)]
    if steps is None and "timesteps" not in options and sampler != "ddpm":
        steps = min(DEFAULT_STEPS, schedule.max_steps)
    accepted = make.__kwdefaults__ or {}
    unknown = [name for name in options if name not in accepted]
    if unknown:
        raise TypeError(f"sampler {sampler!r} takes no option {unknown[0]!r}; it takes {', '.join(sorted(accepted))}")
    chosen = {name: value for name, value in defaults.items() if name in accepted and name not in options}
    if accepted.get("clip") is None:
        chosen.pop("clip", None)
    _give_way(chosen, options, accepted)
    options = {**chosen, "prediction": prediction, **options}
    if "steps_offset" in chosen:
        options["steps_offset"] = min(chosen["steps_offset"], _room_for_offset(schedule, steps, options, accepted))
    return make(schedule, steps, **options)


def _give_way(chosen: dict[str, Any], options: Mapping[str, Any], accepted: Mapping[str, Any]) -> None:
    """Take out of a model's options what the caller's own options leave no place for.

    Only what a caller gave may be refused: a model's "steps_offset" is an option of the spacing "leading", a list of
    timesteps needs no spacing at all, and a caller's clip is one in place of the model's threshold.
    """
    if "timesteps" in options:
        for name in ("spacing", "steps_offset", "lambda_min_clipped"):
            chosen.pop(name, None)
    if chosen.get("spacing") == "karras" and ("compat" in options or "steps_offset" in options):
        del chosen["spacing"]
    if {**accepted, **chosen, **options}.get("spacing") != "leading":
        chosen.pop("steps_offset", None)
    if "clip" in options and "threshold" not in options:
        chosen.pop("threshold", None)
    if options.get("v_posterior") and chosen.get("variance") == "fixed_large":
        del chosen["variance"]


def _room_for_offset(
    schedule: NoiseSchedule, steps: int | None, options: Mapping[str, Any], accepted: Mapping[str, Any]
) -> int:
    """The largest offset with which so many steps stay below T; 0 if ``steps`` are none, as the sampler will say."""
    total = schedule.num_timesteps
    if "lambda_min_clipped" in accepted:
        bound = options.get("lambda_min_clipped")
        total = timesteps_in_bound(schedule, steps, None, options["prediction"], bound) or total
    steps = total if steps is None else steps
    return largest_offset(total, steps) if isinstance(steps, int) and 1 <= steps <= total else 0


def check_options(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Default options of a model; TypeError or ValueError if no sampler takes one of them."""
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise TypeError(f"options must be a dict, got {type(options).__name__}")
    known = sorted({name for make in SAMPLERS.values() for name in make.__kwdefaults__ or {}})
    for name in options:
        if name not in known:
            raise ValueError(f"options must be options of the samplers ({', '.join(known)}), got {name!r}")
    return dict(options)
