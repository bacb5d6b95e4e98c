"""Curves over the steps of a training, and differences in the number of steps."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench.figures.colors import color_of
from workbench.figures.template import COLORS, GRAY, band, error_bars, new_figure, translucent


def training_curves(logs: dict[str, pd.DataFrame], measure: str) -> go.Figure:
    """Draw one measure over training steps, a line per model; models without it are left out."""
    figure = new_figure(xaxis_title="step", yaxis_title=measure, height=360)
    for number, (name, log) in enumerate(logs.items()):
        if measure in log:
            part = log.dropna(subset=[measure]).drop_duplicates("step")
            figure.add_scatter(
                x=part["step"],
                y=part[measure],
                name=name,
                mode="lines",
                line={"color": color_of(name, number), "width": 2},
                hovertemplate="%{y:.3f}",
            )
    return figure


def step_curves(
    curves: pd.DataFrame,
    *,
    y: str,
    panel: str = "",
    null: str = "",
    share: bool = False,
    goal: str = "",
    goals: Mapping[str, float] | None = None,
) -> go.Figure:
    """Draw scores over training steps, a line per model with its interval as a band, a chart per value of `panel`.

    Args:
        curves: columns model, step, score, low, high, over (what the interval is over) and the one named by `panel`;
            for `null` also null_mean and null_q95.
        y: name of the score, shown on the axis.
        panel: the column with a chart for each value; "" for a single chart.
        null: name of the dotted line at null_q95; without it no line is drawn.
        share: whether the score is a share, which is shown from 0 to 1 in every chart.
        goal: name of the dashed line at the level that `goals` has for a chart.
        goals: {value of `panel`: level}.
    """
    names = list(dict.fromkeys(curves[panel])) if panel else [""]
    width = min(len(names), 4)
    rows = -(-len(names) // width)
    figure = make_subplots(
        rows, width, subplot_titles=names if panel else None, horizontal_spacing=0.06, vertical_spacing=0.32 / rows
    )
    models = list(dict.fromkeys(curves["model"]))
    for number, name in enumerate(names):
        at = {"row": number // width + 1, "col": number % width + 1}
        shown = curves[curves[panel] == name] if panel else curves
        if null:
            level = shown.groupby("step")["null_q95"].max().reset_index()
            line = {"color": GRAY, "dash": "dot", "width": 1.5}
            mode = "lines" if len(level) > 1 else "markers"
            figure.add_scatter(
                x=level["step"],
                y=level["null_q95"],
                name=null,
                legendgroup="null",
                showlegend=(number == 0),
                mode=mode,
                line=line,
                hovertemplate="%{y:.3f}",
                **at,
            )
        if goals and name in goals:
            figure.add_scatter(
                x=[shown["step"].min(), shown["step"].max()],
                y=[goals[name]] * 2,
                name=goal,
                legendgroup="goal",
                showlegend=(number == 0),
                mode="lines",
                line={"color": COLORS[0], "dash": "dash", "width": 1.5},
                hovertemplate="%{y:.3f}",
                **at,
            )
        for model, part in shown.groupby("model", sort=False):
            part, color = part.sort_values("step"), color_of(model, models.index(model))
            if (part["high"] > part["low"]).any():
                band(figure, part["step"], part["low"], part["high"], translucent(color, 0.16), str(model), **at)
            in_legend = {trace.legendgroup for trace in figure.data if trace.showlegend is not False}
            figure.add_scatter(
                x=part["step"],
                y=part["score"],
                name=str(model) if panel else f"{model} ({part['over'].iloc[0]})",
                legendgroup=str(model),
                **at,
                mode="lines" if len(part) > 20 else "lines+markers",
                showlegend=str(model) not in in_legend,
                line={"color": color, "width": 2},
                marker={"size": 5},
                error_y=error_bars(part) if len(part) == 1 else None,  # a single point has no band
                customdata=part[["low", "high", "over"]],
                hovertemplate="%{y:.3f}  [%{customdata[0]:.3f}, %{customdata[1]:.3f}]  %{customdata[2]}",
            )
    figure.update_layout(
        template="workbench",
        height=420 if rows == 1 else 90 + 240 * rows,
        margin={"t": 80},
        legend={"y": 1.02 + 0.1 / rows if panel else 1.02},
    )
    figure.update_xaxes(title="step", row=rows)
    figure.update_yaxes(title=y, col=1)
    if share:
        figure.update_yaxes(range=[0, 1.04])
    return figure


def step_differences(reach: pd.DataFrame) -> go.Figure:
    """Draw how many steps more a model needs to reach another model's final score than that model itself.

    Each measure has a point with its interval over seeds, or words if the difference or its interval is not known.

    Args:
        reach: columns model, other, measure, of, seeds, difference, low, high, reached; the difference is NaN if it is
            not known, and its interval infinite if all seeds have the same.
    """
    rows = [(f"{row.of} ({row.measure})" if row.measure not in row.of else row.of, row) for row in reach.itertuples()]
    pairs = list(dict.fromkeys((row.model, row.other) for _, row in rows))
    titles = [f"{model} to {other}'s final score" for model, other in pairs]
    figure = make_subplots(1, len(pairs), subplot_titles=titles, shared_yaxes=True, horizontal_spacing=0.03)
    for number, pair in enumerate(pairs, start=1):
        of_pair = [(name, row) for name, row in rows if (row.model, row.other) == pair]
        known = [(name, row) for name, row in of_pair if np.isfinite([row.difference, row.low, row.high]).all()]
        spread = {
            "array": [row.high - row.difference for _, row in known],
            "arrayminus": [row.difference - row.low for _, row in known],
        }
        figure.add_scatter(
            x=[row.difference for _, row in known],
            y=[name for name, _ in known],
            mode="markers",
            marker={"color": color_of(pair[0], number - 1), "size": 8},
            error_x={"type": "data", "width": 3, "thickness": 1.5, "color": GRAY, **spread},
            customdata=[[row.low, row.high, row.seeds, row.reached] for _, row in known],
            hovertemplate=(
                "%{y}: %{x:.0f} steps [%{customdata[0]:.0f}, %{customdata[1]:.0f}], %{customdata[2]} seeds,"
                " %{customdata[3]}<extra></extra>"
            ),
            row=1,
            col=number,
        )
        unknown = [(name, row) for name, row in of_pair if not np.isfinite([row.difference, row.low, row.high]).all()]
        reasons = [
            row.reached if np.isnan(row.difference) else f"{row.difference:+.0f} steps in all {row.seeds} seeds"
            for _, row in unknown
        ]
        words = [reason if len(reason) < 48 else reason[:46] + " …" for reason in reasons]
        figure.add_scatter(
            x=[0] * len(unknown),
            y=[name for name, _ in unknown],
            mode="text",
            text=words,
            textfont={"size": 11},
            hovertext=reasons,
            hoverinfo="text",
            row=1,
            col=number,
        )
        figure.add_vline(x=0, line={"color": GRAY, "dash": "dot", "width": 1.5}, row=1, col=number)
    figure.update_xaxes(title="difference in steps, paired by seed")
    figure.update_yaxes(
        categoryorder="array", categoryarray=list(dict.fromkeys(name for name, _ in rows))[::-1], automargin=True
    )
    height = 150 + 28 * len({name for name, _ in rows})
    return figure.update_layout(
        template="workbench", height=height, hovermode="closest", showlegend=False, margin={"t": 60}
    )
