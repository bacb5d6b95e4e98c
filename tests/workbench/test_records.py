"""Records of results: what is written is read again, and damage is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from workbench.errors import RunError
from workbench.records import read_run_record, read_training_record, write_record

RUN: dict[str, Any] = {"analysis": "cknna", "label": "viral", "config": {"k": 10}, "seed": 0, "seconds": 3, "git": "a"}


def test_what_is_written_is_read_with_what_an_analysis_adds(tmp_path: Path) -> None:
    record = RUN | {"layers": [1, 2], "model": Path("runs/viral")}
    write_record(tmp_path / "run.json", record)
    assert read_run_record(tmp_path / "run.json") == record | {"model": "runs/viral"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seconds": "3"}, r"run.json is damaged \(seconds: Input should be a valid number\): expected a record"),
        ({"config": None}, r"\(config: Input should be a valid dictionary\)"),
        ({"left_out": ["a", 1]}, r"\(left_out.1: Input should be a valid string\)"),
        ({"dirty": "no"}, r"\(dirty: Input should be a valid boolean\)"),
    ],
)
def test_a_value_of_another_type_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write_record(tmp_path / "run.json", RUN | change)
    with pytest.raises(RunError, match=message):
        read_run_record(tmp_path / "run.json")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"label": "viral"}', "\x00"])
def test_what_is_no_record_is_one_sentence(tmp_path: Path, text: str) -> None:
    for name, read in (("run.json", read_run_record), ("training.json", read_training_record)):
        (tmp_path / name).write_text(text)
        with pytest.raises(RunError, match=f"{name} is damaged .*: expected a record of a") as caught:
            read(tmp_path / name)
        assert "\n" not in str(caught.value)
        (tmp_path / name).unlink()
        with pytest.raises(RunError, match=f"{name} is damaged .*No such file"):
            read(tmp_path / name)


def test_a_training_of_another_kind_keeps_its_keys(tmp_path: Path) -> None:
    record = {"recipe": {"seed": 1}, "max_length": 128, "dropped": 2}
    (tmp_path / "training.json").write_text(json.dumps(record))
    assert read_training_record(tmp_path / "training.json") == record
