"""What a diffusers scheduler config says: the schedule, and how to sample with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepfusion import _checks
from stepfusion.errors import CheckpointError
from stepfusion.kernels.coefficients import PREDICTIONS
from stepfusion.samplers.schedule import NoiseSchedule
from stepfusion.samplers.timesteps import SPACINGS

_VARIANCES = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "fixed_large_log": "fixed_large",
    "learned_range": "learned_range",
}


def read_config(config: Mapping[str, Any]) -> tuple[NoiseSchedule, str, dict[str, Any]]:
    """The schedule, the prediction type, and the samplers' options, by their names in
    :mod:`stepfusion.samplers.registry`.

    Options that the config leaves out have diffusers' defaults. What its settings mean is taken over, its quirks
    are not: ask for those with ``compat="diffusers"``.

    Raises:
        CheckpointError: a setting that is unknown or not supported, named.
    """
    try:
        prediction = _checks.choice("prediction_type", config.get("prediction_type", "epsilon"), PREDICTIONS)
        variance = _checks.choice("variance_type", config.get("variance_type", "fixed_small"), _VARIANCES)
        spacing = _checks.choice("timestep_spacing", config.get("timestep_spacing", "leading"), SPACINGS)
        offset = _checks.integer("steps_offset", config.get("steps_offset", 0), 0, 1 << 20)
        clipped = _checks.boolean("clip_sample", config.get("clip_sample", True))
        bound = _checks.number("clip_sample_range", config.get("clip_sample_range", 1.0), 0.0, open_low=True)
        whole = _checks.boolean("set_alpha_to_one", config.get("set_alpha_to_one", True))
        thresholding = _checks.boolean("thresholding", config.get("thresholding", False))
        name = "dynamic_thresholding_ratio"
        ratio = _checks.number(name, config.get(name, 0.995), 0.0, 1.0, open_low=True)
        largest = _checks.number("sample_max_value", config.get("sample_max_value", 1.0), 1.0)
        schedule = NoiseSchedule.from_config(config)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"scheduler config: {str(error).removeprefix('scheduler config has ')}") from error
    options: dict[str, Any] = {
        "variance": _VARIANCES[variance],
        "spacing": spacing,
        "steps_offset": offset,
        "clip": bound if clipped else None,
    }
    if thresholding:
        options |= {"threshold": ratio, "sample_max_value": largest}
    if not whole:
        options["final_alpha_cumprod"] = float(schedule.alphas_cumprod[0])
    return schedule, prediction, options
