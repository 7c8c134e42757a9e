"""stepfusion: fast, exact, reproducible sampling of diffusion models.

Every sampler is a table; one fused kernel walks it. Start with :class:`Engine`::

    import stepfusion as sf

    engine = sf.Engine.from_pretrained("fashion-mnist")
    images = engine.sample(64, steps=50, labels=[i % 10 for i in range(64)])
"""

from stepfusion import kernels, networks, serving
from stepfusion.checkpoints.diffusers_directory import load_pretrained
from stepfusion.checkpoints.guided_diffusion import load_guided_diffusion
from stepfusion.checkpoints.save_directory import save_pretrained
from stepfusion.diffusion.gaussian_diffusion import GaussianDiffusion
from stepfusion.diffusion.likelihood import bits_per_dimension
from stepfusion.engine import Engine
from stepfusion.errors import BackendError, BulkError, CheckpointError, ExportError, NonFiniteError, SamplingCancelled
from stepfusion.lanes.interpolation import slerp
from stepfusion.lanes.request import Event
from stepfusion.samplers import ddim, ddim_inversion, ddpm, dpmpp_2m, euler_ancestral
from stepfusion.samplers.schedule import NoiseSchedule
from stepfusion.samplers.table import StepTable

__version__ = "0.1.0"

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
    "kernels",
    "load_guided_diffusion",
    "load_pretrained",
    "networks",
    "save_pretrained",
    "serving",
    "slerp",
]
