"""How soon a model reaches another model's final score on benchmarks, with an interval over images."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import permutations
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from analyses.dynamics.benchmarks import DRAWS
from analyses.dynamics.comparison import groups, question_of
from analyses.dynamics.options import BENCHMARK
from workbench.benchmarks.headline import resampled, weighted
from workbench.runs import Run
from workbench.stats import steps_reached

COLUMNS = (
    "model",
    "other",
    "measure",
    "of",
    "others_steps",
    "reached_low",
    "reached_high",
    "resamples_reached",
    "resamples_skipped",
)


def reached_over_images(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Return the interval of the steps that each model takes to reach each other model's final benchmark scores.

    In every resample of the images both models have the scores of the same images, and the level is the other model's
    final score there. The steps are averaged over the seeds that both models have. The interval goes from the 2.5 % to
    the 97.5 % quantile of the resamples; it ends at infinity if the level is not reached in more than 2.5 % of them.

    Returns:
        Columns model, other, measure, of, others_steps (length of the other training), reached_low, reached_high,
        resamples_reached (share of the resamples in which all seeds reach the level), and resamples_skipped (number of
        resamples in which a score is not defined; the rest count). All are NaN if no resample is left.
    """
    rows: list[dict[str, Any]] = []
    for (name, seeds), (other, others) in permutations(groups(runs).items(), 2):
        shared = sorted(s for s in seeds if s in others and question_of(seeds[s]) == question_of(others[s]))
        drawn = [(_curves(seeds[seed]), _curves(others[seed])) for seed in shared]
        names = [of for of in (drawn[0][0] if drawn else ()) if all(of in of_one for pair in drawn for of_one in pair)]
        for of in names:
            bounds = np.mean([_reached(mine[of], theirs[of]) for mine, theirs in drawn], axis=0)
            defined = ~np.isnan(bounds).any(axis=0)
            earliest, latest = bounds[:, defined] if defined.any() else np.full((2, 1), np.nan)
            rows.append(
                {
                    "model": name,
                    "other": other,
                    "measure": BENCHMARK,
                    "of": of,
                    "others_steps": drawn[0][1][of][0][-1],
                    "reached_low": float(np.quantile(earliest, 0.025, method="lower")),
                    "reached_high": float(np.quantile(latest, 0.975, method="higher")),
                    "resamples_reached": float(np.isfinite(latest).mean()) if defined.any() else np.nan,
                    "resamples_skipped": int((~defined).sum()),
                }
            )
    return pd.DataFrame(rows, columns=list(COLUMNS))


Curve = tuple[Float[np.ndarray, " step"], Float[np.ndarray, "draw step"]]
"""Steps, and the scores at these steps in each resample."""


def _curves(run: Run) -> dict[str, Curve]:
    """Return the resampled curve of each benchmark score of a run; none for a run without benchmarks."""
    if "benchmark_units" not in run.tables:
        return {}
    values, weights = run.tables["benchmark_units"], run.tables["benchmark_weights"]
    steps = sorted(values["step"].unique())
    drawn = resampled(values, steps, draws=DRAWS, seed=int(run.record["config"]["seed"]))
    of_last = weights[weights["step"] == steps[-1]]
    return {
        str(of): (np.array(steps, dtype=float), weighted(drawn, rows.sort_values("data")["weight"].to_numpy()))
        for of, rows in of_last.groupby("of", sort=False)
    }


def _reached(mine: Curve, theirs: Curve) -> Float[np.ndarray, "2 draw"]:
    """Return at which step one curve reaches the end of the other in each resample: at the earliest, and at the latest.

    These differ where the level was reached before the first evaluation. NaN where a score is not defined.
    """
    (steps, curves), (_, others) = mine, theirs
    levels = others[:, -1]
    latest = steps_reached(steps, curves, levels)
    latest[np.isnan(curves).any(axis=1) | np.isnan(levels)] = np.nan
    return np.stack([np.where(curves[:, 0] >= levels, 0.0, latest), latest])
