"""Tiny networks of diffusers and transformers, with random weights, and a tokenizer of a few words."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)


def randomised(network: Network, scale: float = 0.2) -> Network:
    """The network in eval mode and without gradients, with every weight random: norms and biases too."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return network.eval().requires_grad_(False)
