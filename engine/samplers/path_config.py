"""What configs of diffusers' schedulers on other paths than a schedule of betas say: EDM, consistency, flows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from stepfusion.files.strict_model import StrictModel
from stepfusion.samplers.path import FlowPath, Path, SigmaPath
from stepfusion.samplers.scheduler_keys import check_keys

Found = tuple[Path, str, dict[str, Any]]


class _EdmKeys(StrictModel):
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    sigma_schedule: Literal["karras", "exponential"] = "karras"
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    rho: float = 7.0
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"


class _EdmDpmKeys(_EdmKeys):
    solver_order: Literal[1, 2, 3] = 2
    solver_type: Literal["midpoint", "heun"] = "midpoint"
    algorithm_type: Literal["dpmsolver++", "sde-dpmsolver++"] = "dpmsolver++"
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    lower_order_final: bool = True
    euler_at_final: bool = False


class _ConsistencyKeys(StrictModel):
    num_train_timesteps: int = 40
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    s_noise: float = 1.0
    rho: float = 7.0
    clip_denoised: bool = True


class _FlowHeunKeys(StrictModel):
    num_train_timesteps: int = 1000
    shift: float = 1.0


class _FlowKeys(_FlowHeunKeys):
    use_dynamic_shifting: bool = False
    invert_sigmas: bool = False
    shift_terminal: float | None = None
    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    use_beta_sigmas: bool | None = False
    stochastic_sampling: bool = False


def _edm(keys: _EdmKeys) -> Found:
    if keys.final_sigmas_type != "zero":
        raise ValueError("final_sigmas_type must be 'zero', for 'sigma_min' repeats the last level, got 'sigma_min'")
    path = SigmaPath(keys.sigma_min, keys.sigma_max, keys.sigma_data, rho=keys.rho)
    prediction = "edm" if keys.prediction_type == "epsilon" else "v_prediction"
    return path, prediction, {"sampler": "euler", "spacing": keys.sigma_schedule}


def _edm_dpm(keys: _EdmDpmKeys) -> Found:
    path, prediction, options = _edm(keys)
    stochastic = keys.algorithm_type == "sde-dpmsolver++"
    if stochastic and keys.solver_order != 2:
        raise ValueError(f"solver_order must be 2 with algorithm_type 'sde-dpmsolver++', got {keys.solver_order}")
    by_order = {1: "dpmpp_1s", 2: "dpmpp_2m", 3: "dpmpp_3m"}
    options["sampler"] = "dpmpp_2m_sde" if stochastic else by_order[keys.solver_order]
    if keys.solver_order == 2:
        options["solver_type"] = keys.solver_type
    if keys.euler_at_final or not keys.lower_order_final:
        options["lower_order_final"] = keys.euler_at_final
    if keys.thresholding:
        options |= {"threshold": keys.dynamic_thresholding_ratio, "sample_max_value": keys.sample_max_value}
    return path, prediction, options


def _consistency(keys: _ConsistencyKeys) -> Found:
    path = SigmaPath(keys.sigma_min, keys.sigma_max, keys.sigma_data, rho=keys.rho, told_scale=250.0)
    options = {"sampler": "consistency", "train_levels": keys.num_train_timesteps, "s_noise": keys.s_noise}
    return path, "consistency", {**options, "clip": 1.0 if keys.clip_denoised else None}


def _flow(keys: _FlowKeys) -> Found:
    if keys.use_dynamic_shifting:
        raise ValueError(
            "use_dynamic_shifting must be false, for a shift that depends on the size of an image is not one path: "
            "give stepfusion.FlowPath(shift=...) with the shift of your size, got True"
        )
    if keys.invert_sigmas or keys.shift_terminal is not None:
        name, accepted = ("invert_sigmas", "false") if keys.invert_sigmas else ("shift_terminal", "null")
        raise ValueError(
            f"{name} must be {accepted}, for nothing here samples otherwise, got {getattr(keys, name)!r}"
        )
    chosen = [name for name in ("karras", "exponential", "beta") if getattr(keys, f"use_{name}_sigmas")]
    options: dict[str, Any] = {"spacing": chosen[0] if chosen else "linear"}
    options["sampler"] = "consistency" if keys.stochastic_sampling else "euler"
    return FlowPath(keys.shift, told_scale=float(keys.num_train_timesteps)), "flow", options


def _flow_heun(keys: _FlowHeunKeys) -> Found:
    path = FlowPath(keys.shift, told_scale=float(keys.num_train_timesteps))
    return path, "flow", {"sampler": "heun", "spacing": "linear"}


Keys = TypeVar("Keys", bound=StrictModel)


@dataclass(frozen=True)
class PathScheduler(Generic[Keys]):
    """A scheduler on another path: the keys that it reads, and what they say."""

    keys: type[Keys]
    build: Callable[[Keys], Found]

    def read(self, config: Mapping[str, Any]) -> Found:
        """The path, the prediction type, and the samplers' options, "sampler" among them.

        Raises:
            TypeError, ValueError: naming the key.
        """
        check_keys(config, "")
        return self.build(self.keys.of({key: config[key] for key in config if key in self.keys.model_fields}))


#: The schedulers of :data:`stepfusion.samplers.scheduler_keys.OTHER_PATHS`.
PATH_SCHEDULERS: Mapping[str, PathScheduler[Any]] = {
    "EDMEulerScheduler": PathScheduler(_EdmKeys, _edm),
    "EDMDPMSolverMultistepScheduler": PathScheduler(_EdmDpmKeys, _edm_dpm),
    "CMStochasticIterativeScheduler": PathScheduler(_ConsistencyKeys, _consistency),
    "FlowMatchEulerDiscreteScheduler": PathScheduler(_FlowKeys, _flow),
    "FlowMatchHeunDiscreteScheduler": PathScheduler(_FlowHeunKeys, _flow_heun),
}
