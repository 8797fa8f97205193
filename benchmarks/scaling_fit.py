"""Power laws with a floor, fitted to the losses of finished runs, and what they say of compute. Trains nothing.

Hoffmann et al. 2022 (Training Compute-Optimal Large Language Models): the third approach is `fit` with two variables,
the first is `envelope` and `power`. Kaplan et al. 2020 call the exponents alpha_N, alpha_D and alpha_C.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits

# Where the quadratic part of the loss on log-residuals ends: small runs differ by this much from seed to seed. Hoffmann
# et al. (section 3.3) take a tenth of it for long runs.
HUBER_DELTA = 1e-2
STARTS = {"floor": (0.05, 0.5, 0.9), "exponent": (0.1, 0.4, 1.0)}  # floor as a share of the least loss
MOST = 5.0  # the largest exponent that is looked for
RESAMPLES = 100  # of the residuals, for the intervals
SHARE = 0.9  # of the resamples that an interval holds


class FitError(ValueError):
    """The points don't determine the curve; the sentence says why and what to do."""


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """floor + sum_k scales[k] * variables[k] ** -exponents[k]."""

    floor: float
    scales: tuple[float, ...]
    exponents: tuple[float, ...]

    def __call__(self, *variables: Any) -> Any:
        """The loss at values (numbers or arrays that broadcast) of the variables."""
        terms = zip(self.scales, variables, self.exponents, strict=True)
        return self.floor + sum(scale * np.asarray(x, float) ** -exponent for scale, x, exponent in terms)


@dataclasses.dataclass(frozen=True)
class Fit:
    """A fitted curve.

    Attributes:
        law: the curve.
        intervals: (low, high) of each exponent: the middle 90 % over fits to resampled residuals; NaN without any.
        points: how many losses it was fitted to.
        error: root mean square of the relative residuals.
    """

    law: PowerLaw
    intervals: tuple[tuple[float, float], ...]
    points: int
    error: float


def fit(losses: Sequence[float], *variables: Sequence[float], resamples: int = RESAMPLES, seed: int = 0) -> Fit:
    """The power law of one or several variables through losses.

    The Huber loss of the residuals of log loss is minimised by L-BFGS from a grid of starts, over the logarithms of
    floor and scales (Hoffmann et al., equation 3). Exponents lie in [0, 5].

    Args:
        losses: positive, [n].
        *variables: each positive, [n]: parameters, images, FLOPs.
        resamples: fits to the curve with resampled residuals, which give the intervals; 0: intervals of no width.
        seed: of the resampling.

    Raises:
        FitError: fewer points than the curve has parameters, fewer than three values of a variable, or numbers that
            are not positive.
    """
    loss_n, x_kxn = np.asarray(losses, float), np.asarray(variables, float)
    _check(loss_n, x_kxn)
    # Around the middle of the points, so that scale and exponent of a term are nearly independent.
    centres = np.log(x_kxn).mean(axis=1)
    u_kxn, log_loss = np.log(x_kxn) - centres[:, None], np.log(loss_n)
    with threadpool_limits(1):  # on numbers this few, threads of the linear algebra only wait for each other
        best = _best(log_loss, u_kxn, _starts(log_loss, len(u_kxn)))
        law, drawn = _law(best, centres), _resampled(log_loss, u_kxn, best, resamples, seed)
    exponents = [_law(theta, centres).exponents for theta in drawn] or [law.exponents]
    edges = np.quantile(exponents, [(1 - SHARE) / 2, (1 + SHARE) / 2], axis=0)
    if len(loss_n) == len(best):
        edges = np.full_like(edges, np.nan)  # a curve through every point has no residuals that could tell
    intervals = tuple((float(low), float(high)) for low, high in edges.T)
    error = np.sqrt(np.mean(np.square(log_loss - _log_law(best, u_kxn)[0])))
    return Fit(law, intervals, len(loss_n), float(error))


def envelope(compute: Sequence[float], losses: Sequence[float]) -> list[int]:
    """The runs that no other run beats with as little compute, by compute: indices of the lower envelope."""
    order = sorted(range(len(losses)), key=lambda i: (compute[i], losses[i]))
    best = itertools.accumulate((losses[i] for i in order), min, initial=np.inf)
    return [i for i, before in zip(order, best, strict=False) if losses[i] < before]


def power(x: Sequence[float], y: Sequence[float]) -> float:
    """The exponent a of y ~ x ** a, by least squares in the logarithms; NaN for fewer than two values of x."""
    if len(set(x)) < 2:
        return float("nan")
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def optimal_exponent(joint: PowerLaw) -> float:
    """a of N ~ C ** a at least loss for C ~ N D, by the exponents of L(N, D): beta / (alpha + beta)."""
    alpha, beta = joint.exponents
    return beta / (alpha + beta) if alpha + beta else float("nan")


def _check(loss_n: np.ndarray, x_kxn: np.ndarray) -> None:
    needed, count = 1 + 2 * len(x_kxn), len(loss_n)
    if count < needed:
        raise FitError(f"{count} runs don't determine a curve of {needed} parameters; train more sizes or amounts")
    if not (np.isfinite(loss_n).all() and np.isfinite(x_kxn).all() and loss_n.min() > 0 and x_kxn.min() > 0):
        raise FitError("a curve needs finite positive losses and amounts; look at the runs that diverged")
    fewest = min(len(np.unique(x)) for x in x_kxn)
    if fewest < 3:
        raise FitError(f"{fewest} different values don't tell floor, scale and exponent apart; train at least three")


def _starts(log_loss: np.ndarray, terms: int) -> list[np.ndarray]:
    """[log floor, log scales, exponents] from which the search begins."""
    starts = []
    for share in STARTS["floor"]:
        floor = share * np.exp(log_loss.min())
        scale = np.log((np.exp(log_loss).mean() - floor) / terms)
        for exponents in itertools.product(STARTS["exponent"], repeat=terms):
            starts.append(np.array([np.log(floor), *[scale] * terms, *exponents]))
    return starts


def _log_law(theta: np.ndarray, u_kxn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(log of the curve [n], its gradient [parameters, n])."""
    terms = len(u_kxn)
    scales, exponents = theta[1 : 1 + terms, None], theta[1 + terms :, None]
    parts = np.exp(np.concatenate([np.full((1, u_kxn.shape[1]), theta[0]), scales - exponents * u_kxn]))
    total = parts.sum(axis=0)
    shares = parts / total
    return np.log(total), np.concatenate([shares, -shares[1:] * u_kxn])


def _best(log_loss: np.ndarray, u_kxn: np.ndarray, starts: Sequence[np.ndarray]) -> np.ndarray:
    """The parameters of the least Huber loss that L-BFGS finds from any start."""

    def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = _log_law(theta, u_kxn)
        residual = (value - log_loss) / HUBER_DELTA
        clipped = np.clip(residual, -1, 1)
        return float((clipped * (residual - clipped / 2)).sum()), gradient @ clipped / HUBER_DELTA

    terms, top = len(u_kxn), log_loss.max()
    bounds = [(top - 10, top), *[(top - 15, top + 2)] * terms, *[(0.0, MOST)] * terms]
    options: dict[str, Any] = {"maxiter": 500, "ftol": 1e-13, "gtol": 1e-7}
    found = [
        minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options) for start in starts
    ]
    return min(found, key=lambda end: end.fun).x


def _resampled(log_loss: np.ndarray, u_kxn: np.ndarray, best: np.ndarray, count: int, seed: int) -> list[np.ndarray]:
    """The parameters of curves through the best one's losses, each with some point's residual."""
    curve, random = _log_law(best, u_kxn)[0], np.random.default_rng(seed)
    residuals = log_loss - curve
    # Residuals are smaller than the noise: the curve has bent to the points.
    spread = np.sqrt(len(curve) / max(len(curve) - len(best), 1)) * (residuals - residuals.mean())
    return [_best(curve + random.choice(spread, len(spread)), u_kxn, [best]) for _ in range(count)]


def _law(theta: np.ndarray, centres: np.ndarray) -> PowerLaw:
    terms = len(centres)
    exponents = theta[1 + terms :]
    scales = np.exp(theta[1 : 1 + terms] + exponents * centres)
    return PowerLaw(float(np.exp(theta[0])), tuple(map(float, scales)), tuple(map(float, exponents)))
