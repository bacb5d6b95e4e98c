"""The table that the command prints."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from analyses.dynamics.comparison import compared, curves
from analyses.dynamics.resampling import reached_over_images
from workbench.runs import Run


def summary(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Return the final value of every score, and the steps to every other model's final score.

    Benchmark scores also have the interval of these steps over images (`reached_over_images`), and the steps as a share
    of the length of the other training.

    Returns:
        One row for each model, score and other model, or one for each model and score if nothing can be compared.
    """
    table = curves(runs)
    last = table[table["step"] == table.groupby(["model", "measure", "of"])["step"].transform("max")]
    last = last[
        ["model", "measure", "of", "step", "score", "low", "high", "null_mean", "null_q95", "over", "n"]
    ].rename(columns={"step": "steps"})
    reach = compared(runs)
    if reach.empty:
        return last
    reach = reach.rename(
        columns={
            "target": "others_final",
            "step": "reached_at",
            "other_step": "other_at",
            "low": "difference_low",
            "high": "difference_high",
        }
    ).drop(columns=["seeds"])
    resampled = reached_over_images(runs)
    if len(resampled):
        reach = reach.merge(resampled, on=["model", "other", "measure", "of"], how="left")
        for share, steps in (("share", "reached_at"), ("share_low", "reached_low"), ("share_high", "reached_high")):
            reach[share] = reach[steps] / reach["others_steps"]
    return last.merge(reach, on=["model", "measure", "of"], how="left")
