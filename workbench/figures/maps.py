"""Heat maps, outlines and words drawn over an image."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from PIL import Image
from plotly.subplots import make_subplots

from workbench.figures.template import translucent

# low values let the image through
HEAT = [
    [n / 4, translucent(color, 0.25 + 0.15 * n)]
    for n, color in enumerate(("#440154", "#3b528b", "#21918c", "#5ec962", "#fde725"))
]


Corners = tuple[float, float, float, float]
PAGE = 1100  # pixels, width of a figure on a page of the usual width
CONTROL = r"<[^<>\s]+>|\[(?:UNK|PAD|CLS|SEP|MASK)\]"  # how tokenizers spell tokens that are no words


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
        edges: the edges of the columns and of the rows in fractions of the image, where patches are of unequal sizes.
        words: a text to write on each patch, row by row.
        frame: the region that is framed, as an outline.
    """

    title: str
    image: np.ndarray
    values: np.ndarray
    box: Corners
    outlines: Sequence[Corners] = ()
    edges: tuple[Sequence[float], Sequence[float]] | None = None
    words: Sequence[str] = ()
    frame: Corners | None = None


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


def overlays_on_one_scale(row: Sequence[Overlay], bounds: tuple[float, float], unit: str) -> go.Figure:
    """Draw heat maps over images side by side, on one color scale, with their words and frames.

    Args:
        row: one whose values are all NaN shows its image alone.
        bounds: ends of the color scale.
        unit: what a value is, beside the color bar.
    """
    figure = _overlay_grid([row])
    for column, overlay in enumerate(row, start=1):
        _image(figure, overlay, 1, column)
        if not np.isnan(overlay.values).all():
            _heat(figure, overlay, 1, column, coloraxis="coloraxis", hovertemplate="%{z:.3f}<extra></extra>")
        if overlay.words:
            _written(figure, overlay, 1, column, room=0.8 * PAGE / len(row))
        if overlay.frame is not None:
            size = overlay.image.shape[1], overlay.image.shape[0]
            left, top, right, bottom = (edge * size[n % 2] for n, edge in enumerate(overlay.frame))
            _framed(figure, (left, top, right, bottom), 1, column)
    bar = {"title": {"text": unit, "side": "right"}, "thickness": 12}
    scale = {"colorscale": HEAT, "cmin": bounds[0], "cmax": bounds[1], "colorbar": bar}
    return figure.update_layout(coloraxis=scale, height=_row_height(row[0].image, len(row)), margin={"r": 8, "b": 8})


def colored_patches(plain: Overlay, maps: Sequence[tuple[str, np.ndarray, Corners]]) -> go.Figure:
    """Draw an image and, beside it, maps of colors patch by patch.

    Args:
        plain: the image, and the region that is framed in it.
        maps: title, colors (h, w, 3) from 0 to 1, and left, top, right, bottom of the framed region in patches.
    """
    blank = [Overlay(title, plain.image, colors[..., 0], plain.box) for title, colors, _ in maps]
    figure = _overlay_grid([[plain, *blank]])
    _image(figure, plain, 1, 1)
    if plain.frame is not None:
        size = plain.image.shape[1], plain.image.shape[0]
        left, top, right, bottom = (edge * size[n % 2] for n, edge in enumerate(plain.frame))
        _framed(figure, (left, top, right, bottom), 1, 1)
    shape = plain.image.shape[0] / plain.image.shape[1]
    for column, (_, colors, frame) in enumerate(maps, start=2):
        rows, columns = colors.shape[:2]
        figure.add_image(z=(colors * 255).round().astype(np.uint8), hoverinfo="skip", row=1, col=column)
        image_axes(figure, (rows - 0.5, columns - 0.5), 1, column, start=(-0.5, -0.5))
        figure.update_yaxes(scaleratio=shape * columns / rows, row=1, col=column)
        _framed(figure, (frame[0] - 0.5, frame[1] - 0.5, frame[2] - 0.5, frame[3] - 0.5), 1, column)
    return figure.update_layout(height=_row_height(plain.image, 1 + len(maps)), margin={"r": 8, "b": 8})


def _width(count: int) -> float:
    """Return the width of each of `count` images of a row in pixels, so that a paper's columns hold them."""
    return 0.85 * (800 if count > 2 else 380) / count


def _row_height(image: np.ndarray, count: int) -> int:
    """Return the height of a row of images in pixels, which leaves no empty space in a paper."""
    return round(90 + _width(count) * image.shape[0] / image.shape[1])


def _framed(figure: go.Figure, box: Corners, row: int, column: int) -> None:
    """Frame a region of a subplot, visibly on white and on black."""
    left, top, right, bottom = box
    for color, width in (("#000000", 4), ("#ffffff", 2)):
        line = {"color": color, "width": width}
        figure.add_shape(type="rect", x0=left, y0=top, x1=right, y1=bottom, line=line, row=row, col=column)


def _written(figure: go.Figure, overlay: Overlay, row: int, column: int, *, room: float) -> None:
    """Write the words of an overlay on its patches, which are `room` pixels wide together."""
    x, y = ((edges[:-1] + edges[1:]) / 2 for edges in _edges(overlay))
    size = float(np.clip(room / len(x) / 4.5, 6, 13))
    fits = max(2, int(room / len(x) / (0.5 * size)))  # letters
    figure.add_scatter(
        x=np.tile(x, len(y)),
        y=np.repeat(y, len(x)),
        text=[escape(word if len(word) <= fits else word[: fits - 1] + "…") for word in overlay.words],
        mode="text",
        textfont={"size": size, "color": "#ffffff", "shadow": "0 0 2px #000000"},
        hoverinfo="skip",
        row=row,
        col=column,
    )


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
        meta={"images": len({overlay.image.tobytes() for row in rows for overlay in row})},
    )
    return figure


def _edges(overlay: Overlay) -> tuple[np.ndarray, np.ndarray]:
    """Return the edges of an overlay's patches in pixels: x of the columns, y of the rows."""
    height, width = overlay.image.shape[:2]
    if overlay.edges is not None:
        return np.asarray(overlay.edges[0]) * width, np.asarray(overlay.edges[1]) * height
    left, top, right, bottom = overlay.box
    x = np.linspace(left * width, right * width, overlay.values.shape[1] + 1)
    return x, np.linspace(top * height, bottom * height, overlay.values.shape[0] + 1)


def _heat(figure: go.Figure, overlay: Overlay, row: int, column: int, **options: Any) -> None:
    """Draw the heat map of an overlay into a subplot."""
    x, y = _edges(overlay)
    scale = {} if "coloraxis" in options else {"zmin": 0, "colorscale": HEAT, "showscale": False}
    figure.add_heatmap(
        x=x,
        y=y,
        z=overlay.values,
        row=row,
        col=column,
        **{"hovertemplate": "%{z:.3f} of the attention on the image<extra></extra>"} | scale | options,
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
    white if it is another word on an object, and gray if there is no object or the word is a control token.
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
        " gray: on no object, or a control token"
    )
    margin = {"t": 84, "l": 8, "r": 8, "b": 8}
    figure.update_layout(
        template="workbench",
        height=int(180 + 900 / max(2, len(maps))),
        hovermode="closest",
        showlegend=False,
        margin=margin,
        meta={"images": len({word_map.image.tobytes() for word_map in maps})},
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
    room = PAGE / maps * (tokens["right"] - tokens["left"]).min() if len(tokens) else 0
    size = float(np.clip(room / 4.5, 6, 13))
    fits = max(2, int(room / (0.58 * size)))  # characters
    control = tokens["word"].str.fullmatch(CONTROL)
    on_object = (tokens["truth"] != "") & ~control
    colors = np.where(tokens["right_word"], "#ffd43b", np.where(on_object, "#ffffff", "#a9b0ba"))
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
