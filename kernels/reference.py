"""The kernels' twins in eager PyTorch, under the kernels' names: the path of CPUs, the oracle of tests.

Same signatures, same results within :mod:`stepfusion.kernels.tolerance`; float64 as well.
"""

from stepfusion.kernels.add_bias import add_bias_doubled_reference as add_bias_doubled
from stepfusion.kernels.add_bias import add_bias_padded_reference as add_bias_padded
from stepfusion.kernels.add_bias import add_bias_reference as add_bias
from stepfusion.kernels.add_projection import add_projection_doubled_reference as add_projection_doubled
from stepfusion.kernels.add_projection import add_projection_reference_ as add_projection_
from stepfusion.kernels.group_norm_reference import add_group_norm_silu_reference as add_group_norm_silu
from stepfusion.kernels.group_norm_reference import group_norm_silu_reference as group_norm_silu
from stepfusion.kernels.layer_norm_reference import add_layer_norm_modulate_reference as add_layer_norm_modulate
from stepfusion.kernels.layer_norm_reference import layer_norm_modulate_reference as layer_norm_modulate
from stepfusion.kernels.philox import normal_reference as normal
from stepfusion.kernels.posterior import q_posterior_mean_variance_reference as q_posterior_mean_variance
from stepfusion.kernels.q_sample import q_sample_reference as q_sample
from stepfusion.kernels.single_step import ddim_step_reference as ddim_step
from stepfusion.kernels.single_step import ddpm_step_reference as ddpm_step
from stepfusion.kernels.step_reference import diffusion_step_reference as diffusion_step
from stepfusion.kernels.to_uint8 import to_uint8_reference as to_uint8
from stepfusion.kernels.transition_reference import transition_logprob_reference as transition_logprob

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
