"""Configs of every scheduler of diffusers: what is honoured, said and refused; saved by A, loaded into B."""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import logging
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packaging.version import Version

import stepfusion as sf
from stepfusion.errors import CheckpointError
from stepfusion.model_spec import ModelSpec
from stepfusion.samplers.scheduler_config import read_config
from stepfusion.samplers.scheduler_keys import (
    DISTILLED,
    HONOURED_KEYS,
    IGNORED_KEYS,
    KNOWN_KEYS,
    NEUTRAL_VALUES,
    OTHER_PATHS,
    OTHER_SOLVERS,
    OWN_SCHEDULERS,
    REFUSED_SCHEDULERS,
    SCHEDULE_KEYS,
    SPACING_KEYS,
)

pytest.importorskip("diffusers")

import diffusers

pytestmark = pytest.mark.filterwarnings(  # of diffusers' schedulers, with NumPy 2
    "ignore:__array__ implementation:DeprecationWarning", "ignore:__array_wrap__ must accept:DeprecationWarning"
)
READ = {**OWN_SCHEDULERS, **OTHER_SOLVERS}


def signatures() -> dict[str, dict[str, Any]]:
    """The arguments of every scheduler of the installed diffusers with their defaults, from its source."""
    found = {}
    folder = Path(importlib.util.find_spec("diffusers").origin).parent / "schedulers"
    for file in sorted(folder.rglob("scheduling_*.py")):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef) and "ConfigMixin" in map(ast.unparse, node.bases):
                if node.name.startswith("Flax"):  # until diffusers 0.35, beside each a scheduler of the same config
                    continue
                makers = [f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"]
                arguments = makers[0].args
                names = [argument.arg for argument in arguments.args][1:]
                values = [None] * (len(names) - len(arguments.defaults)) + [_value(d) for d in arguments.defaults]
                found[node.name] = dict(zip(names, values, strict=True))
    return found


def _value(node: ast.expr) -> Any:
    return eval(ast.unparse(node), {"float": float})


SIGNATURES = signatures()


def saved(name: str, **settings: Any) -> dict[str, Any]:
    """The ``scheduler_config.json`` that a scheduler saves, or would if what it needs were installed."""
    if not _can_be_made(name):
        return {"_class_name": name, **SIGNATURES[name], **settings}
    return json.loads(getattr(diffusers, name)(**settings).to_json_string())


def read(config: dict[str, Any]) -> tuple[sf.NoiseSchedule, str, dict[str, Any]]:
    """:func:`read_config` of a scheduler for which there is a warning or none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return read_config(config)


@functools.cache
def _saved_by_default(name: str) -> Any:
    return json.loads(getattr(diffusers, name)().to_json_string())


@functools.cache
def _can_be_made(name: str) -> bool:
    """False for the schedulers that need a package which is not installed, or an argument."""
    try:
        _saved_by_default(name)
    except (ImportError, TypeError, AttributeError):
        return False
    return True


@pytest.fixture(autouse=True)
def _silent_diffusers() -> Any:
    logger = logging.getLogger("diffusers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(level)


def test_every_scheduler_and_every_key_stands_in_a_list() -> None:
    assert len(SIGNATURES) > 40
    lists = [OWN_SCHEDULERS, OTHER_SOLVERS, DISTILLED, OTHER_PATHS, REFUSED_SCHEDULERS]
    assert {name for names in lists for name in names} >= SIGNATURES.keys()
    assert sum(map(len, lists)) == len({name for names in lists for name in names})
    keys = {key for arguments in SIGNATURES.values() for key in arguments}
    assert keys <= KNOWN_KEYS
    kinds = [SCHEDULE_KEYS, HONOURED_KEYS, NEUTRAL_VALUES.keys(), IGNORED_KEYS.keys()]
    assert sum(map(len, kinds)) == len(KNOWN_KEYS)
    assert all(reason and reason[0].islower() for reason in IGNORED_KEYS.values())


@pytest.mark.parametrize("name", [*READ, *DISTILLED])
def test_a_missing_key_has_the_default_of_its_scheduler(name: str) -> None:
    ours, theirs = {**OWN_SCHEDULERS, **OTHER_SOLVERS, **DISTILLED}[name], SIGNATURES[name]
    base = SIGNATURES["DDPMScheduler"]
    shared = {key: value for key, value in theirs.items() if key in base and key != "variance_type"}
    assert {key: ours.defaults.get(key, base[key]) for key in shared} == shared
    for key, value in ours.defaults.items():
        assert theirs[key] == value
    watched = {*NEUTRAL_VALUES, *SPACING_KEYS} - {"timestep_values"}
    # A scheduler that reads more in newer releases than in the installed one is read as in the newer ones.
    assert ours.reads - {"timestep_values"} >= watched & theirs.keys()
    if Version(diffusers.__version__) >= Version("0.42"):
        assert ours.reads - {"timestep_values"} == watched & theirs.keys()
    bare, full = {"_class_name": name}, {"_class_name": name, **theirs}
    if name in READ:
        assert read(bare)[0] == read(full)[0]
        assert read(bare)[1:] == read(full)[1:]
    assert sf.NoiseSchedule.from_config(bare) == sf.NoiseSchedule.from_config(full)


@pytest.mark.parametrize("name", OWN_SCHEDULERS)
def test_own_schedulers_are_read_without_a_word(name: str) -> None:
    schedule, prediction, options = read_config(saved(name))
    assert schedule == sf.NoiseSchedule.linear()
    assert prediction == "epsilon"
    assert options == {"variance": "fixed_small", "spacing": "leading", "steps_offset": 0, "clip": 1.0}
    assert read_config({**saved(name), "_class_name": f"Flax{name}"})[2] == options


@pytest.mark.parametrize("name", OTHER_SOLVERS)
def test_other_solvers_are_said(name: str) -> None:
    with pytest.warns(UserWarning, match=rf"^this model's scheduler is {name}: it is sampled by DDIM unless another"):
        schedule, prediction, options = read_config(saved(name))
    if (sampler := OTHER_SOLVERS[name].sampler) is not None:
        table = ModelSpec(schedule, prediction, (1, 8, 8), options=options).table(sampler.split("'")[1], 10)
        assert len(table) == {"heun": 19, "plms": 11}.get(sampler.split("'")[1], 10)


@pytest.mark.parametrize("name", REFUSED_SCHEDULERS)
def test_other_processes_are_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"^scheduler config: {name} is not implemented: "):
        read_config({"_class_name": name})
    with pytest.raises(ValueError, match=f"^{name} is not implemented"):
        sf.NoiseSchedule.from_config({"_class_name": name})


@pytest.mark.parametrize("name", ["MyScheduler", "DDPM", "", 3, None, ["DDPMScheduler"]])
def test_unknown_schedulers_are_refused(name: Any) -> None:
    with pytest.raises(
        CheckpointError, match=r"^scheduler config: (_class_name must be a string|'.*' is no scheduler)"
    ):
        read_config({"_class_name": name})


@pytest.mark.parametrize("into", READ)
def test_saved_by_any_loaded_into_another(into: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The config is what B saves. Its own keys decide; what A left in it changes nothing that B does not read."""
    for slow in (diffusers.KDPM2DiscreteScheduler, diffusers.KDPM2AncestralDiscreteScheduler):
        # called when one is made, and takes a second
        monkeypatch.setattr(slow, "set_timesteps", lambda self, *_: setattr(self, "sigmas", torch.zeros(1)))
    if not _can_be_made(into):
        pytest.skip(f"{into} needs a package that is not installed")
    tried = 0
    for config in (_saved_by_default(by) for by in SIGNATURES if _can_be_made(by)):
        try:
            theirs = getattr(diffusers, into).from_config(config)
        except (ValueError, NotImplementedError):
            continue  # diffusers does not load this pair
        loaded = json.loads(theirs.to_json_string())
        newer = READ[into].reads - SIGNATURES[into].keys()  # keys that the installed release of B does not read
        loaded = {key: value for key, value in loaded.items() if key not in newer}
        if (refused := _named(into, loaded)) is not None:
            with pytest.raises(CheckpointError, match=rf"^scheduler config: {refused} must be"):
                read(loaded)
            continue
        schedule, prediction, options = read(loaded)
        np.testing.assert_allclose(schedule.betas, theirs.betas.numpy(), rtol=1e-5)
        assert prediction == loaded.get("prediction_type", "epsilon")
        assert options["clip"] == (1.0 if loaded.get("clip_sample", True) else None)
        tried += 1
    assert tried >= (5 if into == "UnCLIPScheduler" else 20)


def _named(name: str, config: dict[str, Any]) -> str | None:
    """The key for which a config is refused: what the scheduler of this name reads, and no table here honours."""
    for key, neutral in NEUTRAL_VALUES.items():
        if key in SIGNATURES[name] and config.get(key, neutral[0]) not in neutral:
            return key
    known = ("epsilon", "sample", "v_prediction")
    return None if config.get("prediction_type", "epsilon") in known else "prediction_type"


SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "karras": ({"use_karras_sigmas": True}, {"spacing": "karras"}),
    "exponential": ({"use_exponential_sigmas": True}, {"spacing": "exponential"}),
    "beta": ({"use_beta_sigmas": True}, {"spacing": "beta"}),
    "lu": ({"use_lu_lambdas": True}, {"spacing": "lambda"}),
    "lambda": ({"lambda_min_clipped": -5.1}, {"lambda_min_clipped": -5.1}),
    "no lambda": ({"lambda_min_clipped": -math.inf}, {}),
    "euler at final": ({"euler_at_final": True}, {"lower_order_final": True}),
    "no lower order": ({"lower_order_final": False}, {"lower_order_final": False}),
    "trailing": ({"timestep_spacing": "trailing"}, {"spacing": "trailing"}),
    "learned range": ({"variance_type": "learned_range"}, {"variance": "learned_range"}),
    "unclipped threshold": (
        {"thresholding": True, "sample_max_value": None, "dynamic_thresholding_ratio": 0.9},
        {"threshold": 0.9, "sample_max_value": float(np.finfo(np.float32).max)},
    ),
    "last sigma": ({"final_sigmas_type": "sigma_min"}, {"final_alpha_cumprod": pytest.approx(0.9999)}),
    "flow shift without flows": ({"flow_shift": 3.0}, {}),
    "heun": ({"solver_type": "heun", "solver_order": 3, "algorithm_type": "sde-dpmsolver++"}, {}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_what_dpm_solver_saves_is_honoured(name: str) -> None:
    settings, wanted = SETTINGS[name]
    plain, changed = (read(saved("DPMSolverMultistepScheduler", **s))[2] for s in ({}, settings))
    assert changed == {**plain, **wanted}
    hidden = {**saved("DDIMScheduler"), **{k: v for k, v in settings.items() if k.startswith(("use_", "final"))}}
    assert read_config(hidden)[2] == read_config(saved("DDIMScheduler"))[2], "DDIMScheduler does not read it"


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("DPMSolverMultistepScheduler", "use_flow_sigmas", True),
        ("UniPCMultistepScheduler", "use_dynamic_shifting", True),
        ("UniPCMultistepScheduler", "shift_terminal", 0.1),
        ("EulerDiscreteScheduler", "timestep_type", "continuous"),
        ("EulerDiscreteScheduler", "sigma_max", 14.6),
        ("DDPMScheduler", "timestep_values", [5, 3]),
    ],
)
def test_what_changes_the_levels_is_refused_where_it_is_read(name: str, key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=rf"^scheduler config: {key} must be .*, for nothing here samples"):
        read_config({"_class_name": name, key: value})
    if key != "timestep_values":
        assert read_config({"_class_name": "DDIMScheduler", key: value}) == read_config({})


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"predict_epsilon": True}, "epsilon"),
        ({"predict_epsilon": False}, "sample"),
        ({"predict_epsilon": None, "prediction_type": "v_prediction"}, "v_prediction"),
        ({"predict_epsilon": False, "prediction_type": "sample"}, "sample"),
        ({"predict_epsilon": True, "prediction_type": "epsilon"}, "epsilon"),
    ],
)
def test_predict_epsilon_of_old_configs(config: dict[str, Any], wanted: str) -> None:
    assert read_config({"_class_name": "DDPMScheduler", **config})[1] == wanted


def test_what_yesterdays_diffusers_saved() -> None:
    """Releases 0.1 to 0.14, and a DDIM scheduler that was made from DPM-Solver's config."""
    first = {"_class_name": "DDPMScheduler", "_diffusers_version": "0.1.1", "beta_end": 0.02,
             "beta_schedule": "linear", "beta_start": 0.0001, "clip_sample": True, "num_train_timesteps": 1000,
             "predict_epsilon": True, "tensor_format": "pt", "timestep_values": None, "trained_betas": None,
             "variance_type": "fixed_large"}  # fmt: skip
    assert read_config(first)[2]["variance"] == "fixed_large"
    solver = {"algorithm_type": "dpmsolver++", "lambda_min_clipped": -math.inf, "lower_order_final": True,
              "solver_order": 2, "solver_type": "midpoint", "use_karras_sigmas": False, "variance_type": None,
              "use_dynamic_shifting": False, "predict_x0": True, "solver_p": None, "disable_corrector": [],
              "sample_max_value": None, "thresholding": False, "dynamic_thresholding_ratio": None,
              "clip_sample": False, "clip_sample_range": None, "skip_prk_steps": True}  # fmt: skip
    for name in ("DDIMScheduler", "DDPMScheduler"):
        options = read_config({"_class_name": name, **solver})[2]
        assert options == {"variance": "fixed_small", "spacing": "leading", "steps_offset": 0, "clip": None}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"predict_epsilon": False, "prediction_type": "epsilon"},
            "predict_epsilon says 'sample', and prediction_type",
        ),
        ({"predict_epsilon": "no"}, "predict_epsilon must be True or False, got 'no'"),
        (
            {"prediction_type": "flow_prediction"},
            "prediction_type must be one of 'epsilon', 'sample', 'v_prediction',",
        ),
        ({"steps_offset": "1"}, "steps_offset must be an integer, got '1'"),
        ({"steps_offset": -1}, "steps_offset must be at least 0, got -1"),
        ({"clip_sample": 1}, "clip_sample must be True or False, got 1"),
        ({"clip_sample_range": None}, "clip_sample_range must be a finite number in (0, inf], got None"),
        ({"clip_sample_range": 0}, "clip_sample_range must be a finite number in (0, inf], got 0"),
        ({"clip_sample_range": float("nan")}, "clip_sample_range must be a finite number, got nan"),
        ({"thresholding": True, "dynamic_thresholding_ratio": None}, "dynamic_thresholding_ratio must be"),
        ({"thresholding": True, "dynamic_thresholding_ratio": 1.5}, "dynamic_thresholding_ratio must be"),
        ({"thresholding": True, "sample_max_value": 0.5}, "sample_max_value must be a finite number in [1, inf]"),
        ({"variance_type": "learned"}, "variance_type must be one of"),
        ({"variance_type": 3}, "variance_type must be one of"),
        ({"lambda_min_clipped": float("nan")}, "lambda_min_clipped must be a number or -Infinity"),
        ({"lambda_min_clipped": math.inf}, "lambda_min_clipped must be a number or -Infinity"),
        ({"lambda_min_clipped": "-inf"}, "lambda_min_clipped must be a number, got '-inf'"),
        ({"num_train_timesteps": "1000"}, "num_train_timesteps must be an integer, got '1000'"),
        ({"num_train_timesteps": 0}, "num_train_timesteps must be at least 1, got 0"),
        ({"beta_schedule": "laplace"}, "beta_schedule must be one of 'linear', 'scaled_linear',"),
        ({"new_key": 1}, "unknown keys: 'new_key'"),
    ],
)
def test_values_of_another_kind_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_config(config)
    assert str(caught.value).startswith(f"scheduler config: {message}")


def test_numpys_scalars_are_numbers() -> None:
    config = {"num_train_timesteps": np.int64(100), "beta_end": np.float32(0.02), "clip_sample": np.bool_(False)}
    schedule, _, options = read_config(config)
    assert schedule.num_timesteps == 100
    assert options["clip"] is None


def test_a_variance_that_a_solver_only_splits_off() -> None:
    assert read(saved("DPMSolverMultistepScheduler", variance_type="learned"))[2]["variance"] == "fixed_small"
    assert read_config({"_class_name": "DDIMScheduler", "variance_type": "learned"})[2]["variance"] == "fixed_small"
