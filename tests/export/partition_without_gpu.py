"""Run torch-tensorrt's real partitioner over stepfusion's networks on a machine without a GPU, as a script.

What is stubbed is what asks for the device: the package asks at import, and cannot be imported otherwise. Lowering,
converter look-up and partitioning are the package's own. Nothing is built and nothing is run: what this shows is that
every operator has a converter and that the network becomes one engine.

Prints a line of JSON for each "model/dtype" that is given as an argument.
"""

from __future__ import annotations

import contextlib
import json
import sys
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from test_to_onnx import published

import stepfusion as sf
from stepfusion.networks import ContextUNet
from stepfusion_testing.condition_networks import condition_engine
from stepfusion_testing.exports import cpu_engine

GPU = SimpleNamespace(name="a stub", major=8, minor=9, multi_processor_count=64, total_memory=24 << 30)
LOOK_UPS: dict[str, Any] = {
    "current_device": lambda: 0,
    "device_count": lambda: 1,
    "set_device": lambda device: None,
    "get_device_properties": lambda *_: GPU,
    "get_device_capability": lambda *_: (GPU.major, GPU.minor),
    "mem_get_info": lambda *_: (GPU.total_memory, GPU.total_memory),
    "empty_cache": lambda: None,
}


def engine_for(name: str, dtype: str) -> sf.Engine:
    """The engine of a bundled model, or of of a published, a tiny or a ContextUNet with random weights."""
    if name == "context-unet":
        return cpu_engine(ContextUNet(), prediction="epsilon", dtype=dtype)
    if name.startswith("tiny "):
        return condition_engine(name.removeprefix("tiny "), dtype=dtype)
    if name.startswith("google"):
        return cpu_engine(published(name).network, prediction="epsilon", dtype=dtype)
    return sf.Engine.from_pretrained(name, device="cpu", dtype=dtype, backend="reference", network="eager")


def main() -> None:
    """Partition every network that the arguments name."""
    torch.set_num_threads(1)
    with contextlib.ExitStack() as stubs:
        for name, look_up in LOOK_UPS.items():
            stubs.enter_context(mock.patch.object(torch.cuda, name, look_up))
        stubs.enter_context(mock.patch.object(torch._C, "_CudaDeviceProperties", SimpleNamespace, create=True))
        from stepfusion.export.batch import DYNAMIC
        from stepfusion.export.program import export_program
        from stepfusion.export.to_torch_tensorrt import dry_run

        for argument in sys.argv[1:]:
            name, _, dtype = argument.rpartition("/")
            engine = engine_for(name, dtype)
            coverage = dry_run(export_program(engine), engine, DYNAMIC)
            print(json.dumps({"network": argument, **vars(coverage)}), flush=True)


if __name__ == "__main__":
    main()
