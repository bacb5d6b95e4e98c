"""One plotly template and the chart forms that several analyses share."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio

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


def new_figure(**layout: object) -> go.Figure:
    """An empty figure in the workbench's template."""
    return go.Figure(layout={"template": "workbench", **layout})


def translucent(colour: str, alpha: float) -> str:
    """`#rrggbb` with an alpha of 0..1, for bands."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def layer_curves(curves: pd.DataFrame, *, y: str, kind: str) -> go.Figure:
    """Score by layer, one line per model and `kind`, with its interval as a band and its null as a dotted line.

    Args:
        curves: columns model, layer, score, low, high, n_images and the column named by `kind`; null_mean and null_q95 where the score has a null,
            otherwise 0 means no change and is drawn as a line. Layer -1 stands for the tower.
        y: name of the score, shown on the axis.
        kind: the column that dashes tell apart; colours tell models apart.
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
            customdata=part[["low", "high", "n_images"]],
            hovertemplate=hover,
        )
    if "null_mean" in curves:
        _null_band(figure, curves)
        figure.update_yaxes(rangemode="tozero")
    else:
        figure.add_hline(y=0, line={"color": GREY, "dash": "dot", "width": 1.5})
    step = 1 if curves["layer"].max() <= 16 else 4
    figure.update_xaxes(dtick=step)
    if curves["layer"].min() < 0:
        ticks = [-1, *range(0, int(curves["layer"].max()) + 1, step)]
        figure.update_xaxes(tickvals=ticks, ticktext=["tower", *map(str, ticks[1:])])
    return figure


def _null_band(figure: go.Figure, curves: pd.DataFrame) -> None:
    null = curves.groupby("layer")[["null_mean", "null_q95"]].agg({"null_mean": "min", "null_q95": "max"}).reset_index()
    _band(figure, null["layer"], null["null_mean"], null["null_q95"], translucent(GREY, 0.25), "null")
    figure.add_scatter(
        x=null["layer"],
        y=null["null_q95"],
        name="chance (null mean to 95 %)",
        legendgroup="null",
        mode="lines",
        line={"color": GREY, "dash": "dot", "width": 1.5},
        hovertemplate="%{y:.3f}",
    )


def _band(figure: go.Figure, x: pd.Series, low: pd.Series, high: pd.Series, fill: str, group: str) -> None:
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
    )


def bars(table: pd.DataFrame, *, x: str, y: str, by: str = "model") -> go.Figure:
    """Bars with their intervals side by side, a colour for each value of `by`; 0 means no change.

    Args:
        table: columns score, low, high, n_images and those named by `x` and `by`.
        y: name of the score, shown on the axis.
    """
    figure = new_figure(yaxis_title=y, height=400, barmode="group", hovermode="closest")
    for number, (name, part) in enumerate(table.groupby(by, sort=False)):
        error = {"type": "data", "array": part["high"] - part["score"], "arrayminus": part["score"] - part["low"], "width": 3, "thickness": 1.5}
        figure.add_bar(
            **{"x": part[x], "y": part["score"], "name": name, "error_y": error, "customdata": part[["low", "high", "n_images"]]},
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
