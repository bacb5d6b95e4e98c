"""Explorer: what one image and one question look like inside the models; the only page that loads models."""

from __future__ import annotations

from collections.abc import Mapping

import streamlit as st

from workbench import figures, runs
from workbench.analysis.discover import load_analysis
from workbench.dashboard import scene, tokens_views
from workbench.dashboard.site import Site, cached, choice, plain
from workbench.runs import Run

VIEWS = {
    "scene": "One image and question",
    "maps": "Maps of stored images",
    "umap": "UMAP of tokens",
    "attention": "Attention maps",
    "words": "Words (logit lens)",
}
STORED = {"maps": "tokens", "umap": "tokens", "attention": "attention", "words": "logit_lens"}
DRAWN = {"attention": ("Attention over the image",), "words": ("Words over image",)}


def page(site: Site) -> None:
    """Draw one of the views."""
    st.title("What happens with this image and this question?")
    view = choice("view", list(VIEWS), "scene", "View", format_func=VIEWS.__getitem__, label_visibility="collapsed")
    if view == "scene":
        scene.page(site)
        return
    lists = site.stored.of(STORED[view], site.chosen)
    if not lists:
        models = " ".join(str(site.root / key) for key in site.chosen) or "runs/baseline runs/viral"
        st.info(f"This view needs stored runs: `python -m analyses.{STORED[view]} --model {models}`")
        return
    compared = {run.model: _loaded(str(run.folder)) for run in lists[0]}
    if view in DRAWN:
        _figures(STORED[view], DRAWN[view], compared)
    else:
        {"maps": tokens_views.maps, "umap": tokens_views.umap}[view](compared)


@cached
def _loaded(folder: str) -> Run:
    from pathlib import Path

    return runs.load(Path(folder))


def _figures(analysis: str, titles: tuple[str, ...], compared: Mapping[str, Run]) -> None:
    """Draw the figures of an analysis over stored images."""
    for title, figure in load_analysis(analysis).figures(compared).items():
        if title.startswith(titles):
            st.subheader(plain(title))
            st.plotly_chart(figure, width="stretch", config=figures.EXPORT, key=title)
