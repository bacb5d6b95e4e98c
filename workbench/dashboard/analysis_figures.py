"""All figures and the summary that an analysis makes of the chosen models, as its command stores them."""

from __future__ import annotations

import io
import shlex
import zipfile
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import plotly.graph_objects as go
import streamlit as st

from workbench import figures
from workbench.analysis.discover import words_of
from workbench.dashboard.drawn import drawn
from workbench.dashboard.papers import archive, chart
from workbench.dashboard.site import Site, choice, plain
from workbench.errors import WorkbenchError
from workbench.overview.stored import StoredRun, options_text


def chosen_runs(site: Site, analysis: str, key: str) -> list[StoredRun]:
    """Return the runs to show; where runs with several options or images are stored, the user chooses.

    Args:
        site: the models; at least one run of the analysis is stored of the chosen ones.
        analysis: its name.
        key: of the choice, in the address.
    """
    lists = site.stored.of(analysis, site.chosen)
    if len(lists) == 1:
        return lists[0]
    texts = {
        runs[0].question: f"at most {runs[0].record['config'].get('limit')} images of {runs[0].record.get('data')},"
        f" {len(runs)} models ({options_text(runs[0])})"
        for runs in lists
    }
    with st.popover(f"{len(texts)} sets of images and options", type="tertiary"):
        picked = choice(key, list(texts), next(iter(texts)), "Shown", listed=True, format_func=texts.__getitem__)
    return next(runs for runs in lists if runs[0].question == picked)


def every_figure(site: Site, analysis: str, key: str, runs: Sequence[StoredRun] = ()) -> None:
    """Draw all figures and the summary that an analysis makes of the chosen models, with downloads and commands.

    Args:
        site: the models.
        analysis: its name.
        key: of the charts on their page.
        runs: those to draw; by default the user chooses, where there are several sets of them.
    """
    if not site.stored.of(analysis, site.chosen):
        words = shlex.join([*words_of(analysis), "--model", *site.words_of_models(site.chosen)])
        st.info(f"No run of this analysis is stored for these models. `{words}` makes one.")
        return
    runs = runs or chosen_runs(site, analysis, f"run-{analysis}")
    try:
        drawn_figures, captions, summary = drawn(
            analysis,
            {figures.plain_name(run.model): str(run.folder) for run in runs},
            {figures.plain_name(run.model): site.colors[run.model] for run in runs},
            tuple(run.stamp for run in runs),
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
