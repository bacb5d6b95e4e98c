"""The frame of the dashboard: page settings, navigation, the choice of models, and errors in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module

import streamlit as st

from workbench.dashboard.copy_link import copy_link
from workbench.dashboard.glossary import glossary_popover
from workbench.dashboard.pointed import color_pointed_lines
from workbench.dashboard.site import Site, choose_models, complaints, plain, read_site
from workbench.errors import WorkbenchError
from workbench.figures import COLORS, colored

# each is a module with `page(site)`, imported when it is opened, and its title
PAGES = {name: name.capitalize() for name in ("home", "models", "layers", "examples", "explorer", "evidence")}
QUIET = 75  # % of the text's color in captions and in the texts of charts
BUTTON = COLORS[0]  # behind the white text of buttons and tags, in both themes
STYLE = """<style>
[data-testid=stMainBlockContainer] {padding: 3.9rem 2rem 3rem; max-width: 1500px}
h1 {font-size: 1.75rem !important; padding-bottom: .7rem !important}
h2 {font-size: 1.3rem !important; padding: .1rem 0 .3rem !important}
h3 {font-size: 1.08rem !important; padding: .5rem 0 .5rem !important}
[data-testid=stVerticalBlock] {gap: .7rem}
[data-testid=stCaptionContainer], kbd {
  opacity: 1 !important; color: color-mix(in srgb, currentColor $quiet%, transparent) !important
}
[data-testid=stCaptionContainer] p {color: inherit !important}
[data-testid=stPaginationEllipsis], [data-testid=stCode] .token {color: inherit !important}
[data-testid=stPlotlyChart] :is(.xtick, .ytick, [class*=title], .annotation-text-g, .legend, .colorbar) text {
  fill: color-mix(in srgb, currentColor $quiet%, transparent) !important
}
[data-testid=stBaseButton-primary]:not(:disabled), [data-tag], [data-tag] > * {background: $button !important}
:has(> .st-key-paste-place) {position: absolute !important}
.st-key-home, .st-key-home [data-testid=stVerticalBlock] {gap: .3rem !important}
.st-key-home h1 {padding: .2rem 0 .6rem !important}
.st-key-home h2 {padding: 0 0 .6rem !important}
.st-key-home h3 {padding: .2rem 0 .8rem !important}
.st-key-home [class*=st-key-save-] button {min-height: 0; padding: 0}
.st-key-cards [data-testid=stColumn] {padding: .4rem .9rem .5rem !important}
[class*=st-key-look-] {position: relative}
[class*=st-key-look-] :is(a, :has(a)) {position: static !important}
[class*=st-key-look-] a::after {content: ""; position: absolute !important; inset: 0}
[data-testid=stPageLink] * {white-space: normal !important}
@media (max-width: 640px) {
  [data-testid=stMainBlockContainer] {padding: 4.2rem .8rem 2rem}
  h1 {font-size: 1.35rem !important}
  [data-testid=stButtonGroup] [role=radiogroup] {flex-wrap: wrap !important; overflow: visible !important}
}
</style>""".replace("$quiet", str(QUIET)).replace("$button", BUTTON)


def show(first: str = "home") -> None:
    """Draw the page of the current address; a `WorkbenchError` is shown as one sentence, without a traceback.

    Args:
        first: the page of an address without a path.
    """
    st.set_page_config(page_title="VIRAL Workbench", page_icon="👁", layout="wide")
    site = read_site()
    site.pages = {
        name: st.Page(_page(name, site), title=title, url_path=name, default=name == first)
        for name, title in PAGES.items()
    }
    chosen = st.navigation(list(site.pages.values()), position="top")
    st.html(STYLE)
    try:
        left, right = st.columns([3, 1], vertical_alignment="bottom")
        with left:
            choose_models(site)
        with right, st.container(horizontal=True, horizontal_alignment="right"):
            copy_link()
            glossary_popover()
        above = st.container(key="complaints")
        try:
            with colored(site.colors):
                chosen.run()
        finally:  # pages complain too
            color_pointed_lines()
            with above:
                complaints()
    except WorkbenchError as error:
        st.error(plain(error))


def _page(name: str, site: Site) -> Callable[[], None]:
    return partial(_draw, name, site)


def _draw(name: str, site: Site) -> None:
    with st.spinner("Opening the page; Explorer loads PyTorch first, which takes some seconds"):
        module = import_module(f"workbench.dashboard.{name}")
    module.page(site)
