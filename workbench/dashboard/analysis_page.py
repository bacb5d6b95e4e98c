"""The page of an analysis: its stored runs compared in figures and a table, and a form that starts a new run.

The form also shows the command that it would run.
"""

from __future__ import annotations

import dataclasses
import io
import shlex
import time
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from math import isinf
from typing import Any, get_type_hints

import pandas as pd
import plotly.graph_objects as go
import streamlit as st

from workbench import figures, runs
from workbench.analysis.declaration import Analysis
from workbench.analysis.discover import load_analysis, words_of
from workbench.dashboard.folders import default_models, runs_root, trained_models
from workbench.dashboard.jobs import jobs, may_start
from workbench.options import Range, ranges, texts
from workbench.runs import Run

CURVES = "Curves and table"


def page(name: str) -> None:
    """Draw the page of the analysis `name`."""
    analysis = load_analysis(name)
    st.title(analysis.heading)
    st.caption(analysis.title)
    _show_finished(name)
    table = runs.index(runs_root())
    table = table[table["analysis"] == name]
    if table.empty:
        st.info(
            f"No run of this analysis is stored yet. Run `{' '.join(words_of(name))} --model runs/baseline runs/viral`,"
            " or start it below."
        )
    else:
        _stored(analysis, table)
    with st.expander("A new run", expanded=table.empty):
        _new(analysis)
    if job := jobs().newest.get(name):
        st.fragment(_watch, run_every=1.0 if job.state == "running" else None)(name)


def _stored(analysis: Analysis, table: pd.DataFrame) -> None:
    """Draw the stored runs that the user chooses, by default those like the newest one."""
    names = {row["key"]: _run_name(analysis, row) for _, row in table.iterrows()}
    folders = dict(zip(table["key"], table["folder"], strict=True))
    newest = table.iloc[0]
    like_newest = [
        row["key"] for _, row in table.iterrows() if (row["data"], row["config"]) == (newest["data"], newest["config"])
    ]
    chosen = st.multiselect(
        "Runs",
        list(names),
        default=sorted(like_newest, key=names.__getitem__),
        format_func=names.__getitem__,
        key="run",
        bind="query-params",
    )
    if not chosen:
        st.info("Choose one or more runs.")
        return
    loaded = [runs.load(folders[key]) for key in chosen]
    labeled = _labeled(loaded, names)
    _warn(loaded)
    views = _views(analysis.name)
    if views:
        view = st.segmented_control(
            "View", [CURVES, *views], default=CURVES, key="view", bind="query-params", label_visibility="collapsed"
        )
        if view in views:
            views[view](labeled)
            return
    for title, figure in analysis.figures(labeled).items():
        st.subheader(title)
        st.plotly_chart(figure, width="stretch", config=figures.EXPORT, key=title)
    summary = analysis.summary(labeled)
    _table(summary)
    left, right = st.columns(2)
    left.download_button("Table as CSV", summary.to_csv(index=False), f"{analysis.name}.csv", "text/csv")
    archive = partial(_archive, analysis.figures(labeled))
    right.download_button("Figures as HTML", archive, f"{analysis.name}.zip", "application/zip")
    with st.expander("Commands"):
        for run in labeled.values():
            st.code(shlex.join(run.record["argv"]), language="bash")


def _views(name: str) -> dict[str, Callable[[Mapping[str, Run]], None]]:
    """Return an analysis's interactive views: `VIEWS` of `workbench/dashboard/<name>_views.py`, if that exists."""
    module = f"workbench.dashboard.{name}_views"
    return import_module(module).VIEWS if find_spec(module) else {}


def _warn(loaded: list[Run]) -> None:
    """Warn where runs differ in config or images, since their chance levels may differ then."""
    questions = [
        {key: value for key, value in run.record["config"].items()} | {"images": run.record["data_fingerprint"]}
        for run in loaded
    ]
    differ = sorted(key for key in questions[0] if len({str(question.get(key)) for question in questions}) > 1)
    if differ:
        st.warning(
            f"These runs differ in {', '.join(differ)}, so their chance levels may differ: compare each run with"
            " its own chance level."
        )


def _table(summary: pd.DataFrame) -> None:
    """Draw the summary; if it has layers, the rows of the layer that the user chooses."""
    shown = summary
    if "layer" in summary:
        layers = sorted(summary["layer"].unique())
        layer = layers[0]
        if len(layers) > 1:
            layer = st.select_slider("Layer", layers, value=layers[len(layers) // 2], key="layer", bind="query-params")
        shown = summary[summary["layer"] == layer]
    numbers = {c: st.column_config.NumberColumn(format="%.3f") for c in summary.select_dtypes("float")}
    st.dataframe(shown, hide_index=True, width="stretch", column_config=numbers)


def _archive(drawn: dict[str, go.Figure]) -> bytes:
    """Return a zip of one self-contained HTML page per figure, which fetches and uploads nothing."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for title, figure in drawn.items():
            page = figure.to_html(include_plotlyjs=True, config=figures.EXPORT)
            archive.writestr(f"{title.lower().replace(' ', '_').replace('/', '_')}.html", page)
    return content.getvalue()


def _new(analysis: Analysis) -> None:
    """Draw a form with the fields of the analysis's Config, and the command that it stands for."""
    models = trained_models(finished=True)
    chosen = st.multiselect("Models", models, default=default_models(models), key="new-model")
    words = [*words_of(analysis.name), "--model", *(str(runs_root() / name) for name in chosen)]
    hints, allowed, text_of = get_type_hints(analysis.config), ranges(analysis.config), texts(analysis.config)
    flags: list[list[str]] = []
    for column, field in zip(st.columns(3) * len(hints), dataclasses.fields(analysis.config), strict=False):
        name = field.name
        flags.append(_flag(column, field, hints[name], allowed.get(name, Range()), text_of.get(name)))
    words += [word for flag in flags for word in flag]
    words += ["--output_dir", str(runs_root())]
    st.code(shlex.join(words), language="bash")
    wrong = [word for flag in flags for word in flag[1:] if word.startswith("-")]
    if wrong:
        st.error(f"'{wrong[0]}' begins with a dash, like an option: expected a value.")
    _start(analysis.name, words, ready=bool(chosen) and not wrong)


def _start(name: str, words: list[str], *, ready: bool) -> None:
    """Draw the button that runs the command."""
    job = jobs().newest.get(name)
    running = job is not None and job.state == "running"
    if not may_start():
        st.caption(
            "This page starts jobs only if the dashboard is served to this machine alone (`--server.address"
            " 127.0.0.1`). Copy the command and run it in a terminal."
        )
    elif st.button("Start", type="primary", disabled=running or not ready, key="start-job"):
        jobs().start(name, words)
        st.session_state[f"seen-{name}"] = None
        st.rerun()


def _watch(name: str) -> None:
    """Draw a job's progress and the button that stops it, or how it ended; redrawn every second while it runs."""
    job = jobs().newest[name]
    state = job.state
    if state == "running":
        progress = job.progress()
        share, text = progress if progress else (0.0, (job.lines() or ["starting"])[-1])
        st.progress(share, text=text)
        st.caption(f"Running for {time.monotonic() - job.started:.0f} s: `{shlex.join(job.words)}`")
        if st.button("Stop", disabled=job.stopped, key="stop-job"):
            job.stop()
        return
    if st.session_state.get(f"watched-{name}") is job:  # it has just ended: redraw the page with what it stored
        del st.session_state[f"watched-{name}"]
        st.rerun()
    if state == "failed":
        st.error(job.error())
    elif state == "stopped":
        st.warning("Stopped. Finished chunks are stored; the same command continues from there.")
    else:
        st.success("Done: its runs are shown above.")
    with st.expander("Output"):
        st.code("\n".join(job.lines()[-30:]), language=None)


def _show_finished(name: str) -> None:
    """Select the runs of a job that has ended since this page showed it running, so that its result appears."""
    job = jobs().newest.get(name)
    if job is None:
        return
    seen = f"seen-{name}"
    if job.state == "running":
        st.session_state[f"watched-{name}"] = job
        st.session_state[seen] = None
    elif job.state == "done" and seen in st.session_state:
        del st.session_state[seen]
        stored = set(runs.index(runs_root())["key"])
        if keys := [key for key in job.keys(name) if key in stored]:
            st.session_state["run"] = keys


def _flag(column: Any, field: dataclasses.Field[Any], kind: Any, allowed: Range, text: str | None) -> list[str]:
    """Draw one field of the form, and return the words that it adds to the command (none at its default).

    Args:
        kind: type of the field.
        allowed: its range.
        text: explanation that appears beside its name.
    """
    default: Any = field.default
    key, options = f"new-{field.name}", getattr(kind, "__args__", ())
    value: Any
    if kind is bool:
        value = column.checkbox(field.name, default, key=key, help=text)
        return [] if value == default else [f"--{field.name}" if value else f"--no-{field.name}"]
    if kind in (int, float):
        low, high = (None if isinf(end) else kind(end) for end in (allowed.low, allowed.high))
        value = column.number_input(field.name, low, high, default, key=key, help=text)
        return [] if value == default else [f"--{field.name}", str(value)]
    is_choice = bool(options) and all(isinstance(option, str) for option in options)
    if is_choice and getattr(kind, "__origin__", None) is not tuple:
        value = column.selectbox(field.name, options, index=options.index(default), key=key, help=text)
        return [] if value == default else [f"--{field.name}", value]
    before = " ".join(map(str, default)) if isinstance(default, tuple) else "" if default is None else str(default)
    value = column.text_input(field.name, before, key=key, help=text)
    words = value.split() if isinstance(default, tuple) else [value]  # a path may contain spaces
    return [] if value == before else [f"--{field.name}", *words]


def _run_name(analysis: Analysis, row: pd.Series) -> str:
    """Return a name of a stored run: model, data, options that differ from their defaults, start of the key."""
    defaults = {
        f.name: f.default if f.default is not dataclasses.MISSING else None for f in dataclasses.fields(analysis.config)
    }
    config = {key: tuple(value) if isinstance(value, list) else value for key, value in row["config"].items()}
    special = [
        f"{key} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"
        for key, value in config.items()
        if value != defaults.get(key)
    ]
    return " · ".join([row["label"], row["data"], *(s for s in special if not s.startswith("data ")), row["key"][:6]])


def _labeled(loaded: list[Run], names: dict[str, str]) -> dict[str, Run]:
    """Return the runs by their label, or by their full name where two runs share a label."""
    labels = [run.label for run in loaded]
    return {run.label if labels.count(run.label) == 1 else names[run.key]: run for run in loaded}
