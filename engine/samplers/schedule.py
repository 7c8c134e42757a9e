"""Noise schedules: every coefficient of the DDPM paper, in float64, by its usual name.

The forward process is q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I) for t = 0 .. T-1 (Ho et al. 2020,
equation 2; here, as in most code, t counts from 0), so that q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I)
(equation 4).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from stepfusion import _checks
from stepfusion.files.strict_model import StrictModel
from stepfusion.kernels import coefficients as algebra
from stepfusion.samplers.betas import MAX_TIMESTEPS, check_betas
from stepfusion.samplers.path import Path
from stepfusion.samplers.scheduler_keys import SCHEDULE_KEYS, check_keys, scheduler_of

Array = NDArray[np.float64]


class ScheduleConfig(StrictModel):
    """The keys of a diffusers scheduler config that shape the schedule, with its defaults."""

    num_train_timesteps: Annotated[int, Field(ge=1, le=MAX_TIMESTEPS)] = 1000
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"] = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    trained_betas: Any = None
    rescale_betas_zero_snr: bool = False


class NoiseSchedule(Path):
    """A discrete noise schedule of T timesteps, immutable, float64: a variance-preserving path.

    Made by :meth:`linear`, :meth:`scaled_linear`, :meth:`quadratic`, :meth:`cosine`, :meth:`sigmoid`,
    :meth:`from_betas` or :meth:`from_config`. Every table is a read-only float64 NumPy array [T].
    """

    predictions = algebra.PREDICTIONS
    discrete = True

    def __init__(self, betas: ArrayLike, *, name: str = "custom") -> None:
        """``betas``: [T], each in (0, 1), the last one possibly 1 (zero terminal SNR). ``name`` is for messages.

        Raises:
            TypeError, ValueError: ``betas`` are not such numbers (:func:`stepfusion.samplers.betas.check_betas`).
        """
        self.betas: Array = _frozen(check_betas(betas))
        self.name = name

    @classmethod
    def linear(
        cls, timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02, *, scaled: bool = True
    ) -> NoiseSchedule:
        """Betas on a line (Ho et al. 2020, section 4).

        ``scaled`` multiplies both end points by 1000 / T, as guided-diffusion does, which keeps the total noise when
        T is not 1000; diffusers uses them as they are (``scaled=False``). At T = 1000 the two are equal.
        """
        timesteps = _timesteps(timesteps)
        start, end = _end_points(beta_start, beta_end)
        factor = 1000 / timesteps if _checks.boolean("scaled", scaled) else 1.0
        if end * factor >= 1:
            raise ValueError(
                f"timesteps = {timesteps} scales beta_end to {end * factor:g}, which must stay below 1: "
                "use more timesteps or scaled=False"
            )
        return cls(np.linspace(start * factor, end * factor, timesteps), name="linear")

    @classmethod
    def scaled_linear(
        cls, timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
    ) -> NoiseSchedule:
        """Square roots of the betas on a line, with latent diffusion's end points (Rombach et al. 2022)."""
        start, end = _end_points(beta_start, beta_end)
        return cls(np.linspace(start**0.5, end**0.5, _timesteps(timesteps)) ** 2, name="scaled_linear")

    @classmethod
    def quadratic(cls, timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
        """Square roots of the betas on a line, with DDPM's end points ("quad" in Ho et al.'s code)."""
        start, end = _end_points(beta_start, beta_end)
        return cls(np.linspace(start**0.5, end**0.5, _timesteps(timesteps)) ** 2, name="quadratic")

    @classmethod
    def cosine(cls, timesteps: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> NoiseSchedule:
        """abar_t follows a squared cosine (Nichol & Dhariwal 2021, equation 17)."""
        timesteps = _timesteps(timesteps)
        s = _checks.number("s", s, 0.0, 1.0)
        max_beta = _checks.number("max_beta", max_beta, 0.0, 0.9999999, open_low=True)
        f = np.cos((np.arange(timesteps + 1) / timesteps + s) / (1 + s) * np.pi / 2) ** 2
        return cls(np.minimum(1 - f[1:] / f[:-1], max_beta), name="cosine")

    @classmethod
    def sigmoid(cls, timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
        """Betas on a sigmoid over [-6, 6] (GeoDiff, Xu et al. 2022)."""
        start, end = _end_points(beta_start, beta_end)
        return cls(start + (end - start) / (1 + np.exp(-np.linspace(-6, 6, _timesteps(timesteps)))), name="sigmoid")

    @classmethod
    def from_betas(cls, betas: ArrayLike) -> NoiseSchedule:
        """A schedule with the given betas, [T]."""
        return cls(betas)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """The schedule that a diffusers scheduler config describes (``scheduler_config.json`` as a dict).

        Keys that shape the sampler and not the schedule are passed over
        (:mod:`stepfusion.samplers.scheduler_keys`).

        Raises:
            TypeError, ValueError: a key or a scheduler is unknown, or a value is of another type or out of range.
        """
        if not isinstance(config, Mapping):
            raise TypeError(f"config must be a dict, got {type(config).__name__}")
        check_keys(config, "scheduler config has ")
        defaults = scheduler_of(config)[1].defaults
        merged = {**defaults, **config}
        read = ScheduleConfig.of({key: merged[key] for key in merged if key in SCHEDULE_KEYS})
        schedule = cls._of_config(read)
        return schedule.rescale_zero_terminal_snr() if read.rescale_betas_zero_snr else schedule

    @classmethod
    def _of_config(cls, read: ScheduleConfig) -> NoiseSchedule:
        """The schedule before it is rescaled."""
        total, ends = read.num_train_timesteps, (read.beta_start, read.beta_end)
        if read.trained_betas is not None:
            betas = check_betas(read.trained_betas, "trained_betas")
            if len(betas) != total:
                raise ValueError(f"trained_betas must have num_train_timesteps = {total} entries, got {len(betas)}")
            return cls(betas)
        if read.beta_schedule == "scaled_linear":
            return cls.scaled_linear(total, *ends)
        if read.beta_schedule == "squaredcos_cap_v2":
            return cls.cosine(total)
        if read.beta_schedule == "sigmoid":
            return cls.sigmoid(total, *ends)
        return cls.linear(total, *ends, scaled=False)

    def rescale_zero_terminal_snr(self) -> NoiseSchedule:
        """Shift and scale sqrt(abar) so that the last one is exactly 0 (Lin et al. 2024, algorithm 1)."""
        root = self.sqrt_alphas_cumprod
        if len(root) < 2:
            raise ValueError("rescale_zero_terminal_snr needs at least 2 timesteps, got 1")
        root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
        cumprod = root**2
        alphas = np.concatenate((cumprod[:1], cumprod[1:] / cumprod[:-1]))
        return NoiseSchedule(1 - alphas, name=f"{self.name}, zero terminal SNR")

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.betas)

    @property
    def max_steps(self) -> int:
        """T."""
        return self.num_timesteps

    def pair(self, levels: ArrayLike) -> tuple[Array, Array]:
        """sqrt(abar) and sqrt(1 - abar) at timesteps [R]."""
        visits = np.asarray(levels)
        return self.sqrt_alphas_cumprod[visits], self.sqrt_one_minus_alphas_cumprod[visits]

    def told(self, levels: ArrayLike) -> NDArray[np.int64]:
        """The timesteps themselves."""
        return np.asarray(levels, dtype=np.int64)

    def keys(self, levels: ArrayLike) -> NDArray[np.int64]:
        """The timesteps themselves."""
        return np.asarray(levels, dtype=np.int64)

    def predict(self, prediction: str, levels: ArrayLike) -> tuple[Array, Array]:
        """:func:`stepfusion.kernels.coefficients.predict_x0` at timesteps [R]."""
        _checks.choice("prediction", prediction, self.predictions)
        return algebra.predict_x0(self.alphas_cumprod[np.asarray(levels)], prediction)

    def to_json(self) -> dict[str, Any]:
        """Its name and its betas."""
        return {"name": self.name, "betas": self.betas.tolist()}

    @cached_property
    def alphas(self) -> Array:
        """1 - beta_t."""
        return _frozen(1 - self.betas)

    @cached_property
    def alphas_cumprod(self) -> Array:
        """abar_t, the product of alpha_0 .. alpha_t."""
        return _frozen(np.cumprod(self.alphas, dtype=np.float64))

    @cached_property
    def alphas_cumprod_prev(self) -> Array:
        """abar_{t-1}, 1 at t = 0."""
        return _frozen(np.append(1.0, self.alphas_cumprod[:-1]))

    @cached_property
    def alphas_cumprod_next(self) -> Array:
        """abar_{t+1}, 0 at t = T-1."""
        return _frozen(np.append(self.alphas_cumprod[1:], 0.0))

    @cached_property
    def sqrt_alphas_cumprod(self) -> Array:
        """sqrt(abar_t), the weight of x_0 in x_t."""
        return _frozen(np.sqrt(self.alphas_cumprod))

    @cached_property
    def sqrt_one_minus_alphas_cumprod(self) -> Array:
        """sqrt(1 - abar_t), the weight of the noise in x_t."""
        return _frozen(np.sqrt(1 - self.alphas_cumprod))

    @cached_property
    def log_one_minus_alphas_cumprod(self) -> Array:
        """log(1 - abar_t), the log variance of q(x_t | x_0)."""
        return _frozen(np.log(1 - self.alphas_cumprod))

    @cached_property
    def sqrt_recip_alphas_cumprod(self) -> Array:
        """sqrt(1 / abar_t); inf if abar_t is 0."""
        with np.errstate(divide="ignore"):
            return _frozen(np.sqrt(1 / self.alphas_cumprod))

    @cached_property
    def sqrt_recipm1_alphas_cumprod(self) -> Array:
        """sqrt(1 / abar_t - 1); inf if abar_t is 0."""
        with np.errstate(divide="ignore"):
            return _frozen(np.sqrt(1 / self.alphas_cumprod - 1))

    @cached_property
    def snr(self) -> Array:
        """Signal-to-noise ratio abar_t / (1 - abar_t) (Kingma et al. 2021)."""
        return _frozen(self.alphas_cumprod / (1 - self.alphas_cumprod))

    @cached_property
    def posterior_variance(self) -> Array:
        """beta-tilde_t, the variance of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, equation 7); 0 at t = 0."""
        return _frozen(self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod))

    @cached_property
    def posterior_log_variance_clipped(self) -> Array:
        """log beta-tilde_t, with the entry of t = 1 in place of the -inf at t = 0 (T = 1: log beta_0)."""
        variance = self.posterior_variance
        first = variance[1] if len(variance) > 1 else self.betas[0]
        return _frozen(np.log(np.append(first, variance[1:])))

    @cached_property
    def posterior_mean_coef1(self) -> Array:
        """The weight of x_0 in the mean of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, equation 7)."""
        return _frozen(self.betas * np.sqrt(self.alphas_cumprod_prev) / (1 - self.alphas_cumprod))

    @cached_property
    def posterior_mean_coef2(self) -> Array:
        """The weight of x_t in the mean of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, equation 7)."""
        return _frozen((1 - self.alphas_cumprod_prev) * np.sqrt(self.alphas) / (1 - self.alphas_cumprod))

    @cached_property
    def fingerprint(self) -> str:
        """A short hash of the betas' bits: equal schedules have equal fingerprints."""
        return hashlib.sha256(self.betas.tobytes()).hexdigest()[:16]

    def __repr__(self) -> str:
        first, last = self.alphas_cumprod[[0, -1]]
        return f"NoiseSchedule({self.name}, {self.num_timesteps} timesteps, abar {first:.6f} to {last:.3g})"


def _frozen(array: Array) -> Array:
    array.flags.writeable = False
    return array


def _timesteps(value: int) -> int:
    return _checks.integer("timesteps", value, 1, MAX_TIMESTEPS)


def _end_points(beta_start: float, beta_end: float) -> tuple[float, float]:
    start = _checks.number("beta_start", beta_start, 0.0, 0.9999999, open_low=True)
    end = _checks.number("beta_end", beta_end, 0.0, 0.9999999, open_low=True)
    if start > end:
        raise ValueError(f"beta_start must not exceed beta_end, got {start:g} and {end:g}")
    return start, end
