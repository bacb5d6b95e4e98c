"""The frame of the dashboard: page settings, navigation, and errors shown as one sentence."""

from __future__ import annotations

import re
from functools import partial

import streamlit as st

from workbench.analysis.discover import analysis_files, analysis_names
from workbench.errors import WorkbenchError


def show() -> None:
    """Draw the page of the current address; a `WorkbenchError` is shown as one sentence, without a traceback."""
    st.set_page_config(page_title="VIRAL Workbench", page_icon="👁", layout="wide")
    from workbench.dashboard import runs_page

    pages = [st.Page(runs_page.page, title="Runs", url_path="runs", default=True)]
    for name, title in analysis_pages().items():
        pages.append(st.Page(partial(_analysis, name), title=title, url_path=title.lower().replace(" ", "-")))
    pages += [st.Page(_claims, title="Claims", url_path="claims"), st.Page(_scene, title="Scene", url_path="scene")]
    chosen = st.navigation(pages)
    st.html("<style>[data-testid=stMainBlockContainer] {padding-top: 2.5rem}</style>")
    try:
        chosen.run()
    except WorkbenchError as error:
        st.error(str(error))


def _analysis(name: str) -> None:
    from workbench.dashboard.analysis_page import page  # imports torch, which the first page does not need

    page(name)


def _claims() -> None:
    from workbench.dashboard.claims_page import page

    page()


def _scene() -> None:
    from workbench.dashboard.scene_page import page

    page()


def analysis_pages() -> dict[str, str]:
    """Return {name: page title} of every analysis, without importing them, which would take seconds.

    The title is read from the line `PAGE = "..."` of the analysis's file. The title of a plugin's page is its name.
    """
    files, titles = analysis_files(), {}
    for name in analysis_names():
        text = files[name].read_text(encoding="utf-8") if name in files else ""
        title = re.search(r'^PAGE = "([^"]+)"$', text, re.M)
        titles[name] = title[1] if title else name.replace("_", " ").capitalize()
    return titles
