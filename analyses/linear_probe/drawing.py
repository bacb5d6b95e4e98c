"""The summary, differences and figures of stored runs."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import plotly.graph_objects as go

from analyses.linear_probe.options import ENCODER
from workbench import figures as fig
from workbench.runs import Run, after_final_norm, comparable
from workbench.stats import paired_differences

PROBES = ("cover", "final_norm", "folds", "l2", "seed", "tokens_per_image")  # options that change a score


def _table(runs: Mapping[str, Run], name: str = "scores") -> pd.DataFrame:
    """Return a table of all runs, with the label of the run in the column model."""
    return pd.concat([run.tables[name].assign(model=label) for label, run in runs.items()], ignore_index=True)


def summary(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Return one row for each model, target and layer; the vision encoder and the VFMs have layer -1."""
    columns = [
        "model",
        "source",
        "layer",
        "target",
        "score",
        "low",
        "high",
        "control",
        "selectivity",
        "selectivity_low",
        "selectivity_high",
        "chance",
    ]
    return _table(runs)[[*columns, "n_images", "n", "measure"]].sort_values(["model", "target"], kind="stable")


def differences(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Return every model minus the first one by target and layer, paired over images.

    Models that were probed on other images or with other options of the probes are left out. p-values are
    Holm-corrected over the layers of a target.
    """
    of_all = {label: run.tables["per_image"] for label, run in comparable(runs, PROBES).items()}
    tables = {label: table[table["source"] == "model"] for label, table in of_all.items()}
    seed = int(next(iter(runs.values())).record["seed"])
    return paired_differences(tables, by=("target", "layer"), within=("target",), seed=seed)


def figures(runs: Mapping[str, Run]) -> dict[str, go.Figure]:
    """Draw each target by layer with its control, the vision encoder and the VFMs, and differences between models."""
    table, changes, drawn = _table(runs), differences(runs), {}
    for target in dict.fromkeys(table["target"]):
        rows = table[table["target"] == target]
        layers = rows[rows["source"].isin(["model", ENCODER])]
        measure = str(rows["measure"].iloc[0])
        control = layers.assign(
            labels="control",
            score=layers["control"],
            low=layers["control_low"],
            high=layers["control_high"],
        )
        curves = fig.layer_curves(pd.concat([layers.assign(labels="true labels"), control]), y=measure, kind="labels")
        ceilings = rows[~rows["source"].isin(["model", ENCODER])].drop_duplicates("source")
        drawn[f"{target}: {measure}"] = fig.with_ceilings(curves, ceilings, name="source")
        change = changes[changes["target"] == target]
        if len(change):
            drawn[f"{target}: {measure}, difference"] = fig.difference_curves(
                change, y=f"{measure}, minus {change['against'].iloc[0]}"
            )
    fig.name_final_norm(drawn, after_final_norm(runs))
    return drawn
