"""Charts of two or of many models: differences as dots, and curves with their names at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from workbench.figures.colors import color_of
from workbench.figures.layer_maps import finite, layer_heat
from workbench.figures.layers import layer_axis
from workbench.figures.template import GRAY, band, error_bars, new_figure, plain_name, translucent
from workbench.intervals import t_interval

LINES = 6  # with more curves, a heat map is drawn
NAME = 16  # letters of a name at the end of a curve
CHANCE, Q95 = "chance", "chance (95th percentile)"  # what the dotted line is
GOLDEN = 0.618  # of the golden ratio: its multiples are spread evenly
ZERO = {"color": GRAY, "dash": "dot", "width": 1.5}


def difference_dots(table: pd.DataFrame, *, x: str, names: tuple[str, str], last: str = "") -> go.Figure:
    """Draw differences with their intervals as dots around 0, one row each, the largest at the top.

    A dot has the color of the model that is ahead if the interval leaves 0 out, else it is gray.

    Args:
        table: columns name, score, low, high, over (what the interval is over, in words).
        x: what the difference is, with its unit.
        names: the two models; positive is in favor of the second.
        last: the name of a row to show below the others, such as their mean.
    """
    table = table.assign(last=table["name"] == last).sort_values(["last", "score"], ascending=[False, True])
    ahead = [1 if low > 0 else 0 if high < 0 else None for low, high in zip(table["low"], table["high"], strict=True)]
    colors = [GRAY if side is None else color_of(names[side], side) for side in ahead]
    labels = [f"<b>{plain_name(name)}</b>" if name == last else plain_name(name) for name in table["name"]]
    figure = new_figure(height=80 + 25 * len(table), hovermode="closest", showlegend=False)
    for label, row, color in zip(labels, table.itertuples(), colors, strict=True):
        spread = {"array": [row.high - row.score], "arrayminus": [row.score - row.low]}
        figure.add_scatter(
            x=[row.score],
            y=[label],
            name=plain_name(f"{names[1]} minus {names[0]}"),
            mode="markers",
            marker={"color": color, "size": 10},
            error_x={"type": "data", "width": 0, "thickness": 2.5, "color": color, **spread},
            customdata=[[row.low, row.high, row.over]],
            hovertemplate=(
                "%{y}: %{x:+.1f} [%{customdata[0]:+.1f}, %{customdata[1]:+.1f}], %{customdata[2]}<extra></extra>"
            ),
        )
    figure.add_vline(x=0, line=ZERO)
    ends = [0.0, *table["low"], *table["high"]]
    room = 0.04 * (max(ends) - min(ends))
    figure.update_xaxes(title=x, range=[min(ends) - room, max(ends) + room])
    figure.update_yaxes(automargin=True, showgrid=False, ticksuffix=" ")
    return figure.update_layout(margin={"l": 16, "t": 8})


def named_curves(
    curves: pd.DataFrame,
    *,
    x: str,
    y: str,
    marked: int | None = None,
    front: Sequence[str] = (),
    zero: bool = False,
) -> go.Figure:
    """Draw a line for each curve, with its interval as a band and its name at its end instead of a legend.

    Args:
        curves: columns name, at (x), score, low, high, over, and where known chance, with `level`, which says what that
            is (CHANCE, or Q95 of a null). Of several levels of chance, as models that were asked different questions
            have, each is drawn; of nulls, the highest at each x. A column `group` makes thin lines of the curves and
            adds the mean of every group as a thick one, with its name, where all its curves have a point.
        x, y: titles of the axes.
        marked: a value of x with a vertical line, such as the chosen layer.
        front: the curves that have colors, intervals and names if there are more than LINES; the others are thin gray
            lines behind them, with their colors in `meta`. Without it, all have colors, and only the highest and
            lowest have names.
        zero: whether 0 means that there is no effect, which a dotted line then shows.
    """
    figure = new_figure(xaxis_title=x, yaxis_title=y, height=320, showlegend=False, hovermode="closest")
    curves, grouped = finite(curves), "group" in curves
    names = list(dict.fromkeys(curves["name"]))
    many = not grouped and len(names) > LINES
    front = [name for name in names if name in front] if many else []
    for number, (name, part) in enumerate(curves.groupby("name", sort=False)):
        color, part = color_of(name, number), part.sort_values("at")
        if front and name not in front:
            _line(figure, part, str(name), GRAY, width=1, thin=True, pointed=color)
            continue
        if not grouped and (front or not many) and part["low"].notna().any():
            band(figure, part["at"], part["low"], part["high"], translucent(color, 0.16), str(name))
        _line(figure, part, str(name), color, width=1 if grouped else 2.5, thin=grouped)
    drawn = curves
    if grouped:
        drawn = _means(curves)
        for number, (name, part) in enumerate(drawn.groupby("name", sort=False)):
            line = part[["at", "score"]].sort_values("at")
            _line(figure, line, str(name), color_of(name, number), width=3, of=part["of"].iloc[0])
        names = list(dict.fromkeys(drawn["name"]))
    if zero:
        figure.add_hline(y=0, line=ZERO)
    for level in chance_levels(curves):
        words = level_words(curves)
        figure.add_scatter(
            x=level.index,
            y=level,
            mode="lines",
            line=ZERO,
            name=words,
            hovertemplate=f"{words} %{{y:.3f}}<extra></extra>",
        )
    if marked is not None:
        figure.add_vline(x=marked, line={"color": GRAY, "width": 1, "dash": "dash"})
    if len(names) > LINES:  # names of the highest and of the lowest; the others are named when pointed at
        last = drawn.sort_values("at").groupby("name")["score"].last().sort_values()
        names = front or [*last.index[: LINES // 2], *last.index[-(LINES // 2) :]]
    if front:  # above the gray lines
        figure.data = sorted(figure.data, key=lambda trace: trace.legendgroup in front)
    _end_names(figure, drawn, names, chance=curves)
    return figure


def chance_levels(curves: pd.DataFrame) -> list[pd.Series]:
    """Return the levels of chance to draw, by x: each that is the same in all of its curves, or else the highest."""
    if "chance" not in curves or curves["chance"].isna().all():
        return []
    known = curves.dropna(subset="chance")
    known = known.assign(chance=known["chance"].round(6))
    is_constant = (known.groupby("name")["chance"].nunique() == 1).all()
    if level_words(curves) == CHANCE and is_constant:
        return [part.groupby("at")["chance"].max() for _, part in known.groupby("chance")]
    return [known.groupby("at")["chance"].max()]


def level_words(curves: pd.DataFrame) -> str:
    """Return what the level of chance is that curves (`named_curves`) are drawn with; "" if there is none."""
    known = curves[curves["chance"].notna()]
    return "" if known.empty else str(known["level"].iloc[0]) if "level" in known else CHANCE


def image_dots(values: pd.DataFrame, *, x: str, chance: Sequence[float] = ()) -> go.Figure:
    """Draw the value of each image as a dot, a row for each model, with a line at the mean of the row.

    Args:
        values: columns name, image_id, value.
        x: what the values are.
        chance: the levels of dotted lines.
    """
    names = list(dict.fromkeys(values["name"]))
    figure = new_figure(height=110 + 46 * len(names), hovermode="closest", showlegend=False)
    for row, (name, part) in enumerate(values.groupby("name", sort=False)):
        part = part.sort_values("value")
        spread = (np.arange(len(part)) * GOLDEN) % 1 - 0.5  # neighbors are far from one another
        color, label = color_of(name, row), plain_name(str(name))
        figure.add_scatter(
            x=part["value"],
            y=row + 0.6 * spread,
            mode="markers",
            name=label,
            marker={"color": translucent(color, 0.55), "size": 5},
            text=[plain_name(str(image)) for image in part["image_id"]],
            hovertemplate=f"{label}, %{{text}}: %{{x:.3f}}<extra></extra>",
        )
        figure.add_scatter(
            x=[part["value"].mean()],
            y=[row],
            mode="markers",
            name=f"{label}, mean",
            marker={"symbol": "line-ns", "size": 15, "line": {"width": 3, "color": color}},
            hovertemplate=f"{label}, mean: %{{x:.3f}}<extra></extra>",
        )
    for level in chance:
        figure.add_vline(x=level, line=ZERO)
    ticks = [plain_name(name if len(name) <= NAME else f"{name[: NAME - 8]}…{name[-7:]}") for name in names]
    figure.update_yaxes(
        tickvals=list(range(len(names))),
        ticktext=ticks,
        range=[len(names) - 0.5, -0.5],
        showgrid=False,
        automargin=True,
    )
    return figure.update_xaxes(title=x).update_layout(margin={"l": 8, "t": 8})


def _line(
    figure: go.Figure,
    part: pd.DataFrame,
    name: str,
    color: str,
    *,
    width: float,
    thin: bool = False,
    pointed: str = "",
    of: str = "",
) -> None:
    """Draw one line; the dashboard gives it the color `pointed` while the pointer is on it. `of` says what it is."""
    interval = {"low", "high"} <= set(part) and bool(part["low"].notna().any())
    hover = f"{plain_name(name)}: %{{y:.3f}}" + "%{customdata[0]}, %{customdata[1]}" * interval + f", {of}" * bool(of)
    figure.add_scatter(
        x=part["at"],
        y=part["score"],
        name=plain_name(name),
        legendgroup=name,
        mode="lines" if len(part) > 1 and (thin or len(part) > 20) else "lines+markers",
        line={"color": translucent(color, 0.45) if thin else color, "width": width},
        marker={"size": 5 if thin else 6},
        error_y=error_bars(part) | {"color": color} if interval and not thin and len(part) == 1 else None,
        customdata=_ends(part) if interval else None,
        hovertemplate=f"{hover}<extra></extra>",
        meta={"color": pointed} if pointed else None,
    )


def _ends(part: pd.DataFrame) -> list[list[str]]:
    """Return of each point its interval in words, "" where it is not known, and what it is over."""
    rows = zip(part["low"], part["high"], part["over"], strict=True)
    return [[f" [{low:.3f}, {high:.3f}]" if np.isfinite([low, high]).all() else "", over] for low, high, over in rows]


def _end_names(figure: go.Figure, curves: pd.DataFrame, names: Sequence[object], chance: pd.DataFrame) -> None:
    """Write each curve's name beside its last point; names that would overlap are moved apart."""
    ends = {str(name): curves[curves["name"] == name].sort_values("at").iloc[-1] for name in names}
    places = {name: float(row["score"]) for name, row in ends.items()}
    drawn = [column for column in ("score", "low", "high") if column in chance]
    lowest, highest = float(chance[drawn].min().min()), float(chance[drawn].max().max())
    levels = [float(level.iloc[-1]) for level in chance_levels(chance)]
    for level in levels:
        places["chance" if len(levels) == 1 else f"chance {level:.3f}"] = level
        lowest, highest = min(lowest, level), max(highest, level)
    gap = 0.065 * max(highest - lowest, 1e-9)
    written = _apart(places, gap)
    right = float(chance["at"].max())
    for name, place in written.items():
        short = name if len(name) <= NAME else f"{name[: NAME - 8]}…{name[-7:]}"
        number = list(dict.fromkeys(curves["name"])).index(name) if name in ends else 0
        color = color_of(name, number) if name in ends else GRAY
        figure.add_annotation(
            x=right,
            y=place,
            text=f"<span style='color:{color}'>━</span> {plain_name(short)}",
            showarrow=False,
            xanchor="left",
            xshift=8,
            hovertext=plain_name(name),
        )
    left = float(chance["at"].min())
    room = 0.03 * max(right - left, 1e-9)
    figure.update_xaxes(range=[left - room, right + room])
    figure.update_layout(margin={"r": 30 + 8 * max((min(len(name), NAME) for name in written), default=0), "t": 12})


def _apart(places: Mapping[str, float], gap: float) -> dict[str, float]:
    """Return the places in order, moved up and down as little as a distance of `gap` between neighbors takes."""
    order = sorted(places, key=lambda name: places[name])
    moved = [places[name] for name in order]
    for _ in range(50):
        for i in range(1, len(moved)):
            lack = gap - (moved[i] - moved[i - 1])
            if lack > 1e-12:
                moved[i - 1] -= lack / 2
                moved[i] += lack / 2
    return dict(zip(order, moved, strict=True))


def layer_curves_named(curves: pd.DataFrame, *, y: str, marked: int | None = None, zero: bool = False) -> go.Figure:
    """Draw curves over layers with their names at the end, or a heat map if there are more than LINES of them.

    Args:
        curves: as `named_curves`, with `at` the layer.
    """
    lines = curves["group"].nunique() if "group" in curves else curves["name"].nunique()
    drawn = _means(curves) if "group" in curves else curves
    if lines > LINES and len(drawn):
        return layer_heat(drawn, title=y, marked=marked)
    figure = named_curves(curves, x="layer", y=y, marked=marked, zero=zero)
    layer_axis(figure, curves["at"])
    return figure


def _means(curves: pd.DataFrame) -> pd.DataFrame:
    """Return the mean of every group where all its curves have a point, with Student's interval over them.

    Returns:
        Columns name, at, score, low, high, of ("mean of 2 seeds"; "" for a single curve, which is as it was).
    """
    curves = curves.dropna(subset="score")
    sizes = curves.groupby("group")["name"].nunique()
    rows = []
    for (group, at), part in curves.groupby(["group", "at"], sort=False):
        if len(part) < sizes[group]:
            continue
        row = {"name": group, "at": at, **part[["score", "low", "high"]].mean(), "of": ""}
        if len(part) > 1:
            interval = t_interval(part["score"])
            row |= {"low": interval.low, "high": interval.high, "of": f"mean of {len(part)} seeds"}
        rows.append(row)
    return pd.DataFrame(rows, columns=["name", "at", "score", "low", "high", "of"])
