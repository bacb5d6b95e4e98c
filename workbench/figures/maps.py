"""Heat maps, outlines and words drawn over an image."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from PIL import Image
from plotly.subplots import make_subplots

from workbench.figures.template import translucent


@dataclass(frozen=True)
class Overlay:
    """A heat map over an image.

    Attributes:
        title: the text above the image.
        image: pixels as bytes, (height, width, 3).
        values: the value of each patch, (h, w).
        box: left, top, right, bottom of the patch grid in fractions of the image; if the model pads the image, the grid
            is larger than the image.
        outlines: left, top, right, bottom of each object to frame, in fractions of the image.
    """

    title: str
    image: np.ndarray
    values: np.ndarray
    box: tuple[float, float, float, float]
    outlines: Sequence[tuple[float, float, float, float]] = ()


def overlays(rows: Sequence[Sequence[Overlay]]) -> go.Figure:
    """Draw heat maps over images, with a row of images for each sequence in `rows`.

    Every patch covers its own pixels. Each map has its own color scale from 0 to its maximum.
    """
    figure = _overlay_grid(rows)
    for at, row in enumerate(rows, start=1):
        for column, overlay in enumerate(row, start=1):
            _image(figure, overlay, at, column)
            _heat(figure, overlay, at, column)
    return figure


def layered_overlays(rows: Sequence[Sequence[Mapping[int, Overlay]]]) -> go.Figure:
    """Draw heat maps over images as `overlays`, with a slider that chooses the layer and one color scale for a layer.

    Args:
        rows: of each place its overlays by layer, which differ in `values` only. A layer that a place lacks shows no
            map there.
    """
    places = [
        (at, column, by_layer) for at, row in enumerate(rows, start=1) for column, by_layer in enumerate(row, start=1)
    ]
    layers = sorted({layer for _, _, by_layer in places for layer in by_layer})
    start = layers[len(layers) // 2]
    figure = _overlay_grid([[next(iter(by_layer.values())) for by_layer in row] for row in rows])
    for at, column, by_layer in places:
        _image(figure, next(iter(by_layer.values())), at, column)
    for layer in layers:
        most = max(float(np.nanmax(by_layer[layer].values)) for _, _, by_layer in places if layer in by_layer)
        bar = {"title": {"text": "share of the attention<br>on the image", "side": "right"}}
        for at, column, by_layer in places:
            if layer in by_layer:
                heat = {"zmax": most, "visible": layer == start, "meta": layer, "showscale": (at, column) == (1, 1)}
                _heat(figure, by_layer[layer], at, column, colorbar=bar, **heat)
    slider = _layer_slider(figure, layers, start)
    return figure.update_layout(sliders=[slider], height=figure.layout.height + 90, margin={"b": 90})


def _layer_slider(figure: go.Figure, layers: Sequence[int], start: int) -> dict[str, Any]:
    """Return a slider that shows the traces of one layer, which have it as `meta`, and those without a layer."""
    layer_of = [trace.meta for trace in figure.data]  # None for images and outlines
    steps = [
        {"label": str(layer), "method": "restyle", "args": [{"visible": [at in (None, layer) for at in layer_of]}]}
        for layer in layers
    ]
    return {"active": layers.index(start), "currentvalue": {"prefix": "layer "}, "pad": {"t": 8}, "steps": steps}


def _overlay_grid(rows: Sequence[Sequence[Overlay]]) -> go.Figure:
    """Return a figure with a titled, empty place for each overlay."""
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
        for column in range(len(row) + 1, width + 1):
            figure.update_xaxes(visible=False, row=at, col=column)
            figure.update_yaxes(visible=False, row=at, col=column)
    figure.update_layout(
        template="workbench",
        height=80 + 340 * len(rows),
        hovermode="closest",
        showlegend=False,
        margin={"t": 70, "l": 16, "b": 16},
    )
    return figure


def _edges(overlay: Overlay) -> tuple[np.ndarray, np.ndarray]:
    """Return the edges of an overlay's patches in pixels: x of the columns, y of the rows."""
    height, width = overlay.image.shape[:2]
    left, top, right, bottom = overlay.box
    x = np.linspace(left * width, right * width, overlay.values.shape[1] + 1)
    return x, np.linspace(top * height, bottom * height, overlay.values.shape[0] + 1)


def _heat(figure: go.Figure, overlay: Overlay, row: int, column: int, **options: Any) -> None:
    """Draw the heat map of an overlay into a subplot."""
    x, y = _edges(overlay)
    figure.add_heatmap(
        x=x,
        y=y,
        z=overlay.values,
        zmin=0,
        hovertemplate="%{z:.3f} of the attention on the image<extra></extra>",
        colorscale=[[0, translucent("#ff2a00", 0)], [1, translucent("#ff2a00", 0.8)]],
        row=row,
        col=column,
        **{"showscale": False} | options,
    )


def _image(figure: go.Figure, overlay: Overlay, row: int, column: int) -> None:
    """Draw the image and the outlines of an overlay into a subplot."""
    (x, y), (height, width) = _edges(overlay), overlay.image.shape[:2]
    # x0 and y0 are the center of the first pixel for plotly; here, as everywhere else, pixel 0 extends from 0 to 1
    figure.add_image(source=png(overlay.image), x0=0.5, y0=0.5, dx=1, dy=1, hoverinfo="skip", row=row, col=column)
    for outline in overlay.outlines:
        sizes = (width, height, width, height)
        left, top, right, bottom = (edge * size for edge, size in zip(outline, sizes, strict=True))
        line = {"color": "white", "width": 2, "dash": "dash"}
        corners = ([left, right, right, left, left], [top, top, bottom, bottom, top])
        figure.add_scatter(x=corners[0], y=corners[1], mode="lines", line=line, hoverinfo="skip", row=row, col=column)
    image_axes(figure, (max(height, y[-1]), max(width, x[-1])), row, column, start=(min(0, y[0]), min(0, x[0])))


def png(image: np.ndarray) -> str:
    """Return pixels (height, width, 3) as a PNG data URL."""
    data = io.BytesIO()
    Image.fromarray(image.astype(np.uint8)).save(data, format="PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def image_axes(
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
        darkened = png(word_map.image * 0.35)
        figure.add_image(source=darkened, x0=0.5, y0=0.5, dx=1, dy=1, hoverinfo="skip", row=1, col=column)
        for layer in layers:
            _words(figure, word_map, layer, len(maps), column, visible=layer == start)
        image_axes(figure, word_map.image.shape, 1, column)
    slider = _layer_slider(figure, layers, start)
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
