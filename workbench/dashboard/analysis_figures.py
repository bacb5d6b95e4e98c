"""All figures and the summary that an analysis makes of the chosen models, as its command stores them."""

from __future__ import annotations

import io
import shlex
import zipfile
from collections.abc import Mapping
from functools import partial
from typing import Any

import plotly.graph_objects as go
import streamlit as st

from workbench import figures
from workbench.analysis.discover import words_of
from workbench.dashboard.drawn import drawn
from workbench.dashboard.papers import archive, chart
from workbench.dashboard.site import Site, plain
from workbench.errors import WorkbenchError


def every_figure(site: Site, analysis: str, key: str) -> None:
    """Draw all figures and the summary that an analysis makes of the chosen models, with downloads and commands."""
    lists = site.stored.of(analysis, site.chosen)
    if not lists:
        words = " ".join([*words_of(analysis), "--model", *(str(site.root / name) for name in site.chosen)])
        st.info(f"No run of this analysis is stored for these models. `{words}` makes one.")
        return
    runs = lists[0]
    try:
        drawn_figures, captions, summary = drawn(
            analysis,
            {figures.plain_name(run.model): str(run.folder) for run in runs},
            {figures.plain_name(run.model): site.colors[run.model] for run in runs},
        )
    except WorkbenchError as error:
        st.error(plain(error))
        return
    for title, figure in drawn_figures.items():
        st.markdown(f"**{plain(title)}**")
        chart(figure, f"{key}-{title}", captions[title])
    forms = {name: "%.3g" if name in ("p", "p_holm") else "%.3f" for name in summary.select_dtypes("float")}
    numbers = {name: st.column_config.NumberColumn(format=form) for name, form in forms.items()}
    st.dataframe(summary, hide_index=True, width="stretch", column_config=numbers, key=f"{key}-table")
    with st.container(horizontal=True):
        st.download_button("Table as CSV", summary.to_csv(index=False), f"{analysis}.csv", "text/csv", key=f"{key}-csv")
        st.download_button(
            "Figures as HTML", partial(_archive, drawn_figures), f"{analysis}.zip", "application/zip", key=f"{key}-zip"
        )
        st.download_button(
            "Figures for a paper",
            partial(archive, drawn_figures, captions),
            f"{analysis}-paper.zip",
            "application/zip",
            key=f"{key}-paper",
            help="Each as SVG, PDF, PNG, CSV, LaTeX table, caption and Python; takes a second per figure",
        )
    for run in runs:
        st.code(shlex.join(run.record.get("argv", [])), language="bash", wrap_lines=True)


def _archive(drawn_figures: Mapping[str, Any]) -> bytes:
    """Return a zip of an HTML page per figure beside one copy of plotly.js, which fetches and uploads nothing."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("plotly.min.js", figures.javascript())
        for title, figure in drawn_figures.items():
            page = go.Figure(figure).to_html(include_plotlyjs="plotly.min.js", config=figures.EXPORT)
            archive.writestr(f"{title.lower().replace(' ', '_').replace('/', '_')}.html", page)
    return content.getvalue()
