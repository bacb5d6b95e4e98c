"""Alignment: stored runs of the CKNNA analysis, any number of them over one another."""

from __future__ import annotations

import shlex
from importlib import import_module

import pandas as pd
import streamlit as st

from workbench import figures, runs
from workbench.dashboard.shell import runs_root
from workbench.runs import Run


def page() -> None:
    """Layer curves of the chosen runs, and their scores at one layer."""
    st.title("Alignment")
    table = runs.index(runs_root())
    table = table[table["analysis"] == "cknna"]
    if table.empty:
        st.info("No alignment is stored yet. Run `python -m analyses.cknna --model runs/baseline runs/viral`.")
        return
    names = dict(zip(table["key"], [_name(row) for _, row in table.iterrows()], strict=True))
    folders = dict(zip(table["key"], table["folder"], strict=True))
    newest = [key for key in names if _question(table, key) == _question(table, next(iter(names)))]
    newest.sort(key=lambda key: names[key])
    chosen = st.multiselect("Runs", list(names), default=newest, format_func=lambda key: names[key], key="run", bind="query-params")
    if not chosen:
        st.info("Choose one or more runs.")
        return
    found = _labelled([runs.load(folders[key]) for key in chosen], names)
    if len({(*(r.record["config"][o] for o in ("k", "pooling", "limit", "tokens_per_image")), r.record["data_fingerprint"]) for r in found.values()}) > 1:
        st.warning(
            "These runs differ in data, n, k or pooling, so their chance levels differ: compare each with its own null in the table.", icon=":material/warning:"
        )
    analysis = import_module("analyses.cknna").ANALYSIS
    for title, figure in analysis.figures(found).items():
        st.plotly_chart(figure, width="stretch", config=figures.EXPORT, key=title)
    _at_layer(analysis.summary(found))
    with st.expander("Commands"):
        for run in found.values():
            st.code(shlex.join(run.record["argv"]), language="bash")


def _at_layer(scores: pd.DataFrame) -> None:
    layers = sorted(scores["layer"].unique())
    layer = layers[0]
    if len(layers) > 1:
        layer = st.select_slider("Layer", layers, value=layers[len(layers) // 2], key="layer", bind="query-params")
    st.dataframe(
        scores[scores["layer"] == layer],
        hide_index=True,
        width="stretch",
        column_config={c: st.column_config.NumberColumn(format="%.3f") for c in ("score", "low", "high", "null_mean", "null_q95", "p")},
    )
    st.download_button("Download all layers as CSV", scores.to_csv(index=False), "cknna.csv", "text/csv", icon=":material/download:")


def _question(table: pd.DataFrame, key: str) -> str:
    row = table[table["key"] == key].iloc[0]
    return f"{row['data']} {row['config']}"


def _name(row: pd.Series) -> str:
    config = row["config"]
    return f"{row['label']} · {', '.join(config['vfm'])} · {row['data']} · {config['pooling']} · k={config['k']} · {config['limit']} images · {row['key'][:6]}"


def _labelled(loaded: list[Run], names: dict[str, str]) -> dict[str, Run]:
    """Short labels where they are unique, the full name where two runs share a label."""
    labels = [run.label for run in loaded]
    return {run.label if labels.count(run.label) == 1 else names[run.key]: run for run in loaded}
