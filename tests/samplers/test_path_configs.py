"""Configs of diffusers' schedulers on other paths, and of distilled networks: read, and sampled at their levels."""

from __future__ import annotations

import json
import warnings
from typing import Any

import numpy as np
import pytest

import stepfusion as sf
from stepfusion.errors import CheckpointError
from stepfusion.model_spec import ModelSpec
from stepfusion.samplers.path_config import PATH_SCHEDULERS
from stepfusion.samplers.scheduler_config import read_config
from stepfusion.samplers.scheduler_keys import DISTILLED, OTHER_PATHS

pytest.importorskip("diffusers")

import diffusers

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def saved(name: str, **settings: Any) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(getattr(diffusers, name)(**settings).to_json_string())
    return result


def spec(name: str, **settings: Any) -> ModelSpec:
    path, prediction, options = read_config(saved(name, **settings))
    return ModelSpec(path, prediction, (1, 8, 8), options=options)


def test_every_scheduler_of_another_path_has_a_reader() -> None:
    assert PATH_SCHEDULERS.keys() == OTHER_PATHS.keys()
    for name in OTHER_PATHS:
        with pytest.raises(ValueError, match=f"^{name} has no schedule of betas: its levels are those of"):
            sf.NoiseSchedule.from_config({"_class_name": name})


SETTINGS: list[tuple[str, dict[str, Any], str]] = [
    ("EDMEulerScheduler", {}, "euler"),
    ("EDMEulerScheduler", {"sigma_schedule": "exponential", "sigma_max": 20.0, "sigma_data": 1.0}, "euler"),
    ("EDMEulerScheduler", {"rho": 5.0, "prediction_type": "v_prediction"}, "euler"),
    ("EDMDPMSolverMultistepScheduler", {}, "dpm-solver++ 2m"),
    ("EDMDPMSolverMultistepScheduler", {"solver_order": 3}, "dpm-solver++ 3m"),
    ("EDMDPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "dpm-solver++ 2m sde, eta 1"),
    ("CMStochasticIterativeScheduler", {"num_train_timesteps": 151, "sigma_max": 40.0}, "consistency"),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, "euler"),
    ("FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True}, "euler"),
    ("FlowMatchEulerDiscreteScheduler", {"use_beta_sigmas": True, "stochastic_sampling": True}, "consistency"),
    ("FlowMatchHeunDiscreteScheduler", {"shift": 2.0}, "heun"),
    ("LCMScheduler", {"original_inference_steps": 100}, "lcm"),
    ("TCDScheduler", {}, "tcd, eta 0.3"),
]


@pytest.mark.parametrize(("name", "settings", "wanted"), SETTINGS)
def test_a_model_visits_its_schedulers_levels(name: str, settings: dict[str, Any], wanted: str) -> None:
    """If no sampler is asked for: what the network is told, and at which levels, is what diffusers tells it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = spec(name, **settings)
    theirs = getattr(diffusers, name)(**settings)
    theirs.set_timesteps(4)
    table = model.table(steps=4)
    assert table.name.startswith(wanted)
    np.testing.assert_allclose(table.told, np.asarray(theirs.timesteps), rtol=2e-6, atol=2e-6)
    if name.startswith("EDM"):
        sigma_data = settings.get("sigma_data", 0.5)
        assert table.in_scale(1) == pytest.approx(1 / np.hypot(float(theirs.sigmas[1]), sigma_data), rel=1e-5)


def test_what_is_kept_of_the_keys() -> None:
    path, prediction, options = read_config(saved("CMStochasticIterativeScheduler", s_noise=0.9))
    assert path == sf.SigmaPath(told_scale=250.0)
    assert prediction == "consistency"
    assert options == {"sampler": "consistency", "train_levels": 40, "s_noise": 0.9, "clip": 1.0}
    table = ModelSpec(path, prediction, (1, 8, 8), options=options).table()
    assert (table.column("clip") == 1.0).all()
    _, sigma = table.pairs()
    assert table.column("sigma")[0] == pytest.approx(0.9 * np.sqrt(sigma[1] ** 2 - 0.002**2))
    assert read_config(saved("LCMScheduler"))[2] == {
        "sampler": "lcm", "original_steps": 50, "timestep_scaling": 10.0, "clip": None,
    }  # fmt: skip
    assert set(DISTILLED) == {"LCMScheduler", "TCDScheduler"}


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting", True, "use_dynamic_shifting must be false"),
        ("FlowMatchEulerDiscreteScheduler", "shift_terminal", 0.1, "shift_terminal must be null"),
        ("FlowMatchEulerDiscreteScheduler", "invert_sigmas", True, "invert_sigmas must be false"),
        ("FlowMatchEulerDiscreteScheduler", "shift", -1.0, "shift must be"),
        ("FlowMatchEulerDiscreteScheduler", "shift", "3", "shift must be a number, got '3'"),
        ("EDMEulerScheduler", "final_sigmas_type", "sigma_min", "final_sigmas_type must be 'zero'"),
        ("EDMEulerScheduler", "prediction_type", "sample", "prediction_type must be one of"),
        ("EDMDPMSolverMultistepScheduler", "solver_order", 4, "solver_order must be one of"),
        ("CMStochasticIterativeScheduler", "sigma_data", 0, "sigma_data must be"),
        ("CMStochasticIterativeScheduler", "new_key", 1, "unknown keys: 'new_key'"),
    ],
)
def test_what_would_change_the_images_is_refused(name: str, key: str, value: Any, message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_config({**saved(name), key: value})
    assert str(caught.value).startswith(f"scheduler config: {message}"), caught.value


@pytest.mark.parametrize(
    ("name", "settings", "how"),
    [
        ("DPMSolverMultistepScheduler", {}, "sampler='dpmpp_2m'"),
        ("DPMSolverMultistepScheduler", {"solver_order": 3}, "sampler='dpmpp_3m'"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "sampler='dpmpp_2m_sde'"),
        ("DPMSolverSinglestepScheduler", {"solver_order": 3}, "sampler='dpmpp_3s'"),
        ("UniPCMultistepScheduler", {"solver_order": 3}, "sampler='unipc' with order=3"),
        ("DEISMultistepScheduler", {}, "sampler='deis' with order=2"),
        ("HeunDiscreteScheduler", {}, "sampler='heun'"),
        ("PNDMScheduler", {}, "sampler='plms'"),
    ],
)
def test_the_warning_says_how_to_ask_for_a_models_own_sampler(name: str, settings: dict[str, Any], how: str) -> None:
    with pytest.warns(UserWarning, match=rf"its own images come with {how}$"):
        read_config(saved(name, **settings))
