"""Triton kernels, their launchers, and the eager PyTorch reference of each.

The functions here are the fused ones; :mod:`stepfusion.kernels.reference` has the same names in eager PyTorch.
This package knows tensors only.

Kernels have no gradient, but for :func:`transition_logprob`. If an input requires one, a function here runs as its
reference, through autograd, with the same result to rounding.
"""

from stepfusion.kernels import reference
from stepfusion.kernels.add_bias import add_bias, add_bias_doubled, add_bias_padded
from stepfusion.kernels.add_group_norm import add_group_norm_silu
from stepfusion.kernels.add_projection import add_projection_, add_projection_doubled
from stepfusion.kernels.backend import BackendError
from stepfusion.kernels.coefficients import COLUMNS
from stepfusion.kernels.group_norm import group_norm_silu
from stepfusion.kernels.layer_norm_modulate import add_layer_norm_modulate, layer_norm_modulate
from stepfusion.kernels.philox import STREAM_FORWARD, STREAM_INITIAL, STREAM_STEP, normal
from stepfusion.kernels.posterior import q_posterior_mean_variance
from stepfusion.kernels.q_sample import q_sample
from stepfusion.kernels.single_step import ddim_step, ddpm_step
from stepfusion.kernels.step import diffusion_step
from stepfusion.kernels.step_reference import FINITE, PARKED
from stepfusion.kernels.to_uint8 import to_uint8
from stepfusion.kernels.transition import transition_logprob
from stepfusion.kernels.transition_reference import transitions_of

__all__ = [
    "COLUMNS",
    "FINITE",
    "PARKED",
    "STREAM_FORWARD",
    "STREAM_INITIAL",
    "STREAM_STEP",
    "BackendError",
    "add_bias",
    "add_bias_doubled",
    "add_bias_padded",
    "add_group_norm_silu",
    "add_layer_norm_modulate",
    "add_projection_",
    "add_projection_doubled",
    "ddim_step",
    "ddpm_step",
    "diffusion_step",
    "group_norm_silu",
    "layer_norm_modulate",
    "normal",
    "q_posterior_mean_variance",
    "q_sample",
    "reference",
    "to_uint8",
    "transition_logprob",
    "transitions_of",
]
