"""The functions of :mod:`stepfusion.kernels.reference` in C++ for CPUs, with the same signatures and the same bits.

They are compiled on first use (:mod:`stepfusion.kernels.cpu.sampling_library`). Float64, inputs that require a
gradient and programs that are exported go to the reference. Norms are the network's, and stay with it.
"""

from stepfusion.kernels.cpu.forward import normal, q_posterior_mean_variance, q_sample
from stepfusion.kernels.cpu.pixels import to_uint8
from stepfusion.kernels.cpu.single_step import ddim_step, ddpm_step
from stepfusion.kernels.cpu.step import diffusion_step
from stepfusion.kernels.cpu.transition import transition_logprob
from stepfusion.kernels.reference import (
    add_bias,
    add_bias_doubled,
    add_bias_padded,
    add_group_norm_silu,
    add_layer_norm_modulate,
    add_projection_,
    add_projection_doubled,
    group_norm_silu,
    layer_norm_modulate,
)

__all__ = [
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
    "to_uint8",
    "transition_logprob",
]
