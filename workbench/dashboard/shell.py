"""Page config, navigation and the one place that knows the runs folder."""

from __future__ import annotations

import json
import re
import sys
from functools import partial
from pathlib import Path

import streamlit as st

from workbench.catalogue import analysis_files
from workbench.errors import RunError, WorkbenchError


def show() -> None:
    """Draw the page that the address names; an error of ours is one sentence, not a traceback."""
    st.set_page_config(page_title="VIRAL Workbench", page_icon=":material/layers:", layout="wide")
    from workbench.dashboard import runs_page

    pages = [st.Page(runs_page.page, title="Runs", icon=":material/inventory_2:", url_path="runs", default=True)]
    for name, title in analysis_pages().items():
        pages.append(st.Page(partial(_analysis, name), title=title, icon=":material/show_chart:", url_path=title.lower().replace(" ", "-")))
    pages += [st.Page(_scene, title="Scene", icon=":material/image_search:", url_path="scene")]
    chosen = st.navigation(pages)
    st.html("<style>[data-testid=stMainBlockContainer] {padding-top: 2.5rem}</style>")
    try:
        chosen.run()
    except WorkbenchError as error:
        st.error(str(error), icon=":material/error:")


def _analysis(name: str) -> None:
    from workbench.dashboard.analysis_page import page  # brings torch, which the first page does without

    page(name)


def _scene() -> None:
    from workbench.dashboard.scene_page import page

    page()


def analysis_pages() -> dict[str, str]:
    """{name: page title} of every file in `analyses`, read from its `PAGE = "..."` line: importing them all would take seconds."""
    found = {}
    for name, file in analysis_files().items():
        title = re.search(r'^PAGE = "([^"]+)"$', file.read_text(), re.M)
        found[name] = title[1] if title else name.replace("_", " ").capitalize()
    return found


def runs_root() -> Path:
    """The folder given with `--runs`, by default ./runs."""
    words = sys.argv[1:]
    given = words[words.index("--runs") + 1] if "--runs" in words[:-1] else "runs"
    return Path(given).resolve()


def below_root(path: str | Path) -> Path:
    """Resolve `path` inside the runs folder.

    Raises:
        RunError: it lies outside, whatever links or dots it uses.
    """
    root = runs_root()
    resolved = (root / path).resolve()
    if not resolved.is_relative_to(root):
        raise RunError(f"'{path}' is not below the runs folder")
    return resolved


def default_models(models: list[str]) -> list[str]:
    """A baseline and an aligned model to begin with: the first of each kind, first stages left out."""
    kinds: dict[bool, str] = {}
    for name in models:
        file = below_root(name) / "training.json"
        recipe = json.loads(file.read_text())["recipe"] if file.exists() else None
        if recipe is not None and recipe["start"] is not None:
            kinds.setdefault(recipe["alignment"]["objective"] != "none", name)
    return [kinds[aligned] for aligned in sorted(kinds)] or models[:2]


def trained_models(finished: bool = False) -> list[str]:
    """Training folders below the runs folder, relative to it; with `finished`, those that hold a model."""
    root = runs_root()
    found = sorted((path.parent for path in root.glob("**/training.parquet")), key=lambda f: (len(f.parts), f))  # those of a sweep last
    return [str(f.relative_to(root)) for f in found if not finished or (f / "training.json").exists()]
