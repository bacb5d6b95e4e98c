"""The table by decoding and scorer, from scores of three runs of two variants."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from benchmarks.twins import by_scorer
from workbench.benchmarks.tables import answer_row, scores
from workbench.data.base import Sample

NOTHING: Any = None


def table(right: int) -> pd.DataFrame:
    rows = []
    for number in range(20):
        sample = Sample(f"{number}", f"image {number}", NOTHING, "what ?", "yes", ("yes", "no"), "random")
        rows.append(answer_row("pope", sample, "image", "Yes" if number < right else "no"))
    return scores(pd.DataFrame(rows), seed=0)


def test_runs_are_paired_and_every_scorer_has_a_row() -> None:
    counts = {"baseline": (10, 12, 13), "viral": (13, 14, 18)}
    rows = list(by_scorer("pope", "pope", "greedy", {name: [table(n) for n in of] for name, of in counts.items()}))
    assert [row[2] for row in rows] == ["own", "official", "lmms", "paper"]
    assert rows[0][:2] == ["pope", "greedy"]
    assert rows[0][4].startswith(f"{np.mean([0.5, 0.6, 0.65]):.3f} [")
    difference = np.array([3, 2, 5]) / 20
    half = stats.t.ppf(0.975, 2) * difference.std(ddof=1) / np.sqrt(3)
    center = rows[0][6].split()[0]
    assert center == f"{difference.mean():+.3f}"
    low, high = (float(bound) for bound in rows[0][6].split("[")[1].rstrip("]").split(","))
    assert low < difference.mean() < high
    assert abs((high - low) / 2 - half) < 0.02
