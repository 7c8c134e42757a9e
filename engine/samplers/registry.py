"""Samplers by their names, and the options that each takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from stepfusion import _checks
from stepfusion.samplers import tables
from stepfusion.samplers.schedule import NoiseSchedule
from stepfusion.samplers.table import StepTable

SAMPLERS: dict[str, Callable[..., StepTable]] = {
    "ddim": tables.ddim,
    "ddpm": tables.ddpm,
    "dpmpp_2m": tables.dpmpp_2m,
    "euler_ancestral": tables.euler_ancestral,
    "ddim_inversion": tables.ddim_inversion,
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
DEFAULT_SAMPLER = "ddim"
DEFAULT_STEPS = 50


def make_table(
    schedule: NoiseSchedule,
    prediction: str,
    sampler: str = DEFAULT_SAMPLER,
    steps: int | None = None,
    *,
    defaults: Mapping[str, Any],
    **options: Any,
) -> StepTable:
    """The table of a sampler for a schedule and a prediction type.

    Args:
        steps: 50 by default, but all timesteps for "ddpm".
        defaults: options of the model, used if ``options`` does not give them and the sampler takes them. Its clip
            is used only for samplers that clip by default.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    make = SAMPLERS[_checks.choice("sampler", sampler, SAMPLERS)]
    if steps is None and "timesteps" not in options and sampler != "ddpm":
        steps = min(DEFAULT_STEPS, schedule.num_timesteps)
    accepted = make.__kwdefaults__ or {}
    unknown = [name for name in options if name not in accepted]
    if unknown:
        raise TypeError(f"sampler {sampler!r} takes no option {unknown[0]!r}; it takes {', '.join(sorted(accepted))}")
    chosen = {name: value for name, value in defaults.items() if name in accepted}
    if accepted.get("clip") is None:
        chosen.pop("clip", None)
    return make(schedule, steps, **{**chosen, "prediction": prediction, **options})


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
