"""Figures of the attention analysis."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import plotly.graph_objects as go

from analyses.attention.measuring import nan_mean
from analyses.attention.questions import MEASURES, OBJECT_MEASURES
from analyses.attention.tables import differences
from workbench import figures as fig
from workbench.runs import Run


def figures(runs: Mapping[str, Run]) -> dict[str, go.Figure]:
    """Draw overlays of the best head, the chosen heads and the methods; then each measure by layer and by head."""
    drawn: dict[str, go.Figure] = {}
    overlays = [row for label, run in runs.items() for row in _overlays(label, run)]
    if overlays:
        drawn["Attention over the image, of a head that was chosen on other images"] = fig.overlays(overlays)
    head_tables = {label: run.tables["heads"] for label, run in runs.items() if len(run.tables.get("heads", ()))}
    if head_tables:
        heads = pd.concat(
            [
                table.assign(model=label, name=[f"L{row.layer} H{row.head}" for row in table.itertuples()])
                for label, table in head_tables.items()
            ]
        )
        drawn["Chosen heads on the held-out half"] = fig.points(heads, y="pointing", title=OBJECT_MEASURES["pointing"])
    method_tables = {label: run.tables["methods"] for label, run in runs.items() if "methods" in run.tables}
    if method_tables:
        methods = pd.concat([table.assign(model=label, name=table["method"]) for label, table in method_tables.items()])
        for name, title in OBJECT_MEASURES.items():
            drawn[f"{title}: raw attention, rollout and gradient x attention"] = fig.points(
                methods[methods["measure"] == name], y="score", title=title
            )
    by_head = pd.concat([run.tables["scores"].assign(model=label) for label, run in runs.items()])
    by_layer = pd.concat([run.tables["layers"].assign(model=label) for label, run in runs.items()])
    all_changes = differences(runs)
    for name, title in MEASURES.items():
        if name not in set(by_layer["measure"]):
            continue
        drawn[f"{title}: by layer"] = fig.layer_curves(by_layer[by_layer["measure"] == name], y=title, kind="measure")
        changes = all_changes[all_changes["measure"] == name]
        if len(changes):
            drawn[f"{title}: difference by layer"] = fig.difference_curves(
                changes, y=f"{title}, minus {changes['against'].iloc[0]}"
            )
        drawn[f"{title}: by head"] = fig.head_maps(by_head[by_head["measure"] == name], title=title)
    return drawn


def _overlays(label: str, run: Run) -> list[list[fig.Overlay]]:
    """Return rows of overlays on the stored examples: the best head, rollout, gradient x attention.

    The best head was chosen on the other half of the images; where there is none, the mean of the last layer is drawn.
    """
    layers, heads = run.extra["layers"], run.tables.get("heads")
    rows: list[list[fig.Overlay]] = [[], [], []]
    for example in run.tables["examples"].itertuples():
        head_maps = run.tensors[f"map_{example.number}"].numpy()
        if heads is not None and len(heads):
            layer, head = int(heads["layer"][0]), int(heads["head"][0])
            maps = [(f"L{layer} H{head}", head_maps[layers.index(layer), head])]
        else:
            maps = [(f"L{layers[-1]}, all heads", nan_mean(head_maps[-1], 0))]
        if f"methods_{example.number}" in run.tensors:
            method_maps = run.tensors[f"methods_{example.number}"].numpy()
            maps += zip(("rollout", "gradient x attention"), method_maps, strict=True)
        target_box = (example.asked_left, example.asked_top, example.asked_right, example.asked_bottom)
        image = run.tensors[f"image_{example.number}"].numpy()
        grid_box = (example.left, example.top, example.right, example.bottom)
        for row, (name, values) in zip(rows, maps, strict=False):
            title = f"{label} · {name}<br>{example.question}"
            row.append(fig.Overlay(title, image, values, grid_box, target_box if example.asked else None))
    return [row for row in rows if row]
