"""Charts of scores with their intervals, as bars or points."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from workbench.figures.colors import color_of
from workbench.figures.template import GRAY, error_bars, new_figure


def bars(table: pd.DataFrame, *, x: str, y: str, by: str = "model") -> go.Figure:
    """Draw scores as bars with their intervals, in a color for each value of `by`; a line at 0 means no change.

    Args:
        table: columns score, low, high, n_images and those named by `x` and `by`.
        x: column of the groups of bars.
        y: name of the score, shown on the axis.
        by: column of the bars within a group.
    """
    figure = new_figure(yaxis_title=y, height=400, barmode="group", hovermode="closest")
    for number, (name, part) in enumerate(table.groupby(by, sort=False)):
        figure.add_bar(
            x=part[x],
            y=part["score"],
            name=name,
            error_y=error_bars(part),
            customdata=part[["low", "high", "n_images"]],
            marker={"color": color_of(name, number)},
            hovertemplate="%{x}: %{y:.3f} [%{customdata[0]:.3f}, %{customdata[1]:.3f}], %{customdata[2]} images",
        )
    figure.add_hline(y=0, line={"color": GRAY, "dash": "dot", "width": 1.5})
    return figure


def accuracy_by_type(tables: dict[str, pd.DataFrame]) -> go.Figure:
    """Draw the accuracy of each question type with its interval, a point per model, and a gray tick at chance.

    Args:
        tables: {model: columns category, accuracy, low, high, few, n_images, chance}; hovering over a point says if
            there is too little data to conclude much (`few`).
    """
    figure = new_figure(yaxis_title="accuracy", height=380, hovermode="closest")
    categories = list(dict.fromkeys(category for table in tables.values() for category in table["category"]))
    chance = pd.concat(tables.values()).groupby("category")["chance"].mean()
    for number, (name, table) in enumerate(tables.items()):
        offset = (number - (len(tables) - 1) / 2) * 0.14
        x = [categories.index(category) + offset for category in table["category"]]
        error = {
            "type": "data",
            "array": table["high"] - table["accuracy"],
            "arrayminus": table["accuracy"] - table["low"],
            "width": 3,
            "thickness": 1.5,
        }
        hover = (
            "%{text}: %{y:.3f} [%{customdata[0]:.3f}, %{customdata[1]:.3f}], %{customdata[2]} images%{customdata[3]}"
        )
        few = np.where(table.get("few", pd.Series(False, table.index)), ", too few to conclude much", "")
        figure.add_scatter(
            x=x,
            y=table["accuracy"],
            name=name,
            mode="markers",
            error_y=error,
            text=table["category"],
            hovertemplate=hover,
            marker={"color": color_of(name, number), "size": 8},
            customdata=table[["low", "high", "n_images"]].assign(few=few),
        )
    x = list(range(len(categories)))
    marker = {"symbol": "line-ew", "size": 12, "line": {"width": 2, "color": GRAY}}  # nine fit on a phone
    figure.add_scatter(
        x=x,
        y=[chance[category] for category in categories],
        name="chance",
        mode="markers",
        marker=marker,
        hovertemplate="chance %{y:.3f}",
    )
    figure.update_xaxes(tickvals=x, ticktext=categories, showgrid=False, range=[-0.5, len(x) - 0.5], automargin=True)
    figure.update_yaxes(range=[0, 1.03])
    return figure


def points(table: pd.DataFrame, *, y: str, title: str) -> go.Figure:
    """Draw a score with its interval for each `name`, models next to each other, and a gray tick at its null.

    Args:
        table: columns model, name, low, high, null_mean, n_images and the one named by `y`.
        y: column of the score.
        title: name of the score, shown on the axis.
    """
    figure = new_figure(yaxis_title=title, height=380, hovermode="closest")
    for number, (model, part) in enumerate(table.groupby("model", sort=False)):
        x = [[model] * len(part), list(part["name"])]
        error = {
            "type": "data",
            "array": part["high"] - part[y],
            "arrayminus": part[y] - part["low"],
            "width": 3,
            "thickness": 1.5,
        }
        marker = {"color": color_of(model, number), "size": 8}
        hover = "%{y:.3f} [%{customdata[0]:.3f}, %{customdata[1]:.3f}], %{customdata[2]} images<extra></extra>"
        custom = part[["low", "high", "n_images"]]
        figure.add_scatter(
            x=x,
            y=part[y],
            name=str(model),
            mode="markers",
            error_y=error,
            marker=marker,
            customdata=custom,
            hovertemplate=hover,
        )
        tick = {"symbol": "line-ew", "size": 22, "line": {"width": 2, "color": GRAY}}
        null = {
            "name": "chance (other images' objects)",
            "legendgroup": "null",
            "showlegend": number == 0,
            "hovertemplate": "chance %{y:.3f}<extra></extra>",
        }
        figure.add_scatter(x=x, y=part["null_mean"], mode="markers", marker=tick, **null)
    figure.update_yaxes(rangemode="tozero")
    return figure
