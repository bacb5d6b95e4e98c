"""Figures of the dynamics analysis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analyses.dynamics.comparison import compared, curves, differences, losses
from analyses.dynamics.options import ACCURACY, BENCHMARK, CKNNA, DROP
from workbench import figures as fig
from workbench.runs import Run
from workbench.training_folder import MEAN


def figures(runs: Mapping[str, Run]) -> dict[str, go.Figure]:
    """Draw every score over training steps and, given several seeds, the steps to other models' final scores."""
    table = curves(runs)
    drawn: dict[str, go.Figure] = {}
    accuracy, aligned, drop = (table[table["measure"] == measure] for measure in (ACCURACY, CKNNA, DROP))
    mean, types, drop = accuracy[accuracy["of"] == MEAN], accuracy[accuracy["of"] != MEAN], drop[drop["of"] == MEAN]
    if len(mean):
        chance = mean["null_mean"].iloc[0]
        drawn["Accuracy over training, mean of types"] = _curves(mean, runs, y=f"accuracy (chance {chance:.2f})")
    if len(types):
        drawn["Accuracy over training by question type"] = _curves(
            types, runs, panel="of", y="accuracy", null="chance", share=True
        )
    of_benchmarks = table[table["measure"] == BENCHMARK]
    if len(of_benchmarks):
        first = of_benchmarks[of_benchmarks["model"] == of_benchmarks["model"].iloc[0]]
        last = first[first["step"] == first["step"].max()]
        drawn["Benchmarks over training"] = _curves(
            of_benchmarks,
            runs,
            panel="of",
            y="score",
            null="chance",
            goal=f"final score of {first['model'].iloc[0]}",
            goals=dict(zip(last["of"], last["score"], strict=True)),
        )
    if len(aligned):
        drawn["Alignment over training"] = _curves(
            aligned, runs, panel="of", y="CKNNA", null="chance (95 % of the null)"
        )
    if len(drop):
        drawn["Accuracy drop when tokens are permuted after the vision encoder, mean of types"] = _curves(
            drop, runs, y="accuracy drop", null="no change"
        )
    paired = differences(runs)
    whole = (paired["measure"] == ACCURACY) & (paired["of"] == MEAN)
    paired = paired[whole | paired["measure"].isin([CKNNA, BENCHMARK])]
    if len(paired):
        paired = paired.assign(of=np.where(paired["measure"] == BENCHMARK, "", paired["measure"] + ", ") + paired["of"])
        drawn["Difference over training, paired by seed"] = _curves(
            paired, runs, panel="of", y="difference", null="no difference"
        )
    drawn["Training losses"] = fig.step_curves(losses(runs), panel="of", y="loss").update_layout(meta={"data": ""})
    reach = compared(runs)
    # the difference of a single pair of runs has no interval, so it is in the table only
    if len(reach) and (reach["seeds"] > 1).all():
        drawn["Steps to the other model's final score"] = _noted(fig.step_differences(reach), reach, runs)
    return drawn


def _curves(table: pd.DataFrame, runs: Mapping[str, Run], **options: Any) -> go.Figure:
    """Draw rows of `curves` or `differences` with `step_curves`, whose options these are."""
    return _noted(fig.step_curves(table, **options), table, runs)


def _noted(figure: go.Figure, table: pd.DataFrame, runs: Mapping[str, Run]) -> go.Figure:
    """Note in a figure, for its caption, which data it is about and over how many images its scores are.

    Args:
        table: what is drawn; rows of benchmarks are about data of their own, and a table over seeds has no n_images.
    """
    of_benchmark = table["measure"] == BENCHMARK
    data = [] if of_benchmark.all() else [str(run.extra.get("data", "")) for run in runs.values()]
    if of_benchmark.any():
        data += [each["data"] for run in runs.values() for each in run.extra.get("benchmarks", ())]
    counts = sorted({int(n) for n in table["n_images"].dropna()}) if "n_images" in table else []
    return figure.update_layout(meta={"data": ", ".join(dict.fromkeys(data)), "n_images": counts})
