"""Heat maps of scores, and heat maps, outlines and words drawn over an image."""

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
    """Draw scores of layers of models against layers of VFMs as heat maps, a column per model and a row per VFM.

    All maps share one color scale; hovering shows the interval.

    Args:
        table: columns model, vfm, layer, vfm_layer, score, low, high, n_images; also null_mean and null_q95, which are
            shown in the title of a map, or, for a difference, p_holm.
        title: name of the score, shown at the color bar.
        difference: whether the scores are differences; entries with p_holm below .05 whose interval excludes 0 then
            have a dot.
    """
    models, vfms = list(dict.fromkeys(table["model"])), list(dict.fromkeys(table["vfm"]))
    pairs = [(model, vfm) for vfm in vfms for model in models]
    panels = [(model, vfm, table[(table["model"] == model) & (table["vfm"] == vfm)]) for model, vfm in pairs]
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
        columns = ("score", "low", "high", "n_images", *extra)
        wide = {column: part.pivot(index="layer", columns="vfm_layer", values=column) for column in columns}
        place = {"row": number // len(models) + 1, "col": number % len(models) + 1}
        marks = _marks(wide) if difference else None
        figure.add_heatmap(
            x=[str(layer) for layer in wide["score"].columns],
            y=[str(layer) for layer in wide["score"].index],
            z=wide["score"].to_numpy(),
            coloraxis="coloraxis",
            text=marks,
            texttemplate="%{text}" if difference else None,
            textfont={"color": "black"},
            customdata=np.stack([wide[column].to_numpy(dtype=float) for column in columns[1:]], axis=-1),
            hovertemplate="layer %{y}, VFM layer %{x}: %{z:.3f} [%{customdata[0]:.3f}, %{customdata[1]:.3f}]<br>"
            + hover
            + ", %{customdata[2]} images<extra></extra>",
            **place,
        )
        figure.update_xaxes(title="layer of the VFM", type="category", showgrid=False, **place)
    figure.update_yaxes(type="category", showgrid=False)
    figure.update_yaxes(title="layer", col=1)
    _shared_scale(figure, title, height, difference)
    return figure


def _marks(wide: dict[str, pd.DataFrame]) -> np.ndarray:
    """Return a dot for each difference that is significant, and "" for the others."""
    significant = (wide["p_holm"] < 0.05) & ((wide["low"] > 0) | (wide["high"] < 0))
    return np.where(significant, "●", "")


def _shared_scale(figure: go.Figure, title: str, height: int, difference: bool) -> None:
    """Give the maps of a figure one color scale, around 0 for differences, whose dots are then explained."""
    scale = {"colorscale": "RdBu_r", "cmid": 0} if difference else {"colorscale": "Viridis"}
    bar = {"title": {"text": title, "side": "right"}}
    figure.update_layout(
        template="workbench", height=height, hovermode="closest", coloraxis={**scale, "colorbar": bar}, margin={"t": 70}
    )
    if difference:
        figure.add_annotation(
            text="● interval excludes 0, Holm p < .05 over all entries of a map",
            showarrow=False,
            x=0,
            xref="paper",
            xanchor="left",
        )
        figure.layout.annotations[-1].update(y=1, yref="paper", yanchor="bottom", yshift=38)


def _chance(part: pd.DataFrame) -> str:
    """Return the chance level of a map in words: the range of its null means and its largest 95th percentile."""
    low, high, top = part["null_mean"].min(), part["null_mean"].max(), part["null_q95"].max()
    return f"chance {low:.3f} to {high:.3f}, 95 % below {top:.3f}"


def head_maps(scores: pd.DataFrame, *, title: str, difference: bool = False) -> go.Figure:
    """Draw a heat map of layers and heads for each model; hovering shows interval, chance and n.

    All maps share one color scale.

    Args:
        scores: columns model, layer, head, score, low, high, n_images; also chance and null_mean or, for a difference,
            p_holm.
        title: name of the score, shown at the color bar.
        difference: whether the scores are differences; entries with p_holm below .05 whose interval excludes 0 then
            have a dot.
    """
    models = list(dict.fromkeys(scores["model"]))
    figure = make_subplots(1, len(models), subplot_titles=models, shared_yaxes=True, horizontal_spacing=0.04)
    for number, model in enumerate(models, start=1):
        part = scores[scores["model"] == model]
        columns = ("score", "low", "high", "n_images", *(["p_holm"] if difference else ["chance", "null_mean"]))
        wide = {column: part.pivot(index="layer", columns="head", values=column) for column in columns}
        figure.add_heatmap(
            x=[str(head) for head in wide["score"].columns],
            y=[str(layer) for layer in wide["score"].index],
            z=wide["score"].to_numpy(),
            text=_marks(wide) if difference else None,
            texttemplate="%{text}" if difference else None,
            textfont={"color": "black"},
            customdata=np.stack([wide[column].to_numpy() for column in columns[1:]], axis=-1),
            hovertemplate="layer %{y}, head %{x}: %{z:.3f} [%{customdata[0]:.3f}, %{customdata[1]:.3f}]<br>"
            + (
                "Holm p %{customdata[3]:.3g}"
                if difference
                else "chance %{customdata[3]:.3f}, null %{customdata[4]:.3f}"
            )
            + ", %{customdata[2]} images<extra></extra>",
            coloraxis="coloraxis",
            row=1,
            col=number,
        )
        figure.update_xaxes(title="head", type="category", row=1, col=number)
    figure.update_yaxes(type="category", showgrid=False)
    figure.update_yaxes(title="layer", col=1)
    _shared_scale(figure, title, 180 + 22 * max(8, scores["layer"].nunique()), difference)
    return figure


@dataclass(frozen=True)
class Overlay:
    """A heat map over an image.

    Attributes:
        title: the text above the image.
        image: pixels as bytes, (height, width, 3).
        values: the value of each patch, (h, w).
        box: left, top, right, bottom of the patch grid in fractions of the image; if the model pads the image, the grid
            is larger than the image.
        outline: left, top, right, bottom of an object to frame, in fractions of the image.
    """

    title: str
    image: np.ndarray
    values: np.ndarray
    box: tuple[float, float, float, float]
    outline: tuple[float, float, float, float] | None = None


def overlays(rows: Sequence[Sequence[Overlay]]) -> go.Figure:
    """Draw heat maps over images, with a row of images for each sequence in `rows`.

    Every patch covers its own pixels. Each map has its own color scale from 0 to its maximum.
    """
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
        for column, overlay in enumerate(row, start=1):
            _overlay(figure, overlay, at, column)
    figure.update_layout(
        template="workbench",
        height=80 + 340 * len(rows),
        hovermode="closest",
        showlegend=False,
        margin={"t": 70, "l": 16, "b": 16},
    )
    return figure


def _overlay(figure: go.Figure, overlay: Overlay, row: int, column: int) -> None:
    """Draw one heat map over its image into a subplot."""
    height, width = overlay.image.shape[:2]
    left, top, right, bottom = overlay.box
    x = np.linspace(left * width, right * width, overlay.values.shape[1] + 1)
    y = np.linspace(top * height, bottom * height, overlay.values.shape[0] + 1)
    # x0 and y0 are the center of the first pixel for plotly; here, as everywhere else, pixel 0 extends from 0 to 1
    figure.add_image(source=_png(overlay.image), x0=0.5, y0=0.5, dx=1, dy=1, hoverinfo="skip", row=row, col=column)
    figure.add_heatmap(
        x=x,
        y=y,
        z=overlay.values,
        zmin=0,
        showscale=False,
        hovertemplate="%{z:.3f} of the attention on the image<extra></extra>",
        colorscale=[[0, translucent("#ff2a00", 0)], [1, translucent("#ff2a00", 0.8)]],
        row=row,
        col=column,
    )
    if overlay.outline is not None:
        sizes = (width, height, width, height)
        left, top, right, bottom = (edge * size for edge, size in zip(overlay.outline, sizes, strict=True))
        line = {"color": "white", "width": 2, "dash": "dash"}
        corners = ([left, right, right, left, left], [top, top, bottom, bottom, top])
        figure.add_scatter(x=corners[0], y=corners[1], mode="lines", line=line, hoverinfo="skip", row=row, col=column)
    _image_axes(figure, (max(height, y[-1]), max(width, x[-1])), row, column, start=(min(0, y[0]), min(0, x[0])))


def _png(image: np.ndarray) -> str:
    """Return pixels (height, width, 3) as a PNG data URL."""
    data = io.BytesIO()
    Image.fromarray(image.astype(np.uint8)).save(data, format="PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def _image_axes(
    figure: go.Figure, end: Sequence[float], row: int, column: int, start: tuple[float, float] = (0.0, 0.0)
) -> None:
    """Show a subplot with square pixels and without axes, from `start` to `end` (y, x), y downwards."""
    figure.update_xaxes(range=[start[1], end[1]], visible=False, constrain="domain", row=row, col=column)
    axis = figure.get_subplot(row, column).xaxis.plotly_name.replace("axis", "")
    figure.update_yaxes(
        range=[end[0], start[0]], visible=False, scaleanchor=axis, constrain="domain", row=row, col=column
    )


@dataclass(frozen=True)
class WordMap:
    """Words over an image.

    Attributes:
        title: the text above the image.
        image: pixels as bytes, (height, width, 3).
        words: columns layer, token, left, top, right, bottom (of the token, in fractions of the image), rank, word,
            probability, truth (the words of the object there, "" for none) and right_word (whether `word` is one).
    """

    title: str
    image: np.ndarray
    words: pd.DataFrame


def word_maps(maps: Sequence[WordMap]) -> go.Figure:
    """Draw the most likely word of each visual token at its place in a darkened image, models next to each other.

    A slider selects the layer, hovering shows more words. A word is yellow if it is a word of the object at its token,
    white if it is another word on an object, and gray if there is no object.
    """
    layers = sorted({int(layer) for word_map in maps for layer in word_map.words["layer"]})
    start = layers[len(layers) // 2]
    titles = [word_map.title for word_map in maps]
    figure = make_subplots(1, len(maps), subplot_titles=titles, horizontal_spacing=0.02)
    for column, word_map in enumerate(maps, start=1):
        darkened = _png(word_map.image * 0.35)
        figure.add_image(source=darkened, x0=0.5, y0=0.5, dx=1, dy=1, hoverinfo="skip", row=1, col=column)
        for layer in layers:
            _words(figure, word_map, layer, len(maps), column, visible=layer == start)
        _image_axes(figure, word_map.image.shape, 1, column)
    layer_of = [trace.meta for trace in figure.data]  # None for images
    steps = [
        {"label": str(layer), "method": "restyle", "args": [{"visible": [at in (None, layer) for at in layer_of]}]}
        for layer in layers
    ]
    slider = {"active": layers.index(start), "currentvalue": {"prefix": "layer "}, "pad": {"t": 8}, "steps": steps}
    legend = (
        '<span style="color:#d9a400">yellow</span>: a word of the object there · white: another word on an object ·'
        " gray: on no object"
    )
    margin = {"t": 84, "l": 8, "r": 8, "b": 8}
    figure.update_layout(
        template="workbench",
        height=int(180 + 900 / max(2, len(maps))),
        hovermode="closest",
        showlegend=False,
        margin=margin,
    )
    figure.update_layout(title={"text": legend, "font": {"size": 13}, "x": 0.5, "xanchor": "center"}, sliders=[slider])
    return figure


def _words(figure: go.Figure, word_map: WordMap, layer: int, maps: int, column: int, *, visible: bool) -> None:
    """Draw the words of one layer over an image; `maps` is the number of images in the figure."""
    height, width = word_map.image.shape[:2]
    words = word_map.words[word_map.words["layer"] == layer]
    tokens = words[words["rank"] == 1]  # one row for each token, with its most likely word
    lines = words["word"] + words["probability"].map("  {:.3f}".format)
    more = lines.groupby(words["token"]).agg("<br>".join).reindex(tokens["token"])
    truth = tokens["truth"].map(lambda name: f"<br>on: {name}" if name else "<br>on no object")
    # width of a token in pixels, on a page of the usual width
    room = 1100 / maps * (tokens["right"] - tokens["left"]).min() if len(tokens) else 0
    size = float(np.clip(room / 4.5, 6, 13))
    fits = max(2, int(room / (0.58 * size)))  # characters
    colors = np.where(tokens["right_word"], "#ffd43b", np.where(tokens["truth"] != "", "#ffffff", "#a9b0ba"))
    figure.add_scatter(
        x=(tokens["left"] + tokens["right"]) / 2 * width,
        y=(tokens["top"] + tokens["bottom"]) / 2 * height,
        text=tokens["word"].map(lambda word: word if len(word) <= fits else word[: fits - 1] + "…"),
        mode="text",
        textfont={"size": size, "color": colors.tolist()},
        customdata=(more.to_numpy() + truth.to_numpy()).tolist(),
        hovertemplate="%{customdata}<extra></extra>",
        meta=layer,
        visible=visible,
        row=1,
        col=column,
    )
