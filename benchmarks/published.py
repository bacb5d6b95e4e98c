"""Published 95 % intervals, for many simulated data sets at once; benchmarks/coverage.py compares ours with them."""

from __future__ import annotations

import numpy as np
from scipy import stats
from scipy.special import expit, logit

from workbench.intervals import tango, wilson

Bounds = tuple[np.ndarray, np.ndarray]
Z = float(stats.norm.ppf(0.975))
RESAMPLES = 499


def clopper_pearson(p: np.ndarray, n: np.ndarray) -> Bounds:
    """Return the interval of Clopper and Pearson (1934); n need not be an integer."""
    right, wrong = p * n, (1 - p) * n
    low = np.where(right > 1e-9, stats.beta.ppf(0.025, np.maximum(right, 1e-9), wrong + 1), 0.0)
    return low, np.where(wrong > 1e-9, stats.beta.ppf(0.975, right + 1, np.maximum(wrong, 1e-9)), 1.0)


def jeffreys(p: np.ndarray, n: np.ndarray) -> Bounds:
    """Return Jeffreys' interval in the form of Brown, Cai and DasGupta (2001)."""
    low = stats.beta.ppf(0.025, p * n + 0.5, (1 - p) * n + 0.5)
    high = stats.beta.ppf(0.975, p * n + 0.5, (1 - p) * n + 0.5)
    return np.where(p > 0, low, 0.0), np.where(p < 1, high, 1.0)


def proportions(right: np.ndarray, count: np.ndarray, rng: np.random.Generator) -> dict[str, Bounds]:
    """Return intervals of an accuracy: for independent questions, for surveys, and from resampling images.

    Args:
        right: right answers of each image, (draw, image).
        count: questions of each image, (draw, image).
    """
    n, images = count.sum(axis=1), count.shape[1]
    p = right.sum(axis=1) / n
    linear = (right - p[:, None] * count) / n[:, None]
    variance = images / (images - 1) * (linear**2).sum(axis=1)
    binomial = p * (1 - p) / (n - 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        effect = np.where(binomial > 0, variance / binomial, 1.0)
        t = stats.t.ppf(0.975, images - 1)
        adjusted = np.minimum(n, n / effect * (stats.t.ppf(0.975, n - 1) / t) ** 2)  # Korn and Graubard 1998, eq. 3
        scale = np.where(binomial > 0, variance / (p * (1 - p)), 0)
        wald = t * np.sqrt(variance)
        steep = np.where(p * (1 - p) > 0, wald / (p * (1 - p)), 0)
        logits = expit(logit(p) - steep), expit(logit(p) + steep)
    return {
        "Wilson, independent": wilson(p, Z**2 / n),
        "Clopper-Pearson, independent": clopper_pearson(p, n),
        "Jeffreys, independent": jeffreys(p, n),
        "Student, linearised": (p - wald, p + wald),
        "logit, Student": (np.where(p > 0, logits[0], 0), np.where(p < 1, logits[1], 1)),
        "Korn-Graubard": clopper_pearson(p, adjusted),
        "Wilson, effective n": wilson(p, np.where(scale > 0, Z**2 * scale, Z**2 / n)),
        "Wilson, Korn-Graubard n": wilson(p, Z**2 / adjusted),
        "Jeffreys, Korn-Graubard n": jeffreys(p, adjusted),
        **_resampled(right, count, rng),
    }


def differences(gained: np.ndarray, lost: np.ndarray, count: np.ndarray, rng: np.random.Generator) -> dict[str, Bounds]:
    """Return intervals of a paired difference from gained, lost and all answers, each (draw, image)."""
    n, images = count.sum(axis=1), count.shape[1]
    up, down = gained.sum(axis=1) / n, lost.sum(axis=1) / n
    d = up - down
    linear = (gained - lost - d[:, None] * count) / n[:, None]
    variance = images / (images - 1) * (linear**2).sum(axis=1)
    spread = up + down - d**2
    with np.errstate(invalid="ignore", divide="ignore"):
        effect = np.where(spread > 0, variance / (spread / (n - 1)), 1.0)
        t = stats.t.ppf(0.975, images - 1)
        adjusted = np.minimum(n, n / effect * (stats.t.ppf(0.975, n - 1) / t) ** 2)
        phi = -np.sqrt(up * down / ((1 - up) * (1 - down)))
    wald = t * np.sqrt(variance)
    (up_low, up_high), (down_low, down_high) = wilson(up, Z**2 / n), wilson(down, Z**2 / n)

    def combined(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.sqrt((x**2 + y**2 - 2 * phi * x * y).clip(min=0))

    return {
        "Tango, independent": tango(up, down, Z**2 / n),
        "MOVER of Wilson, independent": (
            d - combined(up - up_low, down_high - down),
            d + combined(up_high - up, down - down_low),
        ),
        "Student, linearised": (d - wald, d + wald),
        "Tango, Korn-Graubard n": tango(up, down, Z**2 / adjusted),
        **_resampled(gained - lost, count, rng),
    }


def means(
    values: np.ndarray,
    rng: np.random.Generator,
    *,
    bounds: tuple[float, float] = (-np.inf, np.inf),
    resampled: bool = True,
) -> dict[str, Bounds]:
    """Return intervals of the mean of values (draw, unit)."""
    n, mean, error = values.shape[1], values.mean(axis=1), values.std(axis=1, ddof=1) / np.sqrt(values.shape[1])
    t = stats.t.ppf(0.975, n - 1)
    intervals = {"Student": ((mean - t * error).clip(*bounds), (mean + t * error).clip(*bounds))}
    if np.isfinite(bounds).all():
        with np.errstate(invalid="ignore", divide="ignore"):
            steep = np.where(mean * (1 - mean) > 0, t * error / (mean * (1 - mean)), 0)
            intervals["logit, Student"] = (
                np.where(mean > 0, expit(logit(mean) - steep), 0),
                np.where(mean < 1, expit(logit(mean) + steep), 1),
            )
    return intervals | (_resampled(values, np.ones_like(values), rng, studentized=True) if resampled else {})


def _resampled(
    total: np.ndarray, count: np.ndarray, rng: np.random.Generator, *, studentized: bool = False
) -> dict[str, Bounds]:
    """Return percentile and BCa (Efron 1987) intervals; whole units are resampled.

    With `studentized`, for one value per unit, the bootstrap-t interval as well.
    """
    draws, units = total.shape
    weights = rng.multinomial(units, np.full(units, 1 / units), size=RESAMPLES).astype(float)
    mean = total.sum(axis=1) / count.sum(axis=1)
    again = (weights @ total.T) / (weights @ count.T)
    ordered = np.sort(again, axis=0)
    residual = total - mean[:, None] * count
    below = ((again < mean).mean(axis=0) + 0.5 * (again == mean).mean(axis=0)).clip(1 / RESAMPLES, 1 - 1 / RESAMPLES)
    bias = stats.norm.ppf(below)
    with np.errstate(invalid="ignore", divide="ignore"):
        faster = np.nan_to_num((residual**3).sum(axis=1) / (6 * (residual**2).sum(axis=1) ** 1.5))
    edges = []
    for z in (-Z, Z):
        share = stats.norm.cdf(bias + (bias + z) / (1 - faster * (bias + z)))
        edges.append(ordered[(share * (RESAMPLES - 1)).round().astype(int).clip(0, RESAMPLES - 1), np.arange(draws)])
    intervals = {
        "percentile bootstrap": (ordered[round(0.025 * RESAMPLES)], ordered[round(0.975 * RESAMPLES) - 1]),
        "BCa": (edges[0], edges[1]),
    }
    if studentized:
        error = np.sqrt((residual**2).sum(axis=1) / units / (units - 1))
        spread = np.sqrt(((weights @ total.T**2) / units - again**2).clip(min=0) / (units - 1))
        with np.errstate(invalid="ignore", divide="ignore"):
            t = np.nan_to_num((again - mean) / spread, posinf=0, neginf=0)
        low, high = np.quantile(t, [0.025, 0.975], axis=0)
        intervals["bootstrap-t"] = mean - high * error, mean - low * error
    return intervals
