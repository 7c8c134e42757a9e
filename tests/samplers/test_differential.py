"""Random schedulers of diffusers beside the tables that their saved configs give here; what differs is explained.

A case is a scheduler class, a config and a way to call it, drawn from a seed. Its config goes through the JSON that
diffusers saves, as a model directory holds it, and a whole loop is compared with the noise injected.
"""

from __future__ import annotations

import json
import random
import re
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from stepfusion.errors import CheckpointError
from stepfusion.samplers.levels import float32_levels
from stepfusion.samplers.registry import make_table
from stepfusion.samplers.scheduler_config import read_config
from stepfusion.samplers.table import StepTable
from stepfusion_testing.walking import Network, stand_in, walk

pytest.importorskip("diffusers")

import diffusers

pytestmark = pytest.mark.filterwarnings(  # of diffusers' schedulers, with NumPy 2
    "ignore:__array__ implementation:DeprecationWarning", "ignore:__array_wrap__ must accept:DeprecationWarning"
)
TOLERANCE = 1e-4  # of the largest value of the loop's last state, or of 1; float32 on both sides
ROOT_OF_ROUNDING = 2e-3  # several times 2**-12, the root of one float32 rounding
SHAPE = (2, 3, 6, 6)
SAMPLERS = {
    "DDPMScheduler": "ddpm",
    "DDIMScheduler": "ddim",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
}
#: What may keep a case from being compared, by what the message says, and why that is as it should be.
REFUSED_HERE = {
    r"prediction 'epsilon' cannot start at timestep \d+, where the signal is zero": "eps does not tell x0 there",
    r"variance_type must be one of .*, got 'learned'": "they take v for a variance, its authors for its logarithm",
    r"with spacing 'trailing' is a count for which diffusers makes \d+ timesteps": "their last timestep is -1",
    r"timesteps must lie in \[0, \d+\], got -1 to": "their last timestep is -1",
}
REFUSED_THERE = {
    r"prediction_type not implemented yet: sample": "their EulerAncestral has no x0 prediction",
    r"^DDPMScheduler .*'fixed_large_log'.*: NaN or infinite": "they take the root of a negative logarithm",
    r"^DDIMScheduler .* eta 1.0: NaN or infinite": "1 - abar_prev - sigma^2 is below 0 by rounding",
}
#: How many of the first 320 cases are equal, at least: a reader that refused everything would agree, too.
LEAST_EQUAL = 0.75


@dataclass(frozen=True)
class Case:
    """A scheduler and a call of it."""

    scheduler: str
    settings: dict[str, Any]
    steps: int
    eta: float = 0.0
    clipped_output: bool = False


def draw(number: int) -> Case:
    """The case of a number, always the same.

    Left out, for the two samplers without ``compat``, is what their float32 sigmas cannot hold or put between two
    timesteps: the last levels of the cosine schedule (abar 1e-9), small steps beside large ones (random betas), zero
    terminal SNR for a second-order solver (they put 2**-24 in its place), Karras spacing, and "linspace" of
    EulerAncestral. There they differ from their own formulas in float64.
    """
    rng = random.Random(number)
    name = rng.choices(tuple(SAMPLERS), (4, 4, 2, 1))[0]
    solver = name in ("DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler")
    total = rng.choice((1000, 1000, 400, 100, rng.randint(20, 600)))
    settings: dict[str, Any] = {
        "num_train_timesteps": total,
        "beta_schedule": rng.choice(("linear", "scaled_linear", *([] if solver else ["squaredcos_cap_v2"]))),
        "beta_start": 10 ** rng.uniform(-5, -3),
        "beta_end": 10 ** rng.uniform(-2, -1.4),
        "prediction_type": rng.choice(("epsilon", "sample", "v_prediction")),
        "timestep_spacing": rng.choice(("leading", "trailing", "linspace")),
        "steps_offset": rng.choice((0, 0, 0, 1, 2)),
        "rescale_betas_zero_snr": rng.random() < 0.2 and name != "DPMSolverMultistepScheduler",
    }
    if not solver and rng.random() < 0.15:
        settings["trained_betas"] = [10 ** rng.uniform(-4, -1.3) for _ in range(total)]
    if name in ("DDPMScheduler", "DDIMScheduler"):
        settings |= {"clip_sample": rng.random() < 0.7, "clip_sample_range": rng.choice((1.0, 1.0, 0.5, 2.5))}
    if name != "EulerAncestralDiscreteScheduler" and rng.random() < 0.15:
        settings |= {
            "thresholding": True,
            "dynamic_thresholding_ratio": rng.choice((0.995, 0.9)),
            "sample_max_value": rng.choice((1.0, 2.0)),
        }
    if name == "DDPMScheduler":
        settings["variance_type"] = rng.choice(
            ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned_range", "learned")
        )
    if name == "DDIMScheduler":
        settings["set_alpha_to_one"] = rng.random() < 0.6
    if name == "DPMSolverMultistepScheduler":
        settings |= {
            "lower_order_final": rng.random() < 0.7,
            "euler_at_final": rng.random() < 0.3,
            "final_sigmas_type": rng.choice(("zero", "zero", "sigma_min")),
        }
    if name == "EulerAncestralDiscreteScheduler" and settings["timestep_spacing"] == "linspace":
        settings["timestep_spacing"] = "trailing"
    steps = rng.choice((1, 2, rng.randint(3, 60), rng.randint(3, 60), rng.randint(3, 60)))
    eta = rng.choice((0.0, 0.0, 1.0, rng.random())) if name == "DDIMScheduler" else 0.0
    return Case(name, settings, min(steps, total), eta, rng.random() < 0.3 and name == "DDIMScheduler")


def set_up(case: Case) -> Any:
    """Their scheduler, before its steps are set."""
    return getattr(diffusers, case.scheduler)(**case.settings)


def read(scheduler: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a directory is sampled by DDIM unless asked otherwise
        return read_config(json.loads(scheduler.to_json_string()))


def ours(case: Case, scheduler: Any, *, compat: str | None = "diffusers") -> StepTable:
    """The table that the saved config gives here."""
    schedule, prediction, defaults = read(scheduler)
    if SAMPLERS[case.scheduler] in ("ddpm", "ddim"):
        options: dict[str, Any] = {"compat": compat}
        if case.scheduler == "DDIMScheduler":
            options |= {"eta": case.eta, "rederive_eps": case.clipped_output}
        return make_table(schedule, prediction, SAMPLERS[case.scheduler], case.steps, defaults=defaults, **options)
    visits = [int(t) for t in scheduler.timesteps]  # these two have no compat, so that their list is given
    return make_table(schedule, prediction, SAMPLERS[case.scheduler], defaults=defaults, timesteps=visits)


def share_levels(case: Case, scheduler: Any) -> None:
    """Give their scheduler the noise levels of ours, if they are others: theirs are computed in float32.

    ``compat`` reproduces that except for the rescaling to zero terminal SNR, and two samplers have no ``compat``.
    Both sides then start from the same numbers, so that what is compared is the solver.
    """
    rescaled = case.settings["rescale_betas_zero_snr"]
    if SAMPLERS[case.scheduler] in ("ddpm", "ddim") and not rescaled:
        return
    schedule = read(scheduler)[0]
    levels = float32_levels(schedule) if SAMPLERS[case.scheduler] in ("ddpm", "ddim") else schedule.alphas_cumprod
    abar = torch.from_numpy(levels.copy())
    if rescaled and SAMPLERS[case.scheduler] == "euler_ancestral":
        abar = abar.clamp(min=2.0**-24)  # as they do
    scheduler.alphas_cumprod = abar.float()
    if case.settings.get("set_alpha_to_one") is False:
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    if case.scheduler == "DPMSolverMultistepScheduler":
        scheduler.alpha_t, scheduler.sigma_t = abar.sqrt().float(), (1 - abar).sqrt().float()
        scheduler.lambda_t = (abar.log() - (1 - abar).log()).float() / 2
        scheduler.sigmas = ((1 - abar) / abar).sqrt().float()


def in_their_loop(
    case: Case, scheduler: Any, network: Network, x: torch.Tensor, noise: torch.Tensor, patch: pytest.MonkeyPatch
) -> torch.Tensor:
    """The last state of their loop; ArithmeticError if it is not finite."""
    options: dict[str, Any] = {}
    if case.scheduler == "DDIMScheduler":
        options = {"eta": case.eta, "use_clipped_model_output": case.clipped_output}
    if case.scheduler == "EulerAncestralDiscreteScheduler":  # its states are x / sqrt(abar)
        x = x / float(scheduler.alphas_cumprod[int(scheduler.timesteps[0])].double().sqrt())
    for i, t in enumerate(scheduler.timesteps):
        for module in ("ddpm", "euler_ancestral_discrete"):
            patch.setattr(f"diffusers.schedulers.scheduling_{module}.randn_tensor", lambda *_, i=i, **__: noise[i])
        if case.eta:
            options["variance_noise"] = noise[i]
        out = network(scheduler.scale_model_input(x, t), int(t))
        x = scheduler.step(out, t, x, **options).prev_sample
    if not bool(x.isfinite().all()):
        raise ArithmeticError("NaN or infinite")
    return x


def explained(message: str, reasons: dict[str, str]) -> str:
    """The reason for a message; AssertionError if nothing explains it."""
    for pattern, reason in reasons.items():
        if re.search(pattern, message):
            return reason
    raise AssertionError(f"nothing explains: {message}")


def outcome(number: int, patch: pytest.MonkeyPatch, *, compat: str | None = "diffusers") -> str:
    """ "equal", "differs", or why a case cannot be compared; AssertionError if nothing explains that."""
    case = draw(number)
    scheduler = set_up(case)
    try:
        share_levels(case, scheduler)
        scheduler.set_timesteps(case.steps)
        table = ours(case, scheduler, compat=compat)
    except (CheckpointError, ValueError) as error:
        return explained(str(error), REFUSED_HERE)
    schedule, prediction, _ = read(scheduler)
    network = stand_in(schedule, prediction, learned="learned" in case.settings.get("variance_type", ""))
    torch.manual_seed(number)
    x, noise = torch.randn(SHAPE), torch.randn(case.steps, *SHAPE)
    try:
        want = in_their_loop(case, scheduler, network, x, noise, patch)
    except (ArithmeticError, NotImplementedError) as error:
        return explained(f"{case.scheduler} {case.settings} eta {case.eta}: {error}", REFUSED_THERE)
    # The solvers have 2**-24 in place of an abar of 0; DDIM with eta 1 has the root of a difference that should be 0.
    zero = case.settings["rescale_betas_zero_snr"] and (
        SAMPLERS[case.scheduler] not in ("ddpm", "ddim") or case.eta == 1
    )
    tolerance = (ROOT_OF_ROUNDING if zero else TOLERANCE) * max(1.0, float(want.abs().max()))
    got = walk(table, network, x, noise)
    return "equal" if float((got - want).abs().max()) <= tolerance else "differs"


@pytest.mark.parametrize("first", range(0, 24, 8))
def test_the_first_cases_are_equal_or_explained(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = {number: outcome(number, monkeypatch) for number in range(first, first + 8)}
    assert [draw(number) for number, found in outcomes.items() if found == "differs"] == []
    assert "equal" in outcomes.values()


@pytest.mark.soak
def test_many_cases_are_equal_or_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reason is also found at least once: a list of reasons must not outlive what it explains."""
    outcomes = {number: outcome(number, monkeypatch) for number in range(640)}
    counted = Counter(outcomes.values())
    print(*(f"{count:4} {found}" for found, count in counted.most_common()), sep="\n")
    assert [draw(number) for number, found in outcomes.items() if found == "differs"] == []
    assert counted["equal"] >= LEAST_EQUAL * len(outcomes)
    assert {*REFUSED_HERE.values(), *REFUSED_THERE.values()} <= counted.keys()


def test_without_compat_cases_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: quirks that ``compat`` reproduces are seen by this comparison."""
    found = Counter(outcome(number, monkeypatch, compat=None) for number in range(24))
    assert found["differs"] >= 4
