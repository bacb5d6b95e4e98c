"""Curves of scores over layers, with intervals, nulls and reference levels, and of paired differences."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from workbench.figures.colors import color_of
from workbench.figures.template import DASHES, GRAY, band, error_bars, new_figure, translucent


def layer_curves(curves: pd.DataFrame, *, y: str, kind: str, null: str = "chance (null mean to 95 %)") -> go.Figure:
    """Draw scores over layers, one line per model and `kind`, with intervals as bands and the null as a dotted line.

    Args:
        curves: columns model, layer, score, low, high, n_images and the one named by `kind`. Scores with a null have
            null_mean and null_q95, scores with a known chance level have chance. Without these columns a line at 0
            means no change; to_chance, if it is there, is the change at which a model's answers are at chance. Layer -1
            is the vision encoder.
        y: name of the score, shown on the axis.
        kind: the column whose values have different dashes; models have different colors.
        null: name of the null in the legend; a null that is NaN everywhere is not drawn.
    """
    figure = new_figure(xaxis_title="layer", yaxis_title=y, height=460)
    models, kinds = list(dict.fromkeys(curves["model"])), list(dict.fromkeys(curves[kind]))
    for (model, name), part in curves.groupby(["model", kind], sort=False):
        part = part.sort_values("layer")
        color, dash = color_of(model, models.index(model)), DASHES[kinds.index(name) % len(DASHES)]
        label = f"{model} · {name}"
        band(figure, part["layer"], part["low"], part["high"], translucent(color, 0.16), label)
        hover = "%{y:.3f}  [%{customdata[0]:.3f}, %{customdata[1]:.3f}]  n=%{customdata[2]}"
        figure.add_scatter(
            x=part["layer"],
            y=part["score"],
            name=label,
            legendgroup=label,
            mode="lines+markers",
            line={"color": color, "dash": dash, "width": 2.5},
            marker={"size": 7},
            error_y=error_bars(part) if len(part) == 1 else None,  # a single point has no band
            customdata=part[["low", "high", "n_images"]],
            hovertemplate=hover,
        )
    if "null_mean" in curves:
        if curves["null_mean"].notna().any():
            _null_band(figure, curves, null)
        figure.update_yaxes(rangemode="tozero")
    elif "chance" in curves:
        _level(figure, curves, "chance", "chance")
    else:
        figure.add_hline(y=0, line={"color": GRAY, "dash": "dot", "width": 1.5})
        if "to_chance" in curves:
            levels = curves.groupby("model", sort=False)["to_chance"].mean()
            if np.ptp(levels) < 0.0005:  # equal where they are written
                _level(figure, curves, "to_chance", "answers at chance")
            else:
                for model, part in curves.groupby("model", sort=False):
                    color = color_of(model, models.index(model))
                    _level(figure, part, "to_chance", f"{model}: answers at chance", color)
    layer_axis(figure, curves["layer"])
    return figure


def with_ceilings(figure: go.Figure, ceilings: pd.DataFrame, *, name: str) -> go.Figure:
    """Add a horizontal line with its interval to layer curves for each row of `ceilings`, and return the figure.

    Args:
        ceilings: columns score, low, high, n_images and the one named by `name`, scores of frozen models.
        name: column of the names in the legend.
    """
    layers = [x for trace in figure.data for x in trace.x]
    ends = pd.Series([min(layers), max(layers)])
    for number, row in enumerate(ceilings.to_dict("records")):
        label, dash = str(row[name]), ("longdash", "longdashdot", "dashdot")[number % 3]
        band(figure, ends, pd.Series([row["low"]] * 2), pd.Series([row["high"]] * 2), translucent(GRAY, 0.14), label)
        figure.add_scatter(
            x=ends,
            y=[row["score"]] * 2,
            name=f"{label} (frozen)",
            legendgroup=label,
            mode="lines",
            line={"color": GRAY, "dash": dash, "width": 2},
            customdata=[[row["low"], row["high"], row["n_images"]]] * 2,
            hovertemplate="%{y:.3f}  [%{customdata[0]:.3f}, %{customdata[1]:.3f}]  n=%{customdata[2]}",
        )
    return figure


def layer_axis(figure: go.Figure, layers: pd.Series) -> None:
    """Put a tick at each layer, or at every fourth if there are more than 16; layer -1 is the vision encoder."""
    step = 1 if layers.max() <= 16 else 4
    figure.update_xaxes(dtick=step)
    if layers.min() < 0:
        ticks = [-1, *range(0, int(layers.max()) + 1, step)]
        figure.update_xaxes(tickvals=ticks, ticktext=["encoder", *map(str, ticks[1:])])


def name_final_norm(figures: Mapping[str, go.Figure], after_norm: Mapping[str, bool]) -> None:
    """Say on the layer axes of figures that the last layer was read after the final norm, if it was.

    Args:
        after_norm: for each model whether it was.
    """
    models = [model for model, after in after_norm.items() if after]
    if models:
        which = "" if len(models) == len(after_norm) else f" of {', '.join(models)}"
        title = f"layer (the last one{which} after the final norm)"
        for figure in figures.values():
            figure.for_each_xaxis(lambda axis: axis.update(title=title), {"title.text": "layer"})


def _level(figure: go.Figure, curves: pd.DataFrame, column: str, name: str, color: str = GRAY) -> None:
    """Draw a dotted line at the mean of `column`."""
    ends = [curves["layer"].min(), curves["layer"].max()]
    dotted = {"color": color, "dash": "dot", "width": 1.5}
    figure.add_scatter(
        x=ends, y=[curves[column].mean()] * 2, name=name, mode="lines", line=dotted, hovertemplate="%{y:.3f}"
    )


def _null_band(figure: go.Figure, curves: pd.DataFrame, name: str) -> None:
    """Draw a band from the smallest null mean to the largest 95th percentile of each layer."""
    null = curves.groupby("layer")[["null_mean", "null_q95"]].agg({"null_mean": "min", "null_q95": "max"}).reset_index()
    band(figure, null["layer"], null["null_mean"], null["null_q95"], translucent(GRAY, 0.25), "null")
    figure.add_scatter(
        x=null["layer"],
        y=null["null_q95"],
        name=name,
        legendgroup="null",
        mode="lines",
        line={"color": GRAY, "dash": "dot", "width": 1.5},
        hovertemplate="%{y:.3f}",
    )


def difference_curves(curves: pd.DataFrame, *, y: str, kind: str | None = None) -> go.Figure:
    """Draw paired differences over layers with their intervals, one line per model (and `kind`), and a line at 0.

    Args:
        curves: columns model, layer, score, low, high, p_holm, n_images and the one named by `kind`. Layer -1 is the
            vision encoder.
        y: name of the difference, shown on the axis.
        kind: the column whose values have different dashes, if there is one.
    """
    figure = new_figure(xaxis_title="layer", yaxis_title=y, height=380)
    models, kinds = list(dict.fromkeys(curves["model"])), list(dict.fromkeys(curves[kind])) if kind else []
    for key, part in curves.groupby(["model", kind] if kind else ["model"], sort=False):
        part, label = part.sort_values("layer"), " · ".join(map(str, key))
        color = color_of(key[0], models.index(key[0]) + 1)
        dash = DASHES[kinds.index(key[1]) % len(DASHES)] if kind else DASHES[0]
        band(figure, part["layer"], part["low"], part["high"], translucent(color, 0.16), label)
        figure.add_scatter(
            x=part["layer"],
            y=part["score"],
            name=label,
            legendgroup=label,
            mode="lines+markers",
            showlegend=True,
            line={"color": color, "dash": dash, "width": 2.5},
            marker={"size": 7},
            error_y=error_bars(part) if len(part) == 1 else None,  # a single point has no band
            customdata=part[["low", "high", "n_images", "p_holm"]],
            hovertemplate=(
                "%{y:.3f}  [%{customdata[0]:.3f}, %{customdata[1]:.3f}]  n=%{customdata[2]}  Holm"
                " p=%{customdata[3]:.3g}"
            ),
        )
    figure.add_hline(y=0, line={"color": GRAY, "dash": "dot", "width": 1.5})
    layer_axis(figure, curves["layer"])
    return figure
