"""What is going on while a page is open: the page is drawn again when something in the runs folder has changed, and the
demo says how far it is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import streamlit as st

from workbench.dashboard.folders import files_below, runs_root
from workbench.demo import PROGRESS_FILE, Progress, Stage
from workbench.runs import RUN_FILE
from workbench.training_folder import LOG_FILE, RECORD_FILE

T = TypeVar("T")
SECONDS = 3.0  # between two looks
SHARE = 0.05  # of the time that looks may take, where the folder is large
MARKS = {
    "waiting": ":gray[○]",
    "running": ":blue[▶]",
    "done": ":green[✓]",
    "failed": ":red[✗]",
    "stopped": ":orange[■]",
}


def watch() -> None:
    """Draw the whole page again when a log, a record, a stored run, a sweep or the demo's progress has changed."""
    began = time.monotonic()
    seen = contents(runs_root())
    pause = max(SECONDS, (time.monotonic() - began) / SHARE)

    @st.fragment(run_every=pause)
    def look() -> None:
        if contents(runs_root()) != seen:
            st.rerun()

    look()


def contents(root: Path) -> frozenset[tuple[str, int]]:
    """What pages show of `root`: each file with the time of its last change. All of them are written aside and renamed,
    so none is seen half written."""
    files = [
        *root.glob(f"[!.]*/{RUN_FILE}"),
        *files_below(root, PROGRESS_FILE, LOG_FILE, RECORD_FILE, "sweep-*.parquet"),
    ]
    found = []
    for file in files:
        try:
            found.append((str(file), file.stat().st_mtime_ns))
        except OSError:
            continue  # there is none, or it has just gone
    return frozenset(found)


def follow(key: str, default: Sequence[T]) -> Sequence[T] | None:
    """The default of a multiselect, which changes with what is there for as long as the user leaves the widget alone.

    Returns:
        What to give as its default: None where its value is set here.
    """
    before = st.session_state.get(f"{key}-default")
    st.session_state[f"{key}-default"] = list(default)
    if before is None or before == list(default) or st.session_state.get(key) != before:
        return default
    st.session_state[key] = list(default)
    return None


def demo() -> bool:
    """The stages of a demo, where this folder has one: what is done, what runs, what is still to come; returns whether
    it is under way."""
    progress = Progress.read(runs_root())
    if progress is None:
        return False
    ended = all(stage.state == "done" for stage in progress.stages)
    with st.expander("The demo" + (", done" if ended else ""), expanded=not ended):
        st.markdown("\n".join(f"- {MARKS.get(stage.state, '')} {_said(stage)}" for stage in progress.stages))
        if not ended and not progress.alive:
            st.warning(
                "The demo was interrupted; the same command (`viral demo` or `make demo`) goes on where it stopped."
            )
        elif not ended:
            st.caption(
                "This page draws itself again whenever there is something new; the other pages when you open them."
            )
    return not ended and progress.alive


def _said(stage: Stage) -> str:
    if stage.state == "done":
        return f"{stage.title}: {stage.seconds:.0f} s"
    more = {
        "waiting": "still to come",
        "running": f"since {stage.started[11:19]} UTC",
        "failed": "failed, the terminal says why",
        "stopped": "interrupted",
    }
    return f"{stage.title}: {more[stage.state]}"
