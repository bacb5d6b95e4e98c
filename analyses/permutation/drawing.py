"""What the command prints and draws of permutations."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from workbench import figures as fig
from workbench.runs import Run
from workbench.scoring.tables import changes, drop_differences, drops
from workbench.training_folder import MEAN

PARTS = ("whole", "features", "positions")
BY_LAYER = ("permute", "mean token")  # kinds that are drawn by layer


def summary(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Return the mean of types for each model, site and intervention, and every type for permutation at the encoder.

    Permutation at the encoder has the numbers of right answers too, as in the paper's Table 3.
    """
    table = changes(runs)
    at_encoder = (table["site"] == "encoder") & (table["kind"] == "permute")
    counts = pd.concat([run.tables["counts"].assign(model=label) for label, run in runs.items()])
    named = ["model", "site", "kind", "part", "category"]
    counts = counts[(counts["kind"] == "permute") & (counts["site"] == "encoder")].rename(
        columns={"low": "drop_percent_low", "high": "drop_percent_high"}
    )
    counts = counts[[*named, "right_before", "right_after", "drop_percent", "drop_percent_low", "drop_percent_high"]]
    shown = table[(table["category"] == MEAN) | at_encoder].drop(columns=["seed", "draws"])
    return shown.merge(counts, on=named, how="left")


def differences(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Subtract the drop of the first model from that of every other; p_holm corrects over the sites of a kind."""
    return drop_differences(
        runs,
        lambda samples: samples["kind"].isin(BY_LAYER) & (samples["part"] == "whole"),
        by=("site", "kind"),
        within=("kind",),
    )


def _with_layer(table: pd.DataFrame) -> pd.DataFrame:
    """Return rows of sites with their layer, as figures count: -1 is the vision encoder."""
    return table.assign(layer=table["site"].replace("encoder", "-1").astype(int))


def figures(runs: Mapping[str, Run]) -> dict[str, go.Figure]:
    """Draw the accuracy drop by layer; at the encoder by question type for each part, and for every intervention.

    The drop by layer has a second figure with the paired difference of the models.
    """
    table, drop = drops(changes(runs)), "accuracy drop"
    means = table[table["category"] == MEAN]
    curves = _with_layer(means[means["kind"].isin(BY_LAYER) & (means["part"] == "whole")])
    drawn = {"Accuracy drop by layer, mean of types": fig.layer_curves(curves, y=drop, kind="kind")}
    changed = differences(runs)
    if len(changed):
        drawn["Accuracy drop by layer: difference, mean of types"] = fig.difference_curves(
            _with_layer(changed), y=f"{drop}, minus {changed['against'].iloc[0]}", kind="kind"
        )
    at_encoder = table[table["site"] == "encoder"]
    for part in PARTS:
        permuted = at_encoder[(at_encoder["kind"] == "permute") & (at_encoder["part"] == part)]
        if len(permuted):
            title = f"Accuracy drop by question type, permuted at the encoder: {part}"
            drawn[title] = fig.bars(permuted, x="category", y=drop)
    controls = at_encoder[at_encoder["category"] == MEAN]
    if len(controls):
        change = np.where(controls["part"] == "whole", controls["kind"], controls["kind"] + ", " + controls["part"])
        drawn["Accuracy drop at the encoder by intervention, mean of types"] = fig.bars(
            controls.assign(change=change), x="change", y=drop
        )
    return drawn
