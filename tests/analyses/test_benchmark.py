"""`analyses.benchmark` on a benchmark's folder, by its command: answers, scores, the blind run, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analyses.benchmark import ANALYSIS, VERSION, Config, check_scorer
from tests.conftest import refused, run
from workbench.benchmarks.asking import Asking
from workbench.benchmarks.tables import answer_row, scores
from workbench.data import Sample, load_data
from workbench.errors import UnknownNameError
from workbench.runs import Run, load

IMAGES = 6


@pytest.fixture(scope="module")
def pope(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """POPE's files with scenes of `shapes`, in words that the trained models know."""
    folder, rows = tmp_path_factory.mktemp("pope"), []
    scenes = load_data("shapes:val", limit=IMAGES).scenes
    for number, scene in enumerate(scenes):
        scene[0].image.save(folder / f"{number}.png")
        for question in (sample for sample in scene if sample.category == "exist"):
            rows.append({"question_id": len(rows), "image": f"{number}.png", "text": question.question})
            rows[-1]["label"] = question.answer
    for split in ("random", "popular"):
        (folder / f"coco_pope_{split}.json").write_text("\n".join(map(json.dumps, rows)))
    return folder


def asked(
    prompt: str, said: str, *, likelihood: bool = False, labels: str = "the authors' labels, unknown copy"
) -> Run:
    """A run on twelve questions of POPE, all with the same answer."""
    nothing: Any = None
    scored = {"logprobs": "[-1.0, -2.0]", "tokens": "[1, 3]"} if likelihood else {}
    rows = [
        answer_row(
            "pope",
            Sample(f"{n}", f"image {n}", nothing, "?", ("yes", "no")[n % 2], ("yes", "no"), "random"),
            "image",
            said,
            prompt=prompt,
            **scored,
        )
        for n in range(12)
    ]
    answers = pd.DataFrame(rows)
    record: Any = {"analysis": "benchmark", "label": said, "config": {}, "prompt": prompt, "labels": labels}
    return Run("key", record, {"answers": answers, "scores": scores(answers, seed=0)})


def test_likelihoods_are_drawn_by_category() -> None:
    figures = ANALYSIS.figures({"a": asked("plain", "yes", likelihood=True)})
    assert list(figures) == ["Accuracy by category by likelihood (image)", "Accuracy of all questions by scorer"]
    (points, *_) = figures["Accuracy by category by likelihood (image)"].data
    assert list(points.y) == [0.5]
    by_scorer = figures["Accuracy of all questions by scorer"].data[0]
    assert dict(zip(by_scorer.text, by_scorer.y, strict=True)) == {"sum": 0.5, "mean": 0.5}


def test_prompts_and_labels_of_others_are_named_in_figures_and_summary() -> None:
    runs = {"a": asked("plain", "Yes"), "b": asked("llava", "No", labels="RePOPE's labels, unknown copy")}
    title = "Accuracy by category (image), RePOPE's labels and the authors' labels"
    figure = ANALYSIS.figures(runs)[title]
    assert [trace.name for trace in figure.data[:2]] == ["a, prompt plain", "b, prompt llava"]
    table = ANALYSIS.summary(runs)
    assert table.groupby("model")["prompt"].unique().str.join("").to_dict() == {"a": "plain", "b": "llava"}
    assert table["difference"].isna().all()
    old = asked("plain", "No")  # stored before answers had the column
    old = Run("key", old.record, {name: of.drop(columns="prompt") for name, of in old.tables.items()})
    table = ANALYSIS.summary({"a": asked("plain", "Yes"), "old": old})
    rows = table[(table["model"] == "old") & (table["measure"] == "accuracy") & (table["scorer"] == "own")]
    assert (rows["prompt"] == "plain").all()
    assert rows["difference"].notna().all()


def test_a_scorer_is_checked_before_a_model_answers() -> None:
    sample = Sample("0", "image", lambda: None, "is it ?", "yes", ("yes", "no"))  # type: ignore[arg-type, return-value]
    asking = Asking("pope", "plain", [[sample]], {})
    for scorer in ("all", "own", "official", "lmms", "paper"):
        check_scorer(Config(scorer=scorer), asking)
    with pytest.raises(UnknownNameError, match="did you mean 'paper'"):
        check_scorer(Config(scorer="papr"), asking)
    check_scorer(Config(scorer="sum", decoding="likelihood"), asking)
    with pytest.raises(UnknownNameError, match="expected one of all, mean, sum"):
        check_scorer(Config(scorer="official", decoding="likelihood"), asking)


@pytest.mark.slow
def test_two_models_on_pope(runs_folder: Path, pope: Path, tmp_path: Path) -> None:
    models = [str(runs_folder / name) for name in ("baseline", "viral")]
    words = ["--data", f"pope:{pope}", "--prompt", "plain", "--output_dir", str(tmp_path)]
    done = run("analyses.benchmark", "--model", *models, *words)
    folders = sorted(tmp_path.glob("benchmark-*"))
    assert len(folders) == 2
    for folder in folders:
        answers, scores = (pd.read_parquet(folder / f"{name}.parquet") for name in ("answers", "scores"))
        assert set(answers["shown"]) == {"image", "mean image", "no image"}
        assert len(answers) == 3 * len(load_data(f"pope:{pope}"))
        assert set(answers["benchmark"]) == {"pope"}
        assert set(scores["scorer"]) == {"own", "official", "lmms", "paper"}
        whole = scores[(scores["measure"] == "accuracy") & (scores["category"] == "all questions")]
        assert (whole["n_images"] == IMAGES).all()
        assert set(scores["measure"]) >= {"accuracy", "precision", "recall", "F1", "yes-ratio"}
        record = json.loads((folder / "run.json").read_text())
        assert record["prompt"] == "plain"
        assert record["version"] == VERSION
        assert "unknown copy" in record["labels"]
    assert "paper: random and popular" in done.stdout
    runs = {run.record["label"]: run for run in map(load, folders)}
    assert set(runs) == {"baseline", "viral"}
    table = ANALYSIS.summary(runs)
    paired = table[
        (table["scorer"] == "own") & (table["measure"] == "accuracy") & (table["category"] == "all questions")
    ]
    first, second = (paired[(paired["model"] == name) & (paired["shown"] == "image")].iloc[0] for name in runs)
    assert np.isnan(first["difference"])
    assert second["difference"] == pytest.approx(second["score"] - first["score"])
    assert second["smallest"] > 0
    figures = ANALYSIS.figures(runs)
    assert list(figures) == [
        "Accuracy by category (image)",
        "Accuracy by category (mean image)",
        "Accuracy by category (no image)",
        "Accuracy of all questions by scorer",
    ]
    assert {trace.name for trace in figures["Accuracy by category (image)"].data} == {"baseline", "viral", "chance"}


def test_a_prompt_that_nobody_uses_is_refused(runs_folder: Path, tmp_path: Path) -> None:
    words = ["--model", str(runs_folder / "baseline"), "--limit", "2", "--output_dir", str(tmp_path)]
    said = refused("analyses.benchmark", *words, "--data", "shapes:val", "--prompt", "paper")
    assert "prompt is paper, which a data set that is no benchmark does not have: expected plain, llava" in said
    assert not list(tmp_path.glob("benchmark-*"))
    said = refused("analyses.benchmark", *words, "--data", "pope:nowhere")
    assert "nowhere" in said
