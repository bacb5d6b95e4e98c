"""Heat maps of scores of many models, or of many measures, by layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from workbench.figures.template import GRAY, new_figure, plain_name, two_lines


def finite(curves: pd.DataFrame) -> pd.DataFrame:
    """Return curves without intervals that are infinite, as those of seeds that all agree are; they are not drawn."""
    ends = [name for name in ("low", "high") if name in curves]
    return curves.assign(**{name: curves[name].where(np.isfinite(curves[name])) for name in ends})


def layer_heat(table: pd.DataFrame, *, title: str, marked: int | None = None, column: str = "layer") -> go.Figure:
    """Draw a score of many models as a heat map, a row for each model and a column for each layer.

    Args:
        table: columns name, at (layer), score, low, high, and where known over (or of) and chance.
        title: name of the score, at the color bar.
        marked: a layer to frame.
        column: what a column is, where it is no layer.
    """
    table = finite(table)
    names = list(dict.fromkeys(table["name"]))
    wide = table.pivot_table(index="name", columns="at", values="score", sort=False).reindex(names)
    columns = list(dict.fromkeys(table["at"]))
    wide = wide[columns if isinstance(columns[0], str) else sorted(columns)]
    parts = {key: table.pivot_table(index="name", columns="at", values=key, sort=False) for key in ("low", "high")}
    bounds = np.dstack([part.reindex(index=names, columns=wide.columns) for part in parts.values()])
    words = table.assign(words=_counts(table)).pivot_table(
        index="name", columns="at", values="words", aggfunc="first", sort=False
    )
    more = words.reindex(index=names, columns=wide.columns).fillna("").to_numpy()
    figure = new_figure(height=190 + _row_height(names) * len(names), hovermode="closest", xaxis_title=column)
    figure.add_heatmap(
        z=wide,
        x=_layer_names(list(wide.columns)),
        y=[plain_name(str(name)) for name in names],
        customdata=np.dstack([bounds.astype(object), more]),
        colorscale="Viridis",
        colorbar=_bar(title),
        xgap=1,
        ygap=1,
        hovertemplate=f"%{{y}}, {column}"
        " %{x}: %{z:.3f} [%{customdata[0]:.3f}, %{customdata[1]:.3f}]%{customdata[2]}<extra></extra>",
    )
    _frame_column(figure, list(wide.columns), marked)
    _label_rows(figure, [plain_name(str(name)) for name in names], [str(name) for name in names])
    figure.update_xaxes(type="category", showgrid=False)
    return figure.update_layout(margin={"l": 8, "t": 12})


def _counts(table: pd.DataFrame) -> list[str]:
    """Return of each row what its interval is over and its level of chance, as far as they are known."""
    over = table["over"] if "over" in table else table["of"] if "of" in table else [""] * len(table)
    chance = table["chance"] if "chance" in table else [np.nan] * len(table)
    known = ([str(words), f"chance {level:.3f}" * (level == level)] for words, level in zip(over, chance, strict=True))
    return ["".join(f", {each}" for each in row if each) for row in known]


def layer_strip(table: pd.DataFrame, *, marked: int | None = None) -> go.Figure:
    """Draw in which layer two models differ most: a row for each measure, a column for each layer.

    The color is the difference in standard errors, so that measures with different units share one scale; a dot marks
    an interval that leaves 0 out.

    Args:
        table: columns title, layer, score, low, high, z, n, over.
        marked: a layer to frame.
    """
    titles, layers = list(dict.fromkeys(table["title"])), sorted(table["layer"].unique())
    wide = {
        key: table.pivot_table(index="title", columns="layer", values=key, sort=False).reindex(titles, columns=layers)
        for key in ("z", "score", "low", "high")
    }
    clear = (wide["low"] > 0) | (wide["high"] < 0)
    figure = new_figure(height=180 + _row_height(titles) * len(titles), hovermode="closest", xaxis_title="layer")
    figure.add_heatmap(
        z=wide["z"],
        x=_layer_names(layers),
        y=titles,
        text=np.where(clear, "●", ""),
        texttemplate="%{text}",
        textfont={"size": 8, "color": "#000000"},
        customdata=np.dstack([wide[key] for key in ("score", "low", "high", "z")]),
        colorscale=[(0, "#d55e00"), (0.5, "#e9eaec"), (1, "#0072b2")],
        zmid=0,
        zmin=-8,
        zmax=8,
        xgap=1,
        ygap=1,
        colorbar=_bar("standard errors"),
        hovertemplate=(
            "%{y}, layer %{x}: %{customdata[0]:+.3f} [%{customdata[1]:+.3f}, %{customdata[2]:+.3f}],"
            " %{customdata[3]:.1f} standard errors<extra></extra>"
        ),
    )
    _frame_column(figure, layers, marked)
    _label_rows(figure, titles, titles)
    figure.update_xaxes(type="category", showgrid=False)
    return figure.update_layout(margin={"l": 8, "t": 12})


def clickable(figure: go.Figure) -> go.Figure:
    """Return a heat map with an unseen point in each cell, since a heat map itself reports no clicks."""
    heat = figure.data[0]
    rows, columns = np.nonzero(np.isfinite(np.asarray(heat.z, dtype=float)))
    unseen = {"marker": {"opacity": 0}}
    # go.Figure(figure) would take each trace's type out of `figure` for a moment, when another thread may read it
    shown = go.Figure(figure.to_dict())
    shown.update_yaxes(autorange=False, range=[len(heat.y) - 0.5, -0.5])  # points would ask for a margin
    shown.update_xaxes(autorange=False, range=[-0.5, len(heat.x) - 0.5])
    return shown.add_scatter(
        x=[heat.x[column] for column in columns],
        y=[heat.y[row] for row in rows],
        customdata=np.asarray(heat.customdata)[rows, columns],
        hovertemplate=heat.hovertemplate,
        mode="markers",
        marker={"size": 24, "symbol": "square", "opacity": 0},
        selected=unseen,
        unselected=unseen,
        showlegend=False,
    )


def _layer_names(layers: Sequence[object]) -> list[str]:
    """Return the names of layers, or of other columns, on an axis; layer -1 is the vision encoder."""
    return ["encoder" if layer == -1 else str(layer) for layer in layers]


def _row_height(names: Sequence[object]) -> int:
    """Return the height of a row of a heat map in pixels, which has room for its label."""
    return 30 if any("<br>" in two_lines(str(name)) for name in names) else 24


def _label_rows(figure: go.Figure, rows: Sequence[str], names: Sequence[str]) -> None:
    """Write the names of the rows of a heat map, the first at the top."""
    figure.update_yaxes(
        autorange="reversed",
        automargin=True,
        showgrid=False,
        tickvals=rows,
        ticktext=[two_lines(name) for name in names],
        tickfont={"size": 11},
    )


def _bar(title: str) -> dict[str, object]:
    """Return a color bar above the map, where it takes no width on a phone."""
    place = {"orientation": "h", "thickness": 10, "y": 1.0, "yanchor": "bottom", "len": 0.6}
    return {"title": {"text": title, "side": "top", "font": {"size": 12}}, **place}


def _frame_column(figure: go.Figure, layers: Sequence[int], marked: int | None) -> None:
    if marked is not None and marked in layers:
        place = list(layers).index(marked)
        figure.add_vrect(x0=place - 0.5, x1=place + 0.5, line={"color": GRAY, "width": 2}, fillcolor="rgba(0,0,0,0)")
