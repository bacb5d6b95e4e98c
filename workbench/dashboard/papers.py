"""Every chart of the pages, with a button below it that saves it for a paper."""

from __future__ import annotations

import io
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import streamlit as st

from workbench import figures
from workbench.dashboard.site import Site
from workbench.figures.browser import Browser, browser_file
from workbench.figures.caption import Caption, seed_words
from workbench.figures.paper import FORMS, WIDTHS, Columns, columns_of, export, file_name, paper_figure, text_files

MIME = {"svg": "image/svg+xml", "pdf": "application/pdf", "png": "image/png", "csv": "text/csv", "json": "text/plain"}
LABELS = {"csv": "CSV", "tex": "LaTeX table", "txt": "Caption", "py": "Python", "json": "JSON"}
NO_BROWSER = (
    "SVG, PDF and PNG need Chromium or Chrome on the machine that serves this page (`apt install chromium`, or its file"
    " in the variable BROWSER_PATH). The camera above the chart saves an SVG as it is on screen."
)


def chart(
    figure: Any,
    key: str,
    caption: Caption,
    *,
    below: str = "",
    cells: Any = None,
    clicked: Callable[[], None] | None = None,
) -> None:
    """Draw a figure, a line of text below it, and the button that saves it for a paper.

    Args:
        figure: a plotly figure, or its JSON.
        key: name of the chart on its page.
        caption: what the caption in a paper has to say.
        below: the line below it, as Markdown.
        cells: what is drawn instead if its cells can be chosen (`figures.clickable`).
        clicked: called when one is.
    """
    if cells is None or clicked is None:
        st.plotly_chart(figure, width="stretch", config=figures.EXPORT, key=key)
    else:
        st.plotly_chart(
            cells, width="stretch", config=figures.EXPORT, key=key, on_select=clicked, selection_mode="points"
        )
    place: Any = "distribute" if below else "right"
    with st.container(horizontal=True, horizontal_alignment=place, vertical_alignment="top"):
        if below:
            st.caption(below, width="stretch")
        save_button(figure, key, caption)


def save_button(figure: Any, key: str, caption: Caption) -> None:
    """Draw the button alone, for a chart that its page draws itself.

    Args:
        figure: a plotly figure, its JSON, or a function that makes it once it is to be saved.
        key: name of the chart on its page.
        caption: what the caption in a paper has to say.
    """
    if st.button(
        "↓ Save",
        key=f"save-{key}",
        type="tertiary",
        help="For a paper: SVG, PDF, PNG, the drawn points as CSV, LaTeX, caption, Python",
    ):
        _dialog(figure() if callable(figure) else figure, caption)


@st.dialog("For a paper", width="large")
def _dialog(figure: Any, caption: Caption) -> None:
    needed = columns_of(figure)
    words = {1: f"One column ({WIDTHS[1]} in)", 2: f"Both columns ({WIDTHS[2]} in)"}
    columns: Columns = st.segmented_control(
        "Width", [1, 2], default=needed, required=True, format_func=words.__getitem__, key="paper-width"
    )
    name = file_name(caption.shows)
    files = text_files(figure, name, caption, columns)
    with st.container(horizontal=True):
        if browser_file() is not None:
            for form in FORMS:
                st.download_button(
                    form.upper(),
                    partial(_drawn, figure, form, columns),
                    f"{name}.{form}",
                    MIME[form],
                    key=f"paper-{form}",
                    on_click="ignore",
                )
        for suffix, (what, make) in files.items():
            st.download_button(
                LABELS[suffix],
                partial(_encoded, make),
                f"{name}.{suffix}",
                MIME.get(suffix, "text/plain"),
                key=f"paper-{suffix}",
                help=what,
                on_click="ignore",
            )
    if browser_file() is None:
        st.caption(NO_BROWSER)
    st.markdown("**Caption**")
    st.code(files["txt"][1]().strip(), language=None, wrap_lines=True)
    st.markdown(f"**{files['py'][0]}**")
    st.code(files["py"][1](), language="python", height=320)


def _encoded(make: Any) -> bytes:
    text: str = make()
    return text.encode()


def _drawn(figure: Any, form: str, columns: Columns) -> bytes:
    with Browser() as browser:
        return browser.draw(paper_figure(figure, columns), form)


def archive(drawn: Mapping[str, Any], captions: Mapping[str, Caption]) -> bytes:
    """Return a zip of figures in all forms, as `--export` writes them."""
    content = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as packed:
        files, missing = export(Path(folder), drawn, captions)
        for file in files:
            packed.write(file, file.name)
        if missing:
            packed.writestr("no-images.txt", f"SVG, PDF and PNG are not here, since {missing}\n")
    return content.getvalue()


def seeds_of(site: Site, keys: Sequence[str]) -> str:
    """Return which trainings a chart shows, and their seeds; of a variant with several seeds, all of them."""
    groups: dict[str, list[str]] = {}
    for key in keys:
        groups.setdefault(site.models.by_key[key].variant, []).append(key)
    if all(len(group) == 1 for group in groups.values()):
        return seed_words({key: site.models.by_key[key].seed for key in keys})
    words = []
    for variant, group in groups.items():
        seeds = sorted(str(site.models.by_key[key].seed) for key in group)
        several = "s" * (len(group) > 1)
        words.append(f"{len(group)} training{several} of {variant} (seed{several} {', '.join(seeds)})")
    return "; ".join(words)
