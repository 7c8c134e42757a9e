"""The public names of :mod:`stepfusion`, all of which are imported when the first of them is asked for."""

from __future__ import annotations

from stepfusion.checkpoints.diffusers_directory import load_pretrained
from stepfusion.checkpoints.edm import load_edm
from stepfusion.checkpoints.guided_diffusion import load_guided_diffusion
from stepfusion.checkpoints.save_directory import save_pretrained
from stepfusion.checkpoints.single_file import load_single_file
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
from stepfusion.lanes.request import Event, Request
from stepfusion.lanes.rollout import Rollout
from stepfusion.samplers import (
    consistency,
    ddim,
    ddim_inversion,
    ddpm,
    deis,
    dpmpp_1s,
    dpmpp_2m,
    dpmpp_2m_sde,
    dpmpp_2s,
    dpmpp_3m,
    dpmpp_3s,
    euler,
    euler_ancestral,
    flow_sde,
    heun,
    ipndm,
    lcm,
    plms,
    tcd,
    unipc,
)
from stepfusion.samplers.path import FlowPath, SigmaPath
from stepfusion.samplers.schedule import NoiseSchedule
from stepfusion.samplers.table import StepTable
from stepfusion.saved_images import save_images, to_pil
from stepfusion.warming import warm

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
    "Request",
    "Rollout",
    "SamplingCancelled",
    "SigmaPath",
    "StepTable",
    "bits_per_dimension",
    "consistency",
    "ddim",
    "ddim_inversion",
    "ddpm",
    "deis",
    "dpmpp_1s",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_2s",
    "dpmpp_3m",
    "dpmpp_3s",
    "euler",
    "euler_ancestral",
    "flow_sde",
    "heun",
    "ipndm",
    "lcm",
    "load_edm",
    "load_guided_diffusion",
    "load_pretrained",
    "load_single_file",
    "plms",
    "save_images",
    "save_pretrained",
    "slerp",
    "tcd",
    "to_pil",
    "unipc",
    "warm",
]
