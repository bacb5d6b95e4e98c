"""The three sentences about a pair: right by hand, turned round where the models are exchanged, refused where nothing
can be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.conftest import ROOT, refused
from trainer.recipe import Recipe
from workbench.cli import parse
from workbench.errors import RunError
from workbench.intervals import mean_interval
from workbench.stored_recipe import ADDED
from workbench.summary import Trained, main, outcome, sentences, what_came_out, what_to_open, what_was_compared
from workbench.yaml_config import as_mapping

IMAGES, EACH = 30, 4  # questions of an image: two colors, two counts


def questions(right: float, seed: int = 0) -> pd.DataFrame:
    """Answers of which the share `right` of colors is right, and half of the counts, one question after another."""
    rows = []
    for number in range(IMAGES * EACH):
        kind = "color" if number % EACH < 2 else "count"
        share = right if kind == "color" else 0.5
        own = number // EACH * 2 + number % 2
        correct = (own + 1) * share // 1 > own * share // 1  # evenly spread, so that the share holds exactly
        rows.append((f"q{number}", f"image-{number // EACH}", kind, "red", correct, 0.5 if kind == "count" else 0.25))
    return pd.DataFrame(rows, columns=["id", "image_id", "category", "answer", "correct", "chance"])


def store(folder: Path, recipe: str, table: pd.DataFrame, *flags: str, **record: Any) -> Path:
    """A finished training as far as the sentences read it."""
    folder.mkdir(parents=True)
    own = parse(
        Recipe,
        [*flags, "--output_dir", str(folder)],
        prog="trainer",
        recipe=ROOT / "trainer" / "recipes" / f"{recipe}.yaml",
    )
    content = {"recipe": as_mapping(own), "items": 300, "data": "d1", "val": "v1", "test": "t1"} | record
    (folder / "training.json").write_text(json.dumps(content))
    table.to_parquet(folder / "evaluation.parquet")
    return folder


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Trained, Trained]:
    """A baseline, and a VIRAL that has 20 of 60 colors more; the latter's answers are stored in another order."""
    store(tmp_path / "baseline", "demo_baseline", questions(0.4))
    store(tmp_path / "viral", "demo_viral", questions(0.4 + 20 / 60).sample(frac=1, random_state=1))
    return Trained.read("baseline", tmp_path / "baseline"), Trained.read("viral", tmp_path / "viral")


def test_the_difference_is_right_by_hand_and_paired(pair: tuple[Trained, Trained]) -> None:
    found = outcome(*pair)
    colors = [
        questions(share)["correct"][questions(share)["category"] == "color"].mean() for share in (0.4, 0.4 + 1 / 3)
    ]
    assert colors == pytest.approx([0.4, 44 / 60])
    assert found.accuracy == pytest.approx(((0.4 + 0.5) / 2, (44 / 60 + 0.5) / 2))
    assert found.chance == pytest.approx(0.375)
    assert found.difference.estimate == pytest.approx(20 / 60 / 2)
    assert (
        found.questions,
        found.types,
        found.difference.n,
    ) == (120, 2, IMAGES)
    a, b = questions(0.4), questions(0.4 + 1 / 3)
    paired = mean_interval(
        b["correct"] * 1.0 - a["correct"] * 1.0,
        kind="difference",
        groups=list(a["image_id"]),
        strata=list(a["category"]),
    )
    assert (found.difference.low, found.difference.high) == (paired.low, paired.high)


def test_the_sentences_say_what_came_out(pair: tuple[Trained, Trained]) -> None:
    compared, came_out, _ = sentences(*pair, "")
    assert (
        "alike, on the same 300 images of shapes:train, for 600 steps, with seed 0, from random initialization: "
        in compared
    )
    assert (
        "baseline learns from the answers alone; viral also learns to make its visual tokens resemble the features of"
        " a vision foundation model" in compared
    )
    assert "(efficientnet-lite0, layer 3, weight 0.5)." in compared
    assert "On 120 questions about 30 images of shapes:test, baseline answers 45.0 % right and viral 61.7 %" in came_out
    assert "guessing gives 37.5 %" in came_out
    assert "viral minus baseline is +16.7 points, with a 95 % interval over images from +" in came_out
    assert (
        "so viral is ahead on such questions; each model was trained only once, so this says little about other seeds"
        in came_out
    )


def test_exchanged_models_turn_the_sentences_round(pair: tuple[Trained, Trained]) -> None:
    first, second = pair
    plain, turned = outcome(first, second).difference, outcome(second, first).difference
    assert (turned.estimate, turned.low, turned.high) == pytest.approx((-plain.estimate, -plain.high, -plain.low))
    said = what_came_out(second, first, outcome(second, first))
    assert (
        f"baseline minus viral is -16.7 points, with a 95 % interval over images from {-100 * plain.high:+.1f} to"
        f" {-100 * plain.low:+.1f}" in said
    )
    assert "viral answers 61.7 % right and baseline 45.0 %" in said
    assert "so viral is ahead" in said
    assert ": viral also learns" in what_was_compared(second, first)
    assert "; baseline learns from the answers alone." in what_was_compared(second, first)


@pytest.mark.slow
def test_an_interval_that_holds_zero_names_no_winner(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    a, b = (questions(0.5).assign(correct=rng.random(IMAGES * EACH) < 0.5) for _ in range(2))
    first = Trained.read("a", store(tmp_path / "a", "demo_baseline", a))
    second = Trained.read("b", store(tmp_path / "b", "demo_viral", b))
    found = outcome(first, second)
    assert found.difference.low < 0 < found.difference.high
    assert "do not show which of the two is ahead" in what_came_out(first, second, found)
    same = outcome(first, first)  # no answer differs
    assert same.difference.estimate == 0
    assert "(wide, since few answers differ), so these questions do not show" in what_came_out(first, first, same)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "and their recipes do not differ in anything that affects the model."),
        (("--seed", "7"), "seed is 0 for a and 7 for b."),
        (("--optim.steps", "700", "--save_every", "40"), "optim.steps is 600 for a and 700 for b."),
        (("--alignment.weight", "2.0"), "and their recipes do not differ"),
        (
            ("--alignment.objective", "relation", "--alignment.target", "encoder"),
            "resemble the features of its own vision encoder (own encoder, layer 3, weight",
        ),
        (("--alignment.residual", "encoder"), "; b learns from the answers alone, with a residual encoder, layer 3."),
        (
            (
                "--optim.beta1",
                "0.8",
                "--optim.beta2",
                "0.9",
                "--optim.warmup",
                "1",
                "--data.limit_train",
                "9",
                "--seed",
                "1",
            ),
            "2 more keys of the recipe differ.",
        ),
    ],
)
def test_what_was_compared_is_what_differs(flags: tuple[str, ...], said: str, tmp_path: Path) -> None:
    first = Trained.read("a", store(tmp_path / "a", "demo_baseline", questions(0.5)))
    data = "d2" if "--data.limit_train" in flags else "d1"
    second = Trained.read("b", store(tmp_path / "b", "demo_baseline", questions(0.5), *flags, data=data))
    sentence = what_was_compared(first, second)
    assert said in sentence
    for word, key in (
        ("with seed", "--seed"),
        ("steps,", "--optim.steps"),
        ("images of shapes:train", "--data.limit_train"),
    ):
        assert (word in sentence) == (key not in flags)  # what differs is not called alike


def test_other_training_data_of_one_name_are_said(tmp_path: Path) -> None:
    first = Trained.read("a", store(tmp_path / "a", "demo_baseline", questions(0.5)))
    second = Trained.read("b", store(tmp_path / "b", "demo_baseline", questions(0.5), data="d2"))
    assert "the content of their training data differs" in what_was_compared(first, second)


def test_other_questions_are_not_compared(tmp_path: Path) -> None:
    first = Trained.read("a", store(tmp_path / "a", "demo_baseline", questions(0.5)))
    own = questions(0.5)
    cases: list[tuple[pd.DataFrame, dict[str, str]]] = [
        (own.iloc[1:], {}),
        (own.assign(answer="blue"), {}),
        (own, {"test": "t2"}),
    ]
    for number, (table, record) in enumerate(cases):
        second = Trained.read("b", store(tmp_path / f"b{number}", "demo_baseline", table, **record))
        with pytest.raises(RunError, match="a and b were not asked the same questions"):
            outcome(first, second)


def test_what_to_open_names_what_is_there(tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    assert "report.html" not in what_to_open(report=report, runs=tmp_path)
    report.write_text("")
    said = what_to_open(report=report, runs=Path("runs"), sweep="demo")
    assert said.startswith(f"Open next: {report} in a browser")
    assert "`viral app --runs runs`" in said
    assert "`python -m trainer.sweep demo --seeds 1 2 3 --suffix --output_dir runs/seeds`" in said
    assert "http://127.0.0.1:8501" in (served := what_to_open(runs=Path("runs"), address="http://127.0.0.1:8501"))
    assert "streamlit run" not in served


def test_the_command_prints_three_and_refuses_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, recipe in (("baseline", "demo_baseline"), ("viral", "demo_viral"), ("third", "demo_viral")):
        store(tmp_path / name, recipe, questions(0.5))
    main(["--model", str(tmp_path / "baseline"), f"B={tmp_path / 'viral'}"])
    lines = capsys.readouterr().out.splitlines()
    assert [line[:3] for line in lines] == ["1. ", "2. ", "3. "]
    assert "B minus baseline" in lines[1]
    assert "--model names 3 models: expected two" in refused(
        "workbench.summary", "--model", *(str(tmp_path / name) for name in ("baseline", "viral", "third"))
    )
    assert "is not the folder of a finished training" in refused(
        "workbench.summary", "--model", str(tmp_path / "baseline"), str(tmp_path / "virals")
    )
    pd.DataFrame({"id": ["a"], "lm_loss": [1.0]}).to_parquet(tmp_path / "third" / "evaluation.parquet")
    assert "was evaluated by its loss" in refused(
        "workbench.summary", "--model", str(tmp_path / "baseline"), str(tmp_path / "third")
    )


def test_keys_that_an_older_recipe_lacks_do_not_differ(tmp_path: Path) -> None:
    first = Trained.read("a", store(tmp_path / "a", "demo_viral", questions(0.5)))
    folder = store(tmp_path / "b", "demo_viral", questions(0.5))
    record = json.loads((folder / "training.json").read_text())
    for section, keys in ADDED.items():
        for key in keys:
            del record["recipe"][section][key]
    (folder / "training.json").write_text(json.dumps(record))
    assert "their recipes do not differ in anything" in what_was_compared(first, Trained.read("b", folder))
    last = ("--alignment.layer", "6", "--alignment.final_norm")
    normed = Trained.read("c", store(tmp_path / "c", "demo_viral", questions(0.5), *last))
    sentence = what_was_compared(Trained.read("b", folder), normed)
    assert "final norm)" in sentence
    assert "alignment.final_norm" not in sentence
