"""Matrices, and what is drawn over a picture: heat maps, outlines, words."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from PIL import Image
from plotly.subplots import make_subplots

from workbench.figures.template import translucent


def matrix_maps(table: pd.DataFrame, *, title: str, difference: bool = False) -> go.Figure:
    """Layers of each model against layers of a VFM, a column per model and a row per VFM, on one colour scale; hovering
    shows the interval.

    Args:
        table: columns model, vfm, layer, vfm_layer, score, low, high, n_images; null_mean and null_q95, which each
            map's title states, or for a difference p_holm: cells below .05 whose interval excludes 0 carry a dot.
        title: name of the score, at the colour bar.
    """
    models, vfms = list(dict.fromkeys(table["model"])), list(dict.fromkeys(table["vfm"]))
    panels = [
        (model, vfm, table[(table["model"] == model) & (table["vfm"] == vfm)]) for vfm in vfms for model in models
    ]
    titles = [
        f"{model} · {vfm}" + ("" if difference or part.empty else f"<br>{_chance(part)}") for model, vfm, part in panels
    ]
    lines = max(8, table["layer"].nunique())
    height = (24 * lines + 110) * len(vfms) + 60
    figure = make_subplots(
        len(vfms),
        len(models),
        subplot_titles=titles,
        shared_yaxes=True,
        horizontal_spacing=0.04,
        vertical_spacing=110 / height,
    )
    extra = ["p_holm"] if difference else ["null_mean", "null_q95"]
    hover = "Holm p %{customdata[3]:.3g}" if difference else "null mean %{customdata[3]:.3f}, 95 % %{customdata[4]:.3f}"
    for number, (_, _, part) in enumerate(panels):
        wide = {
            c: part.pivot(index="layer", columns="vfm_layer", values=c)
            for c in ("score", "low", "high", "n_images", *extra)
        }
        place = {"row": number // len(models) + 1, "col": number % len(models) + 1}
        marks = (
            np.where((wide["p_holm"] < 0.05) & ((wide["low"] > 0) | (wide["high"] < 0)), "●", "")
            if difference
            else None
        )
        figure.add_heatmap(
            **{
                "x": [str(layer) for layer in wide["score"].columns],
                "y": [str(layer) for layer in wide["score"].index],
                "z": wide["score"].to_numpy(),
            },
            **{
                "coloraxis": "coloraxis",
                "text": marks,
                "texttemplate": "%{text}" if difference else None,
                "textfont": {"color": "black"},
            },
            customdata=np.stack([wide[c].to_numpy(dtype=float) for c in ("low", "high", "n_images", *extra)], axis=-1),
            hovertemplate="layer %{y}, VFM layer %{x}: %{z:.3f} [%{customdata[0]:.3f}, %{customdata[1]:.3f}]<br>"
            + hover
            + ", %{customdata[2]} images<extra></extra>",
            **place,
        )
        figure.update_xaxes(title="layer of the VFM", type="category", showgrid=False, **place)
    figure.update_yaxes(type="category", showgrid=False)
    figure.update_yaxes(title="layer", col=1)
    scale = {"colorscale": "RdBu_r", "cmid": 0} if difference else {"colorscale": "Viridis"}
    bar = {"title": {"text": title, "side": "right"}}
    figure.update_layout(
        template="workbench", height=height, hovermode="closest", coloraxis={**scale, "colorbar": bar}, margin={"t": 70}
    )
    if difference:
        figure.add_annotation(
            text="● interval excludes 0, Holm p < .05 over all cells of a map",
            showarrow=False,
            **{"x": 0, "xref": "paper", "xanchor": "left"},
        )
        figure.layout.annotations[-1].update(y=1, yref="paper", yanchor="bottom", yshift=38)
    return figure


def _chance(part: pd.DataFrame) -> str:
    """The null of all cells of a map."""
    low, high, top = part["null_mean"].min(), part["null_mean"].max(), part["null_q95"].max()
    return f"chance {low:.3f} to {high:.3f}, 95 % below {top:.3f}"


def head_maps(scores: pd.DataFrame, *, title: str) -> go.Figure:
    """A heat map of layers and heads for each model, on one colour scale; hovering shows interval, chance and n.

    Args:
        scores: columns model, layer, head, score, low, high, chance, null_mean, n_images.
    """
    models = list(dict.fromkeys(scores["model"]))
    figure = make_subplots(1, len(models), subplot_titles=models, shared_yaxes=True, horizontal_spacing=0.04)
    for number, model in enumerate(models, start=1):
        part = scores[scores["model"] == model]
        wide = {
            c: part.pivot(index="layer", columns="head", values=c)
            for c in ("score", "low", "high", "chance", "null_mean", "n_images")
        }
        figure.add_heatmap(
            **{
                "x": [str(head) for head in wide["score"].columns],
                "y": [str(layer) for layer in wide["score"].index],
                "z": wide["score"].to_numpy(),
            },
            customdata=np.stack(
                [wide[c].to_numpy() for c in ("low", "high", "chance", "null_mean", "n_images")], axis=-1
            ),
            hovertemplate=(
                "layer %{y}, head %{x}: %{z:.3f} [%{customdata[0]:.3f}, %{customdata[1]:.3f}]"
                "<br>chance %{customdata[2]:.3f}, null %{customdata[3]:.3f}, %{customdata[4]} images<extra></extra>"
            ),
            coloraxis="coloraxis",
            row=1,
            col=number,
        )
        figure.update_xaxes(title="head", type="category", row=1, col=number)
    figure.update_yaxes(type="category", showgrid=False)
    figure.update_yaxes(title="layer", col=1)
    height = 180 + 22 * max(8, scores["layer"].nunique())
    bar = {"title": {"text": title, "side": "right"}}
    figure.update_layout(
        template="workbench",
        height=height,
        hovermode="closest",
        coloraxis={"colorscale": "Viridis", "colorbar": bar},
        margin={"t": 60},
    )
    return figure


@dataclass(frozen=True)
class Overlay:
    """A picture under a map.

    Attributes:
        image: (height, width, 3) bytes.
        values: what each cell has, (h, w).
        box: left, top, right, bottom of the raster in fractions of the image; it can reach outside, where a model pads.
        outline: the same of an object to frame.
    """

    title: str
    image: np.ndarray
    values: np.ndarray
    box: tuple[float, float, float, float]
    outline: tuple[float, float, float, float] | None = None


def overlays(rows: Sequence[Sequence[Overlay]]) -> go.Figure:
    """Pictures with each cell of their map at its own pixels, a row for each sequence; every map has its own colour
    scale from 0 to its maximum."""
    width = max(len(row) for row in rows)
    titles = [row[column].title if column < len(row) else "" for row in rows for column in range(width)]
    figure = make_subplots(
        len(rows),
        width,
        subplot_titles=titles,
        horizontal_spacing=0.03,
        vertical_spacing=0.14 / max(1, len(rows) - 1) if len(rows) > 1 else 0,
    )
    for at, row in enumerate(rows, start=1):
        for column, shown in enumerate(row, start=1):
            _overlay(figure, shown, at, column)
    figure.update_layout(
        template="workbench",
        height=80 + 340 * len(rows),
        hovermode="closest",
        showlegend=False,
        margin={"t": 70, "l": 16, "b": 16},
    )
    return figure


def _overlay(figure: go.Figure, shown: Overlay, row: int, column: int) -> None:
    height, width = shown.image.shape[:2]
    left, top, right, bottom = shown.box
    x, y = (
        np.linspace(a, b, n + 1)
        for a, b, n in (
            (left * width, right * width, shown.values.shape[1]),
            (top * height, bottom * height, shown.values.shape[0]),
        )
    )
    # plotly puts the centre of an image's first pixel at x0, y0; here pixel 0 lies from 0 to 1, as everywhere else
    figure.add_image(source=_png(shown.image), x0=0.5, y0=0.5, dx=1, dy=1, hoverinfo="skip", row=row, col=column)
    figure.add_heatmap(
        **{
            "x": x,
            "y": y,
            "z": shown.values,
            "zmin": 0,
            "showscale": False,
            "hovertemplate": "%{z:.3f} of the attention on the image<extra></extra>",
        },
        colorscale=[[0, translucent("#ff2a00", 0)], [1, translucent("#ff2a00", 0.8)]],
        row=row,
        col=column,
    )
    if shown.outline is not None:
        left, top, right, bottom = (
            f * size for f, size in zip(shown.outline, (width, height, width, height), strict=True)
        )
        line = {"color": "white", "width": 2, "dash": "dash"}
        corners = ([left, right, right, left, left], [top, top, bottom, bottom, top])
        figure.add_scatter(x=corners[0], y=corners[1], mode="lines", line=line, hoverinfo="skip", row=row, col=column)
    _picture_axes(figure, (max(height, y[-1]), max(width, x[-1])), row, column, start=(min(0, y[0]), min(0, x[0])))


def _png(image: np.ndarray) -> str:
    data = io.BytesIO()
    Image.fromarray(image.astype(np.uint8)).save(data, format="PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def _picture_axes(
    figure: go.Figure, end: Sequence[float], row: int, column: int, start: tuple[float, float] = (0.0, 0.0)
) -> None:
    """Square pixels and no axes, from `start` to `end` (y, x), y downwards."""
    figure.update_xaxes(range=[start[1], end[1]], visible=False, constrain="domain", row=row, col=column)
    axis = figure.get_subplot(row, column).xaxis.plotly_name.replace("axis", "")
    figure.update_yaxes(
        range=[end[0], start[0]], visible=False, scaleanchor=axis, constrain="domain", row=row, col=column
    )


@dataclass(frozen=True)
class WordMap:
    """Words over a picture.

    Attributes:
        image: (height, width, 3) bytes.
        words: columns layer, token, left, top, right, bottom (fractions of the image), rank, word, probability, truth
            and right_word (whether the word is one of `truth`).
    """

    title: str
    image: np.ndarray
    words: pd.DataFrame


def word_maps(shown: Sequence[WordMap]) -> go.Figure:
    """The most likely word of each cell at its place in a darkened picture, models side by side; a slider chooses the
    layer, hovering shows more words.

    Words of what lies under their cell are yellow; a cell on an object whose first word is another one is white, and
    cells on no object are grey.
    """
    layers = sorted({int(layer) for own in shown for layer in own.words["layer"]})
    start = layers[len(layers) // 2]
    figure = make_subplots(1, len(shown), subplot_titles=[own.title for own in shown], horizontal_spacing=0.02)
    for column, own in enumerate(shown, start=1):
        figure.add_image(source=_png(own.image * 0.35), x0=0.5, y0=0.5, dx=1, dy=1, hoverinfo="skip", row=1, col=column)
        for layer in layers:
            _words(figure, own, layer, len(shown), column, visible=layer == start)
        _picture_axes(figure, own.image.shape, 1, column)
    each = [trace.meta for trace in figure.data]
    steps = [
        {"label": str(layer), "method": "restyle", "args": [{"visible": [meta in (None, layer) for meta in each]}]}
        for layer in layers
    ]
    slider = {"active": layers.index(start), "currentvalue": {"prefix": "layer "}, "pad": {"t": 8}, "steps": steps}
    legend = (
        '<span style="color:#d9a400">yellow</span>: a word of the object there · white: another word on an object ·'
        " grey: on no object"
    )
    margin = {"t": 84, "l": 8, "r": 8, "b": 8}
    figure.update_layout(
        template="workbench",
        height=int(180 + 900 / max(2, len(shown))),
        hovermode="closest",
        showlegend=False,
        margin=margin,
    )
    figure.update_layout(title={"text": legend, "font": {"size": 13}, "x": 0.5, "xanchor": "center"}, sliders=[slider])
    return figure


def _words(figure: go.Figure, own: WordMap, layer: int, maps: int, column: int, *, visible: bool) -> None:
    height, width = own.image.shape[:2]
    here = own.words[own.words["layer"] == layer]
    cells = here[here["rank"] == 1]
    lines = here["word"] + here["probability"].map("  {:.3f}".format)
    more = lines.groupby(here["token"]).agg("<br>".join).reindex(cells["token"])
    truth = cells["truth"].map(lambda name: f"<br>on: {name}" if name else "<br>on no object")
    # pixels, on a page of the usual width
    room = 1100 / maps * (cells["right"] - cells["left"]).min() if len(cells) else 0
    size = float(np.clip(room / 4.5, 6, 13))
    fits = max(2, int(room / (0.58 * size)))
    figure.add_scatter(
        x=(cells["left"] + cells["right"]) / 2 * width,
        y=(cells["top"] + cells["bottom"]) / 2 * height,
        text=cells["word"].map(lambda word: word if len(word) <= fits else word[: fits - 1] + "…"),
        mode="text",
        textfont={
            "size": size,
            "color": (
                np.where(cells["right_word"], "#ffd43b", np.where(cells["truth"] != "", "#ffffff", "#a9b0ba")).tolist()
            ),
        },
        customdata=(more.to_numpy() + truth.to_numpy()).tolist(),
        hovertemplate="%{customdata}<extra></extra>",
        meta=layer,
        visible=visible,
        row=1,
        col=column,
    )
