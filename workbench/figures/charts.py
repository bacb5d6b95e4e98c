"""Charts of scores with their intervals, as bars or points."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from workbench.figures.colors import color_of
from workbench.figures.template import GRAY, error_bars, new_figure, plain_name


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


def accuracy_by_type(tables: Mapping[str, pd.DataFrame]) -> go.Figure:
    """Draw the accuracy of each question type with its interval, a point per model, and a gray tick at chance.

    Where models were asked different questions, so that chance differs, each has a tick of its own in its color.

    Args:
        tables: {model or variant: columns category, accuracy, low, high, n_images, chance, and where known few (there
            is too little data to conclude much, which hovering says) and over (what the interval is over, otherwise
            images). Without a finite interval there is no bar.
    """
    figure = new_figure(yaxis_title="accuracy", height=380, hovermode="closest")
    categories = list(dict.fromkeys(category for table in tables.values() for category in table["category"]))
    by_type = pd.concat(tables.values()).groupby("category")["chance"]
    levels = {category: set(chance.dropna().round(6)) for category, chance in by_type}
    ticks = [(place, *levels[name], GRAY) for place, name in enumerate(categories) if len(levels[name]) == 1]
    for number, (name, table) in enumerate(tables.items()):
        offset = (number - (len(tables) - 1) / 2) * 0.14
        error = {
            "type": "data",
            "array": table["high"] - table["accuracy"],
            "arrayminus": table["accuracy"] - table["low"],
            "width": 3,
            "thickness": 1.5,
        }
        figure.add_scatter(
            x=[categories.index(category) + offset for category in table["category"]],
            y=table["accuracy"],
            name=plain_name(name),
            mode="markers",
            error_y=error,
            text=table["category"],
            hovertemplate="%{text}: %{y:.3f}%{customdata[0]}, %{customdata[1]}%{customdata[2]}",
            marker={"color": color_of(name, number), "size": 8},
            customdata=_hover(table),
        )
        ticks += [
            (categories.index(category) + offset, level, color_of(name, number))
            for category, level in zip(table["category"], table["chance"], strict=True)
            if len(levels[category]) > 1 and np.isfinite(level)
        ]
    x = list(range(len(categories)))
    colors = [color for *_, color in ticks]
    marker = {"symbol": "line-ew", "size": 12, "line": {"width": 2, "color": colors}}  # nine fit on a phone
    figure.add_scatter(
        x=[place for place, *_ in ticks],
        y=[level for _, level, _ in ticks],
        name="chance",
        mode="markers",
        marker=marker,
        hovertemplate="chance %{y:.3f}",
    )
    words = {"tickvals": x, "ticktext": categories, "autotickangles": [0, -30, -60, -90]}  # words end at their tick
    figure.update_xaxes(**words, showgrid=False, range=[-0.5, len(x) - 0.5], automargin=True)
    figure.update_yaxes(range=[0, 1.03])
    return figure


def _hover(table: pd.DataFrame) -> list[list[str]]:
    """Return of each point its interval, what that is over, and whether there is too little data."""
    known = np.isfinite(table["low"]) & np.isfinite(table["high"])
    ends = [f" [{low:.3f}, {high:.3f}]" for low, high in zip(table["low"], table["high"], strict=True)]
    over = table["over"] if "over" in table else [f"{n} images" for n in table["n_images"]]
    few = table["few"] if "few" in table else [False] * len(table)
    return [
        [end if has else "", words, ", too few to conclude much" if little else ""]
        for end, has, words, little in zip(ends, known, over, few, strict=True)
    ]


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
