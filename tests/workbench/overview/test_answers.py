"""Numbers of single images, as Examples shows them beside the answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.workbench.overview.folders import cknna, train
from workbench.overview.answers import image_numbers
from workbench.overview.differences import by_layer, pairs_of
from workbench.overview.measures import MEASURES
from workbench.overview.models import read_models
from workbench.overview.stored import read_stored


def test_numbers_of_an_image_are_of_the_seeds_that_both_groups_have(tmp_path: Path) -> None:
    """Seed 1, of which only the baseline is measured, is far above seed 0: its mean would turn the sign."""
    for seed in (0, 1):
        train(tmp_path, f"baseline-s{seed}", right=[True] * 4, seed=seed)
        train(tmp_path, f"viral-s{seed}", right=[True] * 4, seed=seed, aligned=True)
    images = np.linspace(0, 0.01, 20)
    cknna(tmp_path, "baseline-s0", {0: 0.2 + images})
    cknna(tmp_path, "baseline-s1", {0: 0.6 + images})
    cknna(tmp_path, "viral-s0", {0: 0.3 + images[:10]})
    stored = read_stored(tmp_path)
    models = read_models(tmp_path, stored.runs)
    (pair,) = pairs_of(models, "baseline-s0", [key for key in models.by_key if key != "baseline-s0"])
    measure = MEASURES["cknna"]
    table = image_numbers(measure, pair, stored.runs)
    assert table["image_id"].tolist() == [f"image{i:03}" for i in range(10)]
    assert table["first"].to_numpy() == pytest.approx(0.2 + images[:10])
    assert table["second"].to_numpy() == pytest.approx(0.3 + images[:10])
    changes = by_layer(measure, pair, {run.model: run for run in stored.runs})
    assert table["difference"].mean() == pytest.approx(0.1) == changes["score"].item()
    cknna(tmp_path, "viral-s1", {0: 0.8 + images})
    both = image_numbers(measure, pair, read_stored(tmp_path).runs).set_index("image_id")
    assert both.loc["image000", ["first", "second", "difference"]].tolist() == pytest.approx([0.4, 0.55, 0.15])
    assert both.loc["image019", "difference"] == pytest.approx(0.2)  # an image of seed 1 alone
