"""Gaussian diffusion under the names of the literature: forward, reverse, losses, likelihood."""

from stepfusion.diffusion.gaussian_diffusion import GaussianDiffusion

__all__ = ["GaussianDiffusion"]
