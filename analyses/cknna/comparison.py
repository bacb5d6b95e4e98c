"""Stored runs side by side: paired differences, summary and figures."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import plotly.graph_objects as go

from workbench import figures as fig
from workbench.metrics import METRICS
from workbench.paired import flips_for
from workbench.runs import Run, after_final_norm
from workbench.stats import Paired, holm, paired_columns, split_half_test


def differences(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Subtract the first model from every other, for each layer and target, with interval, p and Holm's p.

    Holm's p corrects over all layers and targets of a VFM. Only runs that asked the same question about the same images
    are paired, those stored before version 2 by image only; the table is empty where none can be.
    """
    first, *others = runs
    tables: list[pd.DataFrame] = []
    for name in others:
        pair = [runs[first], runs[name]]
        if _question(pair[0]) != _question(pair[1]):
            continue
        parts = [_parts(run) for run in pair]
        if any(table is None for table in parts):
            continue
        paired = pd.merge(*parts, on=["target", "layer", "part"], suffixes=("_a", "_b"))
        scores = [_scores(run).set_index(["target", "layer"]) for run in pair]
        for vfm, of_vfm in scores[0].groupby("vfm", sort=False):
            part = paired[paired["vfm_a"] == vfm]
            shared = set(zip(part["target"], part["layer"], strict=True))
            cells = [cell for cell in of_vfm.index if cell in shared]
            if not cells:
                continue
            tests = _tests(part.assign(score=part["score_b"] - part["score_a"]), cells, [s.loc[cells] for s in scores])
            table = of_vfm.loc[cells, ["vfm", "vfm_layer", "metric", "pooling"]].reset_index()
            p_values = [test.p for test in tests]
            tables.append(
                table.assign(
                    model=name,
                    against=first,
                    score=[test.difference for test in tests],
                    low=[test.low for test in tests],
                    high=[test.high for test in tests],
                    p=p_values,
                    p_holm=holm(p_values),
                    n_images=[test.n for test in tests],
                )
            )
    columns = ["model", "against", "metric", "vfm", "vfm_layer", "target", "layer"]
    columns += ["score", "low", "high", "p", "p_holm", "n_images"]
    return pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)


def _tests(changes: pd.DataFrame, cells: list[tuple[str, int]], scores: list[pd.DataFrame]) -> list[Paired]:
    """Return the paired test of each cell (target, layer), over images or over the same halves of the images.

    Args:
        changes: the second model minus the first, for each part (image or split) and cell.
        scores: of both models, by cell.
    """
    wide = changes.pivot(index="part", columns=["target", "layer"], values="score")[cells].to_numpy()
    if scores[0]["pooling"].iloc[0] == "within":
        return paired_columns(wide, n=flips_for(len(cells)), seed=int(scores[0]["seed"].iloc[0]))
    differences_of_scores = (scores[1]["score"] - scores[0]["score"]).to_numpy()
    n_images = int(scores[0]["n_images"].iloc[0])
    return [
        split_half_test(float(difference), gaps, n_images)
        for difference, gaps in zip(differences_of_scores, wide.T, strict=True)
    ]


def _question(run: Run) -> tuple[object, ...]:
    """Return all that must be equal for scores of two runs to be subtracted."""
    row = _scores(run).iloc[0]
    return (
        run.record["data_fingerprint"],
        str(run.extra.get("vfm_fingerprints")),  # a folder of a VFM may have had other weights
        run.record["config"]["tokens_per_image"],
        run.record["config"].get("by", "grid"),  # runs from before there was this option are by grid
        run.record["config"].get("final_norm", False),
        *(str(row[column]) for column in ("metric", "k", "dim", "pooling", "n", "seed")),
    )


def _scores(run: Run) -> pd.DataFrame:
    """Return the scores of a run; one stored before version 2 has CKNNA with the VFM's own output only."""
    table = run.tables["scores"].assign(by=run.record["config"].get("by", "grid"))
    if "metric" not in table:
        table = table.assign(
            metric="cknna", target=table["vfm"], vfm_layer=pd.array([None] * len(table), dtype="Int64"), dim=None
        )
    return table


def _parts(run: Run) -> pd.DataFrame | None:
    """Return the values by which two runs are paired: scores of images, or differences between halves of the images.

    Runs stored before version 3 have no halves: None.
    """
    if _scores(run)["pooling"].iloc[0] != "within":
        return run.tables.get("halves")
    table = run.tables["per_image"].rename(columns={"image_id": "part"})
    return table if "target" in table else table.assign(target=table["vfm"])


def summary(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Return one row for each model, VFM, layer of the VFM and layer of the model."""
    table = pd.concat([_scores(run).assign(model=label) for label, run in runs.items()], ignore_index=True)
    columns = ["model", "metric", "vfm", "vfm_layer", "layer", "score", "low", "high", "null_mean", "null_q95", "p"]
    columns += ["n_images", "n", "k", "dim", "pooling", "by"]
    empty = [column for column in ("vfm_layer", "k", "dim") if table[column].isna().all()]
    return table[columns].drop(columns=empty)


def figures(runs: Mapping[str, Run]) -> dict[str, go.Figure]:
    """Draw, for each metric, scores over their null and differences from the first model.

    Scores against the output of a VFM are curves by layer; those against its layers are maps of layer by layer.
    """
    tables = {label: _scores(run) for label, run in runs.items()}
    drawn: dict[str, go.Figure] = {}
    for metric in dict.fromkeys(table["metric"].iloc[0] for table in tables.values()):
        of_metric = {label: run for label, run in runs.items() if tables[label]["metric"].iloc[0] == metric}
        scores = pd.concat([tables[label].assign(model=label) for label in of_metric], ignore_index=True)
        changes, name = differences(of_metric), METRICS.get(metric).label
        suffix = "" if len(of_metric) == len(runs) else f", {name}"
        layered = scores["vfm_layer"].notna()
        if not layered.all():
            drawn[f"Alignment by layer{suffix}"] = fig.layer_curves(scores[~layered], y=name, kind="target")
        curves, maps = changes[changes["vfm_layer"].isna()], changes[changes["vfm_layer"].notna()]
        if len(curves):
            drawn[f"Difference by layer{suffix}"] = fig.difference_curves(
                curves, y=f"{name}, minus {curves['against'].iloc[0]}", kind="target"
            )
        if layered.any():
            drawn[f"Alignment by layer and layer of the VFM{suffix}"] = fig.matrix_maps(scores[layered], title=name)
        if len(maps):
            title = f"{name}, minus {maps['against'].iloc[0]}"
            drawn[f"Difference by layer and layer of the VFM{suffix}"] = fig.matrix_maps(
                maps, title=title, difference=True
            )
    fig.name_final_norm(drawn, after_final_norm(runs))
    return drawn
