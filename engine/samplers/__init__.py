"""Samplers as tables of rows: noise schedules, timesteps, and the functions that make a table."""

from stepfusion.samplers.tables import ddim, ddim_inversion, ddpm, dpmpp_2m, euler_ancestral

__all__ = ["ddim", "ddim_inversion", "ddpm", "dpmpp_2m", "euler_ancestral"]
