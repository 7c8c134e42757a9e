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
    }
)

_NOT_SET = (False, None)

#: Keys of which only these values are accepted, in a config of a scheduler that reads them: others change the levels
#: that are visited, or what the network is told.
NEUTRAL_VALUES: Mapping[str, tuple[Any, ...]] = {
    "use_exponential_sigmas": _NOT_SET,
    "use_beta_sigmas": _NOT_SET,
    "use_lu_lambdas": _NOT_SET,
    "use_flow_sigmas": _NOT_SET,
    "use_dynamic_shifting": _NOT_SET,
    "timestep_type": ("discrete", None),
    "shift_terminal": (None,),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "timestep_values": (None,),  # of DDIM and PNDM before 0.3, where it was never anything else
}

_OF_THE_SOLVER = "it chooses between steps of a solver that has no table here, or one of its own by sampler="
_OF_FLOWS = "it is read with flow sigmas alone, which are refused"
_OF_OTHERS = "no scheduler that is sampled here reads it"

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
            "num_policy_substeps", "num_vec_classes", "original_inference_steps", "rho", "s", "s_churn", "s_max",
            "s_min", "s_noise", "sampling_eps", "scaler", "schedule_mode", "sigma_data", "sigma_schedule", "snr",
            "snr_shift_scale", "t_lim_ode", "t_lim_ode_below", "t_max", "t_min", "tail_step_multiplier", "tail_steps",
            "threshold", "timestep_scaling", "tsr_k", "tsr_sigma",
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
        sampler: what gives its images: a sampler's name, as it is asked for; None if there is no table of it.
        reads: the keys of :data:`NEUTRAL_VALUES`, and "use_karras_sigmas", that it reads.
        defaults: what it takes for keys that a config leaves out, if not what DDPMScheduler takes.
        refused: why its directories are not sampled; None if they are.
    """

    sampler: str | None = None
    reads: frozenset[str] = frozenset()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    refused: str | None = None


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
    "DEISMultistepScheduler": Scheduler(None, _SHIFTED, _LINSPACE),
    "DPMSolverMultistepInverseScheduler": Scheduler(None, _FLOWS, _LINSPACE),
    "DPMSolverSDEScheduler": Scheduler(None, _SIGMAS, {**_LATENT, **_LINSPACE}),
    "DPMSolverSinglestepScheduler": Scheduler(None, _SHIFTED, {"lower_order_final": False}),
    "HeunDiscreteScheduler": Scheduler(None, _SIGMAS, {**_LATENT, **_LINSPACE, "clip_sample": False}),
    "KDPM2AncestralDiscreteScheduler": Scheduler(None, _SIGMAS, {**_LATENT, **_LINSPACE}),
    "KDPM2DiscreteScheduler": Scheduler(None, _SIGMAS, {**_LATENT, **_LINSPACE}),
    "LMSDiscreteScheduler": Scheduler(None, _SIGMAS, _LINSPACE),
    "PNDMScheduler": Scheduler(None, _OLD, {"set_alpha_to_one": False}),
    "RePaintScheduler": Scheduler(None),
    "SASolverScheduler": Scheduler(None, _FLOWS, _LINSPACE),
    "UniPCMultistepScheduler": Scheduler(None, _SHIFTED | {"shift_terminal", "sigma_min", "sigma_max"}, _LINSPACE),
    "UnCLIPScheduler": Scheduler(None, frozenset(), {"beta_schedule": "squaredcos_cap_v2"}),
}

_DISTILLED = "networks that were distilled to few steps have no table here"

#: Schedulers of the same process for networks that were trained to skip it: their schedules are read, no more.
DISTILLED: Mapping[str, Scheduler] = {
    "LCMScheduler": Scheduler(None, frozenset(), _OF_LATENTS, _DISTILLED),
    "TCDScheduler": Scheduler(None, frozenset(), _OF_LATENTS, _DISTILLED),
}

_FLOW = "its noise is mixed in along straight lines, which no table here does"
_SIGMA = "its noise levels are not those of a schedule of betas"
_DISCRETE = "it samples tokens and not pictures"
_SHIFT = "it shifts the signal-to-noise ratio of its schedule"

#: Schedulers of another process, and why no table here is one of theirs.
REFUSED_SCHEDULERS: Mapping[str, str] = {
    "CMStochasticIterativeScheduler": _DISTILLED,
    "ConsistencyDecoderScheduler": _DISTILLED,
    "FlowMatchEulerDiscreteScheduler": _FLOW,
    "FlowMatchHeunDiscreteScheduler": _FLOW,
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
    "EDMDPMSolverMultistepScheduler": _SIGMA,
    "EDMEulerScheduler": _SIGMA,
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
    if plain in REFUSED_SCHEDULERS:
        raise ValueError(f"{name} is not implemented: {REFUSED_SCHEDULERS[plain]}")
    accepted = ", ".join([*OWN_SCHEDULERS, *OTHER_SOLVERS])
    raise ValueError(f"{name[:80]!r} is no scheduler that is known here; known are {accepted}")
