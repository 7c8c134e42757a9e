"""The command-line flags of guided-diffusion and improved-diffusion, which say what a checkpoint of theirs is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from stepfusion import _checks
from stepfusion.checkpoints.json_file import read_object
from stepfusion.errors import CheckpointError
from stepfusion.files.strict_model import StrictModel
from stepfusion.networks import ADMUNetConfig

_ADM = {
    "attention_resolutions": "32,16,8",
    "class_cond": True,
    "learn_sigma": True,
    "noise_schedule": "linear",
    "num_channels": 256,
    "num_head_channels": 64,
    "num_res_blocks": 2,
    "resblock_updown": True,
    "use_scale_shift_norm": True,
}
_LSUN = {**_ADM, "image_size": 256, "class_cond": False, "dropout": 0.1}

#: The flags of the published models, by the names of their files (guided-diffusion's README).
PUBLISHED: dict[str, dict[str, Any]] = {
    "64x64_diffusion": {
        **_ADM,
        "image_size": 64,
        "num_channels": 192,
        "num_res_blocks": 3,
        "noise_schedule": "cosine",
        "use_new_attention_order": True,
        "dropout": 0.1,
    },
    "128x128_diffusion": {**_ADM, "image_size": 128, "num_head_channels": -1, "num_heads": 4},
    "256x256_diffusion": {**_ADM, "image_size": 256},
    "256x256_diffusion_uncond": {**_ADM, "image_size": 256, "class_cond": False},
    "512x512_diffusion": {**_ADM, "image_size": 512},
    "lsun_bedroom": _LSUN,
    "lsun_cat": _LSUN,
    "lsun_horse": _LSUN,
    "lsun_horse_nodropout": {**_LSUN, "dropout": 0.0},
}

#: Flags that only guided-diffusion's scripts have, and one that only improved-diffusion's have.
_OF_GUIDED = {"channel_mult", "num_head_channels", "resblock_updown", "use_fp16", "use_new_attention_order"}
_OF_IMPROVED = {"sigma_small"}

#: Flags of their training and sampling scripts, which change neither the network nor its diffusion.
_OF_SCRIPTS = (
    "use_checkpoint", "use_fp16", "use_kl", "rescale_learned_sigmas", "data_dir", "schedule_sampler", "lr",
    "weight_decay", "lr_anneal_steps", "batch_size", "microbatch", "ema_rate", "log_interval", "save_interval",
    "resume_checkpoint", "fp16_scale_growth", "num_samples", "model_path",
)  # fmt: skip

_SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}


class GuidedFlags(StrictModel):
    """The flags that say what the network is and what it was trained with; defaults are those of guided-diffusion."""

    image_size: int = 64
    in_channels: int = 3
    num_channels: int = 128
    num_res_blocks: int = 2
    num_heads: int = 4
    num_heads_upsample: int = -1
    num_head_channels: int = -1
    attention_resolutions: Any = "16,8"
    channel_mult: Any = ""
    dropout: float = 0.0
    class_cond: bool = False
    num_classes: int = 1000
    use_scale_shift_norm: bool = True
    resblock_updown: bool = False
    learn_sigma: bool = False
    use_new_attention_order: bool = False
    diffusion_steps: Annotated[int, Field(ge=1, le=1 << 20)] = 1000
    noise_schedule: Literal["linear", "cosine"] = "linear"
    predict_xstart: bool = False
    sigma_small: bool = False
    rescale_timesteps: bool = False
    clip_denoised: bool = True

    def network_config(self) -> ADMUNetConfig:
        """The network; attention resolutions are floored to levels as their code does (``image_size // size``)."""
        names = (
            "image_size", "in_channels", "num_channels", "num_res_blocks", "num_heads", "dropout", "class_cond",
            "num_classes", "use_scale_shift_norm", "resblock_updown", "learn_sigma",
        )  # fmt: skip
        return ADMUNetConfig(
            **{name: getattr(self, name) for name in names},
            attention_resolutions=_numbers("attention_resolutions", self.attention_resolutions),
            channel_mult=_numbers("channel_mult", self.channel_mult) or None,
            num_heads_upsample=None if self.num_heads_upsample == -1 else self.num_heads_upsample,
            num_head_channels=None if self.num_head_channels == -1 else self.num_head_channels,
            timestep_scale=1000 / self.diffusion_steps if self.rescale_timesteps else 1.0,
        )

    def scheduler_config(self) -> dict[str, Any]:
        """The diffusion, in the words of a diffusers scheduler config; "linear" scales its end points by 1000 / T."""
        steps, fixed = self.diffusion_steps, "fixed_small" if self.sigma_small else "fixed_large"
        ends = {"beta_start": 1000 / steps * 1e-4, "beta_end": 1000 / steps * 0.02}
        return {
            "_class_name": "DDPMScheduler",
            "num_train_timesteps": steps,
            "beta_schedule": _SCHEDULES[self.noise_schedule],
            **(ends if self.noise_schedule == "linear" else {}),
            "prediction_type": "sample" if self.predict_xstart else "epsilon",
            "variance_type": "learned_range" if self.learn_sigma else fixed,
            "clip_sample": self.clip_denoised,
        }


def read_flags(path: Path, model: str | None, given: Mapping[str, Any]) -> GuidedFlags:
    """The flags of a checkpoint: those given, on top of a published model's, or of those in a JSON file beside it.

    Raises:
        CheckpointError: there are none, one is unknown or of a wrong value, or one is needed that nobody gave.
        ValueError: ``model`` is not published.
    """
    described = _described(path, model, given)
    try:
        _check_sampling(described)
        read = {key: value for key, value in described.items() if key not in (*_OF_SCRIPTS, "timestep_respacing")}
        flags = GuidedFlags.of(read)
        if "rescale_timesteps" not in described and flags.diffusion_steps != 1000:
            return flags.model_copy(update={"rescale_timesteps": _default_rescaling(described, flags)})
        return flags
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"flags of {path}: {error}") from None


def _described(path: Path, model: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that someone gave."""
    beside = path.with_suffix(".json")
    if model is not None:
        base = PUBLISHED[_checks.choice("model", model, PUBLISHED)]
    elif beside.exists():
        base = read_object(beside)
    else:
        base = PUBLISHED.get(path.stem, {})
    described = {**base, **given}
    if not described:
        raise CheckpointError(
            f"{path} does not say its architecture: give the flags it is run with, or model= one of "
            f"{', '.join(PUBLISHED)}, or write them to {beside}"
        )
    return described


def _check_sampling(described: Mapping[str, Any]) -> None:
    """Refuse flags of other models, and of sampling, that are not taken from here."""
    respacing = described.get("timestep_respacing")
    if respacing not in (None, "", []):
        raise ValueError(
            f"timestep_respacing is {respacing!r}: leave it out here, and give it as timesteps= when images are made"
        )
    for name in ("large_size", "small_size"):
        if name in described:
            raise ValueError(f"{name} is a flag of the super-resolution model, which is not implemented")


def _default_rescaling(described: Mapping[str, Any], flags: GuidedFlags) -> bool:
    """``rescale_timesteps`` if it was not given: False for guided-diffusion, True for improved-diffusion."""
    if described.keys() & _OF_GUIDED:
        return False
    if described.keys() & _OF_IMPROVED:
        return True
    raise ValueError(
        f"rescale_timesteps is not given, and with diffusion_steps = {flags.diffusion_steps} it changes every image: "
        "improved-diffusion's scripts have True by default, guided-diffusion's False"
    )


def _numbers(name: str, value: Any) -> Any:
    """A list as their command line writes it, "32,16,8", or as Python or JSON does."""
    if not isinstance(value, str):
        return value
    try:
        numbers = [float(part) for part in value.split(",") if part]
    except ValueError:
        raise ValueError(f"{name} must be numbers with commas between them, got {value!r}") from None
    return tuple(int(number) if number.is_integer() else number for number in numbers)
