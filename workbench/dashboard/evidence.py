"""Evidence: which claims hold, how each number was made, and what to run next."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import pandas as pd
import streamlit as st

from workbench.dashboard import claims
from workbench.dashboard.new_run import job_queue, new_run, start_button
from workbench.dashboard.rows import chosen_rows
from workbench.dashboard.site import Site, choice, choices, plain, unusable
from workbench.overview.differences import Pair
from workbench.overview.report import selection_report
from workbench.overview.stored import StoredRun, options_text

PARTS = {"claims": "Claims", "runs": "Stored runs", "new": "New run and jobs", "report": "Report"}


def page(site: Site) -> None:
    """Draw one of the parts of the page."""
    st.title("Which claims hold, and how was each number made?")
    part = choice("part", list(PARTS), "claims", "Part", format_func=PARTS.__getitem__, label_visibility="collapsed")
    job_queue()
    {"claims": claims.page, "runs": _runs, "new": new_run, "report": _report}[part](site)


def _runs(site: Site) -> None:
    """Draw every stored analysis and everything that cannot be read."""
    rows = unusable(site)
    st.markdown(f"{len(site.stored.runs)} analyses are stored; {len(rows)} files or folders cannot be used.")
    if rows:
        st.subheader("Not usable")
        st.dataframe(pd.DataFrame(rows), hide_index=True, width="stretch")
    if not site.stored.runs:
        st.info("No analysis is stored yet. Try `python -m analyses.cknna --model runs/baseline runs/viral`.")
        return
    table = pd.DataFrame([_row(run) for run in site.stored.runs])
    left, right = st.columns(2)
    names = sorted(table["analysis"].unique())
    with left:
        kinds = choices("kind", names, [], "Analyses", placeholder="all")
    only = right.toggle("Only of the chosen models", key="only", bind="query-params")
    shown = table[table["analysis"].isin(kinds)] if kinds else table
    shown = shown[shown["model"].isin(site.chosen)] if only else shown
    chosen = chosen_rows(shown.drop(columns="command"), shown["key"].tolist(), "run", table["key"].tolist())
    st.caption("Choose rows to see their commands, hashes and versions.")
    records = {run.key: run.record for run in site.stored.runs}
    for key in chosen:
        st.code(shlex.join(records[key].get("argv", [])), language="bash", wrap_lines=True)
        st.caption(plain(_made_with(records[key])))
    st.download_button("Table as CSV", shown.to_csv(index=False), "runs.csv", "text/csv")


def _row(run: StoredRun) -> dict[str, object]:
    record = run.record
    return {
        "analysis": run.analysis,
        "model": run.model,
        "data": record.get("data", ""),
        "limit": record["config"].get("limit"),
        "created": run.created[:16],
        "seconds": record.get("seconds"),
        "MB": round(_size(run.folder) / 1e6, 2),
        "commit": record.get("git", "")[:8] + (" (dirty)" if record.get("dirty") else ""),
        "key": run.key,
        "options": options_text(run),
        "command": shlex.join(record.get("argv", [])),
    }


def _size(folder: Path) -> int:
    """Return the bytes of the files in a folder; a file that has just been removed has none."""
    size = 0
    with suppress(OSError):
        for file in folder.iterdir():
            with suppress(OSError):
                size += file.stat().st_size
    return size


def _made_with(record: Mapping[str, Any]) -> str:
    """Return hashes, versions and machine of a stored run in one line."""
    hashes = {"model": record.get("model_fingerprint"), "data": record.get("data_fingerprint")}
    hashes |= record.get("vfm_fingerprints") or {}
    parts = [" ".join(f"{name} {value}" for name, value in hashes.items() if value)]
    parts.append(", ".join(f"{name} {version}" for name, version in record.get("packages", {}).items()))
    parts.append(" ".join(str(record[name]) for name in ("device", "platform") if record.get(name)))
    return "; ".join(filter(None, parts))


def _report(site: Site) -> None:
    """Draw the buttons that make one HTML page of the chosen models."""
    if not site.chosen:
        st.info("Choose models above.")
        return
    st.markdown(
        "One HTML page of the chosen models, for mail or print: what came out, accuracies, every stored measure by"
        " layer, claims, commands. It needs no network."
    )
    if site.pair is None:
        st.info("A report compares two models: choose a second one above.")
    else:
        st.download_button(
            "Report of this choice",
            partial(_page_of, site, site.pair, _address(site)),
            "report.html",
            "text/html",
            on_click="ignore",
            type="primary",
        )
    words = ["python", "-m", "analyses.all", "--model", *site.words_of_models(site.chosen)]
    words += ["--output_dir", str(site.root), "--report", str(site.root / "report.html")]
    st.markdown(
        "The long form has every figure of every analysis. What is stored is not computed again; what is missing is."
    )
    st.code(shlex.join(words), language="bash", wrap_lines=True)
    start_button("all", words, ready=True, label="Run what is missing")
    file = site.root / "report.html"
    if file.is_file():
        st.download_button(
            f"Long form ({file.stat().st_size / 1e6:.1f} MB)", file.read_bytes, "report.html", "text/html"
        )
        st.caption(plain(f"Made {pd.Timestamp(file.stat().st_mtime, unit='s'):%Y-%m-%d %H:%M} UTC."))


def _address(site: Site) -> str:
    """Return the address of Home with the same choice."""
    here = urlsplit(st.context.url or "")
    return here._replace(path=here.path.removesuffix("evidence"), query=urlencode(site.address(), True)).geturl()


def _page_of(site: Site, pair: Pair, link: str) -> bytes:
    page = selection_report(site.root, site.stored, site.models, pair, site.chosen, site.colors, link)
    return page.encode()
