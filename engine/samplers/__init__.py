"""Samplers as tables of rows: paths, the levels they visit, and the functions that make a table."""

from stepfusion.samplers.adams import deis, ipndm, plms
from stepfusion.samplers.ancestral import ddpm
from stepfusion.samplers.dpm_solver import dpmpp_2m, dpmpp_2m_sde, dpmpp_3m
from stepfusion.samplers.euler_method import dpmpp_1s, euler, euler_ancestral
from stepfusion.samplers.few_step import consistency, lcm, tcd
from stepfusion.samplers.heun_method import heun
from stepfusion.samplers.implicit import ddim, ddim_inversion
from stepfusion.samplers.predictor_corrector import unipc
from stepfusion.samplers.reverse_sde import flow_sde
from stepfusion.samplers.singlestep import dpmpp_2s, dpmpp_3s

__all__ = [
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
    "plms",
    "tcd",
    "unipc",
]
