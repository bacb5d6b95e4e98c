"""The table by decoding and scorer, from scores of three runs of two variants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from benchmarks.twins import by_scorer, over_runs
from tests.conftest import refused
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


def test_six_runs_have_students_interval_whatever_their_skewness() -> None:
    """Near the ends it is in the shape of Wilson's; in the middle it is Student's. One run of six may be far off."""
    scores = [0.48, 0.49, 0.5, 0.5, 0.51, 0.58]
    half = stats.t.ppf(0.975, 5) * np.std(scores, ddof=1) / np.sqrt(6)
    mean, low, high = (float(word.strip("[],")) for word in over_runs(scores, 1000).split())
    assert mean == pytest.approx(0.51)
    assert (low, high) == (pytest.approx(0.51 - half, abs=0.002), pytest.approx(0.51 + half, abs=0.002))


def test_a_single_run_has_its_interval_over_images_and_no_interval_of_the_difference() -> None:
    (row, *_) = by_scorer("pope", "pope", "greedy", {"baseline": [table(10)], "viral": [table(13)]})
    low, high = (float(bound) for bound in row[4].split("[")[1].rstrip("]").split(","))
    assert 0.25 < low < 0.5 < high < 0.75  # 20 images
    assert row[6] == "+0.150, 1 pair"


def test_equal_scores_of_several_runs_have_the_interval_of_their_questions() -> None:
    (row, *_) = by_scorer("pope", "pope", "greedy", {"baseline": [table(10)] * 3, "viral": [table(10)] * 3})
    assert row[4] != "0.500 [0.000, 1.000]"
    low, high = (float(bound) for bound in row[6].split("[")[1].rstrip("]").split(","))
    assert -0.6 < low < 0 < high < 0.6


@pytest.mark.slow
def test_models_that_cannot_be_paired_are_refused(runs_folder: Path, tmp_path: Path) -> None:
    baseline, viral = (str(runs_folder / name) for name in ("baseline", "viral"))
    words = ["benchmarks.twins", str(tmp_path), "--scorers", "--shapes"]
    assert "shapes has nothing: expected NAME=RUN or NAME=RUN,RUN,..." in refused(*words, "nothing")
    said = refused(*words, f"a={baseline}", f"a={viral}")
    assert "shapes names a twice: expected a=RUN,RUN,... for several runs" in said
    said = refused(*words, f"a={baseline},{baseline}", f"b={viral}")
    assert "b has the training seeds 0 and a has 0, 0: expected the same ones in the same order" in said
    assert "is not the folder of a finished training" in refused(*words, f"a={baseline}x")
