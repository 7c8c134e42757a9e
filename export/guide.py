"""The page in every bundle that says how to run it."""

from __future__ import annotations

from stepfusion.export.manifest import Manifest, Tensorspec
from stepfusion.samplers.table import StepTable

_RUN = {
    "onnx": """\
```python
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
(out,) = session.run(None, {{{feed}}})  # NumPy arrays
```""",
    "openvino": """\
```python
import openvino

model = openvino.compile_model("model.xml", "CPU", {{"INFERENCE_PRECISION_HINT": "{openvino_type}"}})
out = model([{names}])[0]  # NumPy arrays
```""",
    "tensorrt": """\
```python
import tensorrt

engine = tensorrt.Runtime(tensorrt.Logger()).deserialize_cuda_engine(open("model.engine", "rb").read())
context = engine.create_execution_context()  # set_input_shape, set_tensor_address, execute_async_v3
```""",
    "tensorrt-rtx": """\
```python
import tensorrt_rtx

engine = tensorrt_rtx.Runtime(tensorrt_rtx.Logger()).deserialize_cuda_engine(open("model.engine", "rb").read())
context = engine.create_execution_context()  # set_input_shape, set_tensor_address, execute_async_v3
```""",
    "torch-tensorrt": """\
```python
import torch, torch_tensorrt

module = torch_tensorrt.load("model.ep").module()
out = module({names})  # tensors on the GPU
```""",
    "aoti": """\
```python
import torch

function = torch._inductor.aoti_load_package("model.pt2")
out = function({names})  # tensors on {device}
```

From C++: `torch::inductor::AOTIModelPackageLoader("model.pt2")`, from LibTorch's
`torch/csrc/inductor/aoti_package/model_package_loader.h`.""",
    "triton-server": """\
    docker run --gpus all --rm -p 8000:8000 -v "$PWD/models:/models" nvcr.io/nvidia/tritonserver:<release>-py3 \\
        tritonserver --model-repository=/models

The model's name and its tensors are in `models/*/config.pbtxt`.""",
}

_RUN_TICK = {
    "onnx": """\
```python
import json

import numpy
import onnxruntime

tick, initial_noise = (
    onnxruntime.InferenceSession(name, providers=["CPUExecutionProvider"])
    for name in ("model.onnx", "initial_noise.onnx")
)
table = json.load(open("table.json"))
index = numpy.arange({lanes})  # the images' numbers
seed = numpy.full_like(index, 0)
feed = {{
    "coefficients": numpy.array(
        [[numpy.inf if value is None else value for value in row] for row in table["coefficients"]], numpy.float32
    ),
    "timesteps": numpy.array(table["timesteps"]),
    "seed": seed,
    "index": index,
{condition}}}
(x,) = initial_noise.run(None, {{"seed": seed, "index": index}})
row = table["starts"][0]
while row >= 0:
    (x,) = tick.run(None, {{"x": x, "row": numpy.full_like(index, row), **feed}})
    row = table["next_row"][row]  # x: float32 {image}, in the end images in [-1, 1]
```""",
    "aoti": """\
```python
import torch

tick, initial_noise = (torch._inductor.aoti_load_package(name) for name in ("model.pt2", "initial_noise.pt2"))
x = initial_noise(seed, index)  # int64 [B] each, on {device}: seeds, and the images' numbers
x = tick({names})  # for row 0, then `next_row` of `table.json`, until that is -1
```

From C++: `torch::inductor::AOTIModelPackageLoader("model.pt2")`, from LibTorch's
`torch/csrc/inductor/aoti_package/model_package_loader.h`.""",
}
_CONDITION = {
    "labels": '    "labels": numpy.zeros_like(index),\n',
    "guidance": '    "guidance": numpy.full(len(index), 1.0, numpy.float32),  # 1: none\n',
}

_TICK = """\
```python
from stepfusion.export import load_tick

loaded = load_tick("DIR")
x = loaded.initial_noise(seed, index)
x = loaded.tick({names})
```"""


def guide(manifest: Manifest, table: StepTable | None, notes: str | None = None) -> str:
    """The page of a bundle, in Markdown; ``notes`` is what its export has to say."""
    rows = [_row("input", spec) for spec in manifest.inputs] + [_row("output", spec) for spec in manifest.outputs]
    names = [spec.name for spec in manifest.inputs]
    pages = _RUN if manifest.kind == "network" else _RUN_TICK
    image = list(manifest.inputs[0].shape)
    low, _, high = manifest.model.get("batch") or (1, 4, 4)
    run = pages.get(manifest.format, f"See the documentation of the format {manifest.format}.").format(
        names=", ".join(names),
        lanes=min(max(4, low), high),
        image=str(image).replace("'", ""),
        condition="".join(_CONDITION.get(name, "") for name in names),
        feed=", ".join(f'"{name}": {name}' for name in names),
        device=manifest.device,
        openvino_type={"float32": "f32", "float16": "f16", "bfloat16": "bf16"}.get(manifest.dtype, "f32"),
    )
    parts = [
        f"# A {manifest.kind} as {manifest.format}",
        f"Written by stepfusion; a {manifest.dtype} network for {_device(manifest.device)}, images of "
        f"{'x'.join(map(str, manifest.model.get('shape', ())))}, prediction type "
        f"{manifest.model.get('prediction', 'unknown')}.",
        "| | name | dtype | shape |\n| --- | --- | --- | --- |\n" + "\n".join(rows),
        "## Run it",
        run,
        "Back in stepfusion, which verifies every hash in `manifest.json` first:",
        '```python\nimport stepfusion as sf\n\nengine = sf.Engine.from_exported("DIR")\n```'
        if manifest.kind == "network"
        else _TICK.format(names=", ".join(names)),
    ]
    if table is not None:
        parts += [
            "## The sampler",
            f"`table.json` holds the {len(table)} rows of {table.name}, in float64: `coefficients` by `columns`, "
            "`timesteps` (what the network is told), and `next_row` (-1: done). A clip of `null` is none. With x the "
            "state, out the network's output and z standard normal noise, a row computes\n\n"
            "    x0 = clamp(x0_x * x + x0_out * out, -clip, clip)\n"
            "    x  = next_x0 * x0 + next_x * x + next_out * out + sigma * z",
        ]
    if notes:
        parts += ["## What was checked", notes]
    made = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    parts.append(f"Made with {made}.")
    return "\n\n".join(parts) + "\n"


def _row(role: str, spec: Tensorspec) -> str:
    return f"| {role} | `{spec.name}` | {spec.dtype} | {list(spec.shape)} |".replace("'", "")


def _device(device: str) -> str:
    return "any device" if device == "any" else device
