"""The campaign of kills: what it calls different, and a small one of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from benchmarks.resume.compare import differences
from tests.conftest import run


def finished(folder: Path, *, weight: float = 1.0, loss: float = 2.0, seconds: float = 3.0, left: bool = False) -> Path:
    """A small training folder."""
    (folder / "out" / "checkpoint-2").mkdir(parents=True)
    save_file({"w": torch.tensor([weight])}, folder / "out" / "model.safetensors")
    torch.save({"state": [torch.tensor(weight)], "lr": weight}, folder / "out" / "checkpoint-2" / "optimizer.pt")
    pd.DataFrame({"step": [1, 2], "loss": [float("nan"), loss], "seconds": seconds}).to_parquet(
        folder / "out" / "training.parquet"
    )
    (folder / "out" / "training.json").write_text(
        json.dumps({"seconds": seconds, "recipe": {"output_dir": str(folder), "loss": loss}})
    )
    if left:
        (folder / "out" / ".training.parquet.77").write_text("half")
        (folder / ".out.lock").write_text("")  # of a process that is dead: no longer held
    return folder


def test_a_difference_is_named_and_the_clock_is_none(tmp_path: Path) -> None:
    whole = finished(tmp_path / "whole")
    assert differences(whole, finished(tmp_path / "same", seconds=9.0)) == []
    moved = differences(whole, finished(tmp_path / "moved", weight=1.0000001))
    assert [line.split(":")[0] for line in moved] == ["out/checkpoint-2/optimizer.pt"] * 2 + ["out/model.safetensors"]
    assert differences(whole, finished(tmp_path / "logged", loss=2.5)) == [
        "out/training.json: recipe/loss is 2.5 and should be 2.0",
        "out/training.parquet: loss/1 is 2.5 and should be 2.0",
    ]
    assert differences(whole, finished(tmp_path / "left", left=True)) == ["out/.training.parquet.77 is left over"]


@pytest.mark.slow
def test_two_kills_and_a_table() -> None:
    done = run("benchmarks.resume", "--kills", "2", "--seed", "3", "--forked", "--only", "student, LoRA")
    header, *rows, whole = done.stdout.strip().splitlines()
    assert header.split()[:3] == ["setting", "runs", "kills"]
    assert len(rows) == 2
    assert whole.split()[0] == "all"
    assert whole.split()[2] == "2"
    assert whole.endswith("yes")


@pytest.mark.slow
def test_a_killed_analysis_ends_with_the_same_tables() -> None:
    done = run("benchmarks.resume.analyses", "--kills", "3", "--seed", "1", "--only", "cknna")
    header, *rows = done.stdout.strip().splitlines()
    assert header.split() == ["analysis", "runs", "kills", "of", "one", "rank", "equal"]
    assert [row.split()[-1] for row in rows] == ["yes", "yes"]
    assert sum(int(row.split()[-3]) for row in rows) == 3
