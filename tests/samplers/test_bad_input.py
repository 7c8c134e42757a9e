"""Bad input to schedules and tables: each mistake's error to the letter, before any work, and nothing left behind."""

from __future__ import annotations

import numpy as np
import pytest

import stepfusion as sf
from stepfusion_testing.bad_input import (
    COSINE,
    INF,
    LINEAR,
    NAN,
    NEXT,
    TABLE,
    Case,
    check_case,
)

pytestmark = pytest.mark.usefixtures("bad_input_workspace")


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

# fmt: on

# fmt: off
TABLES = [
    Case("steps above T", lambda: sf.ddim(LINEAR, 101), ValueError, "steps must be in [1, 100], got 101"),
    Case("steps: 0", lambda: sf.ddim(LINEAR, 0), ValueError, "steps must be in [1, 100], got 0"),
    Case("steps: bool", lambda: sf.ddpm(LINEAR, True), TypeError, "steps must be an integer, got True"),
    Case("steps: float", lambda: sf.ddpm(LINEAR, 2.5), TypeError, "steps must be an integer, got 2.5"),
    Case("schedule by its name", lambda: sf.ddim("linear", 4),
         TypeError, "schedule must be a NoiseSchedule or another path, got str"),
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
         ValueError,
         "spacing must be one of 'leading', 'trailing', 'linspace', 'karras', 'exponential', 'lambda', 'beta', "
         "got 'even'"),
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
         lambda: sf.StepTable("mine", "epsilon", LINEAR, np.full((2, 21), NAN), np.array([9, 0]), NEXT),
         ValueError,
         "coefficient x0_x of row 0 (timestep 9) is nan, which no network output can be multiplied with"),
    Case("coefficients: infinite",
         lambda: sf.StepTable("mine", "epsilon", LINEAR, np.full((2, 21), INF), np.array([9, 0]), NEXT),
         ValueError,
         "coefficient x0_x of row 0 (timestep 9) is inf, which no network output can be multiplied with"),
    Case("coefficients: 8 columns",
         lambda: sf.StepTable("mine", "epsilon", LINEAR, np.zeros((2, 8)), np.array([9, 0]), NEXT),
         ValueError, "a table of 2 rows must have coefficients [2, 21] and next_row [2], got [2, 8] and [2]"),
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

# fmt: on


@pytest.mark.usefixtures("no_network_call")
@pytest.mark.parametrize("case", SCHEDULES + TABLES, ids=lambda case: case.name)
def test_a_call(case: Case) -> None:
    check_case(case)
