"""Bars and points of scores with their intervals."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench.figures.template import COLOURS, GREY, error_bars, new_figure


def bars(table: pd.DataFrame, *, x: str, y: str, by: str = "model") -> go.Figure:
    """Bars with their intervals side by side, a colour for each value of `by`; 0 means no change.

    Args:
        table: columns score, low, high, n_images and those named by `x` and `by`.
        y: name of the score, shown on the axis.
    """
    figure = new_figure(yaxis_title=y, height=400, barmode="group", hovermode="closest")
    for number, (name, part) in enumerate(table.groupby(by, sort=False)):
        figure.add_bar(
            **{"x": part[x], "y": part["score"], "name": name, "error_y": error_bars(part), "customdata": part[["low", "high", "n_images"]]},
            marker={"color": COLOURS[number % len(COLOURS)]},
            hovertemplate="%{x}: %{y:.3f} [%{customdata[0]:.3f}, %{customdata[1]:.3f}], %{customdata[2]} images",
        )
    figure.add_hline(y=0, line={"color": GREY, "dash": "dot", "width": 1.5})
    return figure


def accuracy_by_type(tables: dict[str, pd.DataFrame]) -> go.Figure:
    """Accuracy of each question type with its interval, a point per model, and a grey tick at chance.

    Args:
        tables: {model: columns category, accuracy, low, high, few, n_images, chance}; hovering says where there is too little to go by (`few`).
    """
    figure = new_figure(yaxis_title="accuracy", height=380, hovermode="closest")
    categories = list(dict.fromkeys(c for table in tables.values() for c in table["category"]))
    chance = pd.concat(tables.values()).groupby("category")["chance"].mean()
    for number, (name, table) in enumerate(tables.items()):
        offset = (number - (len(tables) - 1) / 2) * 0.14
        x = [categories.index(c) + offset for c in table["category"]]
        error = {"type": "data", "array": table["high"] - table["accuracy"], "arrayminus": table["accuracy"] - table["low"], "width": 3, "thickness": 1.5}
        hover = "%{text}: %{y:.3f} [%{customdata[0]:.3f}, %{customdata[1]:.3f}], %{customdata[2]} images%{customdata[3]}"
        few = np.where(table.get("few", pd.Series(False, table.index)), ", too few to say much", "")
        figure.add_scatter(
            **{"x": x, "y": table["accuracy"], "name": name, "mode": "markers", "error_y": error, "text": table["category"], "hovertemplate": hover},
            marker={"color": COLOURS[number % len(COLOURS)], "size": 8},
            customdata=table[["low", "high", "n_images"]].assign(few=few),
        )
    x = list(range(len(categories)))
    marker = {"symbol": "line-ew", "size": 40, "line": {"width": 2, "color": GREY}}
    figure.add_scatter(x=x, y=[chance[c] for c in categories], name="chance", mode="markers", marker=marker, hovertemplate="chance %{y:.3f}")
    figure.update_xaxes(tickvals=x, ticktext=categories, showgrid=False)
    figure.update_yaxes(range=[0, 1.03])
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
    figure.update_layout(showlegend=True, legend={"y": 1.0, "yanchor": "top", "yref": "container", "x": 1, "xanchor": "right"})
    return figure
