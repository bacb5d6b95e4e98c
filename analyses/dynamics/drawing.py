"""Figures of the dynamics analysis."""

from __future__ import annotations

from collections.abc import Mapping

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
        drawn["Accuracy over training, mean of types"] = fig.step_curves(mean, y=f"accuracy (chance {chance:.2f})")
    if len(types):
        drawn["Accuracy over training by question type"] = fig.step_curves(
            types, panel="of", y="accuracy", null="chance", share=True
        )
    of_benchmarks = table[table["measure"] == BENCHMARK]
    if len(of_benchmarks):
        first = of_benchmarks[of_benchmarks["model"] == of_benchmarks["model"].iloc[0]]
        last = first[first["step"] == first["step"].max()]
        drawn["Benchmarks over training"] = fig.step_curves(
            of_benchmarks,
            panel="of",
            y="score",
            null="chance",
            goal=f"final score of {first['model'].iloc[0]}",
            goals=dict(zip(last["of"], last["score"], strict=True)),
        ).update_layout(meta={"data": _data_of(of_benchmarks, runs)})
    if len(aligned):
        drawn["Alignment over training"] = fig.step_curves(
            aligned, panel="of", y="CKNNA", null="chance (95 % of the null)"
        )
    if len(drop):
        drawn["Accuracy drop when tokens are permuted after the vision encoder, mean of types"] = fig.step_curves(
            drop, y="accuracy drop", null="no change"
        )
    paired = differences(runs)
    whole = (paired["measure"] == ACCURACY) & (paired["of"] == MEAN)
    paired = paired[whole | paired["measure"].isin([CKNNA, BENCHMARK])]
    if len(paired):
        asked = _data_of(paired, runs)
        paired = paired.assign(of=np.where(paired["measure"] == BENCHMARK, "", paired["measure"] + ", ") + paired["of"])
        drawn["Difference over training, paired by seed"] = fig.step_curves(
            paired, panel="of", y="difference", null="no difference"
        ).update_layout(meta={"data": asked})
    drawn["Training losses"] = fig.step_curves(losses(runs), panel="of", y="loss").update_layout(meta={"data": ""})
    reach = compared(runs)
    # the difference of a single pair of runs has no interval, so it is in the table only
    if len(reach) and (reach["seeds"] > 1).all():
        drawn["Steps to the other model's final score"] = fig.step_differences(reach)
    return drawn


def _data_of(table: pd.DataFrame, runs: Mapping[str, Run]) -> str:
    """Return the data sets that rows with a column `measure` are about: benchmarks have their own."""
    of_benchmark = table["measure"] == BENCHMARK
    names = [] if of_benchmark.all() else [str(run.extra.get("data", "")) for run in runs.values()]
    if of_benchmark.any():
        names += [each["data"] for run in runs.values() for each in run.extra.get("benchmarks", ())]
    return ", ".join(dict.fromkeys(names))
