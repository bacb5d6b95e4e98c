"""`--export` of every analysis, from the real command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from tests.conftest import refused, run

SAME = ["--vfm", "dinov2-small", "--limit", "6", "--null", "10"]


def test_figures_of_stored_runs_are_exported_with_their_numbers(runs_folder: Path, tmp_path: Path) -> None:
    models = ["--model", str(runs_folder / "baseline"), f"A_b={runs_folder / 'viral'}"]
    words = [*models, *SAME, "--output_dir", str(runs_folder), "--export", str(tmp_path / "paper")]
    printed = run("analyses.cknna", *words).stdout
    assert f": {tmp_path / 'paper'}" in printed
    assert {"csv", "tex", "py", "txt"} <= {file.suffix[1:] for file in (tmp_path / "paper").iterdir()}
    points = pd.read_csv(tmp_path / "paper" / "alignment-by-layer.csv")
    stored = {}
    for file in runs_folder.glob("cknna-*/scores.parquet"):
        table = pd.read_parquet(file)
        stored[table["score"].iloc[0]] = table
    for name in ("baseline", "A_b"):
        of = points[points["curve"] == f"{name} · dinov2-small"]
        table = stored[of["y"].iloc[0]]
        assert of[["x", "y", "low", "high"]].to_numpy() == pytest.approx(
            table[["layer", "score", "low", "high"]].to_numpy(), abs=1e-15
        )
    caption = (tmp_path / "paper" / "alignment-by-layer.txt").read_text()
    for part in ("6 images of shapes:val", "baseline seed ", "A_b seed ", "95 %, over images", "Chance (null mean"):
        assert part in caption
    done = subprocess.run([sys.executable, "alignment-by-layer.py"], cwd=tmp_path / "paper", check=False)
    assert done.returncode == 0


def test_a_folder_that_cannot_be_made_is_refused_before_a_model_is_loaded(runs_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    words = ["--model", str(runs_folder / "viral"), "--export", str(tmp_path / "file" / "x")]
    assert "cannot make folder" in refused("analyses.cknna", *words)


def test_every_analysis_has_the_option() -> None:
    for name in ("permutation", "all"):
        assert "--export" in run(f"analyses.{name}", "--help").stdout
