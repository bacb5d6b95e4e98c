"""Colors of models, and charts that name their curves at the end."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from html import unescape
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest

from workbench.figures import (
    CHANCE,
    LINES,
    Q95,
    accuracy_by_type,
    chance_levels,
    clickable,
    colored,
    difference_dots,
    image_dots,
    layer_curves_named,
    layer_heat,
    layer_strip,
    model_colors,
    named_curves,
)
from workbench.figures.caption import Caption
from workbench.figures.compared import _apart
from workbench.figures.point_table import drawn_points
from workbench.figures.template import GRAY, LABEL, two_lines
from workbench.intervals import t_interval


def curves(count: int) -> pd.DataFrame:
    rows = [
        {"name": f"m{i}", "at": layer, "score": 0.1 * i + layer, "low": 0.0, "high": 9.0, "over": "9 images"}
        for i in range(count)
        for layer in range(3)
    ]
    return pd.DataFrame(rows)


def test_a_curve_without_intervals_shows_and_saves_none() -> None:
    figure = named_curves(curves(2).assign(low=np.nan, high=np.nan), x="step", y="loss")
    assert "low" not in drawn_points(figure)
    assert Caption("losses", "", "one training", "images").of(figure).count("No interval is drawn.") == 1
    assert not any("customdata[0]" in trace.hovertemplate for trace in figure.data)
    both = named_curves(pd.concat([curves(1).assign(low=np.nan, high=np.nan, name="x"), curves(1)]), x="step", y="y")
    assert drawn_points(both).groupby("curve")["low"].count().to_dict() == {"m0": 3, "x": 0}


def test_an_infinite_interval_is_not_drawn_and_moves_no_name() -> None:
    table = curves(2)
    table.loc[table["at"] == 1, ["low", "high"]] = [-np.inf, np.inf]
    figure = named_curves(table, x="layer", y="difference")
    points = drawn_points(figure)
    assert points.groupby("x")["low"].count().to_dict() == {0: 2, 1: 0, 2: 2}
    assert all(np.isfinite(note.y) for note in figure.layout.annotations)
    (line, _) = (trace for trace in figure.data if trace.customdata is not None)
    assert [list(row) for row in line.customdata][:2] == [[" [0.000, 9.000]", "9 images"], ["", "9 images"]]
    cells = drawn_points(layer_heat(table, title="difference"))
    assert cells.groupby("x")["low"].count().to_dict() == {"0": 2, "1": 0, "2": 2}


def test_the_columns_of_a_heat_map_are_called_what_they_are() -> None:
    table = curves(2).assign(at=lambda t: "type " + t["at"].astype(str))
    figure = layer_heat(table, title="accuracy", column="question type")
    assert figure.layout.xaxis.title.text == "question type"
    assert figure.data[0].hovertemplate.startswith("%{y}, question type %{x}: ")
    assert layer_heat(curves(2), title="score").data[0].hovertemplate.startswith("%{y}, layer %{x}: ")


def test_every_model_has_one_color() -> None:
    colors = model_colors({f"v{i}": [f"v{i}-s{seed}" for seed in range(4)] for i in range(12)})
    models = [name for name in colors if "-s" in name]
    assert len({colors[name] for name in models}) == len(models) == 48
    assert colors["v3"] == colors["v3-s0"]


def test_names_at_the_ends_of_curves_do_not_overlap_and_stay_near() -> None:
    moved = _apart({"a": 0.50, "b": 0.51, "c": 0.52, "d": 0.9}, 0.1)
    heights = sorted(moved.values())
    assert all(high - low >= 0.1 - 1e-6 for low, high in pairwise(heights))
    assert moved["d"] == pytest.approx(0.9)
    assert sum(moved[name] for name in "abc") / 3 == pytest.approx(0.51)


def test_a_model_has_its_color_in_every_chart() -> None:
    with colored({"m0": "#010203", "m1": "#040506"}):
        figure = named_curves(curves(2), x="layer", y="score")
        assert [trace.line.color for trace in figure.data if trace.name in ("m0", "m1")] == ["#010203", "#040506"]
        table = pd.DataFrame({"name": ["a", "b", "c"], "score": [1, -1, 0], "low": [0.5, -2, -1], "high": [2, -0.5, 1]})
        dots = difference_dots(table.assign(over="x"), x="points", names=("m0", "m1")).data
    assert {dot.y[0]: dot.marker.color for dot in dots} == {"a": "#040506", "b": "#010203", "c": "#8a8f98"}


def test_many_models_become_a_heat_map_with_every_value() -> None:
    assert layer_curves_named(curves(LINES), y="score").data[0].type == "scatter"
    (heat,) = layer_curves_named(curves(LINES + 1), y="score").data
    assert heat.type == "heatmap"
    assert heat.z.tolist() == [[pytest.approx(0.1 * i + layer) for layer in range(3)] for i in range(LINES + 1)]
    grouped = curves(8).assign(group=lambda t: t["name"].isin(["m0", "m1"]).map({True: "x", False: "y"}))
    thick = [trace for trace in layer_curves_named(grouped, y="score").data if trace.line.width == 3]
    assert [trace.name for trace in thick] == ["x", "y"]
    assert thick[0].y.tolist() == pytest.approx([0.05, 1.05, 2.05])


def test_a_single_layer_shows_its_interval_and_every_seed() -> None:
    one = curves(4).query("at == 1")
    bars = [trace for trace in layer_curves_named(one, y="score").data if trace.name in set(one["name"])]
    for trace, row in zip(bars, one.itertuples(), strict=True):
        assert (trace.error_y.array[0], trace.error_y.arrayminus[0]) == (row.high - row.score, row.score - row.low)
    grouped = layer_curves_named(one.assign(group=["x", "x", "y", "y"]), y="score").data
    assert all("markers" in trace.mode for trace in grouped if trace.name in {*one["name"], "x", "y"})


def test_the_interval_of_a_group_in_a_heat_map_is_over_its_curves() -> None:
    many = curves(2 * (LINES + 1)).assign(group=lambda t: t["name"].str[1:].astype(int) // 2)
    (heat,) = layer_curves_named(many.assign(group=many["group"].astype(str)), y="score").data
    expected = t_interval([0.0, 0.1])
    *bounds, words = heat.customdata[0][0]
    assert bounds == pytest.approx([expected.low, expected.high]) and words == ", mean of 2 seeds"
    known = layer_curves_named(curves(LINES + 1).assign(chance=0.25, over="9 images"), y="score").data[0]
    assert known.customdata[0][0][2] == ", 9 images, chance 0.250"


def test_models_that_were_asked_other_questions_have_their_own_chance() -> None:
    table = curves(2).assign(chance=lambda t: np.where(t["name"] == "m0", 0.25, 0.5), level=CHANCE)
    figure = named_curves(table, x="step", y="accuracy")
    assert [set(trace.y) for trace in figure.data if trace.name == CHANCE] == [{0.25}, {0.5}]
    assert {"chance 0.250", "chance 0.500"} <= {note.hovertext for note in figure.layout.annotations}
    assert [set(level) for level in chance_levels(table)] == [{0.25}, {0.5}]
    nulls = named_curves(table.assign(level=Q95), x="step", y="CKNNA")
    assert [list(trace.y) for trace in nulls.data if trace.name == Q95] == [[0.5] * 3]
    models = {
        name: pd.DataFrame(
            {"category": ["x", "y"], "accuracy": 0.6, "low": 0.5, "high": 0.7, "n_images": 9, "chance": [0.5, chance]}
        )
        for name, chance in (("a", 0.25), ("b", 0.5))
    }
    figure = accuracy_by_type(models)
    (tick,) = (trace for trace in figure.data if trace.name == "chance")
    assert list(tick.y) == [0.5, 0.25, 0.5]
    assert list(tick.x) == [0, *(trace.x[1] for trace in figure.data[:2])]
    assert list(tick.marker.line.color) == [GRAY, *(trace.marker.color for trace in figure.data[:2])]


def test_the_mean_of_a_group_is_drawn_where_all_its_curves_have_a_point() -> None:
    """Where a seed is still training, the mean of the others is not that of the variant."""
    table = curves(3).assign(group=["x", "x", "x", "x", "x", "x", "y", "y", "y"])
    table = table[(table["name"] != "m1") | (table["at"] == 0)]
    figure = named_curves(table, x="step", y="accuracy")
    thick = {trace.name: trace for trace in figure.data if trace.line.width == 3}
    assert [list(thick["x"].x), list(thick["x"].y)] == [[0], [pytest.approx(0.05)]]
    assert thick["x"].hovertemplate == "x: %{y:.3f}, mean of 2 seeds<extra></extra>"
    assert list(thick["y"].x) == [0, 1, 2]
    assert thick["y"].hovertemplate == "y: %{y:.3f}<extra></extra>"
    assert {note.x for note in figure.layout.annotations} == {2}  # names are right of all curves
    many = curves(2 * (LINES + 1)).assign(group=lambda t: (t["name"].str[1:].astype(int) // 2).astype(str))
    many = many[many["at"] == many["name"].str[1:].astype(int) % 2]  # no seed has a layer of another
    assert {trace.type for trace in layer_curves_named(many, y="score").data} == {"scatter"}
    apart = table[(table["name"] != "m0") | (table["at"] > 0)].query("group == 'x'")
    assert not [trace for trace in named_curves(apart, x="step", y="accuracy").data if trace.line.width == 3]


def test_long_labels_of_rows_take_two_lines_and_lose_nothing() -> None:
    names = ["linear probe: class of the object", "baseline_limit_train-300-s10", "short", "x" * 40, "a<b & c_d" * 3]
    for name in names:
        lines = two_lines(name).split("<br>")
        assert unescape("".join(lines)).replace(" ", "") == name.replace(" ", "")
        assert len(lines) == (2 if len(name) > LABEL and name[0] != "x" else 1)
    heat = layer_heat(pd.concat([curves(1).assign(name=name) for name in names]), title="score")
    assert list(heat.layout.yaxis.ticktext) == [two_lines(name) for name in names]
    assert list(heat.layout.yaxis.tickvals) == list(heat.data[0].y)


def test_beyond_six_curves_those_in_front_have_colors_and_names() -> None:
    shown = named_curves(curves(LINES + 2), x="step", y="score", front=["m1", "m3"])
    lines = [trace for trace in shown.data if trace.fill != "toself"]
    colors = {trace.name: trace.line.color for trace in lines}
    gray = {color for name, color in colors.items() if name not in ("m1", "m3")}
    assert len(gray) == 1
    pointed = {trace.name: trace.meta["color"] for trace in lines if trace.meta}
    assert pointed.keys() == colors.keys() - {"m1", "m3"}
    assert gray.isdisjoint(pointed.values())
    assert gray.isdisjoint({colors["m1"], colors["m3"]})
    assert {trace.name for trace in lines[-2:]} == {"m1", "m3"}  # drawn above the others
    assert sum(trace.fill == "toself" for trace in shown.data) == 2
    assert len(shown.layout.annotations) == 2
    assert all(f"m{i}: " in str(trace.hovertemplate) for i, trace in enumerate(sorted(lines, key=lambda t: t.name)))
    few = named_curves(curves(LINES), x="step", y="score", front=["m1"])
    assert len(few.layout.annotations) == LINES


def test_each_image_is_a_dot_in_the_row_of_its_model() -> None:
    values = pd.DataFrame({"name": ["a"] * 50 + ["b"] * 50, "image_id": [f"i{n % 50}" for n in range(100)]})
    values["value"] = [0.01 * n for n in range(100)]
    drawn = image_dots(values, x="score", chance=[0.2])
    dots = [trace for trace in drawn.data if len(trace.x) > 1]
    assert [sorted(trace.x) for trace in dots] == [values["value"][:50].tolist(), values["value"][50:].tolist()]
    for row, trace in enumerate(dots):
        assert np.abs(trace.y - row).max() < 0.31
        assert trace.y.std() > 0.1  # spread, so that equal values can be told apart
    means = [trace.x[0] for trace in drawn.data if len(trace.x) == 1]
    assert means == pytest.approx([0.245, 0.745])
    assert drawn.layout.shapes[0].x0 == 0.2


def test_markup_in_a_name_is_text() -> None:
    figure = named_curves(curves(1).assign(name="<b>x</b>"), x="layer", y="score")
    assert "<b>" not in "".join(str(trace.name) for trace in figure.data)
    assert all("<b>" not in note.text for note in figure.layout.annotations)


def test_a_stored_strip_is_made_clickable_by_many_users_at_once() -> None:
    row = {"score": 0.1, "low": 0.0, "high": 0.2, "z": 1.0, "n": 10, "over": "images"}
    strip = layer_strip(pd.DataFrame([row | {"title": name, "layer": at} for name in "abc" for at in range(6)]))
    before, interval = strip.to_json(), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns within one copy
    try:
        with ThreadPoolExecutor(4) as pool:
            made = list(pool.map(lambda _: clickable(strip), range(60)))
    finally:
        sys.setswitchinterval(interval)
    assert {tuple(trace.type for trace in figure.data) for figure in made} == {("heatmap", "scatter")}
    assert strip.to_json() == before


def test_a_dot_marks_a_difference_whose_interval_leaves_zero_out() -> None:
    bounds = [(-0.1, 0.1), (0.1, 0.2), (-0.3, -0.1), (0.0, 0.2)]
    rows = [{"title": "a", "layer": n, "score": 0.1, "low": a, "high": b, "z": 1} for n, (a, b) in enumerate(bounds)]
    assert layer_strip(pd.DataFrame(rows)).data[0].text.tolist() == [["", "\u25cf", "\u25cf", ""]]
