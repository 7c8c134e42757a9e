"""What a training run is for: the averaged weights as a model directory."""

from __future__ import annotations

from pathlib import Path

import torch

from stepfusion.checkpoints.save_directory import save_pretrained
from stepfusion.training.trainer import Trainer


def export_model(trainer: Trainer, directory: Path) -> None:
    """Write the averaged weights as a diffusers directory in float16, replacing what is there."""
    dataset = trainer.dataset
    save_pretrained(
        directory,
        trainer.ema_network(),
        trainer.config.scheduler_config(),
        class_names=dataset.class_names,
        null_label=None if dataset.labels is None else dataset.num_classes,
        dtype=torch.float16,
        overwrite=True,
    )
