"""Live updates: a page is redrawn when the runs folder changes, and shows how far a demo is."""

from __future__ import annotations

import time
from pathlib import Path

import streamlit as st

from workbench.dashboard.folders import runs_root
from workbench.dashboard.site import Site
from workbench.demo import PROGRESS_FILE, Progress, Stage
from workbench.overview.models import files_below
from workbench.runs import RUN_FILE
from workbench.training_folder import LOG_FILE, RECORD_FILE

SECONDS = 3.0  # between two checks of the folder, at least
SHARE = 0.05  # of the time, at most, is spent on checks where the folder is large
MARKS = {
    "waiting": ":gray[○]",
    "running": ":blue[▶]",
    "done": ":green[✓]",
    "failed": ":red[✗]",
    "stopped": ":orange[■]",
}


def watch() -> None:
    """Redraw the whole page when a log, a record, a stored run, a sweep or the demo's progress has changed."""
    began = time.monotonic()
    drawn = contents(runs_root())
    pause = max(SECONDS, (time.monotonic() - began) / SHARE)

    @st.fragment(run_every=pause)
    def check() -> None:
        if contents(runs_root()) != drawn:
            st.rerun()

    check()


def contents(root: Path) -> frozenset[tuple[str, int]]:
    """Return each file below `root` that pages show, with the time of its last change in ns.

    These files are written under another name and then renamed, so none is ever seen half written.
    """
    files = [
        *root.glob(f"[!.]*/{RUN_FILE}"),
        *files_below(root, PROGRESS_FILE, LOG_FILE, RECORD_FILE, "sweep-*.parquet"),
    ]
    changes = []
    for file in files:
        try:
            changes.append((str(file), file.stat().st_mtime_ns))
        except OSError:
            continue  # it has just been removed
    return frozenset(changes)


def demo(*, ended: bool = False) -> bool:
    """Draw the stages of a demo, if this folder has one, and return whether the demo is running.

    Args:
        ended: draw only a demo that has ended, else only one that has not; a page has one place for each.
    """
    progress = Progress.read(runs_root())
    if progress is None or ended != all(stage.state == "done" for stage in progress.stages):
        return False
    with st.expander("The demo" + (", done" if ended else ""), expanded=not ended):
        st.markdown("\n".join(f"- {MARKS.get(stage.state, '')} {_stage_text(stage)}" for stage in progress.stages))
        if not ended and not progress.alive:
            st.warning(
                "The demo was interrupted; the same command (`viral demo` or `make demo`) continues where it stopped."
            )
        elif not ended:
            st.caption(
                "This page redraws itself whenever there is something new; the other pages do when you open them."
            )
    return not ended and progress.alive


def is_demo() -> bool:
    """Return whether a demo made, or is making, this folder."""
    return Progress.read(runs_root()) is not None


def _stage_text(stage: Stage) -> str:
    if stage.state == "done":
        return f"{stage.title}: {stage.seconds:.0f} s"
    details = {
        "waiting": "still to come",
        "running": f"since {stage.started[11:19]} UTC",
        "failed": "failed; the terminal shows why",
        "stopped": "interrupted",
    }
    return f"{stage.title}: {details[stage.state]}"


def unfinished(site: Site) -> bool:
    """Return whether one of the chosen models is still being trained."""
    return any(site.models.by_key[key].state == "training" for key in site.chosen)
