"""Engines as exports want them, and around what was exported."""

from __future__ import annotations

from typing import Any

import torch

import stepfusion as sf
from stepfusion.export.load import ExportedNetwork
from stepfusion.export.program import example_inputs


def cpu_engine(network: Any, **arguments: Any) -> sf.Engine:
    """An engine that is eager, unfused, and on a CPU."""
    given = {"device": "cpu", "dtype": "float32", "network": "eager", "backend": "reference", **arguments}
    return sf.Engine(network, sf.NoiseSchedule.cosine(), **{"prediction": "v_prediction", **given})


def back_in(network: ExportedNetwork) -> sf.Engine:
    """An engine around an exported network."""
    return sf.Engine(
        network,
        network.schedule,
        prediction=network.prediction,
        null_label=network.null_label,
        class_names=network.class_names,
        options=network.options,
        conditions=network.conditions,
        device=network.device,
        dtype=network.dtype,
    )


@torch.no_grad()
def difference(engine: sf.Engine, network: ExportedNetwork, batch: int) -> float:
    """The largest difference of one evaluation, as a fraction of the largest output where that is above 1."""
    example = example_inputs(engine, batch)
    plain = 2 if engine.num_classes is None else 3
    conditions = dict(zip((one.name for one in engine.spec.conditions), example[plain:], strict=True))
    expected = engine.network(*example[:plain], **conditions)
    return float(
        (network(*example[:plain], **conditions) - expected).abs().max() / max(1.0, float(expected.abs().max()))
    )
