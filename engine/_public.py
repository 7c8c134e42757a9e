"""The public names of :mod:`stepfusion`, all of which are imported when the first of them is asked for."""

from __future__ import annotations

from stepfusion.checkpoints.diffusers_directory import load_pretrained
from stepfusion.checkpoints.guided_diffusion import load_guided_diffusion
from stepfusion.checkpoints.save_directory import save_pretrained
from stepfusion.diffusion.gaussian_diffusion import GaussianDiffusion
from stepfusion.diffusion.likelihood import bits_per_dimension
from stepfusion.engine import Engine
from stepfusion.errors import (
    BackendError,
    BulkError,
    CheckpointError,
    ExportError,
    NonFiniteError,
    SamplingCancelled,
)
from stepfusion.lanes.interpolation import slerp
from stepfusion.lanes.request import Event
from stepfusion.samplers import (
    ddim,
    ddim_inversion,
    ddpm,
    dpmpp_2m,
    euler_ancestral,
)
from stepfusion.samplers.schedule import NoiseSchedule
from stepfusion.samplers.table import StepTable

__all__ = [
    "BackendError",
    "BulkError",
    "CheckpointError",
    "Engine",
    "Event",
    "ExportError",
    "GaussianDiffusion",
    "NoiseSchedule",
    "NonFiniteError",
    "SamplingCancelled",
    "StepTable",
    "bits_per_dimension",
    "ddim",
    "ddim_inversion",
    "ddpm",
    "dpmpp_2m",
    "euler_ancestral",
    "load_guided_diffusion",
    "load_pretrained",
    "save_pretrained",
    "slerp",
]
