"""A form that stands for the command of an analysis, and the jobs that it started."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from typing import Any

import streamlit as st

from workbench.analysis.discover import analysis_names, words_of
from workbench.dashboard.access import may_start, why_not
from workbench.dashboard.drawn import options
from workbench.dashboard.form import flags_of
from workbench.dashboard.jobs import Job, jobs
from workbench.dashboard.site import Site, choice, choices, plain
from workbench.errors import WorkbenchError


def new_run(site: Site) -> None:
    """Draw a form with the options of an analysis, and the command that it stands for."""
    names = analysis_names()
    analysis = choice("analysis", names, "cknna" if "cknna" in names else names[0], "Analysis")
    models = [model.key for model in site.models.by_key.values() if model.state == "finished"]
    if not models:
        st.info("No finished model is here yet. Train one with `python -m trainer shapes_viral`, or run `viral demo`.")
        return
    chosen = choices("on", models, [key for key in site.chosen if key in models], "Models")
    words = [*words_of(analysis), "--model", *(str(site.root / name) for name in chosen)]
    try:
        fields = options(analysis)
    except WorkbenchError as error:
        st.error(plain(error))
        return
    for field in fields:
        if field["name"] == "data":
            field["choices"] = _data_sets(site, field["default"])
    flags = flags_of(analysis, fields)
    words += [word for flag in flags for word in flag]
    words += ["--output_dir", str(site.root)]
    st.code(shlex.join(words), language="bash", wrap_lines=True)
    limit = words[words.index("--limit") + 1] if "--limit" in words else _default(fields, "limit")
    _estimate(site, analysis, len(chosen), int(limit))
    wrong = [word for flag in flags for word in flag[1:] if word.startswith("-")]
    if wrong:
        st.error(plain(f"'{wrong[0]}' begins with a dash, like an option: expected a value."))
    start_button(analysis, words, ready=bool(chosen) and not wrong)


def _default(fields: Sequence[Mapping[str, Any]], name: str) -> int:
    return next((int(field["default"]) for field in fields if field["name"] == name and field["default"]), 1)


def _estimate(site: Site, analysis: str, models: int, images: int) -> None:
    """Draw how long the command will take, from how long earlier runs took."""
    earlier = [run.record for run in site.stored.runs if run.analysis == analysis and run.record.get("seconds")]
    if earlier:
        rate = sorted(r["seconds"] / max(1, r["config"].get("limit") or 1) for r in earlier)[len(earlier) // 2]
        st.caption(
            f"About {rate * models * images:.0f} s for {images} images of {models} model{'s' * (models != 1)}, without"
            f" loading them: {len(earlier)} earlier runs took {rate:.2f} s per image (median)."
        )


def _data_sets(site: Site, default: object) -> list[str]:
    """Return the data sets that models or stored analyses of this folder used."""
    specs = [default, *(model.test_data for model in site.models.by_key.values())]
    for model in site.models.by_key.values():
        data = model.recipe.get("data", {})
        specs += [data.get("val"), data.get("test")]
    specs += [run.record.get("data") for run in site.stored.runs]
    return list(dict.fromkeys(spec for spec in specs if spec and isinstance(spec, str)))


def start_button(name: str, words: list[str], *, ready: bool, label: str = "Start") -> None:
    """Draw the button that runs the command."""
    job = jobs().newest.get(name)
    if not may_start():
        st.caption(why_not())
        return
    taken = name in jobs().waiting or (job is not None and job.state == "running")
    label = f"{label}, after the others" if jobs().busy() else label
    if st.button(label, type="primary", disabled=not ready or taken, key="start-job"):
        jobs().add(name, words)
        st.rerun()


def job_queue() -> None:
    """Draw the jobs of this server, redrawn every second while one runs."""
    if jobs().newest or jobs().refused:
        st.fragment(_jobs, run_every=1.0 if jobs().busy() or jobs().waiting else None)()


def _jobs() -> None:
    newest = jobs().newest
    states = {name: job.state for name, job in list(newest.items())}
    before = st.session_state.get("job-states", {})
    st.session_state["job-states"] = states
    if any(before.get(name) == "running" and state != "running" for name, state in states.items()):
        st.rerun()  # its results are in the folder now
    for name, job in list(newest.items()):
        with st.container(border=True):
            _job(name, job)
    for name, why in list(jobs().refused.items()):
        st.error(plain(f"{name}: {why}"))
    for number, (name, words) in enumerate(list(jobs().waiting.items()), start=1):
        with st.container(border=True, horizontal=True, vertical_alignment="center", horizontal_alignment="distribute"):
            st.markdown(f"Waits, number {number}: {plain(name)}", help=f"`{shlex.join(words)}`")
            if may_start() and st.button("Take out of the queue", key=f"remove-{name}"):
                jobs().remove(name)
                st.rerun()


def _job(name: str, job: Job) -> None:
    """Draw a job's progress and the button that stops it, or how it ended."""
    state = job.state
    if state == "running":
        progress = job.progress()
        share, text = progress if progress else (0.0, (job.lines() or ["starting"])[-1])
        st.progress(share, text=plain(f"{name}: {text}"))
        st.caption(f"Running for {time.monotonic() - job.started:.0f} s: `{shlex.join(job.words)}`")
        if may_start() and st.button("Stop", disabled=job.stopped, key=f"stop-{name}"):
            job.stop()
        return
    if state == "failed":
        st.error(plain(f"{name}: {job.error()}"))
    elif state == "stopped":
        st.warning(f"{name}: Stopped. Finished chunks are stored; the same command continues from there.")
    else:
        st.success(f"{name}: Done; its runs are among the stored ones, and on Layers.")
    with st.expander("Output"):
        st.code("\n".join(job.lines()[-30:]), language=None)
