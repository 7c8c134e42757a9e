"""The algebra of the samplers: one row of coefficients for a move from one noise level to another.

Every step is (see :mod:`stepfusion.kernels.step`)

    x0     = clip(x0_x * x + x0_out * out, -clip, clip)
    x_next = next_x0 * x0 + next_x * x + next_out * out
             + next_prev * h[0] + next_prev2 * h[1] + next_prev3 * h[2] + sigma * z
    h      = (keep_x * x + keep_x0 * x0, h[0], h[1])                 if keep_x or keep_x0 is not 0

with the history h that earlier rows left, and if a part of the image is known, that part is known_x * known +
known_sigma * z instead. The network is shown net_scale * x_next next.

The functions here take the levels abar (``alphas_cumprod`` where the step starts) and abar_prev (where it ends) and
return the coefficients. They use arithmetic operators only, so that one formula serves NumPy arrays and PyTorch
tensors of any float dtype, whole tables at a time.
"""

from __future__ import annotations

from typing import Any, TypeVar

Levels = TypeVar("Levels", bound=Any)  # a NumPy array or a PyTorch tensor

PREDICTIONS = ("epsilon", "sample", "v_prediction")
VARIANCES = ("fixed_small", "fixed_large", "learned", "learned_range")

#: The columns of a coefficient table, in order.
COLUMNS = (
    *("x0_x", "x0_out", "clip", "next_x0", "next_x", "next_out", "sigma", "half_log_min", "half_log_span"),
    *("next_prev", "known_x", "known_sigma", "threshold", "threshold_max"),
    *("net_scale", "next_prev2", "next_prev3", "keep_x", "keep_x0", "unguided", "rescale"),
)
#: What a column holds if nothing is said of it; all others hold 0.
DEFAULTS = {"net_scale": 1.0}
#: The weights of what earlier rows left in the history, the latest first.
HISTORY = ("next_prev", "next_prev2", "next_prev3")
#: Columns of rows that need all elements of an image at once, which only the reference step sees, if they are not 0.
WHOLE_IMAGE = ("threshold", "rescale")


def predict_x0(abar: Levels, prediction: str) -> tuple[Levels, Levels]:
    """The weights of x and of the network's output in x0.

    epsilon: (x - sqrt(1 - abar) out) / sqrt(abar) (Ho et al. 2020, equation 4 solved for x0); sample: out;
    v_prediction: sqrt(abar) x - sqrt(1 - abar) out (Salimans & Ho 2022, appendix D).
    """
    signal, noise = abar**0.5, (1 - abar) ** 0.5
    if prediction == "epsilon":
        return 1 / signal, -noise / signal
    if prediction == "sample":
        return abar * 0, abar * 0 + 1
    return signal, -noise


def predict_eps(abar: Levels, prediction: str) -> tuple[Levels, Levels]:
    """The weights of x and of the network's output in eps: the inverse of :func:`predict_x0`."""
    signal, noise = abar**0.5, (1 - abar) ** 0.5
    if prediction == "epsilon":
        return abar * 0, abar * 0 + 1
    if prediction == "sample":
        return 1 / noise, -signal / noise
    return noise, signal


def posterior(abar: Levels, abar_prev: Levels) -> tuple[Levels, Levels, Levels, Levels]:
    """Mean weights of x0 and x, variance beta-tilde and beta of q(x_prev | x, x0) (Ho et al. 2020, equation 7).

    beta is the one of the (respaced) jump, 1 - abar / abar_prev.
    """
    alpha = abar / abar_prev
    beta = 1 - alpha
    mean_x0 = abar_prev**0.5 * beta / (1 - abar)
    mean_x = alpha**0.5 * (1 - abar_prev) / (1 - abar)
    return mean_x0, mean_x, (1 - abar_prev) / (1 - abar) * beta, beta


def ddpm(abar: Levels, abar_prev: Levels, *, prediction: str, variance: str) -> dict[str, Levels]:
    """One ancestral DDPM step, without ``clip`` and with noise everywhere (the caller silences the last row).

    The network's eps, x0 or v becomes x0, and x_next ~ q(x_prev | x, x0) with the variance beta-tilde
    (``fixed_small``), beta (``fixed_large``), or interpolated between the two in the log domain by the network
    (``learned_range``, Nichol & Dhariwal 2021, equation 15: sigma is then 1 and the kernel multiplies by
    exp(half_log_min + frac * half_log_span)), or its log is the network's v itself (``learned``: half of it is
    -1/2 + frac).
    """
    mean_x0, mean_x, small, large = posterior(abar, abar_prev)
    x0_x, x0_out = predict_x0(abar, prediction)
    columns = {"x0_x": x0_x, "x0_out": x0_out, "next_x0": mean_x0, "next_x": mean_x, "next_out": abar * 0}
    columns |= known(abar_prev)
    if variance == "learned":
        return {**columns, "sigma": abar * 0 + 1, "half_log_min": abar * 0 - 0.5, "half_log_span": abar * 0 + 1}
    if variance == "learned_range":
        return {**columns, "sigma": abar * 0 + 1, "small": small, "large": large}
    return {**columns, "sigma": (small if variance == "fixed_small" else large) ** 0.5}


def ddim(abar: Levels, abar_prev: Levels, *, eta: float, prediction: str, rederive_eps: bool) -> dict[str, Levels]:
    """One DDIM step (Song et al. 2021, equation 12), without ``clip``.

    sigma = eta sqrt((1 - abar_prev) / (1 - abar)) sqrt(1 - abar / abar_prev)               (equation 16)
    x_next = sqrt(abar_prev) x0 + sqrt(1 - abar_prev - sigma^2) eps + sigma z

    eps is the network's own, or with ``rederive_eps`` the one that belongs to the clipped x0,
    (x - sqrt(abar) x0) / sqrt(1 - abar). The radicand is clamped at 0, where rounding (or a zero terminal SNR with
    eta = 1) leaves it negative.
    """
    sigma = eta * ((1 - abar_prev) / (1 - abar) * _positive(1 - abar / abar_prev)) ** 0.5
    direction = _positive(1 - abar_prev - sigma**2) ** 0.5
    x0_x, x0_out = predict_x0(abar, prediction)
    next_x0 = abar_prev**0.5
    if rederive_eps:
        noise = (1 - abar) ** 0.5
        next_x0, next_x, next_out = next_x0 - direction * abar**0.5 / noise, direction / noise, abar * 0
    else:
        eps_x, eps_out = predict_eps(abar, prediction)
        next_x, next_out = direction * eps_x, direction * eps_out
    return {
        "x0_x": x0_x,
        "x0_out": x0_out,
        "next_x0": next_x0,
        "next_x": next_x,
        "next_out": next_out,
        "sigma": sigma,
        **known(abar_prev),
    }


def dpmpp_2m(abar: Levels, abar_prev: Levels, history: Levels, *, prediction: str) -> dict[str, Levels]:
    """One step of DPM-Solver++(2M), data prediction (Lu et al. 2022, algorithm 2), without ``clip``.

    x_next = sigma_t / sigma_s x - alpha_t (e^-h - 1) D,    D = (1 + w) x0 - w x0_prev

    with alpha = sqrt(abar), sigma = sqrt(1 - abar), s where the step starts (``abar``), t where it ends
    (``abar_prev``), h = lambda_t - lambda_s, lambda = log(alpha / sigma). ``history`` is w = h / (2 h_prev) =
    1 / (2 r), 0 for a first-order step, which is :func:`ddim` with eta = 0: -alpha_t (e^-h - 1) = alpha_t -
    sigma_t alpha_s / sigma_s. Every row leaves its x0 in the history.
    """
    columns = ddim(abar, abar_prev, eta=0.0, prediction=prediction, rederive_eps=True)
    first_order = columns["next_x0"]
    columns |= {"next_x0": first_order * (1 + history), "next_prev": -first_order * history}
    return {**columns, "keep_x0": abar * 0 + 1}


def known(abar_prev: Levels) -> dict[str, Levels]:
    """A known image diffused to the level where a row ends: q(x_t | x_0) of Ho et al. 2020, equation 4.

    (Lugmayr et al. 2022, equation 8a.)
    """
    return {"known_x": abar_prev**0.5, "known_sigma": (1 - abar_prev) ** 0.5}


def ddim_inversion(abar: Levels, abar_next: Levels, abar_network: Levels, *, prediction: str) -> dict[str, Levels]:
    """One step of the DDIM equation run from data towards noise (Song et al. 2021, section 4.3), without ``clip``.

    x stands at the level abar and goes to abar_next < abar; the network was evaluated at the timestep of abar_network
    (the source or the target). Its output becomes eps at its own level, and x0 follows from x and eps at the level of
    x, so that every prediction type stays finite at abar = 1. With abar_network = abar this is :func:`ddim` with
    eta = 0.
    """
    eps_x, eps_out = predict_eps(abar_network, prediction)
    signal, noise = abar**0.5, (1 - abar) ** 0.5
    noise_next = (1 - abar_next) ** 0.5
    return {
        "x0_x": (1 - noise * eps_x) / signal,
        "x0_out": -noise * eps_out / signal,
        "next_x0": abar_next**0.5,
        "next_x": noise_next * eps_x,
        "next_out": noise_next * eps_out,
        "sigma": abar * 0,
    }


def _positive(value: Levels) -> Levels:
    """max(value, 0) with operators that NumPy and PyTorch share."""
    result: Levels = (value + abs(value)) / 2
    return result
