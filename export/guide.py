"""The page in every bundle that says how to run it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stepfusion.export.bundle import Manifest, Tensorspec
    from stepfusion.table import StepTable

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

_TICK = """\
```python
from stepfusion.export import read_bundle
from stepfusion.export.to_aoti import load_aoti, load_initial_noise

bundle = read_bundle("DIR")
x = load_initial_noise(bundle, "{device}")(seed, index)
tick = load_aoti(bundle, "{device}")
```"""


def guide(manifest: Manifest, table: StepTable | None, notes: str | None = None) -> str:
    """The page of a bundle, in Markdown; ``notes`` is what its export has to say."""
    rows = [_row("input", spec) for spec in manifest.inputs] + [_row("output", spec) for spec in manifest.outputs]
    names = [spec.name for spec in manifest.inputs]
    run = _RUN.get(manifest.format, f"See the documentation of the format {manifest.format}.").format(
        names=", ".join(names),
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
        else _TICK.format(device=manifest.device),
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
