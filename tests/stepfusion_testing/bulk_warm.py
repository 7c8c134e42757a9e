"""Imported by the process that tests fork from: what PyTorch loads for the first image is loaded once."""

import torch

import stepfusion as sf
from stepfusion.commands import main as cli

torch.set_num_threads(1)
sf.Engine.from_pretrained("fashion-mnist", device="cpu").sample(labels=1, steps=1, progress=False)

__all__ = ["cli"]
