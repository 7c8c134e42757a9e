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
    dpmpp_1s,
    dpmpp_2m,
    dpmpp_2m_sde,
    dpmpp_3m,
    euler,
    euler_ancestral,
    heun,
)
from stepfusion.samplers.path import FlowPath, SigmaPath
from stepfusion.samplers.schedule import NoiseSchedule
from stepfusion.samplers.table import StepTable

__all__ = [
    "BackendError",
    "BulkError",
    "CheckpointError",
    "Engine",
    "Event",
    "ExportError",
    "FlowPath",
    "GaussianDiffusion",
    "NoiseSchedule",
    "NonFiniteError",
    "SamplingCancelled",
    "SigmaPath",
    "StepTable",
    "bits_per_dimension",
    "ddim",
    "ddim_inversion",
    "ddpm",
    "dpmpp_1s",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_3m",
    "euler",
    "euler_ancestral",
    "heun",
    "load_guided_diffusion",
    "load_pretrained",
    "save_pretrained",
    "slerp",
]
