# ruff: noqa: B023, E501
"""Records what a user can observe of an installed stepfusion, so that two revisions can be compared.

A change that only moves code must not change a bit of any image, a byte of any file, a signature, a help text or an
answer over HTTP. Bits of networks depend on the processor, so both recordings are made on one machine::

    python tests/behaviour/record.py record before.json      # with the environment of one revision
    python tests/behaviour/record.py record after.json       # with the environment of the other
    python tests/behaviour/record.py compare before.json after.json

The script uses public names alone: the Python API, the command line, and HTTP.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import stepfusion as sf

Recording = dict[str, Any]
SECTIONS: dict[str, Callable[[], Recording]] = {}
_VOLATILE = (
    "created",
    "seconds",
    "started",
    "finished",
    "host",
    "line_sha256",
    "images_per_second",
    "torch",
    "python",
    "elapsed",
    "images_per_s",
)


def section(function: Callable[[], Recording]) -> Callable[[], Recording]:
    """Enter a function into the recording under its name."""
    SECTIONS[function.__name__] = function
    return function


def digest(value: Any) -> Any:
    """A short digest of a tensor, an array or bytes, with its type and shape."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().contiguous()
        kind = f"{value.dtype} {list(value.shape)}"
        if value.dtype == torch.bfloat16:
            value = value.view(torch.int16)
        return f"{kind} {hashlib.sha256(value.numpy().tobytes()).hexdigest()[:16]}"
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)} {hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()[:16]}"
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()[:16]
    if isinstance(value, dict):
        return {str(name): digest(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [digest(entry) for entry in value]
    return value if isinstance(value, int | float | str | bool | type(None)) else str(value)


def attempt(call: Callable[[], Any]) -> Any:
    """What a call returns, as a digest, or the error that it raises."""
    try:
        return digest(call())
    except Exception as error:
        return f"{type(error).__name__}: {error}"


class Network(torch.nn.Module):
    """A small labelled network with parameters; its operations round alike on every machine."""

    num_classes = 4

    def __init__(self, channels: int = 1, *, learned: bool = False) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor([0.75, -0.25, 0.5, 0.125]))
        self.in_channels, self.sample_size, self.learned = channels, 8, learned

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        scale = (self.scale[labels] + timesteps / 1024).view(-1, 1, 1, 1).to(x.dtype)
        out = x * scale - x * x.abs() * 0.0625
        return torch.cat((out, (out * 4) % 2 - 1), 1) if self.learned else out


def engine(**arguments: Any) -> sf.Engine:
    """An engine of :class:`Network` on the CPU."""
    network = arguments.pop("network_module", None) or Network()
    given = {"device": "cpu", "null_label": 3, "class_names": ("Cat", "Dog", "Owl"), "batch": 4}
    schedule = arguments.pop("schedule", None) or sf.NoiseSchedule.linear(100)
    return sf.Engine(network, schedule, **{**given, **arguments})


def events(stream: Iterator[sf.Event]) -> list[Any]:
    """Every event of a stream."""
    return [[e.step, e.steps, e.timestep, list(e.images), digest(e.x), digest(e.x0)] for e in stream]


@section
def names() -> Recording:
    """Public names and signatures."""
    found: Recording = {}
    modules = {"sf": sf, "sf.kernels": sf.kernels, "sf.networks": sf.networks, "sf.serving": sf.serving}
    for prefix, module in modules.items():
        found[prefix] = list(module.__all__)
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isclass(value):
                for member, function in inspect.getmembers(value):
                    if not member.startswith("_") or member in ("__init__", "__call__"):
                        found[f"{prefix}.{name}.{member}"] = _signature(function)
            elif callable(value):
                found[f"{prefix}.{name}"] = _signature(value)
    return found


def _signature(value: Any) -> str:
    if isinstance(value, property):
        return "property"
    try:
        text = str(inspect.signature(value)) if callable(value) else type(value).__name__
    except (TypeError, ValueError):
        return "callable"
    return re.sub(r"stepfusion\.[a-z_.]*\.", "", text)  # where a class is defined is not part of the promise


@section
def tables() -> Recording:
    """Rows of every sampler."""
    schedules = {"linear": sf.NoiseSchedule.linear(1000), "cosine": sf.NoiseSchedule.cosine(400)}
    makers = {"ddim": sf.ddim, "ddpm": sf.ddpm, "dpmpp_2m": sf.dpmpp_2m, "euler_ancestral": sf.euler_ancestral}
    makers["ddim_inversion"] = sf.ddim_inversion
    found: Recording = {}
    for schedule_name, schedule in schedules.items():
        for name, make in makers.items():
            accepted = make.__kwdefaults__ or {}
            for prediction in ("epsilon", "sample", "v_prediction"):
                for steps in (1, 7, 50):
                    for extra in (
                        {},
                        {"compat": "diffusers"},
                        {"compat": "guided-diffusion"},
                        {"spacing": "trailing"},
                    ):
                        if set(extra) <= set(accepted):
                            key = f"{schedule_name} {name} {prediction} {steps} {extra}"
                            table = attempt_table(lambda: make(schedule, steps, prediction=prediction, **extra))
                            found[key] = table
    return found


def attempt_table(make: Callable[[], sf.StepTable]) -> Any:
    """A table's rows and texts."""

    def rows() -> Any:
        table = make()
        return [table.coefficients, table.timesteps, table.next_row, repr(table)]

    return attempt(rows)


@section
def sampling() -> Recording:
    """State bits of every way to sample."""
    found: Recording = {}
    x = torch.linspace(-0.9, 0.9, 3 * 64).reshape(3, 1, 8, 8)
    mask = (torch.arange(64).reshape(1, 1, 8, 8) % 3 == 0).float()
    for invariant in (False, True):
        e = engine(invariant=invariant)
        tag = "invariant " if invariant else ""
        for sampler in ("ddim", "ddpm", "dpmpp_2m", "euler_ancestral"):
            steps = 5
            common: dict[str, Any] = {"sampler": sampler, "steps": steps, "seed": 7}
            key = f"{tag}{sampler}"
            found[key] = attempt(lambda: e.sample(6, labels=[0, 1, 2, 3, 0, 1], **common))
            found[f"{key} guided"] = attempt(
                lambda: e.sample(5, labels=1, guidance=[1.0, 2.0, 0.0, 3.5, 1.0], **common)
            )
            found[f"{key} indices"] = attempt(lambda: e.sample(indices=[9, 2, 4_000_000_000], labels=0, **common))
            noise = torch.linspace(-2, 2, steps * 3 * 64).reshape(steps, 3, 1, 8, 8)
            found[f"{key} noise"] = attempt(lambda: e.sample(3, noise=noise, start=x, labels=2, **common))
            found[f"{key} mask"] = attempt(lambda: e.sample(3, image=x, mask=mask, labels=2, **common))
            found[f"{key} strength"] = attempt(lambda: e.sample(3, image=x, strength=0.5, mask=mask, **common))
            found[f"{key} stream"] = attempt(lambda: events(e.stream(6, every=2, labels=0, **common)))
            found[f"{key} generate"] = attempt(lambda: list(e.generate(9, labels=0, **common)))
        mixed = [e.table("ddpm", 3), e.table("ddim", 6, eta=1.0), e.table("dpmpp_2m", 4), e.table("ddim", 2)] * 2
        found[f"{tag}mixed"] = attempt(lambda: e.sample(8, mixed, labels=[0, 1, 2, 3] * 2, guidance=[1.0, 2.0] * 4))
        found[f"{tag}mixed stream"] = attempt(lambda: events(e.stream(8, mixed, labels=0, every=3)))
        found[f"{tag}encode"] = attempt(lambda: e.encode(x, steps=8, labels=1))
        found[f"{tag}reconstruct"] = attempt(lambda: e.reconstruct(x, steps=8, labels=1))
        found[f"{tag}interpolate"] = attempt(lambda: e.interpolate(1, 2, 5, steps=4, labels=0, guidance=2.0))
        found[f"{tag}explain"] = e.explain()
        found[f"{tag}repr"] = repr(e)
    return found


@section
def networks() -> Recording:
    """Learned variances, thresholds, predictions, dtypes, and the bundled models."""
    found: Recording = {}
    learned = engine(network_module=Network(learned=True))
    for variance in ("learned", "learned_range", "fixed_large"):
        found[variance] = attempt(lambda: learned.sample(3, learned.table("ddpm", 4, variance=variance), labels=0))
    threshold = engine(options={"threshold": 0.9, "sample_max_value": 2.0, "clip": None})
    found["threshold"] = attempt(lambda: threshold.sample(3, steps=4, labels=0))
    for prediction in ("sample", "v_prediction"):
        found[prediction] = attempt(lambda: engine(prediction=prediction).sample(3, steps=4, labels=0))
    for dtype in ("bfloat16", "float16"):
        found[dtype] = attempt(lambda: engine(dtype=dtype).sample(3, steps=4, labels=0))
    decoded = engine(decode=lambda z: z.repeat(1, 3, 2, 2) * 0.5)
    found["decode"] = attempt(lambda: list(decoded.generate(3, steps=4, labels=0)))
    for name in ("fashion-mnist", "garments-16"):
        e = sf.Engine.from_pretrained(name, device="cpu")
        found[name] = [e.explain(), repr(e), e.class_names, e.null_label, str(sorted(e.options.items()))]
        found[f"{name} images"] = attempt(lambda: e.sample(3, steps=3, labels=1, guidance=2.0))
        found[f"{name} pixels"] = attempt(lambda: e.to_uint8(e.sample(3, steps=3, labels=1)))
    e = sf.Engine.from_pretrained("garments-16", device="cpu")
    contexts = torch.tensor([[0.5, 0.5, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0, 0.0]])
    found["contexts"] = attempt(lambda: e.sample(2, steps=3, labels=contexts, guidance=2.0))
    return found


@section
def refusals() -> Recording:
    """Error texts of wrong arguments."""
    e = engine()
    wrong: list[dict[str, Any]] = [
        {"n": -1}, {"n": 1.5}, {"steps": 0}, {"steps": 101}, {"sampler": "dimm"}, {"eta": 2.0}, {"seed": -1},
        {"seed": "x"}, {"indices": 3}, {"indices": [1 << 32]}, {"labels": 4}, {"labels": [0, 1, 2]}, {"labels": 0.5},
        {"guidance": -1.0}, {"guidance": float("nan")}, {"start": torch.zeros(1, 2, 8, 8)}, {"start": "x"},
        {"image": torch.zeros(2, 1, 8, 8)}, {"strength": 0.5}, {"mask": torch.zeros(1, 1, 8, 8)},
        {"image": torch.zeros(2, 1, 8, 8), "strength": 0.0}, {"image": torch.zeros(2, 1, 8, 8), "mask": torch.full((1, 1, 8, 8), 0.5)},
        {"noise": torch.zeros(3, 2, 1, 8, 8)}, {"table": 3}, {"table": sf.ddim(sf.NoiseSchedule.cosine(100), 5)},
        {"table": sf.ddim(sf.NoiseSchedule.linear(100), 5, prediction="sample")}, {"nonfinite": "x"}, {"callback": 3},
        {"progress": "x"}, {"start": torch.full((2, 1, 8, 8), torch.nan)},
    ]  # fmt: skip
    found: Recording = {str(i): attempt(lambda: e.sample(**{"n": 2, **options})) for i, options in enumerate(wrong)}
    makers: list[dict[str, Any]] = [
        {"prediction": "eps"}, {"device": "tpu"}, {"dtype": "int8"}, {"backend": "cuda"}, {"backend": "triton"},
        {"network": "fast"}, {"network": "graph"}, {"batch": 0}, {"invariant": 1}, {"null_label": 9},
        {"class_names": "abc"}, {"class_names": ["a"]}, {"options": {"x": 1}}, {"options": 3}, {"decode": 3},
        {"shape": ()}, {"shape": "x"}, {"num_classes": 0},
    ]  # fmt: skip
    found |= {f"engine {i}": attempt(lambda: repr(engine(**options))) for i, options in enumerate(makers)}
    found["nan"] = attempt(
        lambda: engine(network_module=lambda x, t, y: x * torch.nan, shape=(1, 8, 8), num_classes=4).sample(
            3, steps=4, labels=0
        )
    )
    found["cancel"] = attempt(lambda: e.sample(3, steps=4, labels=0, callback=lambda event: event.step < 2))
    found["missing"] = attempt(lambda: sf.Engine.from_pretrained("nowhere"))
    return found


@section
def diffusion() -> Recording:
    """The literature's methods."""
    found: Recording = {}
    x = torch.linspace(-1, 1, 4 * 3 * 16).reshape(4, 3, 4, 4)
    z = x.flip(0) * 1.5
    t = torch.tensor([0, 3, 50, 98])
    schedule = sf.NoiseSchedule.linear(100)

    def model(x: torch.Tensor, t: torch.Tensor, **_: Any) -> torch.Tensor:
        return x * 0.5 + t.view(-1, 1, 1, 1) / 1024

    def learned(x: torch.Tensor, t: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.cat((model(x, t), (x * 4) % 2 - 1), 1)

    for prediction in ("epsilon", "sample", "v_prediction"):
        for variance in ("fixed_small", "fixed_large", "learned_range"):
            network = learned if variance == "learned_range" else model
            d = sf.GaussianDiffusion(schedule, prediction=prediction, variance=variance)
            key = f"{prediction} {variance}"
            found[f"{key} q_sample"] = attempt(lambda: d.q_sample(x, t, z))
            found[f"{key} q_posterior"] = attempt(lambda: d.q_posterior_mean_variance(x, z, t))
            found[f"{key} p_mean_variance"] = attempt(lambda: d.p_mean_variance(network, x, t))
            found[f"{key} p_sample"] = attempt(lambda: d.p_sample(network, x, t, noise=z))
            found[f"{key} ddim_sample"] = attempt(lambda: d.ddim_sample(network, x, t, noise=z, eta=0.5))
            found[f"{key} reverse"] = attempt(lambda: d.ddim_reverse_sample(network, x, t))
            for loss in ("l2", "l1", "huber"):
                found[f"{key} {loss}"] = attempt(lambda: d.training_losses(network, x, t, noise=z, loss=loss))
            found[f"{key} bpd"] = attempt(lambda: d.calc_bpd_loop(network, x, seed=1))
            found[f"{key} p_loop"] = attempt(lambda: d.p_sample_loop(network, (2, 3, 4, 4), seed=1))
            found[f"{key} ddim_loop"] = attempt(
                lambda: d.ddim_sample_loop(network, (2, 3, 4, 4), seed=1, timesteps="ddim10")
            )
    return found


@section
def command_line() -> Recording:
    """Help texts, exit statuses, messages, and the files that commands write."""
    found: Recording = {}
    for command in ("", "sample", "generate", "serve", "show", "show schedule", "show steps", "show noise", "show context",
                    "interpolate", "reconstruct", "encode", "env", "train", "export", "bench", "bench compare",
                    "bench suite", "bench quality"):  # fmt: skip
        found[f"{command} --help"] = run(*command.split(), "--help")
    for text in ("", "smaple", "sample", "sample nowhere", "sample fashion-mnist -n 0", "sample fashion-mnist --labels Shoe",
                 "sample fashion-mnist --sampler dpmpp_2m --eta 1", "sample fashion-mnist --steps 5 --timesteps 5",
                 "sample fashion-mnist --steps 0", "sample fashion-mnist --device tpu", "generate fashion-mnist -n 3",
                 "generate fashion-mnist --out o -n 0", "generate --verify nowhere", "serve fashion-mnist --local --port 99999",
                 "encode fashion-mnist nowhere.png", "interpolate fashion-mnist --seeds 1", "train nowhere --out r",
                 "export fashion-mnist --format x --out d", "show schedule --image nowhere.png",
                 "bench quality nowhere", "reconstruct fashion-mnist nowhere.png", "env --device tpu"):  # fmt: skip
        found[text] = run(*text.split())
    quick = ("--steps", "2", "--quiet", "--device", "cpu")
    found["sample"] = run("sample", "fashion-mnist", "-n", "4", *quick)
    found["sample one"] = run("sample", "fashion-mnist", "-n", "1", "--labels", "Bag", *quick)
    found["sample single"] = run("sample", "fashion-mnist", "-n", "2", "--single", "--guidance", "2", *quick)
    found["sample gif"] = run("sample", "fashion-mnist", "-n", "2", "--animate", "a.gif", *quick)
    for shards in ("webdataset", "png", "npz"):
        arguments = ("generate", "fashion-mnist", "-n", "10", "--unit", "4", "--steps", "2", "--format", shards)
        found[f"generate {shards}"] = run(
            *arguments, "--out", "o", "--quiet", "--npz", then=("generate", "--verify", "o")
        )
    pictures = run_pictures()
    return found | pictures


def run_pictures() -> Recording:
    """Commands that read a picture."""
    from PIL import Image

    found: Recording = {}
    with tempfile.TemporaryDirectory() as folder:
        grey = np.arange(28 * 28, dtype=np.uint32).reshape(28, 28) * 255 // (28 * 28)
        Image.fromarray(grey.astype(np.uint8)).save(Path(folder) / "grey.png")
        picture = str(Path(folder) / "grey.png")
        quick = ("--device", "cpu", "--quiet")
        found["encode"] = run("encode", "fashion-mnist", picture, "--steps", "2", "--noise", "n.safetensors", *quick)
        found["reconstruct"] = run("reconstruct", "fashion-mnist", picture, "--steps", "2", *quick)
        found["interpolate"] = run("interpolate", "fashion-mnist", "--seeds", "1,2", "--steps", "2", *quick)
        found["from picture"] = run(
            "sample", "fashion-mnist", "-n", "2", "--image", picture, "--strength", "0.5", "--steps", "4", *quick
        )
    return {name: json.loads(json.dumps(value).replace(folder, "FOLDER")) for name, value in found.items()}


def run(*arguments: str, then: tuple[str, ...] = ()) -> Recording:
    """One command in an empty folder: its status, what it says, and the files that it leaves."""
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "COLUMNS": "120", "STEPFUSION_CACHE": str(Path(folder) / ".cache"), "NO_COLOR": "1"}
        said = []
        for command in (arguments, then) if then else (arguments,):
            done = subprocess.run(
                [sys.executable, "-P", "-m", "stepfusion", *command],
                cwd=folder,
                env=env,
                capture_output=True,
                text=True,
            )
            said.append([done.returncode, timeless(done.stdout), timeless(done.stderr)])
        files = sorted(p for p in Path(folder).rglob("*") if p.is_file() and ".cache" not in p.parts)
        return {"said": said, "files": {str(p.relative_to(folder)): content(p) for p in files}}


def timeless(text: str) -> str:
    """A text without durations and rates."""
    text = re.sub(r'"(elapsed_s|images_per_s)": [0-9.e-]+', "TIME", text)
    return re.sub(r"\d+(\.\d+)?(e[+-]?\d+)? ?(s|ms|min|images/s|/s)\b", "TIME", text)


def content(path: Path) -> Any:
    """A file's digest; JSON without what differs between any two runs."""
    if path.suffix in (".json", ".jsonl"):
        lines = [path.read_text()] if path.suffix == ".json" else sorted(path.read_text().splitlines())
        return [without_volatile(json.loads(line)) for line in lines]
    return hashlib.sha256(path.read_bytes()).hexdigest()


def without_volatile(value: Any) -> Any:
    """JSON without times."""
    if isinstance(value, dict):
        return {k: without_volatile(v) for k, v in value.items() if not any(word in k for word in _VOLATILE)}
    return [without_volatile(v) for v in value] if isinstance(value, list) else value


@section
def serving() -> Recording:
    """The asynchronous engine, and answers over HTTP."""
    found: Recording = {}

    async def many() -> None:
        async with sf.serving.AsyncEngine(engine(invariant=True)) as service:
            results = await asyncio.gather(
                service.generate(3, steps=4, seed=1, labels=[0, 1, 2]),
                service.generate(5, steps=7, seed=2, labels=3, guidance=2.0),
                service.generate(2, sampler="dpmpp_2m", steps=5, labels=1, output="uint8"),
                service.generate(1, sampler="ddpm", steps=9, labels=1, indices=[70]),
            )
            found["results"] = [digest(result.images) for result in results]
            stream = [e async for e in service.stream(2, steps=5, labels=0, every=2)]
            found["stream"] = [
                [e.step, e.steps, e.timestep, list(e.images), digest(e.x)]
                if isinstance(e, sf.Event)
                else digest(e.images)
                for e in stream
            ]
            for i, options in enumerate(
                ({"n": -1}, {"steps": 0}, {"output": "x"}, {"priority": 2000}, {"deadline": -1})
            ):
                found[f"refused {i}"] = attempt(lambda: service.submit(**{"labels": 0, **options}))

    asyncio.run(many())
    return found | http()


def http() -> Recording:
    """What a server in a process of its own answers."""
    found: Recording = {}
    command = [sys.executable, "-P", "-m", "stepfusion", "serve", "fashion-mnist", "--local", "--port", "0",
               "--device", "cpu", "--invariant", "--lanes", "4", "--exit-with-parent"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1].rstrip("/")
        ready(url)
        bodies: list[Any] = [
            {"steps": 2, "labels": 1}, {"n": 3, "steps": 2, "seed": 4, "labels": ["Bag", "Coat", None], "guidance": 2.0},
            {"n": 2, "steps": 2, "format": "npz"}, {"sampler": "dpmpp_2m", "steps": 3, "indices": [5, 6]}, {"n": 0},
            {"steps": 100000}, {"sampler": "x"}, {"labels": "Shoe"}, {"labels": 99}, {"seed": -1}, {"eta": 1, "sampler": "ddpm"},
            {"steps": 3, "timesteps": [3, 2, 1]}, {"timesteps": [1, 2]}, {"unknown": 1}, [], "x", {"priority": 5000},
            {"deadline_s": 1e-9}, {"n": 65}, {"n": 2, "seed": [1]}, {"guidance": -1}, {"format": "gif"},
        ]  # fmt: skip
        for i, body in enumerate(bodies):
            found[f"generate {i}"] = answer(url + "/v1/generate", body)
        found["stream"] = answer(url + "/v1/stream", {"steps": 4, "labels": 2, "every": 2})
        found["stream refused"] = answer(url + "/v1/stream", {"steps": 4, "every": 0})
        for path in ("/v1/model", "/openapi.json", "/healthz", "/readyz", "/", "/nowhere", "/v1/generate"):
            found[f"GET {path}"] = answer(url + path, None)
        process.terminate()
        found["status"] = process.wait(30)
    return found


def ready(url: str) -> None:
    """Wait until a server is warm."""
    while True:
        try:
            urllib.request.urlopen(url + "/readyz").read()
            return
        except urllib.error.HTTPError:
            pass


def answer(url: str, body: Any) -> Any:
    """Status, headers that matter, and the body of an answer; a digest where it is no text."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"} if data else {})
    try:
        with urllib.request.urlopen(request) as response:
            status, headers, content = response.status, response.headers, response.read()
    except urllib.error.HTTPError as error:
        status, headers, content = error.code, error.headers, error.read()
    kept = {
        name: headers[name]
        for name in ("Content-Type", "Content-Disposition", "Cache-Control", "Allow")
        if headers[name]
    }
    if kept.get("Content-Type") == "application/x-npz":
        with np.load(io.BytesIO(content)) as arrays:
            return [status, kept, digest(dict(arrays))]
    is_text = kept.get("Content-Type", "").startswith(("application/json", "text/"))
    text = (
        re.sub(
            r'"(queued|running|total|tick_seconds|quiet_seconds|\w*_s)": ?[0-9.e-]+',
            "TIME",
            timeless(content.decode()),
        )
        if is_text
        else ""
    )
    return [status, kept, text if is_text else digest(content)]


@section
def training() -> Recording:
    """A short training run, and what it writes."""
    found: Recording = {}
    data = Path(__file__).parents[1] / "data" / "fashion-mnist-slice"
    common = ("--steps", "3", "--batch-size", "4", "--features", "16", "--norm-groups", "8", "--head-dim", "8", "--device", "cpu",
              "--precision", "float32", "--log-every", "1", "--out", "run")  # fmt: skip
    for name in ("unet2d", "context"):
        found[name] = run("train", str(data), "--network", name, *common)
    return found


@section
def exporting() -> Recording:
    """Exported bundles."""
    return {
        "onnx": run("export", "garments-16", "--format", "onnx", "--out", "bundle"),
        "refused": run("export", "garments-16", "--format", "tensorrt", "--out", "bundle"),
    }


def compare(before: Recording, after: Recording, path: str = "") -> list[str]:
    """Every place at which two recordings differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        found = []
        for name in sorted({*before, *after}):
            found += compare(before.get(name, "absent"), after.get(name, "absent"), f"{path}/{name}")
        return found
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return [
            line for i, (a, b) in enumerate(zip(before, after, strict=True)) for line in compare(a, b, f"{path}/{i}")
        ]
    return [] if before == after else [f"{path}\n  before: {str(before)[:2000]}\n  after:  {str(after)[:2000]}"]


def main(arguments: list[str]) -> int:
    """Record or compare."""
    if arguments[:1] == ["record"] and len(arguments) >= 2:
        torch.set_num_threads(1)
        chosen = arguments[2:] or list(SECTIONS)
        recording = {name: SECTIONS[name]() for name in chosen}
        Path(arguments[1]).write_text(json.dumps(recording, indent=1, sort_keys=True))
        print({name: len(found) for name, found in recording.items()})
        return 0
    if arguments[:1] == ["compare"] and len(arguments) == 3:
        differences = compare(*(json.loads(Path(name).read_text()) for name in arguments[1:]))
        print("\n".join(differences) or "equal")
        return 1 if differences else 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
