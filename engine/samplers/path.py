"""Gaussian paths from data to noise: x = signal * x0 + noise * eps at every level.

Every sampler here joins two such levels, whatever the path. A *level* is named by one number of its path: the
training timestep of a :class:`stepfusion.samplers.schedule.NoiseSchedule`, sigma of a :class:`SigmaPath`, t of a
:class:`FlowPath`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stepfusion import _checks

Floats = NDArray[np.float64]

#: What networks may return: two numbers a level (:meth:`Path.predict`).
ALL_PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow", "edm", "consistency")
#: The most rows of a sampler on a path whose levels are real numbers; a discrete schedule has as many as timesteps.
MAX_STEPS = 1000


class Path(ABC):
    """A Gaussian path, immutable: equal paths have equal fingerprints.

    Attributes:
        name: for messages.
        predictions: what a network on this path may return, the usual one first.
        max_steps: the most levels that a sampler visits.
        discrete: True if levels are training timesteps, integers; False if they are real numbers.
    """

    name: str
    predictions: ClassVar[tuple[str, ...]]
    discrete: ClassVar[bool] = False

    @property
    @abstractmethod
    def max_steps(self) -> int:
        """The most levels that a sampler visits."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A short text: equal paths have equal ones."""

    @abstractmethod
    def pair(self, levels: ArrayLike) -> tuple[Floats, Floats]:
        """The signal and the noise at levels [R], float64 [R] each."""

    @abstractmethod
    def told(self, levels: ArrayLike) -> NDArray[Any]:
        """What a network is told of levels [R]: int64 or float64 [R]."""

    def keys(self, levels: ArrayLike) -> NDArray[np.int64]:
        """The integers that key the noise of levels [R], the same for every sampler that visits a level.

        They are the bits of the level as a float32, which grow with it.
        """
        return np.asarray(levels, dtype=np.float32).view(np.int32).astype(np.int64)

    @abstractmethod
    def predict(self, prediction: str, levels: ArrayLike) -> tuple[Floats, Floats]:
        """The weights of x and of the network's output in x0, float64 [R] each."""

    def in_scale(self, prediction: str, levels: ArrayLike) -> Floats:
        """What x is multiplied with before a network sees it, float64 [R]."""
        _checks.choice("prediction", prediction, self.predictions)
        return np.ones(np.shape(levels))

    def start_scale(self, level: float) -> float:
        """The standard deviation of the noise that a sampler starts from at a level."""
        del level
        return 1.0

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """What :func:`stepfusion.samplers.path_json.path_from_json` makes an equal path of."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Path) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)


class SigmaPath(Path):
    """x = x0 + sigma * eps, the path of EDM (Karras et al. 2022) and of consistency models (Song et al. 2023).

    Args:
        sigma_min, sigma_max: the levels between which networks were trained.
        sigma_data: the standard deviation of the data, which the preconditioning counts with.
        rho: how levels are spaced (Karras et al. 2022, equation 5).
        told_scale: networks are told ``told_scale * log(sigma)``: 1/4 in EDM (c_noise), 250 in consistency models.

    Predictions: "edm" is the raw output of a preconditioned network (Karras et al. 2022, table 1), x0 = c_skip x +
    c_out out, which was shown c_in x; "v_prediction" the same with -c_out; "consistency" has the c_skip and c_out
    that are 1 and 0 at sigma_min (Song et al. 2023, appendix C); "sample" and "epsilon" are of networks that see x
    itself.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    predictions = ("edm", "v_prediction", "consistency", "sample", "epsilon")

    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        *,
        rho: float = 7.0,
        told_scale: float = 0.25,
    ) -> None:
        self.sigma_min = _checks.number("sigma_min", sigma_min, 0.0, open_low=True)
        self.sigma_max = _checks.number("sigma_max", sigma_max, self.sigma_min, open_low=True)
        self.sigma_data = _checks.number("sigma_data", sigma_data, 0.0, open_low=True)
        self.rho = _checks.number("rho", rho, 0.0, open_low=True)
        self.told_scale = _checks.number("told_scale", told_scale, 0.0, open_low=True)
        self.name = "sigma"

    @property
    def max_steps(self) -> int:
        return MAX_STEPS

    @property
    def fingerprint(self) -> str:
        numbers = (self.sigma_min, self.sigma_max, self.sigma_data, self.rho, self.told_scale)
        return " ".join(["sigma", *(value.hex() for value in numbers)])

    def pair(self, levels: ArrayLike) -> tuple[Floats, Floats]:
        sigma = np.asarray(levels, dtype=np.float64)
        return np.ones_like(sigma), sigma

    def told(self, levels: ArrayLike) -> Floats:
        told: Floats = self.told_scale * np.log(np.asarray(levels, dtype=np.float64))
        return told

    def predict(self, prediction: str, levels: ArrayLike) -> tuple[Floats, Floats]:
        _checks.choice("prediction", prediction, self.predictions)
        sigma, data = np.asarray(levels, dtype=np.float64), self.sigma_data
        if prediction == "sample":
            return np.zeros_like(sigma), np.ones_like(sigma)
        if prediction == "epsilon":
            return np.ones_like(sigma), -sigma
        above = sigma - self.sigma_min if prediction == "consistency" else sigma
        skip = data**2 / (above**2 + data**2)
        out = above * data / np.sqrt(sigma**2 + data**2)
        return skip, -out if prediction == "v_prediction" else out

    def in_scale(self, prediction: str, levels: ArrayLike) -> Floats:
        ones = super().in_scale(prediction, levels)
        if prediction in ("sample", "epsilon"):
            return ones
        scale: Floats = ones / np.sqrt(np.asarray(levels, dtype=np.float64) ** 2 + self.sigma_data**2)
        return scale

    def start_scale(self, level: float) -> float:
        return float(level)

    def to_json(self) -> dict[str, Any]:
        names = ("sigma_min", "sigma_max", "sigma_data", "rho", "told_scale")
        return {"kind": "sigma", **{name: getattr(self, name) for name in names}}

    def __repr__(self) -> str:
        return f"SigmaPath({self.sigma_min:g} to {self.sigma_max:g}, sigma_data {self.sigma_data:g})"


class FlowPath(Path):
    """x = (1 - t) x0 + t eps, the straight path of rectified flow (Liu et al. 2023; Lipman et al. 2023).

    Args:
        shift: levels are moved to shift t / (1 + (shift - 1) t), towards noise if it is above 1 (Esser et al. 2024,
            equation 23).
        told_scale: networks are told ``told_scale * t``: 1, or 1000 for networks of diffusers.

    Predictions: "flow" is the velocity eps - x0; "sample" is x0, "epsilon" is eps.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    predictions = ("flow", "sample", "epsilon")

    def __init__(self, shift: float = 1.0, *, told_scale: float = 1.0) -> None:
        self.shift = _checks.number("shift", shift, 0.0, open_low=True)
        self.told_scale = _checks.number("told_scale", told_scale, 0.0, open_low=True)
        self.name = "flow"

    @property
    def max_steps(self) -> int:
        return MAX_STEPS

    @property
    def fingerprint(self) -> str:
        return f"flow {self.shift.hex()} {self.told_scale.hex()}"

    def shifted(self, t: ArrayLike) -> Floats:
        """The levels of unshifted times ``t``."""
        t = np.asarray(t, dtype=np.float64)
        shifted: Floats = self.shift * t / (1 + (self.shift - 1) * t)
        return shifted

    def pair(self, levels: ArrayLike) -> tuple[Floats, Floats]:
        t = np.asarray(levels, dtype=np.float64)
        return 1 - t, t

    def told(self, levels: ArrayLike) -> Floats:
        return self.told_scale * np.asarray(levels, dtype=np.float64)

    def predict(self, prediction: str, levels: ArrayLike) -> tuple[Floats, Floats]:
        _checks.choice("prediction", prediction, self.predictions)
        t = np.asarray(levels, dtype=np.float64)
        if prediction == "sample":
            return np.zeros_like(t), np.ones_like(t)
        if prediction == "flow":
            return np.ones_like(t), -t
        if (t == 1).any():
            raise ValueError(
                "prediction 'epsilon' cannot start at t = 1, where the signal is zero: use a network that returns "
                "'flow' or 'sample', or levels below 1"
            )
        return 1 / (1 - t), -t / (1 - t)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "flow", "shift": self.shift, "told_scale": self.told_scale}

    def __repr__(self) -> str:
        return f"FlowPath(shift {self.shift:g})"
