"""Figures that one looks at and clicks into: maps of an image in every layer, and sampled tokens on a plane."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float
from PIL import Image
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

from workbench.data.shapes import COLOURS as SHAPE_COLOURS
from workbench.figures import COLOURS, GREY, new_figure
from workbench.mllm.family import VisualTokens

ACROSS = 2  # panels side by side
HERE = {"color": "#ffffff", "width": 2}
UNDER = {"color": "#000000", "width": 4}  # the outline must be seen on white and on black
PLACES = {"column": ("left", "right"), "row": ("top", "bottom")}
# with every point, for hover and click
CARRIED = ["image", "left", "top", "right", "bottom", "image_id", "name", "at", "token", "model"]


def data_url(image: np.ndarray) -> str:
    """(height, width, 3) bytes as a PNG in a URL."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def clickable(image: np.ndarray, raster: VisualTokens, chosen: int) -> go.Figure:
    """The picture under a nearly invisible point for each of its tokens, since plotly reports clicks on points alone;
    the chosen cell is framed.

    Args:
        raster: `customdata` of a point is the number of its cell in it.
    """
    assert raster.grid is not None
    height, width = image.shape[:2]
    boxes = np.array([raster.token_box(*divmod(i, raster.grid[1])) for i in range(raster.grid[0] * raster.grid[1])]) * [
        width,
        height,
        width,
        height,
    ]
    figure = new_figure(height=360, hovermode="closest", margin={"l": 4, "r": 4, "t": 4, "b": 4}, showlegend=False)
    figure.add_image(source=data_url(image), x0=0.5, y0=0.5, dx=1, dy=1, hoverinfo="skip")
    _frame(figure, *boxes[chosen])
    size = 0.9 * 340 * float(np.min(boxes[0, 2:] - boxes[0, :2])) / max(height, width)
    figure.add_scatter(
        **{
            "x": boxes[:, [0, 2]].mean(1),
            "y": boxes[:, [1, 3]].mean(1),
            "mode": "markers",
            "customdata": np.arange(len(boxes)),
        },
        marker={"symbol": "square", "size": size, "opacity": 0.01, "color": GREY},
        selected={"marker": {"opacity": 0.01}},
        unselected={"marker": {"opacity": 0.01}},
        hovertemplate="patch %{customdata}<extra></extra>",
    )
    figure.update_xaxes(range=[min(0, boxes[0, 0]), max(width, boxes[-1, 2])], visible=False, constrain="domain")
    figure.update_yaxes(
        range=[max(height, boxes[-1, 3]), min(0, boxes[0, 1])], visible=False, scaleanchor="x", constrain="domain"
    )
    return figure


def _frame(figure: go.Figure, left: float, top: float, right: float, bottom: float, **where: int) -> None:
    for line in (UNDER, HERE):
        corners = {"x": [left, right, right, left, left], "y": [top, top, bottom, bottom, top]}
        figure.add_scatter(**corners, mode="lines", line=line, hoverinfo="skip", showlegend=False, **where)


Maps = Mapping[str, Mapping[str, np.ndarray]]


def small_maps(maps: Maps, cells: Mapping[str, int], *, bounds: tuple[float, float] | None = None) -> go.Figure:
    """A row of maps for each model, a column for each representation.

    Args:
        maps: {model: {representation: (h, w) values or (h, w, 3) colours in 0..1}}.
        cells: {model: number of the cell to frame}, empty for none.
        bounds: ends of the colour scale of all maps of values; without it each map has its own.
    """
    names = list(dict.fromkeys(name for own in maps.values() for name in own))
    titles = [name.removeprefix("layer ").replace("-", "-<br>") for name in names]
    figure = make_subplots(
        len(maps),
        len(names),
        column_titles=titles,
        row_titles=list(maps),
        horizontal_spacing=0.006,
        vertical_spacing=0.02,
    )
    figure.update_annotations(font_size=12)
    for row, (model, own) in enumerate(maps.items(), start=1):
        for column, name in enumerate(names, start=1):
            if name not in own:
                continue
            shown, where = own[name], {"row": row, "col": column}
            if shown.ndim == 3:
                figure.add_image(z=(shown * 255).round().astype(np.uint8), hoverinfo="skip", **where)
            else:
                low, high = bounds or (float(shown.min()), float(shown.max()))
                colours = (
                    {"coloraxis": "coloraxis"}
                    if bounds
                    else {"colorscale": "Viridis", "zmin": low, "zmax": high, "showscale": False}
                )
                figure.add_heatmap(
                    z=shown, hovertemplate=f"{model}, {name}: %{{z:.3f}}<extra></extra>", **colours, **where
                )
            if model in cells:
                y, x = divmod(cells[model], shown.shape[1])
                _frame(figure, x - 0.5, y - 0.5, x + 0.5, y + 0.5, **where)
            anchor = figure.get_subplot(row, column).xaxis.plotly_name.replace("axis", "")
            figure.update_xaxes(visible=False, constrain="domain", range=[-0.5, shown.shape[1] - 0.5], **where)
            figure.update_yaxes(
                visible=False, scaleanchor=anchor, constrain="domain", range=[shown.shape[0] - 0.5, -0.5], **where
            )
    bar = {"title": {"text": "cosine", "side": "right"}, "thickness": 12}
    scale = {"colorscale": "Viridis", "cmin": bounds[0], "cmax": bounds[1], "colorbar": bar} if bounds else {}
    height = 60 + len(maps) * min(240, 1000 // max(1, len(names)))
    figure.update_layout(
        template="workbench",
        height=height,
        hovermode="closest",
        coloraxis=scale,
        margin={"l": 8, "r": 36, "t": 44, "b": 8},
    )
    return figure


def token_planes(table: pd.DataFrame, *, by: str) -> go.Figure:
    """Sampled tokens on a plane, a panel for each `panel`.

    Args:
        table: columns panel, x, y, `CARRIED`, and those that `by` needs: a column of names, "layer", or a place ("row",
            "column").
    """
    panels = list(dict.fromkeys(table["panel"]))
    lines = -(-len(panels) // ACROSS)
    figure = make_subplots(
        lines, min(ACROSS, len(panels)), subplot_titles=panels, horizontal_spacing=0.03, vertical_spacing=0.08
    )
    values = _place(table, by) if by in PLACES else None
    kinds = [] if values is not None else sorted(table[by].unique(), key=_order)
    hues = _hues(kinds)
    for number, panel in enumerate(panels, start=1):
        part = table[table["panel"] == panel]
        for kind in kinds or [by]:
            own = part if values is not None else part[part[by] == kind]
            marker = {"size": 6, "opacity": 0.8} | (
                {"color": hues[kind]} if values is None else {"color": values[own.index], "coloraxis": "coloraxis"}
            )
            figure.add_scattergl(
                **{
                    "x": own["x"],
                    "y": own["y"],
                    "mode": "markers",
                    "marker": marker,
                    "name": _called(kind, by),
                    "legendgroup": str(kind),
                },
                showlegend=values is None and _first(figure, str(kind)),
                customdata=own[CARRIED].astype(object),
                hovertemplate=(
                    "%{customdata[7]} · %{customdata[6]}<br>%{customdata[5]}, token %{customdata[8]}<extra></extra>"
                ),
                **{"row": 1 + (number - 1) // ACROSS, "col": 1 + (number - 1) % ACROSS},
            )
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    edges = {"column": ("left", "right"), "row": ("top", "bottom")}.get(by, ("", ""))
    bar = {"tickvals": [0, 1], "ticktext": edges, "thickness": 12}
    figure.update_layout(
        template="workbench",
        height=120 + 320 * lines,
        hovermode="closest",
        coloraxis={"colorscale": "Viridis", "cmin": 0, "cmax": 1, "colorbar": bar},
    )
    figure.update_layout(
        margin={"l": 8, "r": 8, "t": 56, "b": 48}, legend={"orientation": "h", "y": -0.02, "yanchor": "top", "x": 0}
    )
    return figure


def _order(kind: object) -> tuple[int, float, str]:
    """Numbers by size, then names, what is no object last."""
    if isinstance(kind, float):
        return 0, kind, ""
    return 2 if kind in ("background", "edge") else 1, 0, str(kind)


def _first(figure: go.Figure, group: str) -> bool:
    """Whether no trace of the group is there yet: its legend entry stands for those of all panels."""
    return all(trace.legendgroup != group for trace in figure.data)


def _place(table: pd.DataFrame, by: str) -> pd.Series:
    """Where in the image the middle of each token's cell lies, 0..1."""
    return table[list(PLACES[by])].mean(axis=1).clip(0, 1)


def _called(kind: object, by: str) -> str:
    return f"layer {kind:g}" if by == "layer" and isinstance(kind, float) else str(kind)


def _hues(kinds: Sequence[object]) -> dict[object, str]:
    """A colour for each kind: its own where it is one, grey for what is no object, steps of one scale for numbers, else
    the palette."""
    numbers = [kind for kind in kinds if isinstance(kind, float)]
    names = [
        kind
        for kind in kinds
        if not isinstance(kind, float) and kind not in SHAPE_COLOURS and kind not in ("background", "edge")
    ]
    hues: dict[object, str] = {"background": GREY, "edge": COLOURS[-1]}
    hues |= {kind: "#{:02x}{:02x}{:02x}".format(*SHAPE_COLOURS[kind]) for kind in kinds if kind in SHAPE_COLOURS}  # type: ignore[index]
    hues |= {kind: COLOURS[i % len(COLOURS)] for i, kind in enumerate(names)}
    if numbers:
        hues |= dict(zip(numbers, sample_colorscale("Viridis", list(np.linspace(0, 1, len(numbers)))), strict=True))
    return hues


def located(image: np.ndarray, box: Sequence[float]) -> Float[np.ndarray, "h w 3"]:
    """The picture, enlarged with hard edges, with one cell framed."""
    scale = max(1, 280 // max(image.shape[:2]))
    large = np.repeat(np.repeat(image, scale, axis=0), scale, axis=1).copy()
    height, width = large.shape[:2]
    left, top, right, bottom = (
        round(min(1.0, max(0.0, edge)) * size) for edge, size in zip(box, (width, height, width, height), strict=True)
    )
    for margin, tone in ((0, 0), (2, 255)):
        t, b, lt, r = top + margin, bottom - margin, left + margin, right - margin
        for rows, columns in (
            (slice(t, t + 2), slice(lt, r)),
            (slice(b - 2, b), slice(lt, r)),
            (slice(t, b), slice(lt, lt + 2)),
            (slice(t, b), slice(r - 2, r)),
        ):
            large[rows, columns] = tone
    return large
