"""Events of a command, for a program that started it."""

from __future__ import annotations

from pathlib import Path

import pytest

from workbench.progress import EVENTS, emit, progress_bar, read_events


def test_bars_and_results_are_events_of_whoever_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "events.jsonl"
    emit("run", key="nobody asked")
    monkeypatch.setenv(EVENTS, str(file))
    assert read_events(file) == []
    emit("run", analysis="cknna", key="é")
    bar = progress_bar("reading", total=4)
    bar.delay, bar.start_t = 0, bar.start_t - 10
    bar.update(3)
    bar.close()
    progress_bar("nothing", total=1, disable=True).update()
    first, *bars = read_events(file)
    assert first == {"event": "run", "analysis": "cknna", "key": "é"}
    assert {"event": "progress", "what": "reading", "done": 3, "total": 4} in bars
    assert {bar["what"] for bar in bars} == {"reading"}
    with file.open("a") as opened:
        opened.write('{"event": "pro')  # a line that is being written
    assert len(read_events(file)) == len(bars) + 1


def test_events_that_cannot_be_written_do_not_stop_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(EVENTS, "/nowhere/events.jsonl")
    emit("error", sentence="x")
    assert list(progress_bar("a", [1, 2])) == [1, 2]
