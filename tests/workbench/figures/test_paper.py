"""Files of a figure for a paper: what they contain is what is drawn, and the script draws it again."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
import pytest
from plotly.subplots import make_subplots

from tests.workbench.dashboard.test_dashboard import chromium_or_skip
from workbench import figures
from workbench.analysis.exported import caption_of
from workbench.errors import RunError
from workbench.figures import browser
from workbench.figures.caption import Caption, seed_words
from workbench.figures.latex import latex_table
from workbench.figures.paper import columns_of, export, paper_figure, unique_names
from workbench.figures.point_table import drawn_points
from workbench.runs import Run

CAPTION = Caption("Scores by layer", "40 images of shapes:val", seed_words({"a_1": 3, "b & c": None}), "images")
ROWS = ["panel", "curve", "kind", "x", "y", "value"]


def curves() -> pd.DataFrame:
    rows = [
        (name, layer, s, s - 0.013, s + 0.017, "40 images", 0.25)
        for name, scores in (("a_1", [0.1, 0.7, 1 / 3]), ("b & c", [0.5, -0.2, 0.9]))
        for layer, s in enumerate(scores)
    ]
    return pd.DataFrame(rows, columns=["name", "at", "score", "low", "high", "over", "chance"])


def dots() -> go.Figure:
    table = pd.DataFrame({"name": ["color", "<b>x</b>"], "score": [1.5, -2.25], "low": [1, -3], "high": [2, -1.0]})
    return figures.difference_dots(table.assign(over="9 images"), x="points", names=("a", "b"))


def bars() -> go.Figure:
    table = pd.DataFrame({"model": ["a", "a", "b"], "what": ["p", "q", "p"], "score": [0.1, 0.2, 0.3], "n_images": 7})
    return figures.bars(table.assign(low=table["score"] - 0.01, high=table["score"] + 0.02), x="what", y="drop")


def panels() -> go.Figure:
    figure = make_subplots(1, 3, subplot_titles=["first", "second", "third"])
    for column in (1, 2, 3):
        figure.add_scatter(x=[1, 2], y=[column, 0.5], name="a", mode="lines", row=1, col=column)
    return figure.update_layout(template="workbench")


def heat() -> go.Figure:
    many = pd.concat([curves().assign(name=lambda t, n=n: t["name"] + f" {n}") for n in range(4)])
    return figures.layer_heat(many, title="score")


CHARTS = {
    "curves": lambda: figures.layer_curves_named(curves(), y="score", marked=1, zero=True),
    "dots": dots,
    "bars": bars,
    "panels": panels,
    "heat": heat,
}


def test_points_are_those_that_are_drawn_with_their_intervals() -> None:
    points = drawn_points(CHARTS["curves"]())
    expected = curves()
    of = points[points["curve"] == "b & c"]
    assert of["y"].tolist() == expected["score"].tolist()[3:]  # every digit
    assert of[["low", "high"]].to_numpy() == pytest.approx(expected[["low", "high"]].to_numpy()[3:])
    assert points[points["curve"] == "chance"]["y"].tolist() == [0.25] * 3
    assert set(points["curve"]) == {"a_1", "b & c", "chance"}
    sideways = drawn_points(dots()).set_index("y")
    assert sideways.loc["color", ["x", "low", "high"]].tolist() == [1.5, 1, 2]
    assert "<b>x</b>" in sideways.index  # the name of a question type, as it is stored
    assert drawn_points(heat()).groupby("y")["value"].apply(list)["b & c 2"] == [0.5, -0.2, 0.9]
    cell = drawn_points(heat()).iloc[0]
    assert (cell["low"], cell["high"]) == pytest.approx((0.087, 0.117))


def test_points_survive_plotlys_json_and_hidden_traces_are_left_out() -> None:
    figure = CHARTS["curves"]()
    pd.testing.assert_frame_equal(drawn_points(json.loads(figure.to_json())), drawn_points(figure))
    figure.add_scatter(x=[1], y=[99], name="hidden", visible="legendonly")
    assert "hidden" not in set(drawn_points(figure)["curve"])


@pytest.mark.parametrize("name", CHARTS)
def test_the_script_draws_the_points_of_the_csv_again(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(browser, "browser_file", lambda: None)
    files, missing = export(tmp_path, {f"Figure: {name}": CHARTS[name]()}, {f"Figure: {name}": CAPTION})
    assert "no browser" in missing
    assert {file.suffix for file in files} == {".csv", ".tex", ".py", ".txt"}
    script = tmp_path / f"figure-{name}.py"
    code = f"exec(open({script.name!r}).read()); print(figure.to_json())"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "workbench" not in script.read_text()
    again = drawn_points(pio.from_json(done.stdout))
    points = pd.read_csv(script.with_suffix(".csv")).fillna({"curve": ""})
    columns = [column for column in ROWS if column in points]
    a, b = (t[columns].sort_values(columns, ignore_index=True) for t in (points, again.fillna({"curve": ""})))
    pd.testing.assert_frame_equal(a, b, check_dtype=False)
    if "low" in again:
        assert sorted(again["low"].dropna()) == pytest.approx(sorted(points["low"].dropna()))
    assert (tmp_path / f"figure-{name}.html").exists()


def test_a_figure_with_an_image_comes_with_its_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(browser, "browser_file", lambda: None)
    figure = go.Figure(go.Image(z=np.zeros((2, 2, 3), np.uint8)))
    export(tmp_path, {"Map": figure}, {"Map": CAPTION})
    done = subprocess.run([sys.executable, "map.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "map.html").exists()


def test_maps_of_words_and_of_colors_have_points_and_tables(tmp_path: Path) -> None:
    colors = np.array([[[255, 0, 1], [0, 128, 255]]], np.uint8)
    points = drawn_points(go.Figure(go.Image(z=colors, x0=3, dx=2)))
    assert points[["x", "y", "label"]].to_numpy().tolist() == [[3, 0, "#ff0001"], [5, 0, "#0080ff"]]
    plain = figures.Overlay("a", np.zeros((6, 6, 3), np.uint8), np.full((1, 2), np.nan), (0, 0, 1, 1))
    words = replace(plain, title="b", values=np.array([[0.25, 0.5]]), words=("<eos>", "red"))
    figure = figures.overlays_on_one_scale([plain, words], (0, 0.5), "p")
    points = drawn_points(figure)
    assert points[points["kind"] == "heatmap"]["value"].tolist() == [0.25, 0.5]
    assert points[points["kind"] == "text"]["label"].tolist() == ["<eos>", "red"]
    assert columns_of(figure) == 2
    rows = [line for line in latex_table(figure, "", "x").splitlines() if line.endswith(r"\\")]
    assert rows == [r"part & y & 1.5 & 4.5 \\", r"b & 3 & $<$eos$>$ & red \\"]


def test_the_caption_says_where_the_slider_is_and_the_paper_has_none() -> None:
    image = np.zeros((6, 6, 3), np.uint8)
    by_layer = {n: figures.Overlay("a", image, np.full((1, 2), n / 10), (0, 0, 1, 1)) for n in (1, 2, 3)}
    figure = figures.layered_overlays([[by_layer]])
    assert ". Layer 2. " in CAPTION.of(figure)
    assert set(drawn_points(figure)["value"]) == {0.2}
    assert "sliders" not in paper_figure(figure)["layout"]


def test_a_latex_table_has_every_number_and_no_special_character(tmp_path: Path) -> None:
    export(tmp_path, {"Scores": CHARTS["curves"]()}, {"Scores": CAPTION})
    text = (tmp_path / "scores.tex").read_text()
    assert text.count("\\begin") == text.count("\\end") == 2
    rows = [line.split(" & ") for line in text.splitlines() if line.endswith(r"\\")]
    assert rows[0] == ["layer", r"a\_1", r"b \& c", r"chance \\"]
    assert rows[2] == ["1", "0.700 [0.687, 0.717]", "-0.200 [-0.213, -0.183]", r"0.250 \\"]
    assert len(rows) == 4
    assert r"95 \%" in text


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("curves", "Intervals are 95 %, over images. Chance: 0.250."),
        ("dots", "The line at 0 is no difference."),
        ("panels", "No interval is drawn. No chance level is drawn."),
    ],
)
def test_a_caption_says_n_seeds_interval_and_chance(name: str, words: str) -> None:
    text = CAPTION.of(CHARTS[name]())
    assert "40 images of shapes:val; one training each (a_1 seed 3, b & c seed not known)." in text
    assert words in text


def test_a_caption_leaves_the_name_of_a_model_as_it_is_written() -> None:
    text = replace(CAPTION, shows="a_1 minus b", n="").of(dots())
    assert text.startswith("a_1 minus b. One training each (a_1 seed 3,")
    assert replace(CAPTION, shows="attention by layer").of(dots()).startswith("Attention by layer. 40 images")


def test_the_caption_of_saved_overlays_counts_the_images_that_are_shown() -> None:
    first, second = (np.full((6, 6, 3), value, np.uint8) for value in (0, 9))
    by_layer = [{1: figures.Overlay("a", image, np.full((1, 2), 0.1), (0, 0, 1, 1))} for image in (first, second)]
    stored = {"data": "shapes:val", "model": "m", "analysis": "attention"}
    run = Run("key", cast(Any, stored), {"scores": pd.DataFrame({"n_images": [40.0]})})
    for rows, count in (([by_layer], 2), ([by_layer[:1], by_layer[:1]], 1)):
        figure = figures.layered_overlays(rows)
        assert caption_of("Maps", figure, {"m": run}).n == f"{count} of 40 images of shapes:val"
        assert caption_of("Maps", json.loads(figure.to_json()), {"m": run}).n.startswith(f"{count} of 40")
    assert caption_of("Scores", dots(), {"m": run}).n == "9 images of shapes:val"  # those of its own points
    assert caption_of("Scores", panels(), {"m": run}).n == "40 images of shapes:val"


def test_a_caption_counts_the_images_of_its_own_figure() -> None:
    stored = {"data": "shapes:val", "model": "m", "analysis": "attention"}
    tables = {"layers": pd.DataFrame({"n_images": [200]}), "methods": pd.DataFrame({"n_images": [50]})}
    run = Run("key", cast(Any, stored), tables)
    by_layer = pd.DataFrame({"model": "m", "of": "x", "layer": [0, 1], "score": 0.5, "low": 0.4, "high": 0.6})
    by_layer = by_layer.assign(n_images=[200, 199])
    for figure, n in (
        (figures.layer_curves(by_layer, y="score", kind="of"), "199 to 200 images of shapes:val"),
        (figures.difference_curves(by_layer.assign(p_holm=0.5), y="score"), "199 to 200 images of shapes:val"),
        (bars(), "7 images of shapes:val"),
        (dots().update_layout(meta={"data": "pope:random"}), "9 images of pope:random"),
        (dots().update_layout(meta={"data": "pope:random", "n_images": [500]}), "500 images of pope:random"),
        (dots().update_layout(meta={"data": "pope:random", "n_images": []}), "pope:random"),  # over seeds
        (panels().update_layout(meta={"data": ""}), ""),
    ):
        assert caption_of("Scores", figure, {"m": run}).n == n
        assert caption_of("Scores", json.loads(figure.to_json()), {"m": run}).n == n


def test_answers_at_chance_are_drawn_for_each_model_where_they_differ() -> None:
    table = pd.DataFrame({"model": ["a", "a", "b", "b"], "of": "x", "layer": [0, 1, 0, 1], "n_images": 9})
    table = table.assign(score=0.05, low=0.0, high=0.1, to_chance=[0.1, 0.1, 0.45, 0.45])
    lines = {trace.name: list(trace.y) for trace in figures.layer_curves(table, y="drop", kind="of").data}
    assert lines["a: answers at chance"] == pytest.approx([0.1, 0.1])
    assert lines["b: answers at chance"] == pytest.approx([0.45, 0.45])
    one = figures.layer_curves(table.assign(to_chance=0.1), y="drop", kind="of")
    assert [trace.name for trace in one.data if "chance" in (trace.name or "")] == ["answers at chance"]


@pytest.mark.parametrize(("rows", "columns", "width"), [(2, 2, 312), (4, 2, 312), (1, 3, 648)])
def test_panels_of_points_are_about_as_high_as_wide(rows: int, columns: int, width: int) -> None:
    figure = make_subplots(rows, columns, subplot_titles=[f"{n}" for n in range(rows * columns)])
    for number in range(rows * columns):
        where = {"row": number // columns + 1, "col": number % columns + 1}
        figure.add_scatter(x=[0, 1], y=[1, 2], mode="markers", **where)
    figure.update_layout(template="workbench", height=120 + 320 * rows, showlegend=False)
    layout = paper_figure(figure, 1 if width == 312 else 2)["layout"]
    high = (layout["height"] - layout["margin"]["t"] - layout["margin"]["b"]) / rows
    assert 0.6 < high / (width / columns) < 1.4


def test_a_table_rounds_no_step_of_a_long_training() -> None:
    figure = figures.new_figure().add_scatter(x=[1234567.0, 1234568.0, 0.25], y=[0.1, 0.2, 0.3], name="viral")
    table = latex_table(figure, "caption", "label")
    assert [word in table for word in ("1234567 ", "1234568 ", "0.25 ")] == [True] * 3


@pytest.mark.parametrize(("wide", "environment"), [(False, "table"), (True, "table*")])
def test_a_wide_table_goes_over_both_columns(wide: bool, environment: str) -> None:
    figure = figures.new_figure().add_scatter(x=[0, 1], y=[0.1, 0.2], name="viral")
    table = latex_table(figure, "caption", "label", wide)
    assert (table.startswith(f"\\begin{{{environment}}}"), table.endswith(f"\\end{{{environment}}}\n")) == (True, True)


def test_titles_never_share_a_file() -> None:
    assert list(unique_names(["A / b", "a-b", "A b!", "…"]).values()) == ["a-b", "a-b-2", "a-b-3", "figure"]


def test_wide_figures_take_both_columns() -> None:
    assert [columns_of(CHARTS[name]()) for name in CHARTS] == [1, 1, 1, 2, 1]
    assert [paper_figure(panels(), columns)["layout"]["width"] for columns in (1, 2)] == [312, 648]


def test_without_a_browser_an_error_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROWSER_PATH", "/nowhere/chrome")
    with pytest.raises(RunError, match=r"expected Chromium or Chrome.* BROWSER_PATH"):
        browser.Browser()


@pytest.mark.browser
def test_images_have_the_size_of_the_column_and_the_fonts(tmp_path: Path) -> None:
    from PIL import Image

    chromium_or_skip()
    titles = {"Curves": CHARTS["curves"](), "Evil </script><img src=x>": panels()}
    files, missing = export(tmp_path, titles, dict.fromkeys(titles, CAPTION))
    assert missing == ""
    assert len(files) == 14
    for name, width in (("curves", 3.25), ("evil-script-img-src-x", 6.75)):
        if name not in {file.stem for file in files}:
            name = next(file.stem for file in files if file.stem.startswith("evil"))
        svg = (tmp_path / f"{name}.svg").read_text()
        assert f'width="{round(width * 96)}"' in svg[:400]
        assert "<text" in svg
        pdf = (tmp_path / f"{name}.pdf").read_bytes()
        box = pdf.split(b"/MediaBox [")[1].split(b"]")[0].split()
        assert float(box[2]) == pytest.approx(72 * width, abs=1)
        assert pdf.count(b"/Type /Page\n") == 1
        assert b"/FontFile" in pdf
        content = (tmp_path / f"{name}.png").read_bytes()
        image = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        assert struct.unpack(">I", content[16:20])[0] == pytest.approx(300 * width, abs=3)
        assert (image[0, 0] == 255).all()
        assert len(np.unique(image.reshape(-1, 3), axis=0)) > 20


@pytest.mark.browser
def test_a_browser_that_dies_is_an_error_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "browser"
    script.write_text("#!/bin/sh\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setenv("BROWSER_PATH", str(script))
    with pytest.raises(RunError, match="ended before it answered"), browser.Browser():
        pass


def test_the_legend_takes_nothing_from_the_chart() -> None:
    """Two entries or twelve leave the same height between the margins; a single curve has no legend."""

    def sizes(count: int) -> tuple[float, float]:
        curves = [{"type": "scatter", "x": [0, 1], "y": [0, 1], "name": f"a long name, {n}"} for n in range(count)]
        layout = paper_figure({"data": curves, "layout": {"height": 320}})["layout"]
        return layout["height"], layout["height"] - layout.get("margin", {}).get("t", 0)

    (plain, _), (of_two, below_two), (of_twelve, below_twelve) = (sizes(count) for count in (1, 2, 12))
    assert plain <= of_two < of_twelve
    assert below_twelve == pytest.approx(below_two, abs=1)
