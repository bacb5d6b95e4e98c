"""Interactive figures of stored tokens: maps of an image in every layer, and sampled tokens on a plane."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import UInt8
from PIL import Image
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

from workbench.data.shapes import COLORS as SHAPE_COLORS
from workbench.figures import COLORS, GRAY, new_figure, plain_name
from workbench.mllm.family import VisualTokens

PANELS_PER_ROW = 2
INNER_LINE = {"color": "#ffffff", "width": 2}
OUTER_LINE = {"color": "#000000", "width": 4}  # with both, a frame is visible on white and on black
PLACES = {"column": ("left", "right"), "row": ("top", "bottom")}
# stored with every point, for hover and click
POINT_COLUMNS = ["image", "left", "top", "right", "bottom", "image_id", "name", "at", "token", "model"]


def data_url(image: np.ndarray) -> str:
    """Return an image (height, width, 3) of bytes as a PNG in a data URL."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def clickable(image: np.ndarray, tokens: VisualTokens, chosen: int) -> go.Figure:
    """Return a figure of the image whose patches can be clicked, with the chosen patch framed.

    Plotly reports clicks on points only, so a nearly invisible point lies on each patch.

    Args:
        image: (height, width, 3) bytes.
        tokens: the visual tokens of the image; `customdata` of a point is the number of its patch.
        chosen: number of the patch to frame.
    """
    assert tokens.grid is not None
    height, width = image.shape[:2]
    rows, columns = tokens.grid
    fractions = np.array([tokens.token_box(row, column) for row in range(rows) for column in range(columns)])
    boxes = fractions * [width, height, width, height]
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
        marker={"symbol": "square", "size": size, "opacity": 0.01, "color": GRAY},
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
    for line in (OUTER_LINE, INNER_LINE):
        corners = {"x": [left, right, right, left, left], "y": [top, top, bottom, bottom, top]}
        figure.add_scatter(**corners, mode="lines", line=line, hoverinfo="skip", showlegend=False, **where)


Maps = Mapping[str, Mapping[str, np.ndarray]]


def small_maps(maps: Maps, framed: Mapping[str, int], *, bounds: tuple[float, float] | None = None) -> go.Figure:
    """Return a figure with a row of maps for each model and a column for each representation.

    Args:
        maps: {model: {representation: (h, w) values or (h, w, 3) colors in 0..1}}.
        framed: {model: number of the patch to frame}; empty for none.
        bounds: ends of the color scale that all maps of values share; without it each map has its own scale.
    """
    names = list(dict.fromkeys(name for model_maps in maps.values() for name in model_maps))
    titles = [plain_name(name.removeprefix("layer ")).replace("-", "-<br>") for name in names]
    figure = make_subplots(
        len(maps),
        len(names),
        column_titles=titles,
        row_titles=list(map(plain_name, maps)),
        horizontal_spacing=0.006,
        vertical_spacing=0.02,
    )
    figure.update_annotations(font_size=12)
    for row, (model, model_maps) in enumerate(maps.items(), start=1):
        for column, name in enumerate(names, start=1):
            if name not in model_maps:
                continue
            values, where = model_maps[name], {"row": row, "col": column}
            if values.ndim == 3:
                figure.add_image(z=(values * 255).round().astype(np.uint8), hoverinfo="skip", **where)
            else:
                scale: dict[str, object] = {"coloraxis": "coloraxis"}
                if not bounds:
                    scale = {"colorscale": "Viridis", "zmin": float(values.min()), "zmax": float(values.max())}
                    scale["showscale"] = False
                of = plain_name(f"{model}, {name}")
                figure.add_heatmap(z=values, hovertemplate=f"{of}: %{{z:.3f}}<extra></extra>", **scale, **where)
            if model in framed:
                y, x = divmod(framed[model], values.shape[1])
                _frame(figure, x - 0.5, y - 0.5, x + 0.5, y + 0.5, **where)
            anchor = figure.get_subplot(row, column).xaxis.plotly_name.replace("axis", "")
            figure.update_xaxes(visible=False, constrain="domain", range=[-0.5, values.shape[1] - 0.5], **where)
            figure.update_yaxes(
                visible=False, scaleanchor=anchor, constrain="domain", range=[values.shape[0] - 0.5, -0.5], **where
            )
    bar = {"title": {"text": "cosine", "side": "right"}, "thickness": 12}
    shared = {"colorscale": "Viridis", "cmin": bounds[0], "cmax": bounds[1], "colorbar": bar} if bounds else {}
    height = 60 + len(maps) * min(240, 1000 // max(1, len(names)))
    figure.update_layout(
        template="workbench",
        height=height,
        hovermode="closest",
        coloraxis=shared,
        margin={"l": 8, "r": 36, "t": 44, "b": 8},
    )
    return figure


def token_planes(table: pd.DataFrame, *, by: str) -> go.Figure:
    """Return a figure of sampled tokens on planes, one panel for each value of `panel`, colored by `by`.

    Args:
        table: columns panel, x, y, `POINT_COLUMNS`, and what `by` needs.
        by: a column of names, "layer", or a place in the image ("row" or "column").
    """
    panels = list(dict.fromkeys(table["panel"]))
    rows = -(-len(panels) // PANELS_PER_ROW)
    figure = make_subplots(
        rows,
        min(PANELS_PER_ROW, len(panels)),
        subplot_titles=list(map(plain_name, panels)),
        horizontal_spacing=0.03,
        vertical_spacing=0.08,
    )
    values = _place(table, by) if by in PLACES else None
    kinds = [] if values is not None else sorted(table[by].unique(), key=_sort_key)
    colors = _colors(kinds)
    for number, panel in enumerate(panels, start=1):
        part = table[table["panel"] == panel]
        for kind in kinds or [by]:
            marker: dict[str, object] = {"size": 6, "opacity": 0.8}
            if values is None:
                points = part[part[by] == kind]
                marker |= {"color": colors[kind]}
            else:
                points = part
                marker |= {"color": values[points.index], "coloraxis": "coloraxis"}
            figure.add_scattergl(
                **{
                    "x": points["x"],
                    "y": points["y"],
                    "mode": "markers",
                    "marker": marker,
                    "name": _kind_label(kind, by),
                    "legendgroup": str(kind),
                },
                showlegend=values is None and _is_first(figure, str(kind)),
                customdata=points[POINT_COLUMNS].astype(object),
                hovertemplate=(
                    "%{customdata[7]} · %{customdata[6]}<br>%{customdata[5]}, token %{customdata[8]}<extra></extra>"
                ),
                **{"row": 1 + (number - 1) // PANELS_PER_ROW, "col": 1 + (number - 1) % PANELS_PER_ROW},
            )
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    edges = {"column": ("left", "right"), "row": ("top", "bottom")}.get(by, ("", ""))
    bar = {"tickvals": [0, 1], "ticktext": edges, "thickness": 12}
    figure.update_layout(
        template="workbench",
        height=120 + 320 * rows,
        hovermode="closest",
        coloraxis={"colorscale": "Viridis", "cmin": 0, "cmax": 1, "colorbar": bar},
    )
    figure.update_layout(
        margin={"l": 8, "r": 8, "t": 56, "b": 48}, legend={"orientation": "h", "y": -0.02, "yanchor": "top", "x": 0}
    )
    return figure


def _sort_key(kind: object) -> tuple[int, float, str]:
    """Sort numbers by size, then names of objects, then what is no object."""
    if isinstance(kind, float):
        return 0, kind, ""
    return 2 if kind in ("background", "edge") else 1, 0, str(kind)


def _is_first(figure: go.Figure, group: str) -> bool:
    """Return whether the figure has no trace of the group yet; the first one gets the legend entry for all panels."""
    return all(trace.legendgroup != group for trace in figure.data)


def _place(table: pd.DataFrame, by: str) -> pd.Series:
    """Return the center of each token's patch along one axis of the image, 0..1."""
    return table[list(PLACES[by])].mean(axis=1).clip(0, 1)


def _kind_label(kind: object, by: str) -> str:
    return f"layer {kind:g}" if by == "layer" and isinstance(kind, float) else plain_name(str(kind))


def _colors(kinds: Sequence[object]) -> dict[object, str]:
    """Return a color for each kind.

    The name of a color has that color, what is no object is gray, numbers are steps of one scale, and all other names
    take the palette.
    """
    numbers = [kind for kind in kinds if isinstance(kind, float)]
    names = [
        kind
        for kind in kinds
        if not isinstance(kind, float) and kind not in SHAPE_COLORS and kind not in ("background", "edge")
    ]
    colors: dict[object, str] = {"background": GRAY, "edge": COLORS[-1]}
    colors |= {kind: "#{:02x}{:02x}{:02x}".format(*SHAPE_COLORS[kind]) for kind in kinds if kind in SHAPE_COLORS}  # type: ignore[index]
    colors |= {kind: COLORS[i % len(COLORS)] for i, kind in enumerate(names)}
    if numbers:
        steps = sample_colorscale("Viridis", list(np.linspace(0, 1, len(numbers))))
        colors |= dict(zip(numbers, steps, strict=True))
    return colors


def framed_patch(image: UInt8[np.ndarray, "h w 3"], box: Sequence[float]) -> UInt8[np.ndarray, "height width 3"]:
    """Return the image, enlarged with hard edges, with one patch framed; `box` is in fractions of the image."""
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
