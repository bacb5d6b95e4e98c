"""Charts of sweeps: scores of variants, as rows of points or curves over a grid, and paired differences to one."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from pandas.api.types import is_numeric_dtype
from plotly.subplots import make_subplots

from workbench.figures.colors import color_of
from workbench.figures.template import DASHES, GRAY, plain_name
from workbench.training_folder import BEST_ROW

AXES = {"limit_train": "training images"}
APART = 0.02  # shift between neighboring curves, as a share of the axis, so that intervals do not hide one another


def grid_keys(table: pd.DataFrame) -> list[str]:
    """Return the columns of a sweep's table that are keys of its grid."""
    columns = list(table.columns)
    return columns[columns.index("variant") + 1 : columns.index("accuracy")]


def sweep_figure(table: pd.DataFrame) -> go.Figure:
    """Draw a sweep: as curves if its grid is one numeric key with several values, as rows of points otherwise.

    Args:
        table: rows of one question type of the table that `trainer.sweep` stores; it has a column for each key of the
            grid between variant and accuracy.
    """
    keys = grid_keys(table)
    if len(keys) == 1 and is_numeric_dtype(table[keys[0]]) and table[keys[0]].nunique() > 1:
        return sweep_curves(table, keys[0])
    several = [key for key in keys if table[key].nunique() > 1]
    names = table["variant"]
    if several:
        names = names.str.cat([f"{key} " + table[key].astype(str) for key in several], sep=", ")
    against = str(table["against"].iloc[0])
    return sweep_points(table.assign(variant=names, reference=table["variant"] == against))


def sweep_curves(table: pd.DataFrame, key: str) -> go.Figure:
    """Draw scores over `key` above, and their paired differences to one variant below, with intervals over seeds.

    There is one line per variant, dashed for its best checkpoint. The upper chart shows chance, the lower one a line
    at 0. The axis of `key` is logarithmic if all its values are above 0.

    Args:
        table: as in `sweep_figure`; the interval of a single seed is infinite and is not drawn.
    """
    against = str(table["against"].iloc[0])
    figure = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.09, row_heights=[0.6, 0.4])
    values, variants = sorted(table[key].unique()), list(dict.fromkeys(table["variant"]))
    trained = list(dict.fromkeys(variant.removesuffix(BEST_ROW) for variant in variants))
    logarithmic = values[0] > 0
    apart = np.ptp(np.log(values) if logarithmic else values) * APART
    chance = table.groupby(key)["chance"].mean().reset_index()
    dotted = {"color": GRAY, "dash": "dot", "width": 1.5}
    figure.add_scatter(
        x=chance[key],
        y=chance["chance"],
        name="chance",
        mode="lines",
        line=dotted,
        hovertemplate="chance %{y:.3f}<extra></extra>",
        row=1,
        col=1,
    )
    score_hover = "seeds %{customdata[3]}, %{customdata[4]} questions"
    difference_hover = "%{customdata[3]} seeds, Holm p %{customdata[4]:.3g}"
    charts = (
        (1, ("accuracy", "low", "high"), ["seeds", "n"], score_hover),
        (2, ("difference", "d_low", "d_high"), ["pairs", "p_holm"], difference_hover),
    )
    for row, names, more, hover in charts:
        for number, variant in enumerate(variants):
            part = table[(table["variant"] == variant) & table[names[0]].notna()].sort_values(key)
            if part.empty:
                continue
            color = color_of(variant.removesuffix(BEST_ROW), trained.index(variant.removesuffix(BEST_ROW)))
            dash = DASHES[variant.endswith(BEST_ROW)]
            shift = (number - (len(variants) - 1) / 2) * apart
            score, low, high = (part[name].replace([np.inf, -np.inf], np.nan) for name in names)
            figure.add_scatter(
                x=part[key] * np.exp(shift) if logarithmic else part[key] + shift,
                y=score,
                meta={"x": part[key].tolist()},
                mode="lines+markers",
                row=row,
                col=1,
                name=variant,
                legendgroup=variant,
                showlegend=(row == 1),
                line={"color": color, "dash": dash, "width": 2.5},
                marker={"size": 7},
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "array": high - score,
                    "arrayminus": score - low,
                    "width": 4,
                    "thickness": 1.5,
                    "color": color,
                },
                customdata=part[[key, *names[1:], *more]],
                hovertemplate=(
                    f"{variant}, {key} %{{customdata[0]}}: %{{y:.3f}} [%{{customdata[1]:.3f}}, %{{customdata[2]:.3f}}],"
                    f" {hover}<extra></extra>"
                ),
            )
    figure.add_hline(y=0, line=dotted, row=2, col=1)
    figure.update_xaxes(
        type="log" if logarithmic else "linear", tickvals=values, ticktext=[f"{value:g}" for value in values]
    )
    figure.update_xaxes(title=AXES.get(key, key) + (", logarithmic" if logarithmic else ""), row=2, col=1)
    figure.update_yaxes(title="accuracy", row=1, col=1)
    figure.update_yaxes(title=f"minus {against}", row=2, col=1)
    return figure.update_layout(template="workbench", height=620, hovermode="closest", margin={"t": 60})


def sweep_points(table: pd.DataFrame) -> go.Figure:
    """Draw each variant of a sweep as a row: its score on the left, its paired difference to one variant on the right.

    Intervals are over seeds. The left chart shows chance, the right one a line at 0.

    Args:
        table: columns variant, accuracy, low, high, seeds, n, chance, against, pairs, difference, d_low, d_high, p_holm
            of one question type; the interval of a single seed is infinite and is not drawn. If several rows are of the
            variant `against`, a column `reference` marks them.
    """
    against = str(table["against"].iloc[0])
    titles = ["accuracy,<br>mean of seeds", f"minus {plain_name(against)},<br>paired by seed"]  # narrow, for a phone
    figure = make_subplots(1, 2, subplot_titles=titles, shared_yaxes=True, horizontal_spacing=0.04)
    compared = table[table["difference"].notna()]
    chance = {"symbol": "line-ns", "size": 16, "line": {"width": 2, "color": GRAY}}
    figure.add_scatter(
        x=table["chance"],
        y=table["variant"],
        name="chance",
        mode="markers",
        marker=chance,
        hovertemplate="chance %{x:.3f}",
        row=1,
        col=1,
    )
    score_hover = "seeds %{customdata[2]}, %{customdata[3]} questions, chance %{customdata[4]:.3f}"
    difference_hover = "%{customdata[2]} seeds, Holm p %{customdata[3]:.3g}"
    charts = (
        (1, table, ("accuracy", "low", "high"), ["seeds", "n", "chance"], score_hover),
        (2, compared, ("difference", "d_low", "d_high"), ["pairs", "p_holm"], difference_hover),
    )
    for column, rows, names, more, hover in charts:
        score, low, high = (rows[name].replace([np.inf, -np.inf], np.nan) for name in names)
        error = {
            "type": "data",
            "symmetric": False,
            "array": high - score,
            "arrayminus": score - low,
            "width": 4,
            "thickness": 1.5,
            "color": GRAY,
        }
        is_reference = rows.get("reference", rows["variant"] == against)
        colors = [color_of(name, not reference) for name, reference in zip(rows["variant"], is_reference, strict=True)]
        figure.add_scatter(
            x=score,
            y=rows["variant"],
            mode="markers",
            error_x=error,
            showlegend=False,
            row=1,
            col=column,
            marker={"color": colors, "size": 9},
            customdata=rows[[*names[1:], *more]],
            hovertemplate="%{y}: %{x:.3f} [%{customdata[0]:.3f}, %{customdata[1]:.3f}], " + hover + "<extra></extra>",
        )
    figure.add_vline(x=0, line={"color": GRAY, "dash": "dot", "width": 1.5}, row=1, col=2)
    figure.update_yaxes(autorange="reversed", type="category", automargin=True)
    figure.update_layout(
        template="workbench", height=166 + 34 * len(table), hovermode="closest", margin={"l": 8, "t": 96}
    )
    figure.update_layout(
        showlegend=True, legend={"y": 1.0, "yanchor": "top", "yref": "container", "x": 1, "xanchor": "right"}
    )
    return figure
