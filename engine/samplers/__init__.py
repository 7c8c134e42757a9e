"""Samplers as tables of rows: noise schedules, timesteps, and the functions that make a table."""

from stepfusion.samplers.ancestral import ddpm
from stepfusion.samplers.dpm_solver import dpmpp_2m
from stepfusion.samplers.euler import euler_ancestral
from stepfusion.samplers.implicit import ddim, ddim_inversion

__all__ = ["ddim", "ddim_inversion", "ddpm", "dpmpp_2m", "euler_ancestral"]
