"""`analyses.benchmark` on a benchmark's folder, by its command: answers, scores, the blind run, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analyses.benchmark import ANALYSIS
from tests.conftest import refused, run
from workbench.data import load_data
from workbench.runs import load

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
        assert record["version"] == 1
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
