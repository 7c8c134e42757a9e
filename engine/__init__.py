"""stepfusion: fast, exact, reproducible sampling of diffusion models.

Every sampler is a table; one fused kernel walks it. Start with :class:`Engine`::

    import stepfusion as sf

    engine = sf.Engine.from_pretrained("fashion-mnist")
    images = engine.sample(64, steps=50, labels=[i % 10 for i in range(64)])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stepfusion import kernels, latents, networks, serving
    from stepfusion._public import (
        BackendError,
        BulkError,
        CheckpointError,
        Engine,
        Event,
        ExportError,
        FlowPath,
        GaussianDiffusion,
        NoiseSchedule,
        NonFiniteError,
        Request,
        Rollout,
        SamplingCancelled,
        SigmaPath,
        StepTable,
        bits_per_dimension,
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
        load_edm,
        load_guided_diffusion,
        load_pretrained,
        load_single_file,
        plms,
        save_images,
        save_pretrained,
        slerp,
        tcd,
        to_pil,
        unipc,
        warm,
    )

__version__ = "0.1.0"

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
    "kernels",
    "latents",
    "lcm",
    "load_edm",
    "load_guided_diffusion",
    "load_pretrained",
    "load_single_file",
    "networks",
    "plms",
    "save_images",
    "save_pretrained",
    "serving",
    "slerp",
    "tcd",
    "to_pil",
    "unipc",
    "warm",
]


if not TYPE_CHECKING:  # a type checker is to see the names above, and no others

    def __getattr__(name: str) -> Any:
        """A public name, imported when it is first asked for.

        So the command line can choose how threads wait before PyTorch starts them, and answers ``--help`` at once.
        """
        if name == "kernels":
            import stepfusion.kernels as value
        elif name == "latents":
            import stepfusion.latents as value
        elif name == "networks":
            import stepfusion.networks as value
        elif name == "serving":
            import stepfusion.serving as value
        elif name in __all__:
            import stepfusion._public as public

            value = getattr(public, name)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
