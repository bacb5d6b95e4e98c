"""Every page by Streamlit's own test harness, and the whole thing in a real browser."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from streamlit.testing.v1 import AppTest

from tests.conftest import ROOT
from tests.workbench.overview.folders import cknna, knockout, lens, patching, spoil_rows, train
from trainer.setups.packed_data import first_questions
from workbench import runs
from workbench.claims.shown import display_table
from workbench.dashboard import folders, lasso, shell, thumbnails
from workbench.dashboard.drawn import drawn as figures_of
from workbench.dashboard.drawn import options as drawn_by_analysis
from workbench.dashboard.questions import in_words
from workbench.dashboard.site import Site, plain, sweeps, unusable, whole_number
from workbench.data import Dataset, load_data
from workbench.errors import DataError, RunError
from workbench.overview.charts import colors_of
from workbench.overview.models import read_models
from workbench.overview.stored import read_stored
from workbench.runs import Run

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

LEDGER = ("claims", "numbers")  # tables of a stored ledger
LIGHT = [name for name in shell.PAGES if name != "explorer"]  # pages that do not import torch


def open_page(name: str, root: Path, monkeypatch: pytest.MonkeyPatch, **query: str | list[str]) -> AppTest:
    """Run one page on the runs folder `root`, with the parameters of an address."""
    monkeypatch.setattr(sys, "argv", ["app.py", "--runs", str(root)])
    app = AppTest.from_string(f"from workbench.dashboard import shell\nshell.show('{name}')", default_timeout=120)
    for key, value in query.items():
        app.query_params[key] = value
    app.run()
    assert not app.exception, app.exception
    return app


def text_of(app: AppTest) -> str:
    """All text of a page, without the marks that keep Markdown from being read in it."""
    elements = [*app.title, *app.markdown, *app.caption, *app.info, *app.warning, *app.error]
    return "\n".join(element.value for element in elements).replace("\\", "")


def share(right: float, count: int = 40) -> list[bool]:
    return [i < right * count for i in range(count)]


def two_models(root: Path) -> Path:
    """A finished baseline and VIRAL model with stored CKNNA."""
    train(root, "baseline", right=share(0.5))
    train(root, "viral", right=share(0.9), aligned=True, layer=[1])
    noise = np.random.default_rng(0).normal(0, 0.01, 20)
    for name, shift in (("baseline", 0.0), ("viral", 0.1)):
        cknna(root, name, {layer: 0.5 + shift * layer + noise for layer in range(3)})
    return root


def store_claims(root: Path) -> pd.DataFrame:
    """Store the published ledger in a runs folder; returns its claims as the page sorts them."""
    tables = {name: pd.read_parquet(ROOT / "docs" / "results" / "ledger" / f"{name}.parquet") for name in LEDGER}
    record = {"analysis": "claims", "version": 1, "label": "claims", "model": "runs", "data": "", "config": {}}
    record |= {"created": "2026-11-27T00:00:00+00:00", "git": "0123456789", "dirty": False}
    record |= {"seconds": 1.0, "argv": ["python"]}
    runs.save(Run("0123456789ab", record, tables), root)
    return display_table(tables["claims"])


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A runs folder that the test may change."""
    return two_models(tmp_path)


@pytest.mark.parametrize("name", shell.PAGES)
def test_every_page_says_what_to_do_when_nothing_is_stored(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = open_page(name, tmp_path, monkeypatch)
    assert app.info
    assert "python -m" in app.info[0].value


@pytest.mark.parametrize("name", LIGHT)
@pytest.mark.parametrize("left", [1, 2])
def test_every_page_opens_with_one_model_and_without_its_files(
    name: str, left: int, two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(two / "viral")
    if left == 2:  # only its analyses remain
        (two / "baseline" / "evaluation.parquet").unlink()
    open_page(name, two, monkeypatch)


def test_stored_pages_open_without_torch(two: Path) -> None:
    code = (
        "import sys; from streamlit.testing.v1 import AppTest; sys.argv = ['app.py', '--runs', sys.argv[1]]\n"
        f"for name in {LIGHT}:\n"
        "    app = AppTest.from_string(f\"from workbench.dashboard import shell\\nshell.show('{name}')\","
        " default_timeout=120).run()\n"
        "    assert not app.exception, app.exception\n"
        "    assert not {'torch', 'scipy.stats', 'sklearn'} & set(sys.modules), name\n"
        "    print(name, app.title[0].value)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(two)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == LIGHT


@pytest.mark.parametrize(
    ("page", "key", "words"),
    [
        ("home", "save-by-type", "40 questions about 20 images of shapes:test; one training each (baseline seed 0"),
        ("layers", "save-score-cknna", "20 images of shapes:val; one training each"),
        ("models", "save-accuracy", "Intervals are 95 %, over images. Chance: 0.250."),
        ("models", "save-curve-loss on answers (training)", "viral seed 0). No interval is drawn."),
        (
            "examples",
            "save-p-scatter",
            "viral against baseline. 40 questions of shapes:test; one training",
        ),
    ],
)
def test_a_chart_is_saved_for_a_paper_with_its_caption_and_script(
    page: str, key: str, words: str, two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = open_page(page, two, monkeypatch, lasso="true")
    assert len(app.button) >= 1
    app.button(key=key).click().run()
    assert not app.exception
    caption, script = (block.value for block in app.code[-2:])
    assert words in caption
    assert "read_csv" in script


# --- what the pages show --------------------------------------------------------------------------


def test_home_tells_what_came_out(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = open_page("home", two, monkeypatch)
    assert app.title[0].value == "Does aligning visual tokens with a vision foundation model help?"
    text = text_of(app)
    for words in (
        "viral also learns to make its visual tokens resemble",
        "50.0 → 90.0",
        "+40.0 points [",
        "chance 25.0",
        "CKNNA with dinov2-small at layer 1",
        "16 of 40",
        "viral is more accurate",
        "One training each",
    ):
        assert words in text, words
    turned = text_of(open_page("home", two, monkeypatch, b="viral", m="baseline"))
    assert "90.0 → 50.0" in turned
    assert "baseline is less accurate" in turned


def test_home_of_more_than_two_models_has_the_top_of_their_table(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(two, "third", right=share(0.7), aligned=True, weight=2.0)
    app = open_page("home", two, monkeypatch, b="baseline", m=["third", "viral"])
    table = app.dataframe[0].value
    assert table["key"].tolist() == ["baseline", "viral", "third"]
    stored = open_page("models", two, monkeypatch).dataframe[0].value.set_index("key")
    for column in table.columns[1:]:
        np.testing.assert_array_equal(table.set_index("key")[column], stored.loc[table["key"], column])
    assert table["p_holm"].notna().tolist() == [False, True, True]
    assert "50.0 → 90.0" not in text_of(app)


def test_home_counts_the_chosen_seeds_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rights = {"baseline": (0.5, 0.5, 0.5), "viral": (0.9, 0.8, 0.1), "zeta": (0.6, 0.6, 0.6)}
    for name, shares in rights.items():
        for seed, right in enumerate(shares):
            weight = {"viral": 0.5, "zeta": 2.0}.get(name, 0.0)
            train(tmp_path, f"{name}-s{seed}", right=share(right), seed=seed, aligned=weight > 0, weight=weight)
    m = ["baseline-s1", "viral-s0", "viral-s1", "zeta-s0", "zeta-s1"]
    app = open_page("home", tmp_path, monkeypatch, b="baseline-s0", m=m)
    assert "then the 2 others by accuracy. p is Holm-corrected over the chosen variants alone." in text_of(app)
    table = app.dataframe[0].value.set_index("variant")
    assert table["seeds"].to_dict() == {"baseline": 2, "viral": 2, "zeta": 2}
    assert table["accuracy"].to_dict() == pytest.approx({"baseline": 0.5, "viral": 0.85, "zeta": 0.6})
    assert table.loc["viral", "difference"] == pytest.approx(0.35)
    table = open_page("home", tmp_path, monkeypatch, b="baseline-s0", m=[*m, "viral-s2"]).dataframe[0].value
    assert table.set_index("variant").loc["viral", ["seeds", "accuracy"]].tolist() == pytest.approx([3, 0.6])


def test_models_are_filtered_by_the_data_that_they_are_evaluated_on(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = train(two, "other", right=share(0.7), aligned=True, weight=2.0)
    record = json.loads((folder / "training.json").read_text())
    record["recipe"]["data"]["test"] = "easy_vqa:test"
    (folder / "training.json").write_text(json.dumps(record))
    app = open_page("models", two, monkeypatch)
    assert app.dataframe[0].value["data"].tolist() == ["shapes:test", "easy_vqa:test", "shapes:test"]
    app.multiselect(key="evaluated").set_value(["easy_vqa:test"]).run()
    assert app.dataframe[0].value["key"].tolist() == ["other"]
    assert "Accuracy on easy_vqa:test, mean of question types" in text_of(app)


def test_patching_of_several_seeds_is_one_chart_that_names_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in (0, 1):
        for name, wrong in (("baseline", 4), ("viral", 1 + seed)):
            train(tmp_path, f"{name}-s{seed}", right=share(0.5), seed=seed, aligned=name == "viral")
            patching(tmp_path, f"{name}-s{seed}", f"viral-s{seed}", wrong=wrong)
    text = text_of(open_page("layers", tmp_path, monkeypatch, l="1"))
    assert "Layer 1: baseline 0.400 (mean of 2), viral 0.150 (mean of 2)" in text
    assert "Largest difference at layer 0: -0.250 [" in text
    assert "10 images of shapes:val; tokens of viral of the same seed; thick: mean over seeds" in text
    assert "dotted: no effect" in text
    assert "sets of images and options" not in text


def test_curves_of_seeds_have_no_bands_and_are_not_said_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in (0, 1):
        for name in ("baseline", "viral"):
            train(tmp_path, f"{name}-s{seed}", right=share(0.5), seed=seed, aligned=name == "viral")
    app = open_page("models", tmp_path, monkeypatch)
    assert "Thick: mean over seeds, thin: each seed. Dotted: chance" in text_of(app)
    assert "Bands:" not in text_of(app)
    app.toggle(key="means").set_value(False).run()
    assert "Bands: 95 % intervals over the images" in text_of(app)


def test_numbers_of_the_models_table_are_the_stored_ones(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = open_page("models", two, monkeypatch)
    table = app.dataframe[0].value.set_index("key")
    for name in ("baseline", "viral"):
        stored = pd.read_parquet(two / name / "accuracy.parquet").set_index("category").loc["mean of types"]
        assert table.loc[name, ["accuracy", "low", "high"]].tolist() == stored[["accuracy", "low", "high"]].tolist()
    assert table.loc["viral", "difference"] == pytest.approx(0.4)
    assert np.isnan(table.loc["baseline", "difference"])
    assert table["state"].tolist() == ["finished"] * 2


def test_layers_shows_the_stored_scores_and_marks_the_layer_of_the_link(
    two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = open_page("layers", two, monkeypatch, l="2")
    scores = {}
    for name in ("baseline", "viral"):
        (folder,) = (f for f in two.glob("cknna-*") if f'"label": "{name}"' in (f / "run.json").read_text())
        scores[name] = pd.read_parquet(folder / "scores.parquet").set_index("layer")["score"]
    assert f"Layer 2: baseline {scores['baseline'][2]:.3f} [" in text_of(app)
    assert f"viral {scores['viral'][2]:.3f} [" in text_of(app)
    assert "The clearest difference is in CKNNA with dinov2-small at layer 2" in text_of(app)
    app.segmented_control(key="shown").set_value("Differences").run()
    assert f"Layer 2: {scores['viral'][2] - scores['baseline'][2]:+.3f} [" in text_of(app)


def test_examples_filters_sorts_and_exports(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = open_page("examples", two, monkeypatch, outcome="second")
    table = app.dataframe[1].value
    assert len(table) == 16
    assert set(table["given_first"]) == {"blue"}
    assert set(table["given_second"]) == {"red"}
    assert (table["p_second"] - table["p_first"]).tolist() == pytest.approx([0.8] * 16)
    assert app.dataframe[0].value.to_numpy().tolist() == [[20, 0], [16, 4]]
    app.segmented_control(key="outcome").set_value("wrong").run()
    assert len(app.dataframe[1].value) == 4
    app.multiselect(key="types").set_value(["colour"]).run()
    assert set(app.dataframe[1].value["category"]) == {"colour"}
    app.selectbox(key="sort").set_value("CKNNA with a VFM").run()
    numbers = app.dataframe[1].value["number"].tolist()
    assert numbers == sorted(numbers, reverse=True)
    app.text_input(key="text").set_value("no such words").run()
    assert "No question is left" in text_of(app)


def test_an_analysis_of_other_images_is_no_order_and_an_older_one_of_these_images_is(
    two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest runs ask about other images than the questions; those before them are about half of these."""
    for name in ("baseline", "viral"):
        for layers, created, ids in ((1, "2026-03-01", "other"), (2, "2026-02-15", "image")):
            values = {layer: [0.1 * i * (name == "viral") for i in range(10)] for layer in range(layers)}
            file = cknna(two, name, values, created=created, k=layers) / "per_image.parquet"
            table = pd.read_parquet(file)
            table.assign(image_id=table["image_id"].str.replace("image", ids)).to_parquet(file)
    for run in two.glob("cknna-*"):
        if "2026-02-01" in (run / "run.json").read_text():
            shutil.rmtree(run)
    app = open_page("examples", two, monkeypatch, sort="CKNNA with a VFM", outcome="all")
    table = app.dataframe[1].value
    assert len(table) == 20  # two questions about each of ten images
    assert table["number"].tolist() == pytest.approx([0.1 * i for i in range(9, -1, -1) for _ in range(2)])
    assert "20 questions are left out, because this number is not stored for their image" in text_of(app)
    for run in two.glob("cknna-*"):
        if "2026-02-15" in (run / "run.json").read_text():
            shutil.rmtree(run)
    app = open_page("examples", two, monkeypatch, sort="CKNNA with a VFM")
    assert len(app.dataframe[1].value) == 40
    said = text_of(app)
    assert "CKNNA with a VFM under “Sort by”, which is not here; shown is p of the right answer, difference." in said
    assert "Stored for other images only, so not in this list: cknna. `python -m analyses.all` with --data" in said
    assert "--data shapes:test makes them of these images" in said


def test_examples_of_a_model_in_training_are_still_to_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path, "baseline", right=share(0.5))
    train(tmp_path, "viral", right=share(0.9), aligned=True, finished=False)
    app = open_page("examples", tmp_path, monkeypatch)
    assert not app.error
    assert app.info[0].value.replace("\\", "").startswith("Nothing to compare yet: the answers of baseline and viral")


def test_examples_steps_through_the_questions_and_a_link_names_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, right in (("baseline", 0.0), ("viral", 1.0)):
        train(tmp_path, name, right=share(right, 120), aligned=name == "viral", layer=[1])

    def shown(app: AppTest) -> tuple[str, int, str]:
        table = app.dataframe[1].value
        (marked,) = table.index[table["chosen"] == "▸"]
        asked = next(m.value for m in app.markdown if m.value.startswith("**what")).replace("\\", "")
        assert table["question"][marked] in asked
        return re.findall(r"what (\d+)", asked)[0], len(table), "".join(app.query_params.get("q", ""))

    app = open_page("examples", tmp_path, monkeypatch)
    assert shown(app) == ("0", 50, "")
    assert app.button(key="step-K").disabled
    app.button(key="step-J").click().run()
    assert shown(app) == ("1", 50, "q001")
    app = open_page("examples", tmp_path, monkeypatch, q="q049")
    assert shown(app) == ("49", 50, "q049")
    app.button(key="step-J").click().run()
    assert shown(app) == ("50", 50, "q050")  # it turns the page
    app.button(key="step-K").click().run()
    assert shown(app) == ("49", 50, "q049")
    last = open_page("examples", tmp_path, monkeypatch, q="q119")
    assert shown(last) == ("119", 20, "q119")
    assert last.button(key="step-J").disabled
    gone = open_page("examples", tmp_path, monkeypatch, q="away")
    assert [w.value.replace("\\", "") for w in gone.warning] == [
        "The link names question away, which is not here; shown is q000."
    ]


def test_the_command_for_the_shown_questions_asks_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, right in (("baseline", 0.5), ("viral", 1.0)):
        train(tmp_path, name, right=share(right, 844), aligned=name == "viral")
    app = open_page("examples", tmp_path, monkeypatch, outcome="second")
    words = shlex.split(app.code[-1].value)
    assert words[words.index("--ids") :] == ["--ids", "ids.txt", "--questions", "0", "--limit", "211"]


def test_the_area_of_a_lasso_chooses_the_questions_inside_it(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x, y = pd.Series(rng.uniform(0, 1, 500)), pd.Series(rng.uniform(0, 1, 500))
    turns = np.linspace(0, 2 * np.pi, 400, endpoint=False)
    circle = {"x": 0.5 + 0.3 * np.cos(turns), "y": 0.4 + 0.3 * np.sin(turns)}
    words = lasso.words_of(circle)
    assert len(words) < 1500
    corners = [tuple(map(int, corner.split("~"))) for corner in words.split("_")]
    far = np.hypot(x - 0.5, y - 0.4) - 0.3
    inside = lasso.within(x, y, corners)
    assert inside[far < -0.01].all()
    assert not inside[far > 0.01].any()
    horseshoe = [(0, 0), (1000, 0), (1000, 1000), (900, 1000), (900, 100), (100, 100), (100, 1000), (0, 1000)]
    expected = (x < 0.1) | (x > 0.9) | (y < 0.1)
    assert (lasso.within(x, y, horseshoe) == expected).all()
    two_of_them = ["0~500_0~1000_500~1000_500~500", "600~600_1000~600_1000~1000"]
    app = open_page("examples", two, monkeypatch, area=two_of_them)
    assert "area" not in app.query_params  # without the chart
    app = open_page("examples", two, monkeypatch, lasso="true", area=two_of_them)
    table = app.dataframe[1].value
    assert len(table) == 36
    assert (table["p_second"] == 0.9).all()
    for wrong in ("x", "1~2_3~4", "0~0_1~1_2~2;", ""):
        app = open_page("examples", two, monkeypatch, lasso="true", area=wrong)
        assert f"The link names the area {wrong}, which" in text_of(app)
        assert len(app.dataframe[1].value) == 40


def test_points_of_the_lasso_have_the_colors_of_the_site(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after another variant has changed them."""

    def drawn() -> list[str]:
        app = open_page("examples", two, monkeypatch, b="baseline", m="viral", lasso="true")
        (points,) = (
            trace
            for chart in app.get("plotly_chart")
            for trace in json.loads(chart.proto.spec)["data"]
            if trace["type"] == "scattergl"
        )
        return [color for _, color in points["marker"]["colorscale"]]

    for name in ("", "another"):
        if name:
            train(two, name, right=[True] * 40, aligned=True, layer=[2])
        colors = colors_of(read_models(two, read_stored(two).runs))
        assert drawn() == [colors["baseline"], colors["viral"]]


def test_the_counts_of_questions_say_that_they_are_over_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the seeds of one group alone do not agree."""
    for seed in range(2):
        train(tmp_path, f"baseline-s{seed}", right=[True] * 40, seed=seed)
        train(tmp_path, f"viral-s{seed}", right=[i % 2 == seed for i in range(40)], seed=seed, aligned=True)
    assert "Questions, by more than half of the seeds" in text_of(open_page("examples", tmp_path, monkeypatch))


def test_claims_are_those_of_the_ledger_with_their_values_by_seed(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    displayed = store_claims(two)
    app = open_page("evidence", two, monkeypatch, part="claims", claim="accuracy-photos")
    assert app.dataframe[0].value.equals(displayed)
    numbers = pd.read_parquet(ROOT / "docs" / "results" / "ledger" / "numbers.parquet").query("id == 'accuracy-photos'")
    by_seed = app.dataframe[1].value
    assert by_seed.shape == (numbers["seed"].nunique(), 1 + numbers["training"].nunique())
    assert by_seed.drop(columns="seed").mean().to_dict() == pytest.approx(
        numbers.groupby("training")["value"].mean().to_dict()
    )
    assert "It makes answers better on composed photographs" in text_of(app)
    app.multiselect(key="verdict").set_value(["not testable here"]).run()
    assert set(app.dataframe[0].value["verdict"]) == {"not testable here"}
    left_out = open_page("evidence", two, monkeypatch, part="claims", claim="accuracy-photos", verdict="not shown")
    assert "accuracy-photos" not in set(left_out.dataframe[0].value["id"])
    assert "It makes answers better on composed photographs" in text_of(left_out)
    assert "The link names" not in text_of(left_out)


def test_evidence_lists_what_cannot_be_read(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, file, size in (("cut", "training.json", 50), ("short", "evaluation.parquet", 80)):
        folder = train(two, name, right=share(0.5))
        (folder / file).write_bytes((folder / file).read_bytes()[:size])
    run = cknna(two, "viral", {0: [0.1, 0.2]}, key="0123456789ab")
    (run / "scores.parquet").unlink()
    (two / "sweep-x.parquet").write_text("garbage")
    for name in LIGHT:
        open_page(name, two, monkeypatch)
    app = open_page("evidence", two, monkeypatch, part="runs")
    broken = app.dataframe[0].value.set_index("name")["why"]
    assert set(broken.index) == {"cut", "short", "cknna-0123456789ab", "sweep-x"}
    assert broken["short"] == "evaluation.parquet is damaged: expected a parquet file"
    assert len(app.dataframe[1].value) == 2
    models = open_page("models", two, monkeypatch)
    states = models.dataframe[0].value.set_index("key")["state"]
    assert states["cut"].startswith("damaged: training.json is damaged")
    assert "sweep-x cannot be read" in text_of(models)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        *(
            (f"{name}.parquet", lambda content: content[: len(content) // 2])
            for name in ("training", "evaluation", "accuracy")
        ),
        ("training.json", lambda content: content[: len(content) // 2]),
        ("training.json", lambda _: b"[]"),
        ("training.json", lambda _: b"null"),
    ],
)
def test_a_damaged_file_is_a_row_that_names_it_and_other_models_stay(
    file: str, damage: Callable[[bytes], bytes], two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = train(two, "hurt", right=share(0.7), aligned=True, layer=[2])
    (folder / file).write_bytes(damage((folder / file).read_bytes()))
    table = open_page("models", two, monkeypatch).dataframe[0].value.set_index("key")
    assert table.loc["hurt", "state"].startswith(f"damaged: {file}")
    assert table.loc["viral", "difference"] == pytest.approx(0.4)
    assert "50.0 → 90.0" in text_of(open_page("home", two, monkeypatch))
    home = text_of(open_page("home", two, monkeypatch, b="baseline", m="hurt"))
    assert ("How hurt was trained is not known here: its record or recipe cannot be read." in home) == (
        file == "training.json"
    )
    for query in ({"one": "hurt"}, {"b": "baseline", "m": "hurt"}):
        open_page("models", two, monkeypatch, **query)
    for other in ("baseline", "viral"):
        shutil.rmtree(two / other)
    table = open_page("models", two, monkeypatch, b="hurt").dataframe[0].value.set_index("key")
    assert table.loc["hurt", "state"].startswith(f"damaged: {file}")


def test_runs_with_damaged_rows_are_named_and_leave_the_pages_to_all_others(
    two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_rows(train(two, "hurt", right=share(0.7), aligned=True, layer=[2]) / "accuracy.parquet")
    same = dict.fromkeys(range(3), [0.1] * 20)  # asked the same as the run of two_models, so that it would count
    spoil_rows(cknna(two, "viral", same, key="spoilt", created="2026-03-01") / "scores.parquet")
    store_claims(two)
    spoil_rows(two / "claims-0123456789ab" / "numbers.parquet")
    for name in ("home", "layers", "examples"):
        assert not open_page(name, two, monkeypatch, b="baseline", m="viral").error
    table = open_page("models", two, monkeypatch).dataframe[0].value.set_index("key")
    assert table.loc["hurt", "state"] == "damaged: accuracy.parquet is damaged: expected a parquet file"
    assert table.loc["viral", "difference"] == pytest.approx(0.4)
    app = open_page("evidence", two, monkeypatch, part="runs")
    assert set(app.dataframe[0].value["name"]) == {"hurt", "cknna-spoilt", "claims-0123456789ab"}
    app = open_page("evidence", two, monkeypatch, part="claims")
    assert "No ledger is stored yet" in text_of(app)
    assert not app.error


def test_accuracies_of_a_training_without_record_and_recipe_are_drawn(
    two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("training.json", "recipe.yaml"):
        (two / "viral" / name).unlink()
    assert "On data not known; 95 % intervals over images." in text_of(
        open_page("models", two, monkeypatch, one="viral")
    )
    assert "On shapes:test; 95 % intervals over images." in text_of(open_page("models", two, monkeypatch))


def test_a_table_that_is_no_sweep_is_one_line(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pd.DataFrame({"other": [1]}).to_parquet(two / "sweep-x.parquet")
    app = open_page("models", two, monkeypatch)
    assert "sweep-x cannot be read" in text_of(app)


@pytest.mark.parametrize("name", LIGHT)
def test_a_runs_folder_that_vanishes_is_an_empty_one(name: str, two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = open_page(name, two, monkeypatch)
    shutil.rmtree(two)
    app.run()
    assert not app.exception, app.exception
    assert app.info
    two.mkdir()  # for what tidies up


def test_two_tabs_choose_for_themselves(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (open_page("home", two, monkeypatch) for _ in range(2))
    one.selectbox(key="b").set_value("viral").run()
    one.multiselect(key="m").set_value(["baseline"]).run()
    other.run()
    assert "90.0 → 50.0" in text_of(one)
    assert "50.0 → 90.0" in text_of(other)
    assert other.selectbox(key="b").value == "baseline"


def test_names_with_markup_are_text(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "<b>x</b> **y** $z$ :red[w]"
    train(two, name, right=share(0.3), aligned=True, weight=7.0)
    for page in LIGHT:
        app = open_page(page, two, monkeypatch, b="baseline", m=name)
        for element in [*app.markdown, *app.caption]:
            assert "**y**" not in element.value.replace("\\*", ""), element.value
            assert ":red[w]" not in element.value, element.value


def test_one_of_several_models_is_not_the_only_one(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "One model is chosen." in text_of(open_page("home", two, monkeypatch, m=""))
    shutil.rmtree(two / "viral")
    for folder in two.glob("cknna-*"):
        shutil.rmtree(folder)
    assert "There is one model here." in text_of(open_page("home", two, monkeypatch))


def asked_about(root: Path, data: Dataset, **changes: object) -> None:
    """Let the stored answers of a baseline and of a VIRAL model, which has all right, be about these questions."""
    rows = [(s.id, s.image_id, s.category, s.question, s.answer, s.chance) for s in data]
    answers = pd.DataFrame(rows, columns=["id", "image_id", "category", "question", "answer", "chance"])
    for name in ("baseline", "viral"):
        right = answers.assign(correct=name == "viral", given="red", p_right=0.5, **changes)
        right.to_parquet(root / name / "evaluation.parquet")
        file = root / name / "training.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"test": data.fingerprint}))


OTHER_VERSION = "Without images: {} on this machine is not the version that these models were asked about."


@pytest.mark.parametrize(
    ("changes", "others"),
    [
        ({}, 0),
        ({"question": "what was asked before ?"}, 1),
        ({"answer": "another"}, 1),
    ],
)
def test_images_are_those_of_the_questions_that_were_asked(
    changes: dict[str, object], others: int, two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked_about(two, load_data("shapes:test", limit=4), **changes)
    home, examples = (open_page(name, two, monkeypatch) for name in ("home", "examples"))
    for app in (home, examples):
        assert text_of(app).count(OTHER_VERSION.format("shapes:test")) == others
        assert "image not readable" not in text_of(app)
    assert len(home.get("image")) == 2 * (1 - others)
    table = examples.dataframe[1].value
    assert table["image"].notna().all() == (not others)
    for column, value in changes.items():
        assert set(table[column]) == {value}
        assert str(value) in text_of(home)


@pytest.mark.parametrize("questions", [None, 1])
def test_images_of_the_same_questions_with_another_content_are_not_shown(
    questions: int | None, two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "photographs"
    folder.mkdir()
    Image.new("RGB", (8, 8), "red").save(folder / "a.png")
    spec = f"folder:{folder}"
    for name in ("baseline", "viral"):
        file = two / name / "training.json"
        record = json.loads(file.read_text())
        record["recipe"]["data"] |= {"test": spec, "questions": questions}
        file.write_text(json.dumps(record))
    asked_about(two, first_questions(load_data(spec), questions))
    app = open_page("examples", two, monkeypatch)
    assert app.dataframe[1].value["image"].notna().all()
    assert "Without images" not in text_of(app)
    if questions:
        return  # the stored fingerprint is of the first questions, so the data's own says nothing
    (folder / "a.png").unlink()
    assert "Without images" not in text_of(open_page("examples", two, monkeypatch))  # there are none to compare
    Image.new("RGB", (8, 8), "blue").save(folder / "a.png")
    app = open_page("examples", two, monkeypatch)
    assert app.dataframe[1].value["image"].isna().all()
    assert OTHER_VERSION.format(spec) in text_of(app)


def test_images_that_were_replaced_under_their_names_are_not_shown(
    two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor on Home, which reads only some of the images."""
    file, colors = tmp_path / "table.jsonl", [(number, 0, 0) for number in range(70)]
    rows = [{"image": f"{number}.png", "question": "Which ?", "answer": "red"} for number, _, _ in colors]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number, color in enumerate(colors):
        Image.new("RGB", (8, 8), color).save(tmp_path / f"{number}.png")
    spec = f"hf:{file}"
    for name in ("baseline", "viral"):
        record = json.loads((two / name / "training.json").read_text())
        record["recipe"]["data"]["test"] = spec
        (two / name / "training.json").write_text(json.dumps(record))
    asked_about(two, load_data(spec))
    for page in ("home", "examples"):
        app = open_page(page, two, monkeypatch)
        assert "Without images" not in text_of(app), page
    assert app.dataframe[1].value["image"].notna().all()
    for number, color in enumerate(colors):
        Image.new("RGB", (8, 8), color[::-1] if number else (9, 9, 9)).save(tmp_path / f"{number}.png")
    os.utime(file, ns=(1, 1))
    for page in ("home", "examples"):
        assert OTHER_VERSION.format(spec) in text_of(open_page(page, two, monkeypatch)), page


def test_data_that_appear_or_change_are_read_again(tmp_path: Path) -> None:
    folder = tmp_path / "photographs"
    folder.mkdir()
    spec = f"folder:{folder}"
    assert thumbnails.samples_of(spec) == {}
    Image.new("RGB", (8, 8), "red").save(folder / "a.png")
    before = thumbnails.thumbnail(spec, thumbnails.samples_of(spec).get("a.png"))
    assert before is not None
    (folder / "a.png").unlink()
    for name, color in (("a.png", "blue"), ("b.png", "red")):
        Image.new("RGB", (8, 8), color).save(folder / name)
    samples = thumbnails.samples_of(spec)
    assert list(samples) == ["a.png", "b.png"]
    assert len(thumbnails.dataset(spec)) == 2
    assert thumbnails.thumbnail(spec, samples["a.png"]) != before
    assert thumbnails.thumbnail(spec, samples["b.png"]) == before


def test_a_run_that_is_stored_anew_under_its_name_is_read_again(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder,) = (f for f in two.glob("cknna-*") if '"label": "viral"' in (f / "run.json").read_text())
    assert "viral 0.59" in text_of(open_page("layers", two, monkeypatch, l="1"))
    assert "→ 0.59" in text_of(open_page("home", two, monkeypatch))
    shutil.rmtree(folder)
    cknna(two, "viral", {layer: np.linspace(0.2, 0.22, 20) for layer in range(3)}, key=folder.name.partition("-")[2])
    text = text_of(open_page("layers", two, monkeypatch, l="1"))
    assert "viral 0.210" in text
    assert re.search(r"clearest difference is in .* minus baseline is -0\.2", text)
    assert "→ 0.210" in text_of(open_page("home", two, monkeypatch))


def test_a_run_whose_source_was_trained_anew_sorts_no_examples(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = train(two, "source", right=share(0.5), aligned=True, weight=9.0) / "training.json"
    for name in ("baseline", "viral"):
        patching(two, name, "source")

    def sortable() -> list[str]:
        app = open_page("examples", two, monkeypatch, b="baseline", m="viral")
        return list(app.selectbox(key="sort").options)

    assert "accuracy drop, patching" in sortable()
    file.write_text(json.dumps(json.loads(file.read_text()) | {"created": "2026-06-01T00:00:00+00:00"}))
    assert "accuracy drop, patching" not in sortable()


def test_figures_of_a_run_that_is_stored_anew_are_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    content = json.dumps({"figures": {}, "captions": {}, "summary": {}})
    asked: list[object] = []

    def run(*_: object, **more: object) -> subprocess.CompletedProcess[str]:
        asked.append(more["input"])
        return subprocess.CompletedProcess([], 0, content, "")

    monkeypatch.setattr("workbench.dashboard.drawn.subprocess.run", run)
    for changed in (1, 1, 2):
        figures_of("cknna", {"viral": "runs/cknna-0123"}, {}, (changed,))
    assert len(asked) == 2


def test_an_image_that_cannot_be_read_leaves_its_question(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked_about(two, load_data("shapes:test", limit=2))

    def unreadable(*_: object) -> str:
        raise DataError("image is not there")

    monkeypatch.setattr("workbench.dashboard.thumbnails._thumbnail", unreadable)
    text = text_of(open_page("home", two, monkeypatch))
    assert "Where they disagree" in text
    assert "image not readable" in text


def test_a_file_that_is_gone_has_no_size(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    next(two.glob("cknna-*")).joinpath("gone").symlink_to("/nowhere/at/all")
    assert len(open_page("evidence", two, monkeypatch, part="runs").dataframe[0].value) == 2


def test_every_figure_is_of_the_chosen_images(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others = {str(cknna(two, name, {0: [0.1, 0.2], 1: [0.1, 0.2]}, limit=7)) for name in ("baseline", "viral")}
    stored = read_stored(two).of("cknna", ["baseline", "viral"])
    (question,) = {run.question for runs in stored for run in runs if str(run.folder) in others}
    asked: list[set[str]] = []

    def drawn(analysis: str, folders: dict[str, str], colors: object, stamps: object) -> None:
        asked.append(set(folders.values()))
        raise RunError("not drawn here")

    monkeypatch.setattr("workbench.dashboard.analysis_figures.drawn", drawn)
    chosen = {"run-cknna-like": question, "all-like": "true"}
    app = open_page("layers", two, monkeypatch, **chosen)
    assert asked == [others]
    assert "2 images of shapes:val" in text_of(app)


def test_commands_name_models_as_a_shell_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "my runs"
    train(root, "baseline", right=share(0.5))
    train(root, "viral", right=share(0.9), aligned=True)
    (info,) = (each.value for each in open_page("layers", root, monkeypatch).info)
    words = shlex.split(info.split("`")[1])
    assert words == ["python", "-m", "analyses.all", "--model", str(root / "baseline"), str(root / "viral")]


def test_a_model_that_is_elsewhere_is_named_as_its_analysis_named_it(tmp_path: Path) -> None:
    train(tmp_path, "viral", right=share(0.5))
    cknna(tmp_path, "llava", {0: [0.1, 0.2]})
    stored = read_stored(tmp_path)
    site = Site(tmp_path, stored, read_models(tmp_path, stored.runs), {})
    assert site.words_of_models(["viral", "llava"]) == [str(tmp_path / "viral"), "/elsewhere/llava"]


def test_a_linked_training_is_named_since_pages_do_not_show_it(tmp_path: Path) -> None:
    train(tmp_path / "scratch", "viral", right=share(0.5))
    train(tmp_path / "runs", "baseline", right=share(0.5))
    (tmp_path / "runs" / "viral").symlink_to(tmp_path / "scratch" / "viral")
    (tmp_path / "runs" / "notes").symlink_to(tmp_path)
    stored, models = read_stored(tmp_path / "runs"), read_models(tmp_path / "runs")
    (row,) = unusable(Site(tmp_path / "runs", stored, models, {}))
    assert row == {"name": "viral", "why": "is a link, which is not followed: expected the folder or file itself"}


def test_a_linked_sweep_and_ledger_are_named_and_not_read(tmp_path: Path) -> None:
    root, outside = tmp_path / "runs", tmp_path / "outside"
    train(root, "baseline", right=share(0.5))
    pd.DataFrame({"claim": ["x"]}).to_parquet(tmp_path / "claims.parquet")
    folder = cknna(tmp_path, "ledger", {0: [0.1, 0.2]})
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"analysis": "claims"}))
    outside.mkdir()
    folder.rename(outside / "claims-1")
    (root / "claims-1").symlink_to(outside / "claims-1")
    (tmp_path / "claims.parquet").rename(outside / "sweep-a.parquet")
    (root / "sweep-a.parquet").symlink_to(outside / "sweep-a.parquet")
    assert read_stored(root).ledger is None
    assert sweeps(root) == {"sweep-a": "is a link, which is not followed: expected the folder or file itself"}
    named = unusable(Site(root, read_stored(root), read_models(root), {}))
    assert {row["name"]: row["why"].partition(",")[0] for row in named} == {
        "claims-1": "is a link",
        "sweep-a": "sweep-a.parquet is a link",
    }


def test_a_layer_of_the_vision_encoder_is_called_so() -> None:
    assert [in_words(layer) for layer in (-1, 0, 12)] == ["the vision encoder", "layer 0", "layer 12"]


def test_numbers_of_an_address_are_digits() -> None:
    assert [whole_number(text) for text in ("12", "0", "\u00b2", "-1", "1.5", "", "9" * 30)] == [12, 0, *[None] * 5]


def test_the_runs_folder_is_named_in_both_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in (["--runs", str(tmp_path)], [f"--runs={tmp_path}"]):
        monkeypatch.setattr(sys, "argv", ["app.py", *words])
        assert folders.runs_root() == tmp_path
    monkeypatch.setattr(sys, "argv", ["app.py", "--runs"])
    assert folders.runs_root() == Path("runs").resolve()


@pytest.mark.parametrize("name", ["easy_vqa", "photos"])
def test_no_page_fetches_data(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIRAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("VIRAL_DATA", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")  # neither pip nor apt could be asked
    with pytest.raises(DataError, match=f"^{name} is not on this machine: .*--data {name}:val"):
        thumbnails.dataset(f"{name}:val", 3)
    assert thumbnails.samples_of(f"{name}:val", 3) == {}


def test_a_process_that_does_not_start_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(RunError, match=r"^cknna cannot be drawn: .*No such file"):
        drawn_by_analysis("cknna")


# --- links ----------------------------------------------------------------------------------------


def test_a_followed_link_names_the_layer_although_one_was_chosen_before(
    two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = open_page("layers", two, monkeypatch)
    assert "Layer 1: " in text_of(app)
    app.select_slider(key="l").set_value("0").run()
    assert "Layer 0: " in text_of(app)
    assert app.query_params["l"] == "0"
    app.run()
    assert "Layer 0: " in text_of(app)
    app.query_params["l"] = "2"
    app.run()
    assert "Layer 2: " in text_of(app)
    assert app.select_slider(key="l").value == "2"


def test_a_link_that_no_longer_fits_says_so(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = open_page("home", two, monkeypatch, b="gone", m=["viral", "away"])
    warnings = [warning.value.replace("\\", "") for warning in app.warning]
    assert warnings == [
        "The link names the baseline gone, which is not in this folder; shown is baseline.",
        "The link names the model away, which is not in this folder; shown is viral.",
    ]
    app.button(key="dismiss-b").click().run()
    assert len(app.warning) == 1
    layers = open_page("layers", two, monkeypatch, l="77")
    assert "The link names layer 77, which is not here; shown is 1." in text_of(layers)
    assert open_page("home", two, monkeypatch, b="viral", m="baseline").warning.len == 0


@pytest.mark.parametrize(
    ("name", "query", "sentence"),
    [
        ("models", {"variant": ["viral", "x"]}, "x under “Variants”, which is not here; shown is viral."),
        ("models", {"evaluated": "x"}, "x under “Evaluated on”, which is not here; shown is everything."),
        ("models", {"curves": "x"}, "x under “Curves”, which is not here; shown is accuracy, mean of types, loss on"),
        ("models", {"row": "x"}, "the model x, which is not in this folder; shown is the table."),
        ("layers", {"m-like": "x"}, "x under “Measure”, which is not here; shown is CKNNA with a VFM."),
        ("examples", {"types": "x"}, "x under “Question types”, which is not here; shown is everything."),
        ("examples", {"outcome": "x"}, "x under “Outcome”, which is not here; shown is all questions."),
        ("examples", {"sort": "CKNNA with a VFM", "el": "9"}, "9 under “Layer”, which is not here; shown is mean of"),
        ("examples", {"lasso": "true", "area": "1~2"}, "the area 1~2, which has no three corners; shown is every"),
        ("evidence", {"part": "x"}, "x under “Part”, which is not here; shown is Claims."),
        ("evidence", {"part": "runs", "kind": "x"}, "x under “Analyses”, which is not here; shown is everything."),
        ("evidence", {"part": "runs", "run": "x"}, "the run x, which is not in this folder; shown is the table."),
    ],
)
def test_what_a_link_names_and_a_page_does_not_have_is_one_true_sentence(
    name: str, query: dict[str, str | list[str]], sentence: str, two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = [warning.value.replace("\\", "") for warning in open_page(name, two, monkeypatch, **query).warning]
    assert len(said) == 1, said
    assert said[0].startswith(f"The link names {sentence}")


def test_the_shown_pair_stays_when_a_seed_is_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in (0, 1):
        train(tmp_path, f"baseline-s{seed}", right=share(0.5), seed=seed)
        train(tmp_path, f"viral-s{seed}", right=share(0.9), seed=seed, aligned=True)
        train(tmp_path, f"alpha-s{seed}", right=share(0.6), seed=seed, aligned=True, weight=2.0)
    others = ["alpha-s0", "viral-s0"]
    app = open_page("examples", tmp_path, monkeypatch, b="baseline-s0", m=others, **{"with": "viral-s0"})
    assert "viral-s0 alone answers 16 of 40" in text_of(app)
    for chosen, name in (([*others, "viral-s1"], "viral"), (others, "viral-s0")):
        app.multiselect(key="m").set_value(chosen).run()
        assert "viral-s0 alone answers 16 of 40" in text_of(app)  # baseline-s0 has no other partner
        assert app.query_params["with"] == "viral"
        home = open_page("home", tmp_path, monkeypatch, b="baseline-s0", m=chosen, **{"with": "viral"})
        assert f"Accuracy by question type: {name} minus baseline-s0" in text_of(home)
        assert not [*app.warning, *home.warning]
        finding = next(m.value.replace("\\", "") for m in home.markdown if m.value.startswith("**viral"))
        assert finding.startswith(f"**{name} is more accurate")
    seeds = open_page("home", tmp_path, monkeypatch, b="viral-s0", m=["viral-s1"])
    assert "How do viral-s0 and viral-s1 differ?" in text_of(seeds)


def test_the_models_of_one_variant_are_compared_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(3):
        train(tmp_path, f"viral-s{seed}", right=share(0.5 + 0.1 * seed), seed=seed, aligned=True)
    query: dict[str, str | list[str]] = {"b": "viral-s0", "m": ["viral-s1", "viral-s2"], "with": "viral-s2"}
    app = open_page("examples", tmp_path, monkeypatch, **query)
    assert "viral-s2 alone answers 8 of 40" in text_of(app)


def test_chosen_rows_are_in_the_address(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = open_page("models", two, monkeypatch, row="viral")
    assert any(button.label == "Compare viral with baseline" for button in app.button)
    app.text_input(key="find").set_value("base").run()  # another row is the first one now, and is not chosen
    assert "row" not in app.query_params
    assert not any(button.label.startswith("Compare") for button in app.button)
    stored = {run["label"]: run for run in (json.loads(file.read_text()) for file in two.glob("*/run.json"))}
    app = open_page("evidence", two, monkeypatch, part="runs", run=stored["viral"]["key"])
    assert [code.value for code in app.code] == [shlex.join(stored["viral"]["argv"])]


def test_a_choice_is_left_alone_and_a_default_follows_the_folder(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = open_page("models", two, monkeypatch)
    assert (app.selectbox(key="b").value, app.multiselect(key="m").value) == ("baseline", ["viral"])
    app.multiselect(key="m").set_value([]).run()
    train(two, "viral-2", right=share(0.8), aligned=True, seed=3, layer=[1])
    app.run()
    assert app.multiselect(key="m").value == []
    copied = open_page("models", two, monkeypatch, m=app.query_params["m"])
    assert copied.multiselect(key="m").value == []
    assert not copied.warning


def test_colors_do_not_depend_on_what_is_chosen(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from workbench.dashboard.site import read_site

    monkeypatch.setattr(sys, "argv", ["app.py", "--runs", str(two)])
    before = read_site().colors
    assert before["baseline"] != before["viral"]
    train(two, "viral-s5", right=share(0.5), aligned=True, layer=[1], seed=5)
    after = read_site().colors
    assert (after["baseline"], after["viral"]) == (before["baseline"], before["viral"])


CHANGES: dict[str, list[tuple[str, str, object]]] = {
    "home": [("selectbox", "b", "viral"), ("multiselect", "m", ["baseline"])],
    "models": [
        ("text_input", "find", "vir"),
        ("toggle", "group", True),
        ("multiselect", "variant", ["viral"]),
        ("multiselect", "curves", ["accuracy, mean of types"]),
    ],
    "layers": [
        ("select_slider", "l", "2"),
        ("segmented_control", "shown", "Single images"),
        ("toggle", "all-like", True),
    ],
    "examples": [
        ("segmented_control", "outcome", "disagree"),
        ("multiselect", "types", ["count"]),
        ("text_input", "text", "1"),
        ("selectbox", "sort", "CKNNA with a VFM"),
        ("selectbox", "el", "2"),
        ("toggle", "down", False),
        ("toggle", "lasso", True),
        ("button", "step-J", None),
    ],
    "evidence": [
        ("segmented_control", "part", "runs"),
        ("multiselect", "kind", ["cknna"]),
        ("toggle", "only", True),
    ],
}


@pytest.mark.parametrize("name", LIGHT)
def test_a_copied_address_shows_the_same_page(name: str, two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workbench.dashboard.questions.every_figure", lambda *_: None)  # asks another process
    app = open_page(name, two, monkeypatch)
    before = content_of(app)
    for kind, key, value in CHANGES[name]:
        widget = getattr(app, kind)(key=key)
        (widget.click() if kind == "button" else widget.set_value(value)).run()
        assert not app.exception, app.exception
    assert content_of(app) != before
    copied = {key: app.query_params[key] for key in list(app.query_params)}
    again = open_page(name, two, monkeypatch, **written_by_the_browser(name), **copied)
    assert content_of(again) == content_of(app)
    assert not again.warning


BOUND = ("find", "group", "all-like", "text", "down", "lasso", "only")


def written_by_the_browser(name: str) -> dict[str, str | list[str]]:
    """What the address has of widgets that streamlit binds to it, which only the browser writes there (see below)."""
    bound = {key: value for _, key, value in CHANGES[name] if key in BOUND}
    return {key: value if isinstance(value, list) else str(value).lower() for key, value in bound.items()}


def content_of(app: AppTest) -> list[object]:
    """All that a page shows: its texts, tables, charts, and what is chosen in its widgets."""
    charts = [element.proto.spec for element in app.get("plotly_chart")]
    tables = [element.value.to_json() for element in app.dataframe]
    kinds = ("selectbox", "multiselect", "select_slider", "segmented_control", "toggle", "text_input")
    widgets = {f"{kind} {each.key}": each.value for kind in kinds for each in getattr(app, kind)}
    return [text_of(app), tables, charts, widgets]


def test_a_model_has_a_page_of_its_own(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = two / "viral" / "checkpoint-2"
    step.mkdir()
    (step / "trainer_state.json").write_text("{}")
    (two / "viral" / "README.md").mkdir()  # not a file that can be read
    app = open_page("models", two, monkeypatch, one="viral")
    accuracy = pd.read_parquet(two / "viral" / "accuracy.parquet").set_index("category").loc["mean of types"]
    assert app.title[0].value == "viral"
    assert f"Accuracy {accuracy['accuracy']:.3f} [{accuracy['low']:.3f}, " in text_of(app)
    assert "chance 0.250" in text_of(app)
    assert "README.md cannot be read" in text_of(app)
    kept, analyses = (element.value for element in app.dataframe)
    log = pd.read_parquet(two / "viral" / "training.parquet").set_index("step")
    assert kept["accuracy, validation"].tolist() == [log.loc[2, "accuracy/mean"]]
    assert analyses["analysis"].tolist() == ["cknna"]
    assert any("scarce_viral" in code.value or "alignment:" in code.value for code in app.code)
    gone = open_page("models", two, monkeypatch, one="away")
    assert "The link names the model away, which is not in this folder" in text_of(gone)
    assert len(gone.dataframe[0].value) == 2


def test_layers_shows_single_images(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = open_page("layers", two, monkeypatch, l="2", shown="Single images")
    stored = pd.concat(
        pd.read_parquet(folder / "per_image.parquet").assign(
            model=json.loads((folder / "run.json").read_text())["label"]
        )
        for folder in two.glob("cknna-*")
    )
    at = stored[stored["layer"] == 2].pivot(index="image_id", columns="model", values="score")
    higher = int((at["viral"] > at["baseline"]).sum())
    assert f"viral is higher on {higher} of {len(at)} images" in text_of(app)
    figure = json.loads(app.get("plotly_chart")[1].proto.spec)
    assert {trace["name"] for trace in figure["data"]} == {"baseline", "baseline, mean", "viral", "viral, mean"}


def test_a_measure_that_an_analysis_did_not_take_is_not_offered(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of colors where objects have none, and that of single blocks where windows were knocked out."""
    for model in ("baseline", "viral"):
        lens(two, model, ["class"])
        knockout(two, model, [(0, 2), (1, 3)], width=3)
    app = open_page("layers", two, monkeypatch, l="2")
    assert "Layer 2: baseline 0.500 [0.400, 0.600], viral 0.500 [0.400, 0.600]" in text_of(app)
    (offered,) = (each.options for each in app.segmented_control if each.key == "m-readable")
    assert offered == [plain("logit lens: class comes first")]
    assert "Not measured yet: Used?, Looked at?, Shaped how?" in text_of(app)
    for folder in [*two.glob("cknna-*"), *two.glob("logit_lens-*")]:
        shutil.rmtree(folder)
    assert "No measure of the layers of these models is stored yet." in text_of(open_page("layers", two, monkeypatch))


def test_runs_without_a_measure_are_said_to_have_none(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for model in ("baseline", "viral"):
        knockout(two, model, [(0, 0), (1, 1)], width=1)
    assert "Layer 1: baseline 0.300 [" in text_of(open_page("layers", two, monkeypatch))
    windows = [knockout(two, model, [(0, 2), (1, 3)], width=3) for model in ("baseline", "viral")]
    question = next(run.question for run in read_stored(two).runs if run.folder in windows)
    for shown, words in (
        ("Scores", "These runs have no values of this measure."),
        ("Differences", "This measure cannot be compared"),
        ("Single images", "There are no values of single images of this measure in layer 1."),
    ):
        app = open_page("layers", two, monkeypatch, shown=shown, **{"run-knockout-used": question})
        assert any(words in info.value for info in app.info), shown


def test_paths_outside_the_runs_folder_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["app.py", "--runs", str(tmp_path)])
    (tmp_path / "link").symlink_to("/etc")
    for path in ("../secret", "/etc/passwd", "link/passwd"):
        with pytest.raises(RunError, match="is not below the runs folder"):
            folders.below_root(path)
    assert folders.below_root("a/b") == tmp_path / "a" / "b"


# --- with trained models --------------------------------------------------------------------------


@pytest.mark.slow
def test_every_figure_and_the_table_are_the_analysis_own(runs_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = open_page("layers", runs_folder, monkeypatch)
    app.toggle(key="all-like").set_value(True).run()
    assert not app.exception
    table = app.dataframe[0].value
    assert set(table["model"]) == {"baseline", "viral"}
    assert {"null_mean", "null_q95", "p", "n_images", "n", "k"} <= set(table.columns)
    assert any("analyses.cknna" in code.value for code in app.code)


@pytest.mark.slow
def test_trainings_store_what_examples_shows(runs_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = open_page("examples", runs_folder, monkeypatch)
    table = app.dataframe[1].value
    assert {"question", "answer", "given_first", "given_second", "p_first", "p_second"} <= set(table.columns)
    stored = pd.read_parquet(runs_folder / "viral" / "evaluation.parquet")
    assert ((stored["given"] == stored["answer"]) == stored["correct"]).all()
    assert stored["p_right"].between(0, 1).all()
    assert (stored["p_right"] > 0.5).sum() <= stored["correct"].sum()  # the most likely answer is the one that is given


# --- in a browser ---------------------------------------------------------------------------------


@contextmanager
def started(root: Path, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """The server of a dashboard as a user starts it, on a free port; what it prints is read from its stdout."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["-m", "streamlit", "run", "app.py", "--server.port", str(port), "--", "--runs", str(root)]
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | variables,
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


@contextmanager
def serve(root: Path) -> Iterator[str]:
    """The address of a dashboard that answers, without the token."""
    with started(root) as process:
        port = int(process.args[process.args.index("--server.port") + 1])
        deadline = time.monotonic() + 60
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert process.poll() is None and time.monotonic() < deadline, "the dashboard did not start"
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"


def test_the_dashboard_is_for_this_machine_and_watches_no_files() -> None:
    """A watcher of files can hang the server when a page is closed, so that no page answers any more."""
    server = tomllib.loads((ROOT / ".streamlit" / "config.toml").read_text())["server"]
    assert server["address"] == "127.0.0.1"
    assert server["fileWatcherType"] == "none"


def chromium_or_skip() -> str:
    """Where chromium is; without it a test is skipped, but not in CI."""
    found = shutil.which("chromium")
    if found is None:
        assert not os.environ.get("CI"), "chromium is not installed: run make browser"
        pytest.skip("chromium is not installed: run make browser")
    return found


CHROMIUM = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@dataclass
class Shown:
    """A dashboard of two models that tests share, and a browser; nobody changes its folder."""

    root: Path
    address: str
    browser: Browser


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    from playwright.sync_api import sync_playwright

    chromium = chromium_or_skip()
    root = two_models(tmp_path_factory.mktemp("shown"))
    scenes = load_data("shapes:test", limit=20).scenes
    for name in ("baseline", "viral"):  # about images that are there
        file = root / name / "evaluation.parquet"
        asked = [scene[number] for scene in scenes for number in (0, 1)]
        real = {name: [getattr(sample, name) for sample in asked] for name in ("id", "image_id", "question", "answer")}
        pd.read_parquet(file).assign(**real).to_parquet(file)
    store_claims(root)
    with serve(root) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM)
        yield Shown(root, address, browser)
        browser.close()


@pytest.fixture
def page(shown: Shown) -> Iterator[Page]:
    """A window with a memory of its own."""
    context = shown.browser.new_context(viewport={"width": 1440, "height": 1000})
    yield context.new_page()
    context.close()


def wait_until_drawn(page: Page) -> None:
    page.wait_for_selector("h1", timeout=60_000)
    page.wait_for_function("document.querySelector('[data-test-script-state=notRunning]')", timeout=60_000)


@pytest.mark.browser
@pytest.mark.parametrize(
    ("path", "change", "written"),
    [
        ("layers", lambda page: page.get_by_text("Single images").click(), "shown=Single"),
        ("examples", lambda page: page.get_by_label("Words in question or answer").fill("1"), "text=1"),
    ],
)
def test_a_copied_address_shows_the_same_page_in_another_browser(
    path: str, change: Callable[[Page], None], written: str, shown: Shown, page: Page
) -> None:
    page.goto(f"{shown.address}/{path}")
    wait_until_drawn(page)
    change(page)
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile(written), timeout=30_000)
    context = shown.browser.new_context(viewport={"width": 1440, "height": 1000})
    elsewhere = context.new_page()
    elsewhere.goto(page.url)
    wait_until_drawn(elsewhere)
    deadline = time.monotonic() + 30
    while words_of(elsewhere) != words_of(page) and time.monotonic() < deadline:
        page.wait_for_timeout(200)
    assert words_of(elsewhere) == words_of(page)
    context.close()


@pytest.mark.browser
def test_the_address_is_copied(shown: Shown) -> None:
    from playwright.sync_api import expect

    context = shown.browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.goto(f"{shown.address}/layers?b=viral&m=baseline&l=2")
    wait_until_drawn(page)
    page.get_by_role("button", name="Copy link").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == page.url
    assert "b=viral" in page.url
    context.close()


def violations(page: Page) -> list[str]:
    """What axe-core (https://github.com/dequelabs/axe-core) calls serious or critical on a page, in both themes.

    Streamlit fades what it is about to draw again, so a page that breaks a rule is looked at again for ten seconds.
    """
    from axe_playwright_python.sync_playwright import Axe

    broken = []
    for theme in ("light", "dark"):
        page.emulate_media(color_scheme=theme)
        page.wait_for_timeout(500)
        for _ in range(11):
            seen = []
            for rule in Axe().run(page).response["violations"]:
                nodes = [node["html"] for node in rule["nodes"]]
                if rule["impact"] in ("serious", "critical"):
                    seen.append(f"{theme}: {rule['id']}: {nodes[:3]}")
            if not seen:
                break
            page.wait_for_timeout(1000)
        broken += seen
    return broken


@pytest.mark.browser
@pytest.mark.parametrize("path", ["", "models", "models?one=viral", "layers", "examples?lasso=true", "evidence"])
def test_axe_finds_nothing_serious(path: str, shown: Shown, page: Page) -> None:
    page.goto(f"{shown.address}/{path}")
    wait_until_drawn(page)
    page.wait_for_timeout(1000)
    assert violations(page) == []


def words_of(page: Page) -> list[object]:
    """The words that a window shows, and what its widgets hold."""
    main = page.locator("[data-testid=stMain]")
    held = main.evaluate("main => [...main.querySelectorAll('input')].map(input => [input.value, input.checked])")
    return [*main.inner_text().split(), *held]


@pytest.mark.browser
def test_a_click_on_the_strip_marks_its_layer_and_j_goes_to_the_next_question(shown: Shown, page: Page) -> None:
    from playwright.sync_api import expect

    address = shown.address
    page.goto(f"{address}/layers")
    cell = page.locator("[data-testid=stPlotlyChart]").first.locator(".scatterlayer .point").last
    cell.wait_for(state="attached", timeout=60_000)
    page.wait_for_timeout(1000)
    box = cell.bounding_box()
    assert box
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_timeout(300)
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    expect(page.get_by_text(re.compile("Layer 2: baseline"))).to_be_visible(timeout=30_000)
    page.goto(f"{address}/examples")
    expect(page.get_by_text("1 of 40")).to_be_visible(timeout=60_000)
    page.wait_for_function("document.querySelector('[data-test-script-state=notRunning]')", timeout=60_000)
    page.wait_for_timeout(1000)
    page.keyboard.press("j")
    expect(page.get_by_text("2 of 40")).to_be_visible(timeout=30_000)
    page.keyboard.press("k")
    expect(page.get_by_text("1 of 40")).to_be_visible(timeout=30_000)


@pytest.mark.browser
def test_a_click_on_a_claim_opens_it(shown: Shown, page: Page) -> None:
    from playwright.sync_api import expect

    page.goto(f"{shown.address}/evidence?part=claims")
    wait_until_drawn(page)
    table = page.locator("[data-testid=stDataFrame]").first
    box = table.bounding_box()
    assert box
    page.mouse.click(box["x"] + 18, box["y"] + 35 * 3.5)  # the box before the third row, below the headings
    third = display_table(pd.read_parquet(ROOT / "docs" / "results" / "ledger" / "claims.parquet"))["id"].iloc[2]
    page.wait_for_url(re.compile(f"claim={third}"), timeout=30_000)
    expect(page.get_by_text("what the claim says; rule")).to_be_visible()


@pytest.mark.browser
def test_chosen_rows_stay_those_of_their_models(shown: Shown, page: Page) -> None:
    from playwright.sync_api import expect

    page.goto(f"{shown.address}/models")
    wait_until_drawn(page)
    box = page.locator("[data-testid=stDataFrame]").first.bounding_box()
    assert box
    page.mouse.click(box["x"] + 18, box["y"] + 35 * 2.5)  # the box before the second row
    compare = page.get_by_role("button", name="Compare viral with baseline")
    expect(compare).to_be_visible(timeout=30_000)
    page.wait_for_url(re.compile("row=viral"), timeout=30_000)
    context = shown.browser.new_context(viewport={"width": 1440, "height": 1000})
    elsewhere = context.new_page()
    elsewhere.goto(page.url)
    expect(elsewhere.get_by_role("button", name="Compare viral with baseline")).to_be_visible(timeout=60_000)
    context.close()
    page.get_by_label("Find a model").fill("vi")  # its row is the first one now
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile("find=vi"), timeout=30_000)
    page.wait_for_timeout(1000)
    expect(compare).to_be_visible()
    page.get_by_label("Find a model").fill("base")
    page.keyboard.press("Enter")
    expect(compare).to_have_count(0, timeout=30_000)
    page.wait_for_url(re.compile("^((?!row=).)*$"), timeout=30_000)


@pytest.mark.browser
def test_a_gray_line_has_its_color_while_the_pointer_is_on_it(tmp_path: Path, shown: Shown, page: Page) -> None:
    for number, name in enumerate("abcdefgh"):  # more than have colors
        log = train(tmp_path, name, right=[True, False] * 10, weight=number / 8) / "training.parquet"
        table = pd.read_parquet(log)
        table.assign(**{"accuracy/mean": table["accuracy/mean"] + number / 20}).to_parquet(log)
    with serve(tmp_path) as address:
        page.goto(f"{address}/models?b=a&{'&'.join(f'm={name}' for name in 'bcdefgh')}")
        wait_until_drawn(page)
        chart = page.locator("[data-testid=stPlotlyChart]").first
        line = chart.locator(".scatterlayer .trace path.js-line").first  # gray lines are behind
        line.wait_for(state="attached", timeout=60_000)
        page.wait_for_timeout(1000)
        box = line.bounding_box()
        assert box
        strokes = "chart => [...chart.querySelectorAll('path.js-line')].map(line => getComputedStyle(line).stroke)"
        before = chart.evaluate(strokes)
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] - 40)
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=5)
        page.wait_for_timeout(500)
        pointed = [now for was, now in zip(before, chart.evaluate(strokes), strict=True) if was != now]
        assert len(pointed) == 1
        assert pointed[0] not in before
        page.mouse.move(0, 0)
        page.wait_for_timeout(500)
        assert chart.evaluate(strokes) == before


@pytest.mark.browser
def test_home_fits_into_a_window_and_an_example_is_one_link(shown: Shown, page: Page) -> None:
    from playwright.sync_api import expect

    page.set_viewport_size({"width": 1440, "height": 900})
    page.goto(shown.address)
    examples = page.locator("[class*=st-key-look-]")
    expect(examples).to_have_count(2, timeout=60_000)
    wait_until_drawn(page)
    charts = page.locator("[data-testid=stPlotlyChart]")
    expect(charts).to_have_count(2)
    page.wait_for_timeout(1000)
    lowest = page.get_by_role("link", name="Which claims hold?").bounding_box()
    image = examples.first.locator("img").bounding_box()
    assert lowest and image
    assert lowest["y"] + lowest["height"] <= 900
    assert image["width"] > 60
    assert all(chart.bounding_box()["height"] > 200 for chart in charts.all())
    page.mouse.click(image["x"] + image["width"] / 2, image["y"] + image["height"] / 2)
    page.wait_for_url(re.compile("explorer.*[?&]q="), timeout=30_000)
    page.goto(f"{shown.address}/layers")  # a phone shows more map than labels
    page.set_viewport_size({"width": 390, "height": 900})
    wait_until_drawn(page)
    page.wait_for_timeout(1000)
    chart, plot = (charts.first.locator(name).bounding_box() for name in ("svg.main-svg >> nth=0", ".nsewdrag"))
    assert chart and plot
    assert plot["width"] > 0.6 * chart["width"]


@pytest.mark.browser
def test_what_a_lasso_chose_is_in_the_address(shown: Shown, page: Page) -> None:
    """Around the upper left quarter: the questions that viral alone has right."""
    from playwright.sync_api import expect

    page.goto(f"{shown.address}/examples?lasso=true")
    wait_until_drawn(page)
    chart = page.locator(".st-key-p-scatter .nsewdrag").first
    chart.wait_for(timeout=60_000)
    page.wait_for_timeout(1000)
    box = chart.bounding_box()
    assert box

    def move(x: float, y: float) -> None:
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=8)

    move(0.02, 0.02)
    page.mouse.down()
    for x, y in ((0.4, 0.02), (0.4, 0.4), (0.02, 0.4), (0.02, 0.05)):
        move(x, y)
    page.mouse.up()
    page.wait_for_url(re.compile("area="), timeout=30_000)
    expect(page.get_by_text("16 questions; 1 to 16 are shown.")).to_be_visible(timeout=30_000)
    elsewhere = shown.browser.new_context(viewport={"width": 1440, "height": 1000}).new_page()
    elsewhere.goto(page.url)
    expect(elsewhere.get_by_text("16 questions; 1 to 16 are shown.")).to_be_visible(timeout=60_000)
    elsewhere.get_by_role("button", name="All points again").click()
    expect(elsewhere.get_by_text("40 questions; 1 to 40 are shown.")).to_be_visible(timeout=30_000)
    assert "area" not in elsewhere.url


@pytest.mark.browser
def test_in_a_real_browser(shown: Shown, page: Page) -> None:
    """From Home to Layers with the models kept; move the layer; a copied address shows the same page elsewhere."""
    from playwright.sync_api import expect

    address = shown.address
    errors: list[str] = []
    asked: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{address}/?b=viral&m=baseline")
    expect(page.get_by_role("heading", name="Does aligning visual tokens")).to_be_visible(timeout=60_000)
    expect(page.get_by_text("90.0 → 50.0")).to_be_visible(timeout=60_000)
    page.get_by_role("link", name="Layers").first.click()
    expect(page.get_by_role("heading", name="Where in the network do they differ?")).to_be_visible(timeout=60_000)
    page.wait_for_url(re.compile("b=viral.*m=baseline"), timeout=30_000)
    slider = page.get_by_role("slider").first
    slider.focus()
    slider.press("ArrowRight")
    page.wait_for_url(re.compile("l=2"), timeout=30_000)
    expect(page.get_by_text(re.compile("Layer 2: viral"))).to_be_visible(timeout=30_000)
    elsewhere = shown.browser.new_context(viewport={"width": 390, "height": 800}).new_page()
    elsewhere.goto(page.url)
    expect(elsewhere.get_by_text(re.compile("Layer 2: viral"))).to_be_visible(timeout=60_000)
    for window in (page, elsewhere):
        assert window.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert window.locator("[data-testid=stException]").count() == 0
    assert page.locator("[data-testid=stAlert]").count() == 0
    assert not errors
    assert {url.split("/")[2] for url in asked if url.startswith("http")} == {address.split("/")[2]}


@pytest.mark.browser
def test_a_chart_is_downloaded_in_every_form(shown: Shown, page: Page, tmp_path: Path) -> None:
    from playwright.sync_api import expect

    address = shown.address
    page.goto(f"{address}/layers")
    page.locator(".st-key-save-score-cknna button").first.click(timeout=60_000)
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_text("one training each (baseline seed 0, viral seed 0)")).to_be_visible(timeout=60_000)
    dialog.get_by_text("Both columns").click()
    expect(dialog.get_by_text("'width': 648")).to_be_visible(timeout=60_000)
    saved = {}
    for name in ("SVG", "PDF", "PNG", "CSV", "LaTeX table", "Caption", "Python"):
        with page.expect_download(timeout=60_000) as download:
            dialog.get_by_role("button", name=name, exact=True).click()
        saved[name] = Path(download.value.path()).read_bytes()
        assert download.value.suggested_filename.startswith("cknna-with-dinov2-small-by-layer.")
    page.goto(f"{address}/evidence?part=report&b=viral&m=baseline")
    with page.expect_download(timeout=60_000) as download:
        page.get_by_role("button", name="Report of this choice").click(timeout=60_000)
    report = Path(download.value.path()).read_bytes()
    assert b"</html>" in report
    assert f"{address}/?b=viral&amp;m=baseline" in report.decode()
    assert b'width="648"' in saved["SVG"][:300]
    assert saved["PDF"].startswith(b"%PDF")
    assert saved["PNG"].startswith(b"\x89PNG")
    stored = pd.concat([pd.read_parquet(file) for file in shown.root.glob("cknna-*/scores.parquet")])
    csv = tmp_path / "points.csv"
    csv.write_bytes(saved["CSV"])
    points = pd.read_csv(csv)
    points = points[~points["curve"].str.startswith("chance")]
    for drawn, column in (("y", "score"), ("low", "low"), ("high", "high")):
        assert sorted(points[drawn]) == pytest.approx(sorted(stored[column]), abs=1e-15)
