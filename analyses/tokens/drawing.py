"""Summary, paired differences and figures of the tokens analysis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analyses.tokens.options import MEASURES
from analyses.tokens.pca_maps import pca_figures
from workbench import figures as fig
from workbench.runs import Run, after_final_norm, comparable
from workbench.stats import holm, paired_test


def _table(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Return the scores of all models, one below another."""
    table = pd.concat([run.tables["scores"].assign(model=label) for label, run in runs.items()], ignore_index=True)
    return table[["model", *(column for column in table if column != "model")]]


def summary(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Return one row for each model, representation and measure."""
    return _table(runs).drop(columns=["layer", "seed"])


def differences(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Subtract the first model from every other, by layer and measure, on the images that both were measured on.

    Models that were measured on other data, with another `sink` or with another `final_norm` are left out. p_holm
    corrects over the layers of a measure. Interval and p are over images, for these very models: they say nothing about
    other training seeds.
    """
    first, *others = comparable(runs, ("sink", "final_norm"))
    rows: list[dict[str, Any]] = []
    for name in others:
        pair = [
            runs[label].tables["per_image"].dropna(subset="layer").set_index(["measure", "layer", "image_id"])["value"]
            for label in (first, name)
        ]
        shared = pd.concat(pair, axis=1, keys=["a", "b"], join="inner")
        for measure, by_layer in shared.groupby(level="measure", sort=False):
            tested = []
            for layer, part in by_layer.groupby(level="layer"):
                test = paired_test(part["a"], part["b"], seed=int(runs[first].record["seed"]))
                tested.append(
                    {
                        "model": name,
                        "against": first,
                        "measure": measure,
                        "layer": layer,
                        "score": test.difference,
                        "low": test.low,
                        "high": test.high,
                        "p": test.p,
                        "n_images": test.n,
                    }
                )
            rows += [row | {"p_holm": p} for row, p in zip(tested, holm([row["p"] for row in tested]), strict=True)]
    columns = ["model", "against", "measure", "layer", "score", "low", "high", "p", "p_holm", "n_images"]
    return pd.DataFrame(rows, columns=columns)


def figures(runs: Mapping[str, Run]) -> dict[str, go.Figure]:
    """Draw each measure by layer beside VFMs and isotropic tokens, and the paired difference of two models."""
    table, all_changes = _table(runs), differences(runs)
    drawn = {}
    curves_of = {
        "cosine": ("cosine", "cosine_across"),
        "rank_share": ("rank_share",),
        "norm": ("norm",),
        "sinks": ("sinks", "massive"),
    }
    titles = {"cosine": "Homogenization", "rank_share": "Effective rank", "norm": "Token norm", "sinks": "Sink tokens"}
    for measure, names in curves_of.items():
        scores = table[table["measure"].isin(names)]
        figure = fig.layer_curves(
            _with_references(scores, measure),
            y=MEASURES[measure],
            kind="kind",
            null="isotropic random tokens (mean to 95 %)",
        )
        if measure == "cosine":
            figure.update_yaxes(title="mean cosine of two tokens")
        if measure == "sinks":
            highest = scores["high"].replace(np.inf, np.nan).max()
            figure.update_yaxes(title="share of tokens", range=[0, max(0.05, 1.1 * highest)])
        if measure == "norm":
            figure.update_yaxes(type="log")
        drawn[f"{titles[measure]} by layer"] = figure
        changes = all_changes[all_changes["measure"] == measure]
        if len(changes) and measure != "sinks":
            drawn[f"{titles[measure]}: difference by layer"] = fig.difference_curves(
                changes, y=f"{MEASURES[measure]}, minus {changes['against'].iloc[0]}"
            )
    fig.name_final_norm(drawn, after_final_norm(runs))
    return drawn | pca_figures(runs)


KINDS = {"cosine": "same image", "cosine_across": "other images", "sinks": "norm", "massive": "massive activation"}


def _with_references(scores: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Return the curves of the models, and each VFM as a constant line over the layers.

    Norms of VFMs are left out: those of another network are no reference.
    """
    layers = scores.dropna(subset="layer").assign(kind=lambda t: t["measure"].map(KINDS).fillna("layers"))
    ends = dict.fromkeys([layers["layer"].min(), layers["layer"].max()])
    of_vfms = scores["layer"].isna() & (scores["measure"] == measure)
    vfms = scores[:0] if measure == "norm" else scores[of_vfms].drop_duplicates("at")
    lines = [vfms.assign(model=vfms["at"], kind="VFM", layer=end, null_mean=np.nan, null_q95=np.nan) for end in ends]
    return pd.concat([layers, *lines], ignore_index=True)
