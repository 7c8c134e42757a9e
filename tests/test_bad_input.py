"""Bad input: what each mistake raises, to the letter, before any work is done and with nothing left behind."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import pickle
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import stepfusion as sf
from stepfusion import kernels
from stepfusion.checkpoints.bundled import bundled_models
from stepfusion.commands.main import main
from stepfusion.files import atomic as files
from stepfusion.kernels import reference
from stepfusion.networks import UNet2D
from stepfusion_testing.tiny_model import SCHEDULER, save_tiny_model, tiny_network

NAN, INF = math.nan, math.inf
DEVICES = ", ".join(("cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))))
MODELS = ", ".join(bundled_models()) or "none"
WEIGHTS = Path("model/unet/diffusion_pytorch_model.safetensors")

CALLS: list[str] = []  # who called a network


def network(x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
    """A network that is never to be called."""
    CALLS.append("network")
    return x


LINEAR, COSINE = sf.NoiseSchedule.linear(100), sf.NoiseSchedule.cosine(100)
TABLE = sf.ddim(LINEAR, 4)
CPU = {"device": "cpu", "backend": "reference"}
ENGINE = sf.Engine(network, LINEAR, shape=(1, 4, 4), num_classes=3, null_label=2, **CPU)
NO_NULL = sf.Engine(network, LINEAR, shape=(1, 4, 4), num_classes=3, **CPU)
PLAIN = sf.Engine(network, LINEAR, shape=(1, 4, 4), **CPU)
DIFFUSION = sf.GaussianDiffusion(LINEAR, backend="reference")
X = torch.zeros(2, 1, 4, 4)  # two images
T = torch.zeros(2, dtype=torch.int64)
ROWS = torch.from_numpy(TABLE.coefficients.copy()).float()
TIMES = torch.from_numpy(TABLE.timesteps.copy())
LEVELS = torch.full((100,), 0.5)
NEXT = np.array([1, -1])


def engine(**arguments: Any) -> sf.Engine:
    """An engine made with ``arguments``."""
    return sf.Engine(network, LINEAR, **{"shape": (1, 4, 4), "num_classes": 3, **arguments})


def config_with(**changes: object) -> Callable[[], None]:
    """Change the network's config in the model directory."""
    return lambda: edit_json("model/unet/config.json", changes)


def scheduler_with(**changes: object) -> Callable[[], None]:
    """Change the scheduler's config in the model directory."""
    return lambda: edit_json("model/scheduler/scheduler_config.json", changes)


def facts_with(**changes: object) -> Callable[[], None]:
    """Change ``stepfusion.json`` in the model directory."""
    return lambda: edit_json("model/stepfusion.json", changes)


def edit_json(path: str, changes: dict[str, object]) -> None:
    """Write some keys of a JSON object anew."""
    Path(path).write_text(json.dumps({**json.loads(Path(path).read_text()), **changes}))


def weights_with(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[], None]:
    """Change the state dict in the model directory."""

    def prepare() -> None:
        state = load_file(WEIGHTS)
        edit(state)
        save_file(state, WEIGHTS)

    return prepare


def write(path: str | Path, data: bytes) -> Callable[[], object]:
    """Write a file of the model directory anew."""
    return lambda: Path(path).write_bytes(data)


def truncate() -> None:
    """Cut the weights in half."""
    WEIGHTS.write_bytes(WEIGHTS.read_bytes()[: WEIGHTS.stat().st_size // 2])


class Code:
    """Unpickled, it leaves a file behind."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch executed",)


def pickled_code(archive: bool) -> Callable[[], None]:
    """Put pickled code in the place of the weights: in a torch.save archive, or bare."""

    def prepare() -> None:
        WEIGHTS.unlink()
        path = WEIGHTS.with_suffix(".bin")
        torch.save({"conv_in.weight": Code()}, path) if archive else path.write_bytes(pickle.dumps(Code()))

    return prepare


@dataclass(frozen=True)
class Case:
    """``call`` raises ``error`` with ``message``, exactly; ``prepare`` spoils the model directory first."""

    name: str
    call: Callable[..., object]
    error: type[Exception]
    message: str
    prepare: Callable[[], object] | None = None


# fmt: off
SCHEDULES = [
    Case("betas: none", lambda: sf.NoiseSchedule([]),
         ValueError, "betas must be one-dimensional with 1 to 1048576 entries, got shape (0,)"),
    Case("betas: two dimensions", lambda: sf.NoiseSchedule([[0.1]]),
         ValueError, "betas must be one-dimensional with 1 to 1048576 entries, got shape (1, 1)"),
    Case("betas: NaN", lambda: sf.NoiseSchedule([0.1, NAN]),
         ValueError, "betas must lie in (0, 1), the last one in (0, 1], got betas[1] = nan"),
    Case("betas: above 1", lambda: sf.NoiseSchedule([0.1, 1.5]),
         ValueError, "betas must lie in (0, 1), the last one in (0, 1], got betas[1] = 1.5"),
    Case("betas: 0", lambda: sf.NoiseSchedule([0.0, 0.1]),
         ValueError, "betas must lie in (0, 1), the last one in (0, 1], got betas[0] = 0.0"),
    Case("timesteps: 0", lambda: sf.NoiseSchedule.linear(0),
         ValueError, "timesteps must be in [1, 1048576], got 0"),
    Case("timesteps: bool", lambda: sf.NoiseSchedule.linear(True),
         TypeError, "timesteps must be an integer, got True"),
    Case("timesteps: float", lambda: sf.NoiseSchedule.linear(10.0),
         TypeError, "timesteps must be an integer, got 10.0"),
    Case("timesteps: 10**9", lambda: sf.NoiseSchedule.linear(10**9),
         ValueError, "timesteps must be in [1, 1048576], got 1000000000"),
    Case("timesteps: too few for scaled betas", lambda: sf.NoiseSchedule.linear(10),
         ValueError,
         "timesteps = 10 scales beta_end to 2, which must stay below 1: use more timesteps or scaled=False"),
    Case("beta_start above beta_end", lambda: sf.NoiseSchedule.linear(100, 0.5, 0.1),
         ValueError, "beta_start must not exceed beta_end, got 0.5 and 0.1"),
    Case("beta_start: NaN", lambda: sf.NoiseSchedule.linear(100, beta_start=NAN),
         ValueError, "beta_start must be a finite number in (0, 1], got nan"),
    Case("cosine s: negative", lambda: sf.NoiseSchedule.cosine(100, s=-1),
         ValueError, "s must be a finite number in [0, 1], got -1"),
    Case("schedule config: unknown key", lambda: sf.NoiseSchedule.from_config({"beta_shedule": "linear"}),
         ValueError, "scheduler config has unknown keys: 'beta_shedule'"),
    Case("schedule config: unknown schedule", lambda: sf.NoiseSchedule.from_config({"beta_schedule": "wavy"}),
         ValueError,
         "beta_schedule must be one of 'linear', 'scaled_linear', 'squaredcos_cap_v2', 'sigmoid', got 'wavy'"),
    Case("schedule config: no dict", lambda: sf.NoiseSchedule.from_config(["linear"]),
         TypeError, "config must be a dict, got list"),
    Case("schedule config: timesteps as text",
         lambda: sf.NoiseSchedule.from_config({"num_train_timesteps": "1000"}),
         TypeError, "num_train_timesteps must be an integer, got '1000'"),
]

TABLES = [
    Case("steps above T", lambda: sf.ddim(LINEAR, 101), ValueError, "steps must be in [1, 100], got 101"),
    Case("steps: 0", lambda: sf.ddim(LINEAR, 0), ValueError, "steps must be in [1, 100], got 0"),
    Case("steps: bool", lambda: sf.ddpm(LINEAR, True), TypeError, "steps must be an integer, got True"),
    Case("steps: float", lambda: sf.ddpm(LINEAR, 2.5), TypeError, "steps must be an integer, got 2.5"),
    Case("schedule by its name", lambda: sf.ddim("linear", 4),
         TypeError, "schedule must be a NoiseSchedule, got str"),
    Case("eta: NaN", lambda: sf.ddim(LINEAR, 4, eta=NAN),
         ValueError, "eta must be a finite number in [0, 1], got nan"),
    Case("eta: negative", lambda: sf.ddim(LINEAR, 4, eta=-1),
         ValueError, "eta must be a finite number in [0, 1], got -1"),
    Case("eta: text", lambda: sf.ddim(LINEAR, 4, eta="1"), TypeError, "eta must be a number, got '1'"),
    Case("timesteps: duplicate", lambda: sf.ddim(LINEAR, timesteps=[5, 5]),
         ValueError, "timesteps must be strictly decreasing, got 5 followed by 5"),
    Case("timesteps: increasing", lambda: sf.ddpm(LINEAR, timesteps=[1, 5]),
         ValueError, "timesteps must be strictly decreasing, got 1 followed by 5"),
    Case("timesteps: T", lambda: sf.ddim(LINEAR, timesteps=[100, 5]),
         ValueError, "timesteps must lie in [0, 99], got 5 to 100"),
    Case("timesteps: negative", lambda: sf.ddpm(LINEAR, timesteps=[5, -1]),
         ValueError, "timesteps must lie in [0, 99], got -1 to 5"),
    Case("timesteps: empty", lambda: sf.ddim(LINEAR, timesteps=[]),
         ValueError, "timesteps must be a non-empty list of integers, got shape [0]"),
    Case("timesteps: bools", lambda: sf.ddim(LINEAR, timesteps=[True, False]),
         TypeError, "timesteps must be integers, got bool"),
    Case("timesteps: floats", lambda: sf.ddim(LINEAR, timesteps=[5.0, 1.0]),
         TypeError, "timesteps must be integers, got float64"),
    Case("timesteps: nested", lambda: sf.ddim(LINEAR, timesteps=[[5]]),
         ValueError, "timesteps must be a non-empty list of integers, got shape [1, 1]"),
    Case("steps and timesteps", lambda: sf.ddim(LINEAR, 4, timesteps=[5]),
         ValueError, "steps and timesteps exclude each other, got both"),
    Case("spacing: unknown", lambda: sf.ddim(LINEAR, 4, spacing="even"),
         ValueError, "spacing must be one of 'leading', 'trailing', 'linspace', 'karras', got 'even'"),
    Case("prediction: unknown", lambda: sf.ddim(LINEAR, 4, prediction="eps"),
         ValueError, "prediction must be one of 'epsilon', 'sample', 'v_prediction', got 'eps'"),
    Case("clip: 0", lambda: sf.ddim(LINEAR, 4, clip=0),
         ValueError, "clip must be a finite number in (0, inf], got 0"),
    Case("clip: NaN", lambda: sf.ddpm(LINEAR, 4, clip=NAN),
         ValueError, "clip must be a finite number in (0, inf], got nan"),
    Case("clip: bool", lambda: sf.ddpm(LINEAR, 4, clip=True), TypeError, "clip must be a number, got True"),
    Case("variance: unknown", lambda: sf.ddpm(LINEAR, 4, variance="small"),
         ValueError, "variance must be one of 'fixed_small', 'fixed_large', 'learned', 'learned_range', got 'small'"),
    Case("compat: unknown", lambda: sf.ddim(LINEAR, 4, compat="k-diffusion"),
         ValueError, "compat must be None, 'diffusers' or 'guided-diffusion', got 'k-diffusion'"),
    Case("final_alpha_cumprod: NaN", lambda: sf.ddim(LINEAR, 4, final_alpha_cumprod=NAN),
         ValueError, "final_alpha_cumprod must be a finite number in [0.999, 1], got nan"),
    Case("rederive_eps: integer", lambda: sf.ddim(LINEAR, 4, rederive_eps=1),
         TypeError, "rederive_eps must be True or False, got 1"),
    Case("steps_offset: out of the schedule", lambda: sf.ddim(LINEAR, 4, steps_offset=99),
         ValueError, "steps_offset = 99 with steps = 4 reaches timestep 174, beyond T - 1 = 99"),
    Case("epsilon at zero SNR", lambda: sf.ddim(LINEAR.rescale_zero_terminal_snr(), 4, spacing="trailing"),
         ValueError,
         "prediction 'epsilon' cannot start at timestep 99, where the signal is zero (zero terminal SNR): "
        "use a network with prediction 'v_prediction' or 'sample'"),
    Case("evaluate_at: unknown", lambda: sf.ddim_inversion(LINEAR, 4, evaluate_at="middle"),
         ValueError, "evaluate_at must be one of 'source', 'target', got 'middle'"),
    Case("coefficients: NaN",
         lambda: sf.StepTable("mine", "epsilon", LINEAR, np.full((2, 14), NAN), np.array([9, 0]), NEXT),
         ValueError,
         "coefficient x0_x of row 0 (timestep 9) is nan, which no network output can be multiplied with"),
    Case("coefficients: infinite",
         lambda: sf.StepTable("mine", "epsilon", LINEAR, np.full((2, 14), INF), np.array([9, 0]), NEXT),
         ValueError,
         "coefficient x0_x of row 0 (timestep 9) is inf, which no network output can be multiplied with"),
    Case("coefficients: 8 columns",
         lambda: sf.StepTable("mine", "epsilon", LINEAR, np.zeros((2, 8)), np.array([9, 0]), NEXT),
         ValueError, "a table of 2 rows must have coefficients [2, 14] and next_row [2], got [2, 8] and [2]"),
    Case("concatenate: nothing", lambda: sf.StepTable.concatenate([]),
         ValueError, "concatenate needs at least one table, got none"),
    Case("concatenate: two schedules", lambda: sf.StepTable.concatenate([TABLE, sf.ddim(COSINE, 4)]),
         ValueError,
         "tables must share a schedule, got NoiseSchedule(linear, 100 timesteps, abar 0.999000 to 2.04e-05) "
        "and NoiseSchedule(cosine, 100 timesteps, abar 0.999369 to 2.43e-07)"),
    Case("concatenate: two predictions",
         lambda: sf.StepTable.concatenate([TABLE, sf.ddim(LINEAR, 4, prediction="sample")]),
         ValueError, "tables must share a prediction type, got 'epsilon' and 'sample'"),
]

ENGINES = [
    Case("model: not callable", lambda: sf.Engine(None, LINEAR), TypeError, "model must be callable, got NoneType"),
    Case("schedule: text", lambda: sf.Engine(network, "linear"),
         TypeError, "schedule must be a NoiseSchedule, got str"),
    Case("shape: missing", lambda: sf.Engine(network, LINEAR),
         ValueError, "shape is needed, e.g. (3, 32, 32): the model has no in_channels and sample_size"),
    Case("shape: negative", lambda: engine(shape=(1, -4, 4)), ValueError, "shape must be in [1, 1048576], got -4"),
    Case("shape: text", lambda: engine(shape="1x4x4"),
         TypeError, "shape must be a sequence of sizes, e.g. (3, 32, 32), got '1x4x4'"),
    Case("engine prediction: unknown", lambda: engine(prediction="x0"),
         ValueError, "prediction must be one of 'epsilon', 'sample', 'v_prediction', got 'x0'"),
    Case("null_label: out of range", lambda: engine(null_label=3),
         ValueError, "null_label must be in [0, 2], got 3"),
    Case("num_classes: 0", lambda: engine(num_classes=0),
         ValueError, "num_classes must be in [1, 2147483648], got 0"),
    Case("device: unknown", lambda: engine(device="quantum"),
         ValueError, f"device must be 'auto' or one that PyTorch finds here ({DEVICES}), got 'quantum'"),
    Case("device: not here", lambda: engine(device="cuda:99"),
         ValueError, f"device must be 'auto' or one that PyTorch finds here ({DEVICES}), got 'cuda:99'"),
    Case("device: no memory", lambda: engine(device="meta"),
         ValueError, f"device must be 'auto' or one that PyTorch finds here ({DEVICES}), got 'meta'"),
    Case("dtype: float64", lambda: engine(dtype="float64"),
         ValueError, "dtype must be one of 'auto', 'float32', 'bfloat16', 'float16', got 'float64'"),
    Case("dtype: int8", lambda: engine(dtype=torch.int8),
         ValueError, "dtype must be one of 'auto', 'float32', 'bfloat16', 'float16', got 'int8'"),
    Case("backend: unknown", lambda: engine(backend="cuda"),
         ValueError, "backend must be one of 'auto', 'triton', 'reference', got 'cuda'"),
    Case("network: unknown", lambda: engine(network="fast"),
         ValueError, "network must be one of 'auto', 'eager', 'compile', 'graph', 'compile+graph', 'openvino', got "
         "'fast'"),
    Case("network: a graph without CUDA", lambda: engine(network="graph"),
         sf.BackendError, "network='graph' cannot run: CUDA graphs need a CUDA device, and the device is cpu; use "
         "network='eager'"),
    Case("network: a compiled graph without CUDA", lambda: engine(network="compile+graph"),
         sf.BackendError, "network='compile+graph' cannot run: CUDA graphs need a CUDA device, and the device is "
         "cpu; use network='compile'"),
    Case("batch: 0", lambda: engine(batch=0), ValueError, "batch must be in [1, 1048576], got 0"),
    Case("batch: bool", lambda: engine(batch=True), TypeError, "batch must be an integer, got True"),
    Case("invariant: integer", lambda: engine(invariant=1), TypeError, "invariant must be True or False, got 1"),
    Case("sampler: unknown", lambda: ENGINE.table("euler"),
         ValueError, "sampler must be one of 'ddim', 'ddpm', 'dpmpp_2m', 'euler_ancestral', "
         "'ddim_inversion', got 'euler'"),
    Case("option: unknown", lambda: ENGINE.table("ddim", 4, variance="fixed_small"),
         TypeError, "sampler 'ddim' takes no option 'variance'; it takes clip, compat, eta, final_alpha_cumprod, "
        "prediction, rederive_eps, sample_max_value, spacing, steps_offset, threshold, timesteps"),
    Case("n: negative", lambda: ENGINE.sample(-1), ValueError, "n must be in [0, 2147483648], got -1"),
    Case("n: bool", lambda: ENGINE.sample(True), TypeError, "n must be an integer, got True"),
    Case("n: float", lambda: ENGINE.sample(2.5), TypeError, "n must be an integer, got 2.5"),
    Case("n: text", lambda: ENGINE.sample("2"), TypeError, "n must be an integer, got '2'"),
    Case("n: 2**40", lambda: ENGINE.sample(2**40), ValueError, "n must be in [0, 2147483648], got 1099511627776"),
    Case("sample: steps above T", lambda: ENGINE.sample(2, steps=101),
         ValueError, "steps must be in [1, 100], got 101"),
    Case("sample: sampler unknown", lambda: ENGINE.sample(2, sampler="plms"),
         ValueError, "sampler must be one of 'ddim', 'ddpm', 'dpmpp_2m', 'euler_ancestral', "
         "'ddim_inversion', got 'plms'"),
    Case("sample: eta of ddpm", lambda: ENGINE.sample(2, sampler="ddpm", eta=1.0),
         TypeError,
         "sampler 'ddpm' takes no option 'eta'; it takes clip, compat, prediction, sample_max_value, spacing, "
         "steps_offset, threshold, timesteps, v_posterior, variance"),
    Case("sample: table and sampler", lambda: ENGINE.sample(2, TABLE, sampler="ddpm"),
         ValueError, "table and sampler exclude each other, got both"),
    Case("sample: callback is no function", lambda: ENGINE.sample(2, TABLE, callback=5),
         TypeError, "callback must be callable, got 5"),
    Case("sample: one index for two images", lambda: ENGINE.sample(2, TABLE, indices=5),
         TypeError, "indices must be a sequence, one for each image, got 5"),
    Case("sample: start with NaN", lambda: ENGINE.sample(2, TABLE, start=X + NAN),
         ValueError, "start must be finite, got NaN or infinite values"),
    Case("sample: start on meta", lambda: ENGINE.sample(2, TABLE, start=X.to("meta")),
         ValueError, "start must hold values, got a tensor on the meta device"),
    Case("engine: class names as text",
         lambda: sf.Engine(network, LINEAR, shape=(1, 4, 4), num_classes=3, class_names="abc"),
         TypeError, "class_names must be a sequence of names, got 'abc'"),
    Case("engine: too few class names",
         lambda: sf.Engine(network, LINEAR, shape=(1, 4, 4), num_classes=3, class_names=["a"]),
         ValueError, "class_names must name each of the 3 classes, got 1 names"),
    Case("engine: null label without classes", lambda: sf.Engine(network, LINEAR, shape=(1, 4, 4), null_label=0),
         ValueError, "null_label is 0, and the model takes no labels"),
    Case("engine: options as a list", lambda: sf.Engine(network, LINEAR, shape=(1, 4, 4), options=["clip"]),
         TypeError, "options must be a dict, got list"),
    Case("table: timesteps beyond T",
         lambda: sf.StepTable("t", "sample", LINEAR, np.zeros((2, 14)), np.array([100, 0]), NEXT),
         ValueError, "a table must have rows with timesteps in [0, 99], got [100, 0]"),
    Case("table: next row beyond the end",
         lambda: sf.StepTable("t", "sample", LINEAR, np.zeros((2, 14)), np.array([9, 0]), NEXT + 2),
         ValueError, "next_row must lie in [-1, 1], got [3, 1]"),
    Case("table: prediction unknown",
         lambda: sf.StepTable("t", "noise", LINEAR, np.zeros((2, 14)), np.array([9, 0]), NEXT),
         ValueError, "prediction must be one of 'epsilon', 'sample', 'v_prediction', got 'noise'"),
    Case("loop: shape is a number", lambda: DIFFUSION.p_sample_loop(network, 5),
         TypeError, "shape must be a tuple of sizes, e.g. (4, 3, 32, 32), got 5"),
    Case("loss: gamma below zero", lambda: DIFFUSION.training_losses(network, X, T, noise=X, min_snr_gamma=-1.0),
         ValueError, "min_snr_gamma must be a finite number in (0, inf], got -1.0"),
    Case("p_mean_variance: t out of range", lambda: DIFFUSION.p_mean_variance(network, X, T + 100),
         ValueError, "t must lie in [0, 99], got 100 to 100"),
    Case("sample: table and steps", lambda: ENGINE.sample(2, TABLE, steps=4),
         ValueError, "table and steps exclude each other, got both"),
    Case("table: text", lambda: ENGINE.sample(2, "ddim"),
         TypeError, "table must be a StepTable or a list of them, got str"),
    Case("table: one of two", lambda: ENGINE.sample(2, [TABLE]),
         ValueError, "table must be one StepTable or one for each of the 2 images, got 1"),
    Case("table: other schedule", lambda: ENGINE.sample(2, sf.ddim(COSINE, 4)),
         ValueError,
         "table is for NoiseSchedule(cosine, 100 timesteps, abar 0.999369 to 2.43e-07), and the network's is"
        " NoiseSchedule(linear, 100 timesteps, abar 0.999000 to 2.04e-05)"),
    Case("table: other prediction", lambda: ENGINE.sample(2, sf.ddim(LINEAR, 4, prediction="v_prediction")),
         ValueError, "table is for prediction 'v_prediction', and the network's is 'epsilon'"),
    Case("table: joined", lambda: ENGINE.sample(2, sf.StepTable.concatenate([TABLE, TABLE])),
         ValueError, "table holds 2 samplers: give a list with one table for each image"),
    Case("seed: negative", lambda: ENGINE.sample(2, TABLE, seed=-1),
         ValueError, "seed must be in [0, 18446744073709551615], got -1"),
    Case("seed: bool", lambda: ENGINE.sample(2, TABLE, seed=True), TypeError, "seed must be an integer, got True"),
    Case("seed: float", lambda: ENGINE.sample(2, TABLE, seed=1.0), TypeError, "seed must be an integer, got 1.0"),
    Case("seed: 2**64", lambda: ENGINE.sample(2, TABLE, seed=2**64),
         ValueError, "seed must be in [0, 18446744073709551615], got 18446744073709551616"),
    Case("seed: None", lambda: ENGINE.sample(2, TABLE, seed=None), TypeError, "seed must be an integer, got None"),
    Case("seeds: three for two", lambda: ENGINE.sample(2, TABLE, seed=[1, 2, 3]),
         ValueError, "seed must be one value or one for each of the 2 images, got 3"),
    Case("seeds: one negative", lambda: ENGINE.sample(2, TABLE, seed=[1, -2]),
         ValueError, "seed must be in [0, 18446744073709551615], got -2"),
    Case("indices: one for two", lambda: ENGINE.sample(2, TABLE, indices=[0]),
         ValueError, "indices must be one value or one for each of the 2 images, got 1"),
    Case("indices: 2**32", lambda: ENGINE.sample(2, TABLE, indices=[0, 2**32]),
         ValueError, "indices must be in [0, 4294967295], got 4294967296"),
    Case("labels: out of range", lambda: ENGINE.sample(2, TABLE, labels=3),
         ValueError, "labels must be in [0, 2], got 3"),
    Case("labels: negative", lambda: ENGINE.sample(2, TABLE, labels=-1),
         ValueError, "labels must be in [0, 2], got -1"),
    Case("labels: bool", lambda: ENGINE.sample(2, TABLE, labels=[0, True]),
         TypeError, "labels must be an integer, got True"),
    Case("labels: one for two", lambda: ENGINE.sample(2, TABLE, labels=[0]),
         ValueError, "labels must be one value or one for each of the 2 images, got 1"),
    Case("labels: float tensor", lambda: ENGINE.sample(2, TABLE, labels=torch.zeros(2)),
         TypeError, "labels must be integers, got torch.float32"),
    Case("labels: matrix", lambda: ENGINE.sample(2, TABLE, labels=torch.zeros(2, 2, dtype=torch.int64)),
         TypeError, "labels must be an integer, got [0, 0]"),
    Case("labels: by name", lambda: ENGINE.sample(2, TABLE, labels="cat"),
         TypeError, "labels must be an integer, got 'cat'"),
    Case("labels: not taken", lambda: PLAIN.sample(2, TABLE, labels=0),
         ValueError, "labels were given, and this engine's model takes none"),
    Case("labels: needed", lambda: NO_NULL.sample(2, TABLE),
         ValueError, "labels are needed: the model has 3 classes and no null label"),
    Case("guidance: no null label", lambda: NO_NULL.sample(2, TABLE, labels=0, guidance=2.0),
         ValueError, "guidance needs a null label, and this engine's model has none"),
    Case("guidance: NaN", lambda: ENGINE.sample(2, TABLE, guidance=NAN),
         ValueError, "guidance must be a finite number in [0, 10000], got nan"),
    Case("guidance: negative", lambda: ENGINE.sample(2, TABLE, guidance=-1),
         ValueError, "guidance must be a finite number in [0, 10000], got -1"),
    Case("guidance: bool", lambda: ENGINE.sample(2, TABLE, guidance=True),
         TypeError, "guidance must be a number, got True"),
    Case("start: one for two", lambda: ENGINE.sample(2, TABLE, start=X[:1]),
         ValueError, "start must have shape [2, 1, 4, 4], got [1, 1, 4, 4]"),
    Case("start: integers", lambda: ENGINE.sample(2, TABLE, start=X.long()),
         TypeError, "start must be a floating-point tensor, got torch.int64"),
    Case("start: NumPy", lambda: ENGINE.sample(2, TABLE, start=X.numpy()),
         TypeError, "start must be a floating-point tensor, got ndarray"),
    Case("noise: three steps for four", lambda: ENGINE.sample(2, TABLE, noise=torch.zeros(3, 2, 1, 4, 4)),
         ValueError, "noise must have shape [4, 2, 1, 4, 4], got [3, 2, 1, 4, 4]"),
    Case("noise: list", lambda: ENGINE.sample(2, TABLE, noise=[1.0]),
         TypeError, "noise must be a floating-point tensor, got list"),
    Case("progress: text", lambda: ENGINE.sample(2, TABLE, progress="yes"),
         TypeError, "progress must be True or False, got 'yes'"),
    Case("nonfinite: unknown", lambda: ENGINE.sample(2, TABLE, nonfinite="ignore"),
         ValueError, "nonfinite must be one of 'raise', 'keep', got 'ignore'"),
    Case("stream: every 0", lambda: ENGINE.stream(2, TABLE, every=0),
         ValueError, "every must be in [1, 2147483648], got 0"),
    Case("stream: seed", lambda: ENGINE.stream(2, TABLE, seed=2**64),
         ValueError, "seed must be in [0, 18446744073709551615], got 18446744073709551616"),
    Case("encode: wrong shape", lambda: ENGINE.encode(X[:, :, :3], steps=4),
         ValueError, "x must have shape [2, 1, 4, 4], got [2, 1, 3, 4]"),
    Case("encode: integers", lambda: ENGINE.encode(X.long(), steps=4),
         TypeError, "x must be a floating-point tensor, got torch.int64"),
    Case("encode: a table that descends", lambda: ENGINE.encode(X, TABLE),
         ValueError, f"encode needs a table that climbs, as ddim_inversion makes it, got {TABLE!r}"),
    Case("encode: table and steps", lambda: ENGINE.encode(X, sf.ddim_inversion(LINEAR, 4), steps=4),
         ValueError, "table and steps exclude each other, got both"),
    Case("encode: labels", lambda: ENGINE.encode(X, steps=4, labels=[0, 9]),
         ValueError, "labels must be in [0, 2], got 9"),
    Case("pixels: integers", lambda: ENGINE.to_uint8(X.long()),
         TypeError, "x must be float16 or bfloat16 or float32 or float64, got int64"),
    Case("pixels: one image", lambda: ENGINE.to_uint8(X[0]),
         ValueError, "x must be images [B, C, H, W], got shape [1, 4, 4]"),
]

DIFFUSIONS = [
    Case("diffusion schedule: text", lambda: sf.GaussianDiffusion("linear"),
         TypeError, "schedule must be a NoiseSchedule, got str"),
    Case("diffusion variance: unknown", lambda: sf.GaussianDiffusion(LINEAR, variance="small"),
         ValueError, "variance must be one of 'fixed_small', 'fixed_large', 'learned', 'learned_range', got 'small'"),
    Case("diffusion clip: negative", lambda: sf.GaussianDiffusion(LINEAR, clip=-1),
         ValueError, "clip must be a finite number in (0, inf], got -1"),
    Case("t: T", lambda: DIFFUSION.q_sample(X, T + 100, X), ValueError, "t must lie in [0, 99], got 100 to 100"),
    Case("t: negative", lambda: DIFFUSION.q_sample(X, T - 1, X), ValueError, "t must lie in [0, 99], got -1 to -1"),
    Case("t: int32", lambda: DIFFUSION.q_sample(X, T.int(), X), TypeError, "t must be int64, got int32"),
    Case("t: float", lambda: DIFFUSION.q_sample(X, T.float(), X), TypeError, "t must be int64, got float32"),
    Case("t: a number", lambda: DIFFUSION.q_sample(X, 0, X), TypeError, "t must be a tensor, got int"),
    Case("t: one for two", lambda: DIFFUSION.q_sample(X, T[:1], X), ValueError, "t must have shape [2], got [1]"),
    Case("t: other device", lambda: DIFFUSION.q_sample(X, T.to("meta"), X),
         ValueError, "t must be on cpu, got meta"),
    Case("x_start: integers", lambda: DIFFUSION.q_sample(X.long(), T, X),
         TypeError, "x_start must be float16 or bfloat16 or float32 or float64, got int64"),
    Case("noise: one for two images", lambda: DIFFUSION.q_sample(X, T, X[:1]),
         ValueError, "noise must have shape [2, 1, 4, 4], got [1, 1, 4, 4]"),
    Case("noise: integers", lambda: DIFFUSION.q_sample(X, T, X.long()),
         TypeError, "noise must be float16 or bfloat16 or float32 or float64, got int64"),
    Case("noise: none", lambda: DIFFUSION.q_sample(X, T),
         ValueError, "q_sample needs noise, or seeds and indices to draw it"),
    Case("noise: given and drawn", lambda: DIFFUSION.q_sample(X, T, X, seeds=T, indices=T),
         ValueError, "noise must be given or drawn, got both noise and seeds or indices"),
    Case("seeds without indices", lambda: DIFFUSION.q_sample(X, T, seeds=T),
         ValueError, "seeds and indices must be given together, got one of them"),
    Case("seeds: floats", lambda: DIFFUSION.q_sample(X, T, seeds=T.float(), indices=T),
         TypeError, "seeds must be int64, got float32"),
    Case("posterior: two dtypes", lambda: DIFFUSION.q_posterior_mean_variance(X, X.half(), T),
         TypeError, "x_t must be float32, got float16"),
    Case("q_mean_variance: t", lambda: DIFFUSION.q_mean_variance(X, T + 100),
         ValueError, "t must lie in [0, 99], got 100 to 100"),
    Case("predict_eps_from_x0: t", lambda: DIFFUSION.predict_eps_from_x0(X, T + 100, X),
         ValueError, "t must lie in [0, 99], got 100 to 100"),
    Case("p_sample: t", lambda: DIFFUSION.p_sample(network, X, T + 100, noise=X),
         ValueError, "t must lie in [0, 99], got 100 to 100"),
    Case("p_sample: no noise", lambda: DIFFUSION.p_sample(network, X, T),
         ValueError, "this step adds noise: give noise, or seeds and indices"),
    Case("ddim_sample: eta", lambda: DIFFUSION.ddim_sample(network, X, T, eta=2.0),
         ValueError, "eta must be a finite number in [0, 1], got 2.0"),
    Case("ddim_reverse_sample: last t", lambda: DIFFUSION.ddim_reverse_sample(network, X, T + 99),
         ValueError, "t must lie in [0, 98], got 99 to 99"),
    Case("p_sample_loop: steps", lambda: DIFFUSION.p_sample_loop(network, (2, 1, 4, 4), steps=101),
         ValueError, "steps must be in [1, 100], got 101"),
    Case("p_sample_loop: seed", lambda: DIFFUSION.p_sample_loop(network, (2, 1, 4, 4), steps=2, seed=True),
         TypeError, "seed must be an integer, got True"),
    Case("p_sample_loop: start", lambda: DIFFUSION.p_sample_loop(network, (2, 1, 4, 4), steps=2, start=X[:1]),
         ValueError, "start must have shape [2, 1, 4, 4], got [1, 1, 4, 4]"),
    Case("p_sample_loop: noise", lambda: DIFFUSION.p_sample_loop(network, (2, 1, 4, 4), steps=2, noise=X),
         ValueError, "noise must have shape [2, 2, 1, 4, 4], got [2, 1, 4, 4]"),
    Case("training_losses: loss", lambda: DIFFUSION.training_losses(network, X, T, loss="l3", noise=X),
         ValueError, "loss must be one of 'l1', 'l2', 'huber', 'mse', 'rescaled_mse', 'kl', 'rescaled_kl', got 'l3'"),
    Case("training_losses: no noise", lambda: DIFFUSION.training_losses(network, X, T),
         ValueError, "q_sample needs noise, or seeds and indices to draw it"),
]

CHECKPOINTS = [
    Case("model name: with ../", lambda: sf.load_pretrained("../models/fashion-mnist"),
         sf.CheckpointError, "../models/fashion-mnist is missing"),
    Case("model name: unknown", lambda: sf.load_pretrained("imagenet"),
         sf.CheckpointError, f"'imagenet' is neither a bundled model ({MODELS}) nor a directory"),
    Case("model name: empty", lambda: sf.load_pretrained(""),
         sf.CheckpointError, f"'' is neither a bundled model ({MODELS}) nor a directory"),
    Case("model name: a file", lambda: sf.load_pretrained("model/unet/config.json"),
         sf.CheckpointError, "model/unet/config.json is not a directory"),
    Case("config: missing", lambda: sf.load_pretrained("model"),
         sf.CheckpointError, "model/unet/config.json is missing",
         lambda: Path("model/unet/config.json").unlink()),
    Case("config: no JSON", lambda: sf.load_pretrained("model"),
         sf.CheckpointError, "model/unet/config.json is not JSON: Expecting ...",
         write("model/unet/config.json", b"{'sample_size': 8}")),
    Case("config: a list", lambda: sf.load_pretrained("model"),
         sf.CheckpointError, "model/unet/config.json holds a JSON list; accepted is an object",
         write("model/unet/config.json", b"[]")),
    Case("config: huge", lambda: sf.load_pretrained("model"),
         sf.CheckpointError, "model/unet/config.json is larger than 1048576 bytes",
         write("model/unet/config.json", b" " * (1 << 20) + b"{}")),
    Case("config: unknown key", lambda: sf.load_pretrained("model"),
         sf.CheckpointError,
         "model/unet/config.json: the UNet config has the unknown key 'chanels'; accepted are act_fn, "
        "add_attention, attention_head_dim, attn_norm_num_groups, block_out_channels, center_input_sample, "
        "class_embed_type, down_block_types, downsample_padding, downsample_type, dropout, flip_sin_to_cos,"
        " freq_shift, in_channels, layers_per_block, mid_block_scale_factor, mid_block_type, norm_eps, "
        "norm_num_groups, num_class_embeds, num_train_timesteps, out_channels, resnet_time_scale_shift, "
        "sample_size, time_embedding_dim, time_embedding_type, up_block_types, upsample_type",
         config_with(chanels=3)),
    Case("config: NaN channels", lambda: sf.load_pretrained("model"),
         sf.CheckpointError, "model/unet/config.json is not JSON: NaN is not a finite number",
         config_with(in_channels=NAN)),
    Case("config: 10**9 channels", lambda: sf.load_pretrained("model"),
         sf.CheckpointError,
         "model/unet/config.json: the UNet config has block_out_channels = [1000000000]; accepted is a list "
        "of 1 to 16 entries, each an integer from 1 to 16384",
         config_with(block_out_channels=[10**9])),
    Case("config: too many weights", lambda: sf.load_pretrained("model"),
         sf.CheckpointError,
         "model/unet/config.json: the UNet config describes 144,153,198,593 parameters; accepted are at most"
        " 10,000,000,000",
         config_with(block_out_channels=[16384], layers_per_block=8)),
    Case("config: bool channels", lambda: sf.load_pretrained("model"),
         sf.CheckpointError,
         "model/unet/config.json: the UNet config has in_channels = True; accepted is an integer from 1 to "
        "16384",
         config_with(in_channels=True)),
    Case("config: other class", lambda: sf.load_pretrained("model"),
         sf.CheckpointError,
         "model/unet/config.json: the UNet config has _class_name = 'UNet2DConditionModel'; accepted is "
        "'UNet2DModel'",
         config_with(_class_name="UNet2DConditionModel")),
    Case("class names: too few", lambda: sf.load_pretrained("model"),
         sf.CheckpointError, "model/stepfusion.json: class_names has 1 entries; accepted are 3",
         facts_with(class_names=["Cat"])),
    Case("null label: out of range", lambda: sf.load_pretrained("model"),
         sf.CheckpointError, "model/stepfusion.json: null_label is 4; accepted are integers from 0 to 3",
         facts_with(null_label=4)),
    Case("facts: unknown key", lambda: sf.load_pretrained("model"),
         sf.CheckpointError,
         "model/stepfusion.json has the unknown key 'author'; accepted are class_names, null_label",
         facts_with(author="me")),
    Case("weights: none", lambda: sf.load_pretrained("model"),
         sf.CheckpointError, "model/unet has no weights; accepted are diffusion_pytorch_model.safetensors, "
        "diffusion_pytorch_model.fp16.safetensors, diffusion_pytorch_model.bin, "
        "diffusion_pytorch_model.fp16.bin",
         WEIGHTS.unlink),
    Case("weights: one missing", lambda: sf.load_pretrained("model"),
         sf.CheckpointError,
         "model/unet/diffusion_pytorch_model.safetensors does not fit its config: 1 missing (conv_in.weight)",
         weights_with(lambda state: state.pop("conv_in.weight"))),
    Case("weights: one extra", lambda: sf.load_pretrained("model"),
         sf.CheckpointError,
         "model/unet/diffusion_pytorch_model.safetensors does not fit its config: 1 unexpected (extra)",
         weights_with(lambda state: state.update(extra=torch.zeros(1)))),
    Case("weights: one misshapen", lambda: sf.load_pretrained("model"),
         sf.CheckpointError,
         "model/unet/diffusion_pytorch_model.safetensors does not fit its config: 1 misshapen (conv_in.bias "
        "[7] instead of [8])",
         weights_with(lambda state: state.update({"conv_in.bias": torch.zeros(7)}))),
    Case("weights: integers", lambda: sf.load_pretrained("model"),
         sf.CheckpointError,
         "model/unet/diffusion_pytorch_model.safetensors does not fit its config: 1 not floating point "
        "(conv_in.bias I64)",
         weights_with(lambda state: state.update({"conv_in.bias": torch.zeros(8, dtype=torch.int64)}))),
    Case("weights: NaN", lambda: sf.load_pretrained("model"),
         sf.CheckpointError,
         "model/unet/diffusion_pytorch_model.safetensors: conv_in.bias has values that are not finite",
         weights_with(lambda state: state["conv_in.bias"].fill_(NAN))),
    Case("weights: truncated", lambda: sf.load_pretrained("model"),
         sf.CheckpointError,
         "model/unet/diffusion_pytorch_model.safetensors is not a complete safetensors file: ...",
         truncate),
    Case("weights: empty file", lambda: sf.load_pretrained("model"),
         sf.CheckpointError,
         "model/unet/diffusion_pytorch_model.safetensors is not a complete safetensors file: ...",
         write(WEIGHTS, b"")),
    Case("weights: code in an archive", lambda: sf.load_pretrained("model"),
         sf.CheckpointError,
         "model/unet/diffusion_pytorch_model.bin holds pickled code, which is never run; save a safetensors "
        "file",
         pickled_code(archive=True)),
    Case("weights: a bare pickle with code", lambda: sf.load_pretrained("model"),
         sf.CheckpointError,
         "model/unet/diffusion_pytorch_model.bin is not a torch.save archive (a zip file); other pickles are"
        " never opened",
         pickled_code(archive=False)),
    Case("scheduler: missing", lambda: sf.Engine.from_pretrained("model"),
         sf.CheckpointError, "model/scheduler/scheduler_config.json is missing",
         lambda: shutil.rmtree("model/scheduler")),
    Case("scheduler: unknown key", lambda: sf.Engine.from_pretrained("model"),
         sf.CheckpointError, "scheduler config: unknown keys: 'beta_shedule'",
         scheduler_with(beta_shedule="linear")),
    Case("scheduler: unknown schedule", lambda: sf.Engine.from_pretrained("model"),
         sf.CheckpointError,
         "scheduler config: beta_schedule must be one of 'linear', 'scaled_linear', 'squaredcos_cap_v2', "
        "'sigmoid', got 'wavy'",
         scheduler_with(beta_schedule="wavy")),
    Case("scheduler: unknown prediction", lambda: sf.Engine.from_pretrained("model"),
         sf.CheckpointError,
         "scheduler config: prediction_type must be one of 'epsilon', 'sample', 'v_prediction', got 'flow'",
         scheduler_with(prediction_type="flow")),
    Case("scheduler: thresholding at no quantile", lambda: sf.Engine.from_pretrained("model"),
         sf.CheckpointError, "scheduler config: dynamic_thresholding_ratio must be a finite number in (0, 1], got 0",
         scheduler_with(thresholding=True, dynamic_thresholding_ratio=0)),
    Case("scheduler: NaN clip", lambda: sf.Engine.from_pretrained("model"),
         sf.CheckpointError, "model/scheduler/scheduler_config.json is not JSON: NaN is not a finite number",
         scheduler_with(clip_sample_range=NAN)),
    Case("from_pretrained: device", lambda: sf.Engine.from_pretrained("model", device="quantum"),
         ValueError, f"device must be 'auto' or one that PyTorch finds here ({DEVICES}), got 'quantum'"),
    Case("save: no network", lambda: sf.save_pretrained("new", network, SCHEDULER),
         sf.CheckpointError, "network is a function; accepted are UNet2D and ContextUNet"),
    Case("save: directory in use", lambda: sf.save_pretrained("model", tiny_network(), SCHEDULER),
         sf.CheckpointError, "directory CWD/model is not empty; give another directory, or overwrite=True"),
    Case("save: no parent", lambda: sf.save_pretrained("no/where", tiny_network(), SCHEDULER),
         sf.CheckpointError, "directory no/where: its parent is not a directory"),
    Case("save: null label", lambda: sf.save_pretrained("new", tiny_network(), SCHEDULER, null_label=9),
         sf.CheckpointError, "the arguments: null_label is 9; accepted are integers from 0 to 3"),
    Case("save: int8", lambda: sf.save_pretrained("new", tiny_network(), SCHEDULER, dtype=torch.int8),
         sf.CheckpointError,
         "dtype is torch.int8; accepted are torch.float64, torch.float32, torch.float16, torch.bfloat16"),
    Case("save: NaN in the scheduler",
         lambda: sf.save_pretrained("new", tiny_network(), {"clip_sample_range": NAN}),
         sf.CheckpointError, "scheduler_config is not JSON: ..."),
]

OPS = [
    Case("x_start: integers", lambda ops: ops.q_sample(X.long(), T, LEVELS, LEVELS, noise=X),
         TypeError, "x_start must be float16 or bfloat16 or float32, got int64"),
    Case("x_start: a scalar", lambda ops: ops.q_sample(X[0, 0, 0, 0], T, LEVELS, LEVELS, noise=X),
         ValueError, "x_start must have a batch dimension, got a 0-dimensional tensor"),
    Case("x_start: list", lambda ops: ops.q_sample([0.0], T, LEVELS, LEVELS),
         TypeError, "x_start must be a tensor, got list"),
    Case("t: int32", lambda ops: ops.q_sample(X, T.int(), LEVELS, LEVELS, noise=X),
         TypeError, "t must be int64, got int32"),
    Case("t: one for two", lambda ops: ops.q_sample(X, T[:1], LEVELS, LEVELS, noise=X),
         ValueError, "t must have shape [2], got [1]"),
    Case("tables: two lengths", lambda ops: ops.q_sample(X, T, LEVELS, LEVELS[:5], noise=X),
         ValueError, "sqrt_one_minus_alphas_cumprod must have shape [100], got [5]"),
    Case("tables: integers", lambda ops: ops.q_sample(X, T, LEVELS.long(), LEVELS, noise=X),
         TypeError, "sqrt_alphas_cumprod must be float32 or float64, got int64"),
    Case("tables: other device", lambda ops: ops.q_sample(X, T, LEVELS.to("meta"), LEVELS, noise=X),
         ValueError, "sqrt_alphas_cumprod must be on cpu, got meta"),
    Case("noise: none", lambda ops: ops.q_sample(X, T, LEVELS, LEVELS),
         ValueError, "q_sample needs noise, or seeds and indices to draw it"),
    Case("posterior: two shapes",
         lambda ops: ops.q_posterior_mean_variance(X, X[:, :, :3], T, LEVELS, LEVELS, LEVELS, LEVELS),
         ValueError, "x_t must have shape [2, 1, 4, 4], got [2, 1, 3, 4]"),
    Case("posterior: two dtypes",
         lambda ops: ops.q_posterior_mean_variance(X, X.bfloat16(), T, LEVELS, LEVELS, LEVELS, LEVELS),
         TypeError, "x_t must be float32, got bfloat16"),
    Case("out: wrong shape", lambda ops: ops.diffusion_step(X, X[:, :, :3], T, ROWS, TIMES),
         ValueError, "out must have shape [2, 1, 4, 4], or [2, 2, 4, 4] with learned variance, got [2, 1, 3, 4]"),
    Case("out: integers", lambda ops: ops.diffusion_step(X, X.long(), T, ROWS, TIMES),
         TypeError, "out must be float16 or bfloat16 or float32, got int64"),
    Case("x: float16", lambda ops: ops.diffusion_step(X.half(), X, T, ROWS, TIMES),
         TypeError, "x must be float32, got float16"),
    Case("rows: int32", lambda ops: ops.diffusion_step(X, X, T.int(), ROWS, TIMES),
         TypeError, "rows must be int64, got int32"),
    Case("coefficients: 8 columns", lambda ops: ops.diffusion_step(X, X, T, ROWS[:, :8], TIMES),
         ValueError, "coefficients must have shape [4, 14], got [4, 8]"),
    Case("timesteps: two for four rows", lambda ops: ops.diffusion_step(X, X, T, ROWS, TIMES[:2]),
         ValueError, "timesteps must have shape [4], got [2]"),
    Case("seeds without indices", lambda ops: ops.diffusion_step(X, X, T, ROWS, TIMES, seeds=T),
         ValueError, "seeds and indices must be given together, got one of them"),
    Case("guidance without out_uncond", lambda ops: ops.diffusion_step(X, X, T, ROWS, TIMES, guidance=T.float()),
         ValueError, "out_uncond and guidance must be given together, got one of them"),
    Case("x_next: not contiguous", lambda ops: ops.diffusion_step(X, X, T, ROWS, TIMES, x_next=X.transpose(2, 3)),
         ValueError, "x_next must be contiguous, got strides [16, 16, 1, 4] for shape [2, 1, 4, 4]"),
    Case("x_net: three images for two",
         lambda ops: ops.diffusion_step(X, X, T, ROWS, TIMES, x_net=torch.zeros(3, 1, 4, 4)),
         ValueError, "x_net must hold 2 or 4 images like x on cpu, got [3, 1, 4, 4]"),
    Case("flags: int32", lambda ops: ops.diffusion_step(X, X, T, ROWS, TIMES, flags=T.int()),
         TypeError, "flags must be int64, got int32"),
    Case("eta: above 1", lambda ops: ops.ddim_step(X, X, T, T, LEVELS, eta=2),
         ValueError, "eta must be in [0, 1], got 2"),
    Case("eta: NaN", lambda ops: ops.ddim_step(X, X, T, T, LEVELS, eta=NAN),
         ValueError, "eta must be in [0, 1], got nan"),
    Case("clip: 0", lambda ops: ops.ddim_step(X, X, T, T, LEVELS, clip=0),
         ValueError, "clip must be positive or None, got 0"),
    Case("clip: NaN", lambda ops: ops.ddpm_step(X, X, T, T, LEVELS, clip=NAN),
         ValueError, "clip must be positive or None, got nan"),
    Case("prediction: unknown", lambda ops: ops.ddim_step(X, X, T, T, LEVELS, prediction="eps"),
         ValueError, "prediction must be one of 'epsilon', 'sample', 'v_prediction', got 'eps'"),
    Case("variance: unknown", lambda ops: ops.ddpm_step(X, X, T, T, LEVELS, variance="small"),
         ValueError, "variance must be one of 'fixed_small', 'fixed_large', 'learned', 'learned_range', got 'small'"),
    Case("t_prev: float", lambda ops: ops.ddpm_step(X, X, T, T.float(), LEVELS),
         TypeError, "t_prev must be int64, got float32"),
    Case("pixels: three dimensions", lambda ops: ops.to_uint8(X[0]),
         ValueError, "x must be images [B, C, H, W], got shape [1, 4, 4]"),
    Case("normal: one timestep for two", lambda ops: ops.normal(T, T, T[:1], (1, 4, 4)),
         ValueError, "timesteps must have shape [2], got [1]"),
    Case("normal: float seeds", lambda ops: ops.normal(T.float(), T, T, (1, 4, 4)),
         TypeError, "seeds must be int64, got float32"),
]

COMMANDS = [
    ("no command", "", 2, "stepfusion: the following arguments are required: COMMAND (see stepfusion --help)"),
    ("unknown command", "frobnicate", 2, "stepfusion: argument COMMAND: invalid choice: 'frobnicate' ..."),
    ("no model", "sample",
     2, "stepfusion sample: the following arguments are required: model (see stepfusion sample --help)"),
    ("unknown option", "sample model --stepz 3",
     2, "stepfusion: unrecognized arguments: --stepz 3 (see stepfusion --help)"),
    ("fraction of an image", "sample model -n 2.5",
     2, "stepfusion sample: argument -n/--num: invalid int value: '2.5' (see stepfusion sample --help)"),
    ("sampler: unknown", "sample model --sampler plms",
     2, "stepfusion sample: argument --sampler: invalid choice: 'plms' ..."),
    ("dtype: float64", "sample model --dtype float64",
     2, "stepfusion sample: argument --dtype: invalid choice: 'float64' ..."),
    ("model name: with ../", "sample ../models/fashion-mnist", 1, "stepfusion: ../models/fashion-mnist is missing"),
    ("model name: unknown", "sample imagenet",
     1, f"stepfusion: 'imagenet' is neither a bundled model ({MODELS}) nor a directory"),
    ("model name: a file", "sample model/unet/config.json",
     1, "stepfusion: model/unet/config.json is not a directory"),
    ("n: 0", "sample model -n 0", 1, "stepfusion: --num must be in [1, 1048576], got 0"),
    ("n: negative", "sample model -n -1", 1, "stepfusion: --num must be in [1, 1048576], got -1"),
    ("n: too many", "sample model -n 9999999", 1, "stepfusion: --num must be in [1, 1048576], got 9999999"),
    ("seed: negative", "sample model --seed -1", 1, "stepfusion: --seed must be in [0, 2**64 - 1], got -1"),
    ("seed: 2**64", "sample model --seed 18446744073709551616",
     1, "stepfusion: --seed must be in [0, 2**64 - 1], got 18446744073709551616"),
    ("first index: negative", "sample model -n 2 --first-index -1",
     1, "stepfusion: --first-index must be in [0, 4294967294] for 2 images, got -1"),
    ("first index: too large", "sample model -n 2 --first-index 4294967295",
     1, "stepfusion: --first-index must be in [0, 4294967294] for 2 images, got 4294967295"),
    ("steps: 0", "sample model --steps 0", 1, "stepfusion: steps must be in [1, 100], got 0"),
    ("steps above T", "sample model --steps 101", 1, "stepfusion: steps must be in [1, 100], got 101"),
    ("eta: NaN", "sample model --eta nan", 1, "stepfusion: eta must be a finite number in [0, 1], got nan"),
    ("steps and sections", "sample model --steps 4 --timesteps 2,1",
     1, "stepfusion: --steps and --timesteps exclude each other, got both"),
    ("spacing and sections", "sample model --spacing trailing --timesteps 2,1",
     1, "stepfusion: --spacing and --timesteps exclude each other, got both"),
    ("sections: no stride", "sample model --timesteps ddim77",
     1, "stepfusion: timesteps 'ddim77': no stride through 100 timesteps gives 77"),
    ("eta of ddpm", "sample model --sampler ddpm --eta 1",
     1, "stepfusion: --eta is an option of --sampler ddim and euler_ancestral, got --sampler ddpm"),
    ("eta of dpmpp_2m, in bulk", "generate model --num 4 --out out --sampler dpmpp_2m --eta 1",
     1, "stepfusion: --eta is an option of --sampler ddim and euler_ancestral, got --sampler dpmpp_2m"),
    ("eta of ddpm, exported", "export model --format onnx --out out --sampler ddpm --eta 1",
     1, "stepfusion: --eta is an option of --sampler ddim and euler_ancestral, got --sampler ddpm"),
    ("eta above 1, of euler_ancestral in bulk", "generate model --num 4 --out out --sampler euler_ancestral --eta 2",
     1, "stepfusion: eta must be a finite number in [0, 1], got 2.0"),
    ("labels: unknown name", "sample model --labels bird",
     1, "stepfusion: --labels must be among numbers from 0 to 3; Cat, Dog, T-shirt/top; none, got 'bird'"),
    ("labels: out of range", "sample model --labels 4",
     1, "stepfusion: --labels must be among numbers from 0 to 3; Cat, Dog, T-shirt/top; none, got '4'"),
    ("labels: negative", "sample model --labels -1",
     1, "stepfusion: --labels must be among numbers from 0 to 3; Cat, Dog, T-shirt/top; none, got '-1'"),
    ("labels: one empty", "sample model --labels cat,,dog",
     1, "stepfusion: --labels must be among numbers from 0 to 3; Cat, Dog, T-shirt/top; none, got ''"),
    ("guidance: NaN", "sample model --guidance nan",
     1, "stepfusion: guidance must be a finite number in [0, 10000], got nan"),
    ("guidance: negative", "sample model --guidance=-1",
     1, "stepfusion: guidance must be a finite number in [0, 10000], got -1.0"),
    ("batch: 0", "sample model --batch 0", 1, "stepfusion: batch must be in [1, 1048576], got 0"),
    ("columns: 0", "sample model --columns 0", 1, "stepfusion: --columns must be in [1, 1048576], got 0"),
    ("scale: 0", "sample model --scale 0", 1, "stepfusion: --scale must be in [1, 1048576], got 0"),
    ("scale: an enormous picture", "sample model -n 1 --scale 100000",
     1, "stepfusion: the grid must have at most 1073741824 pixels, got 800004 x 800004: lower --scale or "
        "--num"),
    ("scale: too wide for a GIF", "sample model -n 100 --scale 1000 --animate a.gif",
     1, "stepfusion: a GIF is at most 65535 pixels wide and high, got a grid of 24008 x 272070"),
    ("device: not here", "sample model --device cuda:99",
     1, f"stepfusion: device must be 'auto' or one that PyTorch finds here ({DEVICES}), got 'cuda:99'"),
    ("out: no PNG", "sample model --out grid.jpg", 1, "stepfusion: --out must end in .png, got grid.jpg"),
    ("out: a directory", "sample model --out .",
     1, "stepfusion: --out . is a directory: name a PNG file, or use --single"),
    ("out: no folder", "sample model --out no/where/grid.png",
     1, "stepfusion: --out no/where/grid.png cannot be written: no/where is not a directory"),
    ("out: under a file", "sample model --out model/unet/config.json/grid.png",
     1, "stepfusion: --out model/unet/config.json/grid.png cannot be written: model/unet/config.json is not"
        " a directory"),
    ("out: a file for many", "sample model --single --out model/unet/config.json",
     1, "stepfusion: --out model/unet/config.json is a file, and --single needs a directory"),
    ("out: no folder for many", "sample model --single --out no/where",
     1, "stepfusion: --out no/where cannot be written: no is not a directory"),
    ("animate: no GIF", "sample model --animate a.png",
     1, "stepfusion: --animate must be a file that ends in .gif, got a.png"),
    ("animate: no folder", "sample model --animate no/a.gif",
     1, "stepfusion: --animate no/a.gif cannot be written: no is not a directory"),
    ("env: device", "env --device quantum",
     1, f"stepfusion: device must be 'auto' or one that PyTorch finds here ({DEVICES}), got 'quantum'"),
    ("train: no data", "train nowhere --out run", 1, "stepfusion: nowhere is neither a directory nor an .npz file"),
    ("train: out is a file", "train model --out model/unet/config.json",
     1, "stepfusion: --out model/unet/config.json is a file; it must be a directory"),
    ("train: device", "train model --out run --device quantum",
     1, f"stepfusion: device must be 'auto' or one that PyTorch finds here ({DEVICES}), got 'quantum'"),
    ("train: workers", "train model --out run --workers 0", 1, "stepfusion: --workers must be in [1, 1024], got 0"),
    ("train: export", "train model --out run --export no/where",
     1, "stepfusion: --export no/where cannot be written: no is not a directory"),
    ("train: channels", "train model --out run --channels 0",
     1, "stepfusion: channels[0] must be in [1, 16384], got 0"),
    ("train: learning rate", "train model --out run --learning-rate nan",
     1, "stepfusion: learning_rate must be a finite number in (0, 1], got nan"),
]
# fmt: on


def tree() -> dict[str, bytes | None]:
    """Everything in the working directory, hidden files too."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in Path().rglob("*")}


def check(given: str, wanted: str) -> None:
    """One line, to the letter; up to "..." where another library's words follow."""
    assert "\n" not in given
    given = given.replace(os.getcwd(), "CWD")
    if wanted.endswith(" ..."):
        given = given[: len(wanted) - 4] + " ..."
    assert given == wanted


@pytest.fixture(scope="module")
def good_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory, the same for all tests."""
    return save_tiny_model(tmp_path_factory.mktemp("good") / "model")


@pytest.fixture(autouse=True)
def _workspace(good_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory that holds a copy of the good model directory."""
    shutil.copytree(good_model, tmp_path / "model")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def _no_call(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No network is called."""
    monkeypatch.setattr(UNet2D, "forward", network)
    CALLS.clear()
    yield
    assert not CALLS


@pytest.mark.usefixtures("_no_call")
@pytest.mark.parametrize("case", SCHEDULES + TABLES + ENGINES + DIFFUSIONS + CHECKPOINTS, ids=lambda case: case.name)
def test_a_call(case: Case) -> None:
    if case.prepare is not None:
        case.prepare()
    before = tree()
    with pytest.raises(case.error) as caught:
        case.call()
    assert type(caught.value) is case.error
    check(str(caught.value), case.message)
    assert tree() == before


@pytest.mark.parametrize("ops", [kernels, reference], ids=["fused", "reference"])
@pytest.mark.parametrize("case", OPS, ids=lambda case: case.name)
def test_an_op(ops: ModuleType, case: Case) -> None:
    with pytest.raises(case.error) as caught:
        case.call(ops)
    assert type(caught.value) is case.error
    given = str(caught.value)
    if "float64" not in case.message:  # which the references take everywhere
        given = given.replace(" or float64, got", ", got")
    check(given, case.message)
    assert not X.any()
    assert not T.any()


@pytest.mark.usefixtures("_no_call")
@pytest.mark.parametrize(("arguments", "status", "message"), [c[1:] for c in COMMANDS], ids=[c[0] for c in COMMANDS])
def test_a_command(arguments: str, status: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree()
    try:
        given = main(shlex.split(arguments))
    except SystemExit as exit_:  # what argparse does with a wrong command line
        given = exit_.code
    output = capsys.readouterr()
    assert (given, output.out, output.err[-1:]) == (status, "", "\n")
    check(output.err[:-1], message)
    assert tree() == before


@pytest.mark.usefixtures("_no_call")
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a directory that refuses every file, root's too")
@pytest.mark.parametrize("option", ["--out /proc/a.png", "--animate /proc/a.gif", "--single --out /proc/a"])
def test_an_output_where_nobody_may_write(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree()
    assert main(["sample", "model", *option.split()]) == 1
    name, path = option.split()[-2:]
    reasons = [os.strerror(code) for code in (errno.ENOENT, errno.EACCES, errno.EPERM)]  # root's, then a user's
    assert capsys.readouterr().err in [f"stepfusion: {name} {path} cannot be written: {text}\n" for text in reasons]
    assert tree() == before


@pytest.mark.usefixtures("_no_call")
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_without_permission(capsys: pytest.CaptureFixture[str]) -> None:
    Path("locked").mkdir(mode=0o555)
    assert main(["sample", "model", "--out", "locked/a.png"]) == 1
    assert capsys.readouterr().err == "stepfusion: --out locked/a.png cannot be written: Permission denied\n"


class FullFile(io.FileIO):
    """A file on a disk that has room for half of what is written."""

    def __init__(self, path: str, mode: str) -> None:
        super().__init__(path, mode.replace("b", ""))

    def write(self, data: bytes) -> int:
        super().write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing fails, half way."""
    monkeypatch.setattr(files, "open", FullFile, raising=False)


def full_at_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing succeeds, and the disk turns out to be full when the data must reach it."""

    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)


OUTPUTS = [
    ("--out grid.png", "grid.png"),
    ("--single --out many", "many/5-0.png"),
    ("--single --animate a.gif --out model", "model/5-0.png"),
]


@pytest.mark.parametrize("disk", [full_disk, full_at_last])
@pytest.mark.parametrize(("options", "path"), OUTPUTS, ids=["grid", "single files", "single files in a folder"])
def test_a_full_disk(
    disk: Callable[[pytest.MonkeyPatch], None],
    options: str,
    path: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("grid.png").write_bytes(b"the old one")
    before = tree()
    disk(monkeypatch)
    assert main(f"sample model -n 2 --steps 2 --seed 5 {options}".split()) == 1
    assert capsys.readouterr().err == f"stepfusion: {path}: {os.strerror(errno.ENOSPC)}\n"
    assert tree() == before


@pytest.mark.parametrize("disk", [full_disk, full_at_last])
def test_a_full_disk_when_a_model_is_saved(
    disk: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree()
    disk(monkeypatch)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        sf.save_pretrained("new", tiny_network(), SCHEDULER)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        sf.save_pretrained("model", tiny_network(), SCHEDULER, overwrite=True)
    assert tree() == before


def test_a_file_system_that_takes_no_more_bytes() -> None:
    """The kernel refuses: a limit on the size of files, where a small full disk would need a mount."""
    pytest.importorskip("resource")
    Path("grid.png").write_bytes(b"the old one")
    before = tree()
    program = (
        "import resource, sys, torch; torch.set_num_threads(1); from stepfusion.commands.main import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200)); sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, *["sample", "model", "-n", "9", "--steps", "2", "--out", "grid.png"]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"stepfusion: grid.png: {os.strerror(errno.EFBIG)}\n"
    assert tree() == before
