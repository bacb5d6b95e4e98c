"""Rows of variants: means over seeds of accuracies on the same questions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.workbench.overview.folders import train
from workbench.intervals import t_interval
from workbench.overview.models import read_models
from workbench.overview.table import asked_alike, variant_accuracies, variant_rows

HALF, ALL, NONE = [True, False], [True, True], [False, False]


def asked_of(folder: Path, content: str) -> None:
    """Change the fingerprint of the data that a training was evaluated on."""
    record = json.loads((folder / "training.json").read_text())
    (folder / "training.json").write_text(json.dumps(record | {"test": content}))


def test_means_over_seeds_are_of_those_that_were_asked_the_same_as_most(tmp_path: Path) -> None:
    for seed, (first, second) in enumerate(((NONE * 2, ALL * 2), (ALL * 20, HALF * 20), (HALF * 20, ALL * 20))):
        for name, right in (("baseline", first), ("viral", second)):
            folder = train(tmp_path, f"{name}-s{seed}", right=right, seed=seed, aligned=name == "viral")
            asked_of(folder, "same" if seed else "other")
    models = read_models(tmp_path)
    rows = variant_rows(models, "baseline-s1").set_index("variant")
    interval = t_interval([1.0, 0.5], bounds=(0.0, 1.0))
    assert rows.loc["baseline", ["seeds", "accuracy", "low", "high"]].tolist() == pytest.approx(
        [2, 0.75, interval.low, interval.high]
    )
    assert rows["why"].tolist() == [f"without {v}-s0, asked other questions than {v}-s1" for v in ("baseline", "viral")]
    changes = t_interval([-0.5, 0.5], bounds=(-1.0, 1.0))  # without seed 0
    assert rows.loc["viral", ["difference", "d_low", "d_high"]].tolist() == [0.0, changes.low, changes.high]
    of_types = variant_accuracies(models.variants["baseline"]).set_index("category")
    assert of_types["accuracy"].to_dict() == {"colour": 1.0, "count": 0.5, "mean of types": 0.75}
    assert set(of_types["over"]) == {"2 seeds"}
    assert set(of_types["n_images"]) == {20}


def test_of_equally_many_seeds_those_that_were_asked_as_the_first_count(tmp_path: Path) -> None:
    for seed, content in enumerate(("other", "same", "same", "other")):
        asked_of(train(tmp_path, f"baseline-s{seed}", right=HALF * 2, seed=seed), content)
    alike, why = asked_alike(read_models(tmp_path).variants["baseline"])
    assert [model.key for model in alike] == ["baseline-s0", "baseline-s3"]
    assert why == "without baseline-s1, baseline-s2, asked other questions than baseline-s0"
    train(tmp_path, "baseline-s2-copy", right=HALF * 2, seed=2)  # a copy makes no majority
    assert [model.key for model in asked_alike(read_models(tmp_path).variants["baseline"])[0]] == [
        "baseline-s0",
        "baseline-s3",
    ]
