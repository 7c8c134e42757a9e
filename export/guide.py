"""The page in every bundle that says how to run it."""

from __future__ import annotations

from stepfusion.export.manifest import INPUTS, NULL, Manifest, Tensorspec
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
{scaled}row = table["starts"][0]
while row >= 0:
    {run_to} = tick.run(None, {{"x": x, "row": numpy.full_like(index, row), **feed}})
    row = table["next_row"][row]  # x: float32 {image}, in the end images in [-1, 1]
```""",
    "aoti": """\
```python
import torch

tick, initial_noise = (torch._inductor.aoti_load_package(name) for name in ("model.pt2", "initial_noise.pt2"))
x = initial_noise(seed, index)  # int64 [B] each, on {device}: seeds, and the images' numbers{start_scale}
{returned} = tick({names})  # for row 0, then `next_row` of `table.json`, until that is -1
```

From C++: `torch::inductor::AOTIModelPackageLoader("model.pt2")`, from LibTorch's
`torch/csrc/inductor/aoti_package/model_package_loader.h`.""",
}
_CONDITION = {
    "labels": '    "labels": numpy.zeros_like(index),\n',
    "guidance": '    "guidance": numpy.full(len(index), 1.0, numpy.float32),  # 1: none\n',
    "told": '    "told": numpy.array(table["levels"]["told"], numpy.float32),\n',
    "in_scale": '    "in_scale": numpy.array(table["levels"]["in_scale"], numpy.float32),\n',
    "history": '    "history": numpy.zeros((len(index), SIZES), numpy.float32),  # what rows keep for later ones\n',
}

_TICK = """\
```python
from stepfusion.export import load_tick

loaded = load_tick("DIR")
x = loaded.sample(seed, index{given})  # every row of the table
x = loaded.start(seed, index)
{returned} = loaded.tick({names})  # one row
```"""
_ENGINE = """\
```python
import stepfusion as sf

engine = sf.Engine.from_exported("DIR"){sampled}
```"""
_SCALED = 'x *= numpy.float32(table["levels"]["start_scales"][0])\n'


def guide(manifest: Manifest, table: StepTable | None, notes: str | None = None) -> str:
    """The page of a bundle, in Markdown; ``notes`` is what its export has to say."""
    rows = [_row("input", spec) for spec in manifest.inputs] + [_row("output", spec) for spec in manifest.outputs]
    pages = _RUN if manifest.kind == "network" else _RUN_TICK
    words = _words(manifest)
    run = pages.get(manifest.format, f"See the documentation of the format {manifest.format}.").format(**words)
    parts = [
        f"# A {manifest.kind} as {manifest.format}",
        f"Written by stepfusion; a {manifest.dtype} network for {_device(manifest.device)}, images of "
        f"{'x'.join(map(str, manifest.model.get('shape', ())))}, prediction type "
        f"{manifest.model.get('prediction', 'unknown')}.",
        "| | name | dtype | shape |\n| --- | --- | --- | --- |\n" + "\n".join(rows),
        "## Run it",
        run,
        "Back in stepfusion, which verifies every hash in `manifest.json` first:",
        _ENGINE.format(**words) if manifest.kind == "network" else _TICK.format(**words),
    ]
    conditions = _conditions(manifest)
    if conditions:
        parts += ["## Conditions", _about_conditions(manifest, conditions)]
    if table is not None:
        parts += ["## The sampler", _sampler(table)]
    if notes:
        parts += ["## What was checked", notes]
    made = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    parts.append(f"Made with {made}.")
    return "\n\n".join(parts) + "\n"


def _words(manifest: Manifest) -> dict[str, object]:
    """What the pages leave open."""
    names = [spec.name for spec in manifest.inputs]
    low, _, high = manifest.model.get("batch") or (1, 4, 4)
    kept = "history" in names
    sizes = next((", ".join(map(str, spec.shape[1:])) for spec in manifest.inputs if spec.name == "history"), "")
    given = [f", {name}={name}" for name in ("labels", "guidance") if name in names]
    conditions = [spec.name for spec in _conditions(manifest)]
    if conditions:
        by_name = "{" + ", ".join(f'"{name}": {name}' for name in conditions) + "}"
        null = "{" + ", ".join(f'"{name}": {NULL}{name}' for name in conditions) + "}"
        given.append(f", conditions={by_name}" + (f", null_conditions={null}" if "guidance" in names else ""))
        label = "labels=labels, " if "labels" in names else ""
        sampled = f"\nimages = engine.sample({label}conditions={by_name})  # tensors of one image, or [n, ...] of n"
    return {
        "sampled": sampled if conditions else "",
        "names": ", ".join(names),
        "lanes": min(max(4, low), high),
        "image": str(list(manifest.inputs[0].shape)).replace("'", ""),
        "condition": "".join(
            _CONDITION.get(spec.name, "") or _fed(spec, manifest) for spec in manifest.inputs
        ).replace("SIZES", sizes),
        "feed": ", ".join(f'"{name}": {name}' for name in names),
        "device": manifest.device,
        "openvino_type": {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}.get(manifest.dtype, "f32"),
        "scaled": _SCALED if "told" in names else "",
        "start_scale": "; times `start_scales[0]` of `table.json`" if "told" in names else "",
        "returned": "x, history" if kept else "x",
        "run_to": 'x, feed["history"]' if kept else "(x,)",
        "given": "".join(given),
    }


def _conditions(manifest: Manifest) -> list[Tensorspec]:
    """The inputs that are conditions of the model, those that stand for none left out."""
    names = [one["name"] for one in manifest.model.get("conditions", ())]
    return [spec for spec in manifest.inputs if spec.name in names]


def _about_conditions(manifest: Manifest, conditions: list[Tensorspec]) -> str:
    """What an image is conditioned on, and what a consumer has to bring."""
    each = ", ".join(f"`{spec.name}`" for spec in conditions)
    text = (
        f"Each image has conditions of its own beside x: {each}, with the shapes above. They are tensors: what makes "
        "them of a prompt, a text encoder, is not in this bundle. They stay the same in all steps of an image."
    )
    if manifest.kind == "network":
        return f"{text} For guidance call the network again with what stands for none of them, as an empty prompt."
    if "guidance" in [spec.name for spec in manifest.inputs]:
        return f"{text} The inputs whose names begin with `{NULL}` stand for none of them, as an empty prompt does."
    return text


def _fed(spec: Tensorspec, manifest: Manifest) -> str:
    """A condition in the feed of a tick, zeros for a reader to replace; nothing for an input that is none."""
    if spec.name in INPUTS["tick"] or manifest.kind != "tick":
        return ""
    sizes = ", ".join(map(str, spec.shape[1:]))
    return f'    "{spec.name}": numpy.zeros((len(index), {sizes}), numpy.{spec.dtype}),  # put yours here\n'


def _sampler(table: StepTable) -> str:
    """What ``table.json`` holds, and what a row of it computes."""
    told = "what the network is told" if table.levels is None else "what keys the noise"
    levels = (
        ""
        if table.levels is None
        else "`levels` holds what the network is told at each row (`told`), what x is multiplied with before the "
        "network sees it (`in_scale`), and the standard deviation of the noise that the sampler starts from "
        "(`start_scales`). "
    )
    x, history = "next_x0 * x0 + next_x * x + next_out * out", ""
    if table.history:
        x += " + next_prev * h[0] + next_prev2 * h[1] + next_prev3 * h[2]"
        history = (
            "\n    h  = (keep_x * x + keep_x0 * x0, h[0], h[1])  unless keep_x and keep_x0 are 0, of x before the row"
            f"\n\nwith h the history, of which the tick keeps {table.history}."
        )
    return (
        f"`table.json` holds the {len(table)} rows of {table.name}, in float64: `coefficients` by `columns`, "
        f"`timesteps` ({told}), and `next_row` (-1: done). {levels}A clip of `null` is none. With x the "
        "state, out the network's output and z standard normal noise, a row computes\n\n"
        "    x0 = clamp(x0_x * x + x0_out * out, -clip, clip)\n"
        f"    x  = {x} + sigma * z{history}"
    )


def _row(role: str, spec: Tensorspec) -> str:
    return f"| {role} | `{spec.name}` | {spec.dtype} | {list(spec.shape)} |".replace("'", "")


def _device(device: str) -> str:
    return "any device" if device == "any" else device
