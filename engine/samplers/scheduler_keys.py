"""The schedulers of diffusers and the keys of their configs: which are sampled here, by what, and which are read.

Every scheduler and every key of diffusers 0.42 stands in one of these tables, with those of older releases that are
still found in directories; a scheduler or key in none of them is refused. A key that another class left in a config
("saved by A, loaded into B") changes nothing in B and is accepted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: Keys that shape the noise schedule.
SCHEDULE_KEYS = frozenset(
    {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"}
)

#: Keys that become options of the samplers here, or the prediction type.
HONOURED_KEYS = frozenset(
    {
        "prediction_type",
        "predict_epsilon",  # before prediction_type: False is "sample"
        "clip_sample",
        "clip_sample_range",
        "variance_type",
        "timestep_spacing",
        "steps_offset",
        "set_alpha_to_one",
        "thresholding",
        "dynamic_thresholding_ratio",
        "sample_max_value",
        "lambda_min_clipped",
        "lower_order_final",
        "euler_at_final",
        "final_sigmas_type",
        "use_karras_sigmas",
        "use_exponential_sigmas",
        "use_beta_sigmas",
        "use_lu_lambdas",
        "original_inference_steps",
        "timestep_scaling",
    }
)

_NOT_SET = (False, None)

#: Keys of which only these values are accepted, in a config of a scheduler that reads them: others change the levels
#: that are visited, or what the network is told.
NEUTRAL_VALUES: Mapping[str, tuple[Any, ...]] = {
    "use_flow_sigmas": _NOT_SET,
    "use_dynamic_shifting": _NOT_SET,
    "timestep_type": ("discrete", None),
    "shift_terminal": (None,),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "timestep_values": (None,),  # of DDIM and PNDM before 0.3, where it was never anything else
}

_OF_THE_SOLVER = "it chooses between steps of a solver, which are asked for by sampler= and its options"
_OF_FLOWS = "schedulers of betas read it with flow sigmas alone, which are refused"
_OF_OTHERS = "no scheduler of betas that is sampled here reads it"

#: Keys that change nothing here, and why.
IGNORED_KEYS: Mapping[str, str] = {
    **dict.fromkeys(
        (
            "solver_order", "solver_type", "algorithm_type", "skip_prk_steps", "predict_x0", "solver_p", "tau_func",
            "disable_corrector", "predictor_order", "corrector_order", "noise_sampler_seed", "eta",
        ),
        _OF_THE_SOLVER,
    ),
    **dict.fromkeys(
        (
            "flow_shift", "time_shift_type", "shift", "base_shift", "max_shift", "base_image_seq_len", "gamma",
            "max_image_seq_len", "invert_sigmas", "stochastic_sampling", "scale_factors", "upscale_mode", "stages",
            "stage_range", "scheduler_type",
        ),
        _OF_FLOWS,
    ),
    **dict.fromkeys(
        (
            "alpha_cum_end", "alpha_cum_start", "beta_max", "beta_min", "block_length", "clip_denoised",
            "correct_steps", "corrector_k", "corrector_selection", "corrector_selection_tau", "corrector_steps",
            "editing_threshold", "entropy_bound", "eps", "final_step_size_scale", "gamma_cum_end", "gamma_cum_start",
            "mask_token_id", "masking_schedule", "minimal_topk", "n_grid", "noise_mode", "num_inference_steps",
            "num_policy_substeps", "num_vec_classes", "rho", "s", "s_churn", "s_max",
            "s_min", "s_noise", "sampling_eps", "scaler", "schedule_mode", "sigma_data", "sigma_schedule", "snr",
            "snr_shift_scale", "t_lim_ode", "t_lim_ode_below", "t_max", "t_min", "tail_step_multiplier", "tail_steps",
            "threshold", "tsr_k", "tsr_sigma",
        ),
        _OF_OTHERS,
    ),
    "interpolation_type": "it says how levels between two timesteps are found, and whole timesteps are visited here",
    "tensor_format": "it chose between NumPy and PyTorch before diffusers 0.3",
    "set_alpha_to_zero": "it is the old name of set_alpha_to_one in DDIMInverseScheduler, which samples nothing",
}  # fmt: skip

KNOWN_KEYS = SCHEDULE_KEYS | HONOURED_KEYS | NEUTRAL_VALUES.keys() | IGNORED_KEYS.keys()


@dataclass(frozen=True)
class Scheduler:
    """A scheduler whose configs are read here.

    Attributes:
        sampler: what gives its images: a sampler's name, or how it is asked for; None if there is no table of it.
        reads: the keys of :data:`NEUTRAL_VALUES` and of :data:`SPACING_KEYS` that it reads.
        defaults: what it takes for keys that a config leaves out, if not what DDPMScheduler takes.
    """

    sampler: str | None = None
    reads: frozenset[str] = frozenset()
    defaults: Mapping[str, Any] = field(default_factory=dict)


#: Keys that spread levels otherwise than by timestep, and the spacing that each asks for.
SPACING_KEYS: Mapping[str, str] = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "exponential",
    "use_beta_sigmas": "beta",
    "use_lu_lambdas": "lambda",
}

_SIGMAS = frozenset({"use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"})
_FLOWS = _SIGMAS | {"use_flow_sigmas"}
_SHIFTED = _FLOWS | {"use_dynamic_shifting"}
_OLD = frozenset({"timestep_values"})
_LINSPACE: Mapping[str, Any] = {"timestep_spacing": "linspace"}
_LATENT: Mapping[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012}
_OF_LATENTS: Mapping[str, Any] = {**_LATENT, "beta_schedule": "scaled_linear", "clip_sample": False}

#: DDPMScheduler and DDIMScheduler are what the samplers "ddpm" and "ddim" are; no other scheduler is sampled without
#: a word.
OWN_SCHEDULERS: Mapping[str, Scheduler] = {
    "DDPMScheduler": Scheduler("ddpm", _OLD),
    "DDPMParallelScheduler": Scheduler("ddpm"),
    "DDIMScheduler": Scheduler("ddim", _OLD),
    "DDIMParallelScheduler": Scheduler("ddim"),
}

#: Schedulers of the same process, with another solver: their configs are read, and their directories are sampled by
#: the samplers here, which a warning says.
OTHER_SOLVERS: Mapping[str, Scheduler] = {
    "DDIMInverseScheduler": Scheduler("sampler='ddim_inversion'"),
    "DPMSolverMultistepScheduler": Scheduler("sampler='dpmpp_2m'", _SHIFTED | {"use_lu_lambdas"}, _LINSPACE),
    "EulerAncestralDiscreteScheduler": Scheduler("sampler='euler_ancestral'", frozenset(), _LINSPACE),
    "EulerDiscreteScheduler": Scheduler(
        "sampler='euler_ancestral' with eta=0", _SIGMAS | {"timestep_type", "sigma_min", "sigma_max"}, _LINSPACE
    ),
    "DEISMultistepScheduler": Scheduler("sampler='deis'", _SHIFTED, _LINSPACE),
    "DPMSolverMultistepInverseScheduler": Scheduler(None, _FLOWS, _LINSPACE),
    "DPMSolverSDEScheduler": Scheduler(None, _SIGMAS, {**_LATENT, **_LINSPACE}),
    "DPMSolverSinglestepScheduler": Scheduler("sampler='dpmpp_2s'", _SHIFTED, {"lower_order_final": False}),
    "HeunDiscreteScheduler": Scheduler("sampler='heun'", _SIGMAS, {**_LATENT, **_LINSPACE, "clip_sample": False}),
    "KDPM2AncestralDiscreteScheduler": Scheduler(None, _SIGMAS, {**_LATENT, **_LINSPACE}),
    "KDPM2DiscreteScheduler": Scheduler(None, _SIGMAS, {**_LATENT, **_LINSPACE}),
    "LMSDiscreteScheduler": Scheduler(None, _SIGMAS, _LINSPACE),
    "PNDMScheduler": Scheduler("sampler='plms'", _OLD, {"set_alpha_to_one": False}),
    "RePaintScheduler": Scheduler(None),
    "SASolverScheduler": Scheduler(None, _FLOWS, _LINSPACE),
    "UniPCMultistepScheduler": Scheduler(
        "sampler='unipc'", _SHIFTED | {"shift_terminal", "sigma_min", "sigma_max"}, _LINSPACE
    ),
    "UnCLIPScheduler": Scheduler(None, frozenset(), {"beta_schedule": "squaredcos_cap_v2"}),
}

#: Schedulers of the same process for networks that were trained to skip it: they are sampled by their own samplers.
DISTILLED: Mapping[str, Scheduler] = {
    "LCMScheduler": Scheduler("lcm", frozenset(), _OF_LATENTS),
    "TCDScheduler": Scheduler("tcd", frozenset(), _OF_LATENTS),
}

#: Schedulers of other paths, and what their levels are: :mod:`stepfusion.samplers.path_config` reads their configs.
OTHER_PATHS: Mapping[str, str] = {
    "CMStochasticIterativeScheduler": "its levels are those of stepfusion.SigmaPath",
    "EDMDPMSolverMultistepScheduler": "its levels are those of stepfusion.SigmaPath",
    "EDMEulerScheduler": "its levels are those of stepfusion.SigmaPath",
    "FlowMatchEulerDiscreteScheduler": "its levels are those of stepfusion.FlowPath",
    "FlowMatchHeunDiscreteScheduler": "its levels are those of stepfusion.FlowPath",
}

_DECODER = "it decodes latents, and is no sampler of images from noise"
_FLOW = "it moves along a flow in steps that are not those of a sampler here"
_SIGMA = "its noise levels are not those of a schedule of betas"
_DISCRETE = "it samples tokens and not pictures"
_SHIFT = "it shifts the signal-to-noise ratio of its schedule"

#: Schedulers of another process, and why no table here is one of theirs.
REFUSED_SCHEDULERS: Mapping[str, str] = {
    "ConsistencyDecoderScheduler": _DECODER,
    "FlowMatchLCMScheduler": _FLOW,
    "FlowMapEulerDiscreteScheduler": _FLOW,
    "HeliosScheduler": _FLOW,
    "HeliosDMDScheduler": _FLOW,
    "LTXEulerAncestralRFScheduler": _FLOW,
    "MiniMaxH3Scheduler": _FLOW,
    "PiflowScheduler": _FLOW,
    "RFD4ProteinaScheduler": _FLOW,
    "SCMScheduler": _FLOW,
    "CosineDPMSolverMultistepScheduler": _SIGMA,
    "KarrasVeScheduler": _SIGMA,
    "ScoreSdeVeScheduler": _SIGMA,
    "ScoreSdeVpScheduler": _SIGMA,
    "IPNDMScheduler": _SIGMA,
    "DDPMWuerstchenScheduler": _SIGMA,
    "CogVideoXDDIMScheduler": _SHIFT,
    "CogVideoXDPMScheduler": _SHIFT,
    "AmusedScheduler": _DISCRETE,
    "BlockRefinementScheduler": _DISCRETE,
    "DiscreteDDIMScheduler": _DISCRETE,
    "EntropyBoundScheduler": _DISCRETE,
    "VQDiffusionScheduler": _DISCRETE,
}


def check_keys(config: Mapping[str, Any], start: str) -> None:
    """ValueError, its sentence from ``start`` on, if a config has a key that no scheduler of diffusers has."""
    unknown = [key for key in config if key not in KNOWN_KEYS and not str(key).startswith("_")]
    if unknown:
        raise ValueError(f"{start}unknown keys: {', '.join(sorted(map(repr, unknown)))}")


def scheduler_of(config: Mapping[str, Any]) -> tuple[str, Scheduler]:
    """The scheduler that a config names, and its name; DDPMScheduler if it names none. Flax's count as PyTorch's.

    Raises:
        ValueError: it is not a string, or not a scheduler whose config is read here.
    """
    name = config.get("_class_name", "DDPMScheduler")
    if not isinstance(name, str):
        raise ValueError(f"_class_name must be a string, got {name!r}")
    plain = name.removeprefix("Flax")
    found = OWN_SCHEDULERS.get(plain) or OTHER_SOLVERS.get(plain) or DISTILLED.get(plain)
    if found is not None:
        return plain, found
    if plain in OTHER_PATHS:
        raise ValueError(f"{name} has no schedule of betas: {OTHER_PATHS[plain]}")
    if plain in REFUSED_SCHEDULERS:
        raise ValueError(f"{name} is not implemented: {REFUSED_SCHEDULERS[plain]}")
    accepted = ", ".join([*OWN_SCHEDULERS, *OTHER_SOLVERS, *DISTILLED, *OTHER_PATHS])
    raise ValueError(f"{name[:80]!r} is no scheduler that is known here; known are {accepted}")
