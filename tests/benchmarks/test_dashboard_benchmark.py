"""The benchmark of the dashboard notices a wrong number; its large folder has as many runs as it says."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from benchmarks.dashboard.__main__ import server, user
from benchmarks.dashboard.folders import enlarge, facts
from tests.workbench.dashboard.test_dashboard import share
from tests.workbench.overview.folders import cknna, train
from workbench.overview.models import read_models
from workbench.overview.stored import read_stored


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    root = tmp_path / "runs"
    train(root, "baseline", right=share(0.5))
    train(root, "viral", right=share(0.9), aligned=True, layer=[1])
    for name, shift in (("baseline", 0.0), ("viral", 0.1)):
        cknna(root, name, {layer: [0.5 + shift * layer, 0.51, 0.52] for layer in range(7)})
    return root


@pytest.mark.slow
def test_a_user_notices_when_what_is_shown_is_not_what_is_stored(pair: Path) -> None:
    stored = facts(pair)
    with server(pair) as (port, _):
        honest = user(port, stored, 24, 0)
        assert honest.numbers > 100
        assert (honest.wrong, honest.errors) == ([], [])
        answers = stored.answers["viral"]
        answers.loc[0, ["correct", "p_right"]] = [not answers.loc[0, "correct"], 0.123]
        stored.layers["viral"].clear()
        stored.accuracies["viral"][0] += 1e-6
        wrong = " ".join(user(port, stored, 24, 0).wrong)
    for page in ("of Home", "of Examples", "accuracy of viral", "of viral at layer"):
        assert page in wrong, page


def test_the_large_folder_is_read_as_what_it_says(pair: Path, tmp_path: Path) -> None:
    enlarge(pair, tmp_path / "many", seeds=3, runs=9, checkpoints=2)
    stored = read_stored(tmp_path / "many")
    models = read_models(tmp_path / "many", stored.runs)
    assert (len(stored.runs), stored.broken) == (9, ())
    assert {name: [m.seed for m in of] for name, of in models.variants.items()} == {
        "baseline": [0, 1, 2],
        "viral": [0, 1, 2],
    }
    assert len(list((tmp_path / "many" / "viral-s1").glob("checkpoint-*"))) == 2
    assert not pd.read_parquet(tmp_path / "many" / "viral-s1" / "evaluation.parquet").empty
