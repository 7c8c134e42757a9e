"""Samplers as tables of rows: paths, the levels they visit, and the functions that make a table."""

from stepfusion.samplers.ancestral import ddpm
from stepfusion.samplers.dpm_solver import dpmpp_2m, dpmpp_2m_sde, dpmpp_3m
from stepfusion.samplers.euler import dpmpp_1s, euler, euler_ancestral
from stepfusion.samplers.heun import heun
from stepfusion.samplers.implicit import ddim, ddim_inversion

__all__ = [
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
]
