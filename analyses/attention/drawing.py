"""Figures of the attention analysis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analyses.attention.measuring import EDGES, nan_mean
from analyses.attention.questions import ENTROPIES, MEASURES, OBJECT_MEASURES, SINGLE_MEASURES
from analyses.attention.tables import differences
from workbench import figures as fig
from workbench.runs import Run

MOST_WORDS = 8  # of an answer, in a figure


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
    drawn |= _words(runs)
    by_head = pd.concat([run.tables["scores"].assign(model=label) for label, run in runs.items()])
    by_layer = pd.concat([run.tables["layers"].assign(model=label) for label, run in runs.items()])
    all_changes = differences(runs)
    drawn["Spatial entropy: by head"] = fig.head_maps_of(
        {MEASURES[name]: by_head[by_head["measure"] == name] for name in ENTROPIES}
    )
    for name, title in (MEASURES | SINGLE_MEASURES).items():
        if name not in set(by_layer["measure"]):
            continue
        drawn[f"{title}: by layer"] = fig.layer_curves(by_layer[by_layer["measure"] == name], y=title, kind="measure")
        changes = all_changes[all_changes["measure"] == name]
        if len(changes):
            drawn[f"{title}: difference by layer"] = fig.difference_curves(
                changes, y=f"{title}, minus {changes['against'].iloc[0]}"
            )
        if name not in ENTROPIES and name in MEASURES:
            drawn[f"{title}: by head"] = fig.head_maps(by_head[by_head["measure"] == name], title=title)
    return drawn


def _words(runs: Mapping[str, Run]) -> dict[str, go.Figure]:
    """Draw the attention from each word that was read over the image: a figure for each example, a row for each model.

    Answers of one word are in one row. The map of a word is the mean over heads and over the tokens of the word.
    """
    places: dict[str, list[list[Mapping[int, fig.Overlay]]]] = {}
    for label, run in runs.items():
        for example in run.tables["examples"].itertuples() if "words" in run.tables else ():
            tokens = run.tables["words"][run.tables["words"]["number"] == example.number].reset_index(drop=True)
            # a token that begins with a space, or comes first, begins a word
            word_of = tokens["word"].str.match(r"\s").cumsum() - tokens["word"].str.match(r"\s").iloc[0]
            words = tokens.groupby(word_of)["word"].agg("".join).str.strip()
            more = f" (the first {MOST_WORDS} of {len(words)} words)" if len(words) > MOST_WORDS else ""
            maps = run.tensors[f"words_{example.number}"].numpy()  # (token, layer, h, w)
            row: list[Mapping[int, fig.Overlay]] = []
            for number, word in words.iloc[:MOST_WORDS].items():
                layer_maps = nan_mean(maps[(word_of == number).to_numpy()], 0)
                title = f"{label} · {word}{more if number == words.index[0] else ''}<br>{example.question}"
                by_layer = zip(run.extra["layers"], layer_maps, strict=True)
                row.append({layer: _overlay(example, run, title, values) for layer, values in by_layer})
            places.setdefault(str(example.sample_id), []).append(row)
    for sample_id, rows in places.items():
        if all(len(row) == 1 for row in rows):
            places[sample_id] = [[place for row in rows for place in row]]  # answers of one word side by side
    return {
        f"Attention from each word over the image, mean of heads: {sample_id}": fig.layered_overlays(rows)
        for sample_id, rows in places.items()
    }


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
        for row, (name, values) in zip(rows, maps, strict=False):
            row.append(_overlay(example, run, f"{label} · {name}<br>{example.question}", values))
    return [row for row in rows if row]


def _overlay(example: Any, run: Run, title: str, values: np.ndarray) -> fig.Overlay:
    """Return a map over the image of an example (a row of the table `examples`), with the objects framed."""
    image = run.tensors[f"image_{example.number}"].numpy()
    boxes = np.array(
        [[getattr(example, f"{what}{edge}", np.nan) for edge in EDGES] for what in ("", "asked_", "second_")]
    )
    grid_box, *outlines = [(left, top, right, bottom) for left, top, right, bottom in boxes.tolist()]
    return fig.Overlay(title, image, values, grid_box, [box for box in outlines if not np.isnan(box).any()])
