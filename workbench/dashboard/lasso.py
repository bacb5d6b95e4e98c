"""Examples: questions chosen with a lasso or a box by the probabilities of both models.

The address keeps what is drawn as `area`: corners x~y joined by underscores, in thousandths of the probabilities.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import streamlit as st

from workbench import figures
from workbench.dashboard.papers import save_button, seeds_of
from workbench.dashboard.site import Site, complain, once, write_address
from workbench.data.base import content_hash
from workbench.figures.caption import Caption
from workbench.overview.differences import Pair

POINTS = 2000  # of the scatter, at most
CHART = "p-scatter"
AREA = "area"
CORNER = r"-?\d{1,4}~-?\d{1,4}"
STEP = 10  # thousandths; corners that are closer to the one before are left out
FILL = "rgba(128, 128, 128, 0.15)"
Corners = Sequence[tuple[int, int]]


def chosen_by_lasso(site: Site, shown: pd.DataFrame, pair: Pair, stamps: tuple[object, ...]) -> pd.DataFrame:
    """Draw probability against probability if that is asked for; return the questions inside the areas drawn in it."""
    if "p_first" not in shown or shown.empty:
        return shown
    if not st.toggle("Choose questions with a lasso, by both probabilities", key="lasso", bind="query-params"):
        write_address(AREA, [], shown=False)
        return shown
    points = shown.head(POINTS)
    areas = _areas()
    key = ("lasso", stamps, pair.names, content_hash(*points["id"]), str(areas), site.looks)
    figure = once(key, lambda: _scatter(points, pair, areas))
    st.plotly_chart(
        figure,
        width="stretch",
        config=figures.EXPORT,
        key=CHART,
        on_select=_drawn,
        selection_mode=("lasso", "box"),
    )
    if len(shown) > POINTS:
        st.caption(f"The first {POINTS:,} of {len(shown):,} questions.")
    caption = Caption(
        f"Probability of the right answer to each question, {pair.names[1]} against {pair.names[0]}",
        f"{len(points):,} questions of {pair.first[0].test_data}",
        seeds_of(site, pair.keys),
        "",
    )
    with st.container(horizontal=True):
        save_button(figure, CHART, caption)
        if areas:
            st.button(
                "All points again", key="no-area", on_click=write_address, args=(AREA, []), kwargs={"shown": False}
            )
    if not areas:
        return shown
    inside = np.any([within(points["p_first"], points["p_second"], corners) for corners in areas], axis=0)
    return points[inside].reset_index(drop=True)


def _areas() -> list[Corners]:
    """Return the areas of the address; of an address that names none that can be drawn, none."""
    named = st.query_params.get_all(AREA)
    wrong = [text for text in named if not re.fullmatch(rf"{CORNER}(?:_{CORNER}){{2,}}", text)]
    if wrong:
        complain(AREA, wrong, "every question", f"the area {', '.join(wrong)}, which has no three corners")
        write_address(AREA, named := [text for text in named if text not in wrong], shown=bool(named))
    return [[(int(x), int(y)) for x, y in re.findall(r"(-?\d+)~(-?\d+)", text)] for text in named]


def _drawn() -> None:
    """Write what was drawn into the address."""
    selection = st.session_state[CHART]["selection"]
    areas = [words_of(area) for area in (*selection["lasso"], *map(_corners, selection["box"]))]
    write_address(AREA, [words for words in areas if words.count("_") > 1], shown=bool(areas))


def _corners(box: Mapping[str, Any]) -> dict[str, list[float]]:
    (x, right), (y, top) = box["x"], box["y"]
    return {"x": [x, right, right, x], "y": [y, y, top, top]}


def words_of(area: Mapping[str, Sequence[float]]) -> str:
    """Return an area {x, y: corners} as the address has it; corners far outside the chart are moved to its edge."""
    corners: list[np.ndarray] = []
    for corner in np.clip(np.transpose([area["x"], area["y"]]) * 1000, -100, 1100).round().astype(int):
        if not corners or np.abs(corner - corners[-1]).max() >= STEP:
            corners.append(corner)
    return "_".join(f"{x}~{y}" for x, y in corners)


def within(x: pd.Series, y: pd.Series, corners: Corners) -> np.ndarray:
    """Return which points lie within a polygon: a ray from them to the right crosses its edge an odd number of times.

    Args:
        x: coordinates of the points.
        y: coordinates of the points.
        corners: in thousandths; the last one is joined to the first.
    """
    across, up = x.to_numpy(), y.to_numpy()
    inside = np.zeros(len(across), dtype=bool)
    ends = np.array(corners) / 1000
    for (x0, y0), (x1, y1) in zip(ends, np.roll(ends, -1, axis=0), strict=True):
        if y0 != y1:  # a ray does not cross an edge along which it runs
            crosses = (y0 > up) != (y1 > up)
            inside ^= crosses & (across < x0 + (up - y0) * (x1 - x0) / (y1 - y0))
    return inside


def _scatter(points: pd.DataFrame, pair: Pair, areas: Sequence[Corners]) -> figures.Figure:
    """Draw the probability of the right answer of both models, a point for each question, and the chosen areas."""
    first, second = (figures.plain_name(name) for name in pair.names)
    figure = figures.new_figure(
        xaxis_title=f"p of the right answer, {first}",
        yaxis_title=f"p of the right answer, {second}",
        height=340,
        hovermode="closest",
        dragmode="lasso",
    )
    below, above = (figures.color_of(name, side) for side, name in enumerate(pair.names))
    figure.add_scattergl(
        x=points["p_first"],
        y=points["p_second"],
        mode="markers",
        marker={
            "size": 5,
            "color": (points["p_difference"] > 0).astype(float),
            "colorscale": [(0, below), (1, above)],
            "cmin": 0,
            "cmax": 1,
        },
        customdata=points[["question", "answer"]].map(figures.plain_name),
        hovertemplate="%{customdata[0]} (%{customdata[1]}): %{x:.2f} → %{y:.2f}<extra></extra>",
    )
    figure.add_shape(type="line", x0=0, y0=0, x1=1, y1=1, line={"color": figures.GRAY, "dash": "dot"})
    for corners in areas:
        path = "L".join(f"{x / 1000},{y / 1000}" for x, y in corners)
        figure.add_shape(type="path", path=f"M{path}Z", line={"color": figures.GRAY, "width": 1}, fillcolor=FILL)
    return figure
