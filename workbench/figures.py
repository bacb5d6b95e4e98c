"""One plotly template and the chart forms that several analyses share."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
from PIL import Image
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

# A colour-blind-safe order (Okabe and Ito), darkened where needed to read on white and on black.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b8860b", "#cc79a7", "#56a0d3")
DASHES = ("solid", "dash", "dot", "dashdot")
GREY = "#8a8f98"
EXPORT = {"showSendToCloud": False, "displaylogo": False, "toImageButtonOptions": {"format": "svg"}}

pio.templates["workbench"] = go.layout.Template(
    layout={
        "colorway": COLOURS,
        "font": {"family": "Inter, system-ui, sans-serif", "size": 13, "color": GREY},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 60, "r": 16, "t": 36, "b": 48},
        "hovermode": "x unified",
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "xaxis": {"gridcolor": "rgba(138,143,152,0.18)", "zeroline": False, "ticks": "outside", "tickcolor": "rgba(138,143,152,0.5)"},
        "yaxis": {"gridcolor": "rgba(138,143,152,0.18)", "zeroline": False},
    }
)

Figure = go.Figure


def new_figure(**layout: object) -> go.Figure:
    """An empty figure in the workbench's template."""
    return go.Figure(layout={"template": "workbench", **layout})


def translucent(colour: str, alpha: float) -> str:
    """`#rrggbb` with an alpha of 0..1, for bands."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def layer_curves(curves: pd.DataFrame, *, y: str, kind: str, null: str = "chance (null mean to 95 %)") -> go.Figure:
    """Score by layer, one line per model and `kind`, with its interval as a band and its null as a dotted line.

    Args:
        curves: columns model, layer, score, low, high, n_images and the column named by `kind`; null_mean and null_q95 where the score has a null,
            chance where it has a known chance level, otherwise 0 means no change and is drawn as a line. Layer -1 stands for the tower.
        y: name of the score, shown on the axis.
        kind: the column that dashes tell apart; colours tell models apart.
        null: what the null is called; where it is NaN throughout, none is drawn.
    """
    figure = new_figure(xaxis_title="layer", yaxis_title=y, height=460)
    models, kinds = list(dict.fromkeys(curves["model"])), list(dict.fromkeys(curves[kind]))
    for (model, name), part in curves.groupby(["model", kind], sort=False):
        part = part.sort_values("layer")
        colour, dash = COLOURS[models.index(model) % len(COLOURS)], DASHES[kinds.index(name) % len(DASHES)]
        label = f"{model} · {name}"
        _band(figure, part["layer"], part["low"], part["high"], translucent(colour, 0.16), label)
        hover = "%{y:.3f}  [%{customdata[0]:.3f}, %{customdata[1]:.3f}]  n=%{customdata[2]}"
        figure.add_scatter(
            x=part["layer"],
            y=part["score"],
            name=label,
            legendgroup=label,
            mode="lines+markers",
            line={"color": colour, "dash": dash, "width": 2.5},
            marker={"size": 7},
            error_y=_error_bars(part) if len(part) == 1 else None,  # a single point has no band
            customdata=part[["low", "high", "n_images"]],
            hovertemplate=hover,
        )
    if "null_mean" in curves:
        if curves["null_mean"].notna().any():
            _null_band(figure, curves, null)
        figure.update_yaxes(rangemode="tozero")
    elif "chance" in curves:
        ends = [curves["layer"].min(), curves["layer"].max()]
        dotted = {"color": GREY, "dash": "dot", "width": 1.5}
        figure.add_scatter(x=ends, y=[curves["chance"].mean()] * 2, name="chance", mode="lines", line=dotted, hovertemplate="%{y:.3f}")
    else:
        figure.add_hline(y=0, line={"color": GREY, "dash": "dot", "width": 1.5})
    _layer_axis(figure, curves["layer"])
    return figure


def with_ceilings(figure: go.Figure, ceilings: pd.DataFrame, *, name: str) -> go.Figure:
    """Layer curves with a level line and its interval for each row of `ceilings` (columns score, low, high, n_images and the one named by `name`)."""
    layers = [x for trace in figure.data for x in trace.x]
    ends = pd.Series([min(layers), max(layers)])
    for number, row in enumerate(ceilings.to_dict("records")):
        label, dash = str(row[name]), ("longdash", "longdashdot", "dashdot")[number % 3]
        _band(figure, ends, pd.Series([row["low"]] * 2), pd.Series([row["high"]] * 2), translucent(GREY, 0.14), label)
        figure.add_scatter(
            **{"x": ends, "y": [row["score"]] * 2, "name": f"{label} (frozen)", "legendgroup": label, "mode": "lines"},
            line={"color": GREY, "dash": dash, "width": 2},
            customdata=[[row["low"], row["high"], row["n_images"]]] * 2,
            hovertemplate="%{y:.3f}  [%{customdata[0]:.3f}, %{customdata[1]:.3f}]  n=%{customdata[2]}",
        )
    return figure


def _layer_axis(figure: go.Figure, layers: pd.Series) -> None:
    """A tick for each layer, for every fourth of many, and `tower` at -1."""
    step = 1 if layers.max() <= 16 else 4
    figure.update_xaxes(dtick=step)
    if layers.min() < 0:
        ticks = [-1, *range(0, int(layers.max()) + 1, step)]
        figure.update_xaxes(tickvals=ticks, ticktext=["tower", *map(str, ticks[1:])])


def _null_band(figure: go.Figure, curves: pd.DataFrame, name: str) -> None:
    null = curves.groupby("layer")[["null_mean", "null_q95"]].agg({"null_mean": "min", "null_q95": "max"}).reset_index()
    _band(figure, null["layer"], null["null_mean"], null["null_q95"], translucent(GREY, 0.25), "null")
    figure.add_scatter(
        x=null["layer"],
        y=null["null_q95"],
        name=name,
        legendgroup="null",
        mode="lines",
        line={"color": GREY, "dash": "dot", "width": 1.5},
        hovertemplate="%{y:.3f}",
    )


def _error_bars(part: pd.DataFrame) -> dict[str, object]:
    """Intervals as error bars, in a grey that reads on white, on black and on the bars themselves."""
    return {"type": "data", "array": part["high"] - part["score"], "arrayminus": part["score"] - part["low"], "width": 3, "thickness": 1.5, "color": GREY}


def _band(figure: go.Figure, x: pd.Series, low: pd.Series, high: pd.Series, fill: str, group: str, **at: int) -> None:
    figure.add_scatter(
        x=pd.concat([x, x[::-1]]),
        y=pd.concat([high, low[::-1]]),
        mode="lines",  # plotly adds markers to short lines by itself
        fill="toself",
        fillcolor=fill,
        line={"width": 0},
        legendgroup=group,
        showlegend=False,
        hoverinfo="skip",
        **at,
    )


def bars(table: pd.DataFrame, *, x: str, y: str, by: str = "model") -> go.Figure:
    """Bars with their intervals side by side, a colour for each value of `by`; 0 means no change.

    Args:
        table: columns score, low, high, n_images and those named by `x` and `by`.
        y: name of the score, shown on the axis.
    """
    figure = new_figure(yaxis_title=y, height=400, barmode="group", hovermode="closest")
    for number, (name, part) in enumerate(table.groupby(by, sort=False)):
        figure.add_bar(
            **{"x": part[x], "y": part["score"], "name": name, "error_y": _error_bars(part), "customdata": part[["low", "high", "n_images"]]},
            marker={"color": COLOURS[number % len(COLOURS)]},
            hovertemplate="%{x}: %{y:.3f} [%{customdata[0]:.3f}, %{customdata[1]:.3f}], %{customdata[2]} images",
        )
    figure.add_hline(y=0, line={"color": GREY, "dash": "dot", "width": 1.5})
    return figure


def training_curves(logs: dict[str, pd.DataFrame], measure: str) -> go.Figure:
    """One measure over training steps, a line per model; models without it are left out."""
    figure = new_figure(xaxis_title="step", yaxis_title=measure, height=360)
    for number, (name, log) in enumerate(logs.items()):
        if measure in log:
            part = log.dropna(subset=[measure]).drop_duplicates("step")
            figure.add_scatter(
                x=part["step"], y=part[measure], name=name, mode="lines", line={"color": COLOURS[number % len(COLOURS)], "width": 2}, hovertemplate="%{y:.3f}"
            )
    return figure


def accuracy_by_type(tables: dict[str, pd.DataFrame]) -> go.Figure:
    """Accuracy of each question type with its interval, a point per model, and a grey tick at chance.

    Args:
        tables: {model: columns category, accuracy, low, high, n_images, chance}.
    """
    figure = new_figure(yaxis_title="accuracy", height=380, hovermode="closest")
    categories = list(dict.fromkeys(c for table in tables.values() for c in table["category"]))
    chance = pd.concat(tables.values()).groupby("category")["chance"].mean()
    for number, (name, table) in enumerate(tables.items()):
        offset = (number - (len(tables) - 1) / 2) * 0.14
        x = [categories.index(c) + offset for c in table["category"]]
        error = {"type": "data", "array": table["high"] - table["accuracy"], "arrayminus": table["accuracy"] - table["low"], "width": 3, "thickness": 1.5}
        hover = "%{text}: %{y:.3f} [%{customdata[0]:.3f}, %{customdata[1]:.3f}], %{customdata[2]} images"
        figure.add_scatter(
            **{"x": x, "y": table["accuracy"], "name": name, "mode": "markers", "error_y": error, "text": table["category"], "hovertemplate": hover},
            marker={"color": COLOURS[number % len(COLOURS)], "size": 8},
            customdata=table[["low", "high", "n_images"]],
        )
    x = list(range(len(categories)))
    marker = {"symbol": "line-ew", "size": 40, "line": {"width": 2, "color": GREY}}
    figure.add_scatter(x=x, y=[chance[c] for c in categories], name="chance", mode="markers", marker=marker, hovertemplate="chance %{y:.3f}")
    figure.update_xaxes(tickvals=x, ticktext=categories, showgrid=False)
    figure.update_yaxes(range=[0, 1.03])
    return figure


def difference_curves(curves: pd.DataFrame, *, y: str, kind: str | None = None) -> go.Figure:
    """A paired difference by layer with its interval, a line per model (and `kind`), over a line at 0.

    Args:
        curves: columns model, layer, score, low, high, p_holm, n_images and the one named by `kind`. Layer -1 stands for the tower.
        kind: the column that dashes tell apart, where there is one.
    """
    figure = new_figure(xaxis_title="layer", yaxis_title=y, height=380)
    models, kinds = list(dict.fromkeys(curves["model"])), list(dict.fromkeys(curves[kind])) if kind else []
    for key, part in curves.groupby(["model", kind] if kind else ["model"], sort=False):
        part, label = part.sort_values("layer"), " · ".join(map(str, key))
        colour, dash = COLOURS[(models.index(key[0]) + 1) % len(COLOURS)], DASHES[kinds.index(key[1]) % len(DASHES)] if kind else DASHES[0]
        _band(figure, part["layer"], part["low"], part["high"], translucent(colour, 0.16), label)
        figure.add_scatter(
            **{"x": part["layer"], "y": part["score"], "name": label, "legendgroup": label, "mode": "lines+markers", "showlegend": True},
            line={"color": colour, "dash": dash, "width": 2.5},
            marker={"size": 7},
            error_y=_error_bars(part) if len(part) == 1 else None,  # a single point has no band
            customdata=part[["low", "high", "n_images", "p_holm"]],
            hovertemplate="%{y:.3f}  [%{customdata[0]:.3f}, %{customdata[1]:.3f}]  n=%{customdata[2]}  Holm p=%{customdata[3]:.3g}",
        )
    figure.add_hline(y=0, line={"color": GREY, "dash": "dot", "width": 1.5})
    _layer_axis(figure, curves["layer"])
    return figure


def matrix_maps(table: pd.DataFrame, *, title: str, difference: bool = False) -> go.Figure:
    """Layers of each model against layers of a VFM, a column per model and a row per VFM, on one colour scale; hovering shows the interval.

    Args:
        table: columns model, vfm, layer, vfm_layer, score, low, high, n_images; null_mean and null_q95, which each map's title states, or for a
            difference p_holm: cells below .05 whose interval excludes 0 carry a dot.
        title: name of the score, at the colour bar.
    """
    models, vfms = list(dict.fromkeys(table["model"])), list(dict.fromkeys(table["vfm"]))
    panels = [(model, vfm, table[(table["model"] == model) & (table["vfm"] == vfm)]) for vfm in vfms for model in models]
    titles = [f"{model} · {vfm}" + ("" if difference or part.empty else f"<br>{_chance(part)}") for model, vfm, part in panels]
    lines = max(8, table["layer"].nunique())
    height = (24 * lines + 110) * len(vfms) + 60
    figure = make_subplots(len(vfms), len(models), subplot_titles=titles, shared_yaxes=True, horizontal_spacing=0.04, vertical_spacing=110 / height)
    extra = ["p_holm"] if difference else ["null_mean", "null_q95"]
    hover = "Holm p %{customdata[3]:.3g}" if difference else "null mean %{customdata[3]:.3f}, 95 % %{customdata[4]:.3f}"
    for number, (_, _, part) in enumerate(panels):
        wide = {c: part.pivot(index="layer", columns="vfm_layer", values=c) for c in ("score", "low", "high", "n_images", *extra)}
        place = {"row": number // len(models) + 1, "col": number % len(models) + 1}
        marks = np.where((wide["p_holm"] < 0.05) & ((wide["low"] > 0) | (wide["high"] < 0)), "●", "") if difference else None
        figure.add_heatmap(
            **{"x": [str(layer) for layer in wide["score"].columns], "y": [str(layer) for layer in wide["score"].index], "z": wide["score"].to_numpy()},
            **{"coloraxis": "coloraxis", "text": marks, "texttemplate": "%{text}" if difference else None, "textfont": {"color": "black"}},
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
    figure.update_layout(template="workbench", height=height, hovermode="closest", coloraxis={**scale, "colorbar": bar}, margin={"t": 70})
    if difference:
        figure.add_annotation(
            text="● interval excludes 0, Holm p < .05 over all cells of a map", showarrow=False, **{"x": 0, "xref": "paper", "xanchor": "left"}
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
        wide = {c: part.pivot(index="layer", columns="head", values=c) for c in ("score", "low", "high", "chance", "null_mean", "n_images")}
        figure.add_heatmap(
            **{"x": [str(head) for head in wide["score"].columns], "y": [str(layer) for layer in wide["score"].index], "z": wide["score"].to_numpy()},
            customdata=np.stack([wide[c].to_numpy() for c in ("low", "high", "chance", "null_mean", "n_images")], axis=-1),
            hovertemplate="layer %{y}, head %{x}: %{z:.3f} [%{customdata[0]:.3f}, %{customdata[1]:.3f}]"
            "<br>chance %{customdata[2]:.3f}, null %{customdata[3]:.3f}, %{customdata[4]} images<extra></extra>",
            coloraxis="coloraxis",
            row=1,
            col=number,
        )
        figure.update_xaxes(title="head", type="category", row=1, col=number)
    figure.update_yaxes(type="category", showgrid=False)
    figure.update_yaxes(title="layer", col=1)
    height = 180 + 22 * max(8, scores["layer"].nunique())
    bar = {"title": {"text": title, "side": "right"}}
    figure.update_layout(template="workbench", height=height, hovermode="closest", coloraxis={"colorscale": "Viridis", "colorbar": bar}, margin={"t": 60})
    return figure


def points(table: pd.DataFrame, *, y: str, title: str) -> go.Figure:
    """A score with its interval for each named thing, models side by side, and a grey tick at its null.

    Args:
        table: columns model, name, low, high, null_mean, n_images and the one named by `y`.
    """
    figure = new_figure(yaxis_title=title, height=380, hovermode="closest")
    for number, (model, part) in enumerate(table.groupby("model", sort=False)):
        x = [[model] * len(part), list(part["name"])]
        error = {"type": "data", "array": part["high"] - part[y], "arrayminus": part[y] - part["low"], "width": 3, "thickness": 1.5}
        marker = {"color": COLOURS[number % len(COLOURS)], "size": 8}
        hover = "%{y:.3f} [%{customdata[0]:.3f}, %{customdata[1]:.3f}], %{customdata[2]} images<extra></extra>"
        custom = part[["low", "high", "n_images"]]
        figure.add_scatter(x=x, y=part[y], name=str(model), mode="markers", error_y=error, marker=marker, customdata=custom, hovertemplate=hover)
        tick = {"symbol": "line-ew", "size": 22, "line": {"width": 2, "color": GREY}}
        null = {"name": "chance (other images' objects)", "legendgroup": "null", "showlegend": number == 0, "hovertemplate": "chance %{y:.3f}<extra></extra>"}
        figure.add_scatter(x=x, y=part["null_mean"], mode="markers", marker=tick, **null)
    figure.update_yaxes(rangemode="tozero")
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
    """Pictures with each cell of their map at its own pixels, a row for each sequence; every map has its own colour scale from 0 to its maximum."""
    width = max(len(row) for row in rows)
    titles = [row[column].title if column < len(row) else "" for row in rows for column in range(width)]
    figure = make_subplots(
        len(rows), width, subplot_titles=titles, horizontal_spacing=0.03, vertical_spacing=0.14 / max(1, len(rows) - 1) if len(rows) > 1 else 0
    )
    for at, row in enumerate(rows, start=1):
        for column, shown in enumerate(row, start=1):
            _overlay(figure, shown, at, column)
    figure.update_layout(template="workbench", height=80 + 340 * len(rows), hovermode="closest", showlegend=False, margin={"t": 70, "l": 16, "b": 16})
    return figure


def _overlay(figure: go.Figure, shown: Overlay, row: int, column: int) -> None:
    height, width = shown.image.shape[:2]
    left, top, right, bottom = shown.box
    x, y = (
        np.linspace(a, b, n + 1) for a, b, n in ((left * width, right * width, shown.values.shape[1]), (top * height, bottom * height, shown.values.shape[0]))
    )
    # plotly puts the centre of an image's first pixel at x0, y0; here pixel 0 lies from 0 to 1, as everywhere else
    figure.add_image(source=_png(shown.image), x0=0.5, y0=0.5, dx=1, dy=1, hoverinfo="skip", row=row, col=column)
    figure.add_heatmap(
        **{"x": x, "y": y, "z": shown.values, "zmin": 0, "showscale": False, "hovertemplate": "%{z:.3f} of the attention on the image<extra></extra>"},
        colorscale=[[0, translucent("#ff2a00", 0)], [1, translucent("#ff2a00", 0.8)]],
        row=row,
        col=column,
    )
    if shown.outline is not None:
        left, top, right, bottom = (f * size for f, size in zip(shown.outline, (width, height, width, height), strict=True))
        line = {"color": "white", "width": 2, "dash": "dash"}
        corners = ([left, right, right, left, left], [top, top, bottom, bottom, top])
        figure.add_scatter(x=corners[0], y=corners[1], mode="lines", line=line, hoverinfo="skip", row=row, col=column)
    _picture_axes(figure, (max(height, y[-1]), max(width, x[-1])), row, column, start=(min(0, y[0]), min(0, x[0])))


def _png(image: np.ndarray) -> str:
    data = io.BytesIO()
    Image.fromarray(image.astype(np.uint8)).save(data, format="PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def _picture_axes(figure: go.Figure, end: Sequence[float], row: int, column: int, start: tuple[float, float] = (0.0, 0.0)) -> None:
    """Square pixels and no axes, from `start` to `end` (y, x), y downwards."""
    figure.update_xaxes(range=[start[1], end[1]], visible=False, constrain="domain", row=row, col=column)
    axis = figure.get_subplot(row, column).xaxis.plotly_name.replace("axis", "")
    figure.update_yaxes(range=[end[0], start[0]], visible=False, scaleanchor=axis, constrain="domain", row=row, col=column)


@dataclass(frozen=True)
class WordMap:
    """Words over a picture.

    Attributes:
        image: (height, width, 3) bytes.
        words: columns layer, token, left, top, right, bottom (fractions of the image), rank, word, probability, truth and right_word
            (whether the word is one of `truth`).
    """

    title: str
    image: np.ndarray
    words: pd.DataFrame


def word_maps(shown: Sequence[WordMap]) -> go.Figure:
    """The most likely word of each cell at its place in a darkened picture, models side by side; a slider chooses the layer, hovering shows more words.

    Words of what lies under their cell are yellow; a cell on an object whose first word is another one is white, and cells on no object are grey.
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
    steps = [{"label": str(layer), "method": "restyle", "args": [{"visible": [meta in (None, layer) for meta in each]}]} for layer in layers]
    slider = {"active": layers.index(start), "currentvalue": {"prefix": "layer "}, "pad": {"t": 8}, "steps": steps}
    legend = '<span style="color:#d9a400">yellow</span>: a word of the object there · white: another word on an object · grey: on no object'
    margin = {"t": 84, "l": 8, "r": 8, "b": 8}
    figure.update_layout(template="workbench", height=int(180 + 900 / max(2, len(shown))), hovermode="closest", showlegend=False, margin=margin)
    figure.update_layout(title={"text": legend, "font": {"size": 13}, "x": 0.5, "xanchor": "center"}, sliders=[slider])
    return figure


def _words(figure: go.Figure, own: WordMap, layer: int, maps: int, column: int, *, visible: bool) -> None:
    height, width = own.image.shape[:2]
    here = own.words[own.words["layer"] == layer]
    cells = here[here["rank"] == 1]
    lines = here["word"] + here["probability"].map("  {:.3f}".format)
    more = lines.groupby(here["token"]).agg("<br>".join).reindex(cells["token"])
    truth = cells["truth"].map(lambda name: f"<br>on: {name}" if name else "<br>on no object")
    room = 1100 / maps * (cells["right"] - cells["left"]).min() if len(cells) else 0  # pixels, on a page of the usual width
    size = float(np.clip(room / 4.5, 6, 13))
    fits = max(2, int(room / (0.58 * size)))
    figure.add_scatter(
        x=(cells["left"] + cells["right"]) / 2 * width,
        y=(cells["top"] + cells["bottom"]) / 2 * height,
        text=cells["word"].map(lambda word: word if len(word) <= fits else word[: fits - 1] + "…"),
        mode="text",
        textfont={"size": size, "color": np.where(cells["right_word"], "#ffd43b", np.where(cells["truth"] != "", "#ffffff", "#a9b0ba")).tolist()},
        customdata=(more.to_numpy() + truth.to_numpy()).tolist(),
        hovertemplate="%{customdata}<extra></extra>",
        meta=layer,
        visible=visible,
        row=1,
        col=column,
    )


def step_curves(curves: pd.DataFrame, *, y: str, panel: str = "", null: str = "", share: bool = False) -> go.Figure:
    """Scores over training steps, a line per model with its interval as a band; where there are several values of `panel`, a small chart for each.

    Args:
        curves: columns model, step, score, low, high, over (what the interval is over) and the one named by `panel`; null_mean and null_q95 for `null`.
        null: what the dotted line at null_q95 is called; none is drawn without.
        share: the score is a share, shown from 0 to 1 in every chart.
    """
    names = list(dict.fromkeys(curves[panel])) if panel else [""]
    width = min(len(names), 4)
    rows = -(-len(names) // width)
    figure = make_subplots(rows, width, subplot_titles=names if panel else None, horizontal_spacing=0.06, vertical_spacing=0.32 / rows)
    models = list(dict.fromkeys(curves["model"]))
    for number, name in enumerate(names):
        at = {"row": number // width + 1, "col": number % width + 1}
        own = curves[curves[panel] == name] if panel else curves
        if null:
            level = own.groupby("step")["null_q95"].max().reset_index()
            line = {"color": GREY, "dash": "dot", "width": 1.5}
            mode = "lines" if len(level) > 1 else "markers"
            style: dict[str, object] = {"name": null, "legendgroup": "null", "showlegend": number == 0, "mode": mode, "line": line}
            figure.add_scatter(x=level["step"], y=level["null_q95"], hovertemplate="%{y:.3f}", **style, **at)
        for model, part in own.groupby("model", sort=False):
            part, colour = part.sort_values("step"), COLOURS[models.index(model) % len(COLOURS)]
            if (part["high"] > part["low"]).any():
                _band(figure, part["step"], part["low"], part["high"], translucent(colour, 0.16), str(model), **at)
            figure.add_scatter(
                **{
                    "x": part["step"],
                    "y": part["score"],
                    "name": str(model) if panel else f"{model} ({part['over'].iloc[0]})",
                    "legendgroup": str(model),
                    **at,
                },
                mode="lines" if len(part) > 20 else "lines+markers",
                showlegend=not any(trace.legendgroup == str(model) and trace.showlegend is not False for trace in figure.data),
                line={"color": colour, "width": 2},
                marker={"size": 5},
                error_y=_error_bars(part) if len(part) == 1 else None,  # a single point has no band
                customdata=part[["low", "high", "over"]],
                hovertemplate="%{y:.3f}  [%{customdata[0]:.3f}, %{customdata[1]:.3f}]  %{customdata[2]}",
            )
    figure.update_layout(
        template="workbench", height=420 if rows == 1 else 90 + 240 * rows, margin={"t": 80}, legend={"y": 1.02 + 0.1 / rows if panel else 1.02}
    )
    figure.update_xaxes(title="step", row=rows)
    figure.update_yaxes(title=y, col=1)
    if share:
        figure.update_yaxes(range=[0, 1.04])
    return figure


def step_differences(reach: pd.DataFrame) -> go.Figure:
    """Steps to the other model's final score, less the steps of the other model itself: a point with its interval over seeds, words where there is none.

    Args:
        reach: columns model, other, measure, of, seeds, difference, low, high, reached; a difference of NaN is one that is not known.
    """
    rows = [(f"{row.of} ({row.measure})" if row.measure not in row.of else row.of, row) for row in reach.itertuples()]
    pairs = list(dict.fromkeys((row.model, row.other) for _, row in rows))
    titles = [f"{model} to {other}'s final score" for model, other in pairs]
    figure = make_subplots(1, len(pairs), subplot_titles=titles, shared_yaxes=True, horizontal_spacing=0.03)
    for number, pair in enumerate(pairs, start=1):
        own = [(name, row) for name, row in rows if (row.model, row.other) == pair]
        known = [(name, row) for name, row in own if np.isfinite([row.difference, row.low, row.high]).all()]
        spread = {"array": [row.high - row.difference for _, row in known], "arrayminus": [row.difference - row.low for _, row in known]}
        figure.add_scatter(
            x=[row.difference for _, row in known],
            y=[name for name, _ in known],
            mode="markers",
            marker={"color": COLOURS[(number - 1) % len(COLOURS)], "size": 8},
            error_x={"type": "data", "width": 3, "thickness": 1.5, "color": GREY, **spread},
            customdata=[[row.low, row.high, row.seeds, row.reached] for _, row in known],
            hovertemplate="%{y}: %{x:.0f} steps [%{customdata[0]:.0f}, %{customdata[1]:.0f}], %{customdata[2]} seeds, %{customdata[3]}<extra></extra>",
            row=1,
            col=number,
        )
        unknown = [(name, row) for name, row in own if np.isnan(row.difference)]
        words = [row.reached if len(row.reached) < 48 else row.reached[:46] + " …" for _, row in unknown]
        figure.add_scatter(
            **{"x": [0] * len(unknown), "y": [name for name, _ in unknown], "mode": "text", "text": words, "textfont": {"size": 11}},
            hovertext=[row.reached for _, row in unknown],
            hoverinfo="text",
            row=1,
            col=number,
        )
        figure.add_vline(x=0, line={"color": GREY, "dash": "dot", "width": 1.5}, row=1, col=number)
    figure.update_xaxes(title="difference in steps, paired by seed")
    figure.update_yaxes(categoryorder="array", categoryarray=list(dict.fromkeys(name for name, _ in rows))[::-1], automargin=True)
    height = 150 + 28 * len({name for name, _ in rows})
    return figure.update_layout(template="workbench", height=height, hovermode="closest", showlegend=False, margin={"t": 60})


def sweep_points(table: pd.DataFrame) -> go.Figure:
    """Variants of a sweep, a row each: the score with its interval over seeds beside chance, and the paired difference to one of them over a line at 0.

    Args:
        table: columns variant, accuracy, low, high, seeds, n, chance, against, pairs, difference, d_low, d_high, p_holm of one question type; an interval
            of one seed is infinite and is not drawn.
    """
    against = str(table["against"].iloc[0])
    titles = ["accuracy, mean of seeds", f"difference to {against}, paired by seed"]
    figure = make_subplots(1, 2, subplot_titles=titles, shared_yaxes=True, horizontal_spacing=0.04)
    compared = table[table["difference"].notna()]
    chance = {"symbol": "line-ns", "size": 16, "line": {"width": 2, "color": GREY}}
    figure.add_scatter(x=table["chance"], y=table["variant"], name="chance", mode="markers", marker=chance, hovertemplate="chance %{x:.3f}", row=1, col=1)
    for column, own, names, more, hover in (
        (1, table, ("accuracy", "low", "high"), ["seeds", "n", "chance"], "seeds %{customdata[2]}, %{customdata[3]} questions, chance %{customdata[4]:.3f}"),
        (2, compared, ("difference", "d_low", "d_high"), ["pairs", "p_holm"], "%{customdata[2]} seeds, Holm p %{customdata[3]:.3g}"),
    ):
        score, low, high = (own[name].replace([np.inf, -np.inf], np.nan) for name in names)
        error = {"type": "data", "symmetric": False, "array": high - score, "arrayminus": score - low, "width": 4, "thickness": 1.5, "color": GREY}
        colours = [COLOURS[0] if variant == against else COLOURS[1] for variant in own["variant"]]
        figure.add_scatter(
            **{"x": score, "y": own["variant"], "mode": "markers", "error_x": error, "showlegend": False, "row": 1, "col": column},
            marker={"color": colours, "size": 9},
            customdata=own[[*names[1:], *more]],
            hovertemplate="%{y}: %{x:.3f} [%{customdata[0]:.3f}, %{customdata[1]:.3f}], " + hover + "<extra></extra>",
        )
    figure.add_vline(x=0, line={"color": GREY, "dash": "dot", "width": 1.5}, row=1, col=2)
    figure.update_yaxes(autorange="reversed", type="category")
    figure.update_layout(template="workbench", height=150 + 34 * len(table), hovermode="closest", margin={"l": 140, "t": 80})
    figure.update_layout(legend={"y": 1.0, "yanchor": "bottom", "yref": "container", "x": 1, "xanchor": "right"})
    return figure


def javascript() -> str:
    """The source of plotly.js, for a page that needs no network."""
    return get_plotlyjs()


def html_figure(figure: go.Figure, name: str) -> str:
    """A figure as a piece of a page that holds `javascript` already; nothing in it can be uploaded."""
    return str(figure.to_html(full_html=False, include_plotlyjs=False, config=EXPORT | {"responsive": True}, div_id=name))
