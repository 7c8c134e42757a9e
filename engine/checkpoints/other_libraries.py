"""Checkpoints of other libraries, told apart by what they hold: none of them is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

# Names of weights, under any wrapper's prefix.
_BY_WEIGHTS = (
    (re.compile(r"(.*\.)?(init_conv\.weight|downs\.\d+\..*|mid_block1\..*|final_res_block\..*)"),
     "denoising-diffusion-pytorch (lucidrains)"),
    (re.compile(r"(.*\.)?model\.diffusion_model\..*"), "latent-diffusion (CompVis)"),
    (re.compile(r"(.*\.)?(map_layer0|enc\.\d+x\d+_.*|dec\.\d+x\d+_.*)"), "EDM (NVlabs)"),
    (re.compile(r"(.*\.)?all_modules\.\d+\..*"), "score_sde_pytorch"),
)  # fmt: skip
_NOT_HERE = {
    "EDM (NVlabs)": "which is read as a safetensors file (docs/edm.md)",
    "latent-diffusion (CompVis)": "which is read as a safetensors file (docs/models.md)",
}
_NESTED = ("model", "ema", "ema_model", "state_dict", "model_state_dict", "ema_state_dict", "net", "state")


def of_another_library(state: Mapping[Any, Any]) -> str | None:
    """What a state dict is that is no network of guided-diffusion or improved-diffusion; None if it may be one.

    Args:
        state: what a file of ``torch.save`` holds.
    """
    weights = [key for key, value in state.items() if isinstance(key, str) and isinstance(value, Tensor)]
    nested = {key: value for key, value in state.items() if key in _NESTED and isinstance(value, Mapping)}
    for value in nested.values():
        weights += [key for key in value if isinstance(key, str)]
    library = next((name for pattern, name in _BY_WEIGHTS if any(map(pattern.fullmatch, weights))), None)
    if library is not None:
        what = "a checkpoint" if not nested else f"a training state ({', '.join(map(str, list(state)[:6]))})"
        return f"is {what} of {library}, {_NOT_HERE.get(library, 'whose networks are not implemented')}"
    if "param_groups" in state:
        return "is the state of an optimizer, and of no network"
    if nested:
        names = ", ".join(map(str, list(state)[:6]))
        return f"is a training state ({names}), and not a network's state dict: save that alone"
    return None
