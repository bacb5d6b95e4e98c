"""Home: what was compared, what came out, how sure that is, and where to look next."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from workbench import figures
from workbench.dashboard import live
from workbench.dashboard.glossary import meaning
from workbench.dashboard.models import columns, rows_of, several_seeds, training_curves
from workbench.dashboard.papers import chart, seeds_of
from workbench.dashboard.site import Site, once, plain, unusable
from workbench.dashboard.stories import pair_stamp, story_of
from workbench.dashboard.thumbnails import disagreements
from workbench.figures.caption import Caption
from workbench.overview.charts import alignment_chart, types_chart
from workbench.overview.story import Card, Story

SCORED = ["accuracy", "low", "high", "difference", "d_low", "d_high", "p_holm", "CKNNA"]  # columns of `_table`
TOP = 4  # rows of it that are seen at once
LOWEST = 215  # pixels, height of a chart

SEEDS = " The runs of six seeds: `docs/results/data_efficiency.md`."
EMPTY = """Nothing is stored in `{}` yet.

`make demo` (or `viral demo`) trains a baseline and a VIRAL model, runs every analysis on both, and takes about six
minutes on two cores; this page follows it. To train one model: `python -m trainer shapes_viral`."""


def page(site: Site) -> None:
    """Draw the story of the chosen models, or of the training that is running."""
    live.watch()
    running = live.demo()
    if site.pair is None:
        _before(site, running)
        _unusable(site)
        live.demo(ended=True)
        return
    story = story_of(site, site.pair)
    with st.container(key="home"):  # closer together than other pages: it fits into a window of 1440 x 900
        st.title(plain(story.title))
        st.markdown(plain(story.compared))
        if len(site.pairs) > 1:
            _table(site)
        else:
            _cards(site, story, running)
        seeds = SEEDS if live.is_demo() and len(story.pair.shared) == 1 else ""
        st.markdown(f"**{plain(story.finding)}** {plain(story.caveat)}{seeds}")
        for sentence in story.left_out:
            st.caption(plain(sentence))
        _unusable(site)
        if live.unfinished(site):
            training_curves(site, site.chosen, few=True)
        _charts(site, story)
        if story.answered is not None:
            disagreements(site, story.answered)
        _next(site, story)
    live.demo(ended=True)


def _before(site: Site, running: bool) -> None:
    """Draw the page of a folder with fewer than two models."""
    st.title("VIRAL Workbench")
    if not site.models.by_key:
        if running:
            st.info("The first curves will be here within about two minutes.")
        else:
            st.info(EMPTY.format(site.root))
        return
    if len(site.models.by_key) > 1:
        st.info("One model is chosen. Choose a second one above, and this page compares them.")
    else:
        st.markdown("There is one model here. With a second one, this page compares them.")
    training_curves(site, list(site.models.by_key)[:6], few=True)


def _unusable(site: Site) -> None:
    """Draw a link to the list of what cannot be read, if there is anything."""
    if count := len(unusable(site)):
        what = f"{count} files or folders" if count > 1 else "One file or folder"
        site.link("evidence", f"{what} cannot be used: which, and why →", part="runs")


def _table(site: Site) -> None:
    """Draw a table of the chosen models: by variant if there are several seeds."""
    by_seed = several_seeds(site)
    rows, name = rows_of(site, site.chosen, by_seed=by_seed), "variant" if by_seed else "key"
    first = site.models.by_key[site.baseline].variant if by_seed else site.baseline
    rows = rows.sort_values("accuracy", ascending=False)
    rows = rows.sort_values(name, key=lambda names: names != first, kind="stable")
    st.dataframe(
        rows[[name, *(["seeds"] if by_seed else []), *SCORED]],
        hide_index=True,
        width="stretch",
        column_config=columns(by_seed=by_seed),
        height=38 + 35 * min(len(rows), TOP),
    )
    others = "variants" if by_seed else "models"
    left_out = [f" {row.variant}: {row.why}." for row in rows.itertuples() if by_seed and row.why]
    st.caption(
        plain(
            f"The baseline first, then the {len(rows) - 1} others by accuracy. p is Holm-corrected over the chosen"
            f" {others} alone.{''.join(left_out)}"
        )
    )
    site.link("models", "All about them →")


def _cards(site: Site, story: Story, running: bool) -> None:
    with st.container(key="cards"):
        for column, card in zip(st.columns(3, border=True), story.cards, strict=True):
            with column:
                _card(site, card, running)


def _card(site: Site, card: Card, running: bool) -> None:
    """Draw a number: what it is and where there is more, its value, and its difference and chance level."""
    help_of = {"layers": "CKNNA", "models": "accuracy", "examples": "chance"}
    more = {"layers": "By layer →", "models": "By model →", "examples": "Question by question →"}
    with st.container(horizontal=True, horizontal_alignment="distribute", vertical_alignment="center"):
        st.caption(plain(card.title), help=meaning(help_of[card.page]), width="content")
        if not card.missing:
            site.link(card.page, more[card.page])
    st.markdown(f"## {plain(card.value)}")
    if card.missing.startswith("python"):
        st.caption("The demo is going to measure it." if running else "To get it:")
        if not running:
            st.code(card.missing, language="bash", wrap_lines=True)
        return
    if card.missing:
        st.caption(plain(card.missing))
        return
    st.markdown(f"{plain(card.change)} :gray[· {plain(card.chance)}]")


def _charts(site: Site, story: Story) -> None:
    """Draw the difference by question type, and the difference in alignment by layer."""
    left, right = st.columns(2, gap="medium")
    first, second = story.pair.names
    key = (pair_stamp(site, story.pair), site.looks)
    if story.answered is not None:
        asked = story.answered.table
        left.markdown(f"### Accuracy by question type: {plain(second)} minus {plain(first)}")
        with left:
            chart(
                once(("types", *key), lambda: _lower(types_chart(story))),
                "by-type",
                Caption(
                    f"Accuracy by question type, {second} minus {first}",
                    f"{len(asked)} questions about {asked['image_id'].nunique()} images of"
                    f" {story.answered.pair.first[0].test_data}",
                    seeds_of(site, story.answered.pair.keys),
                    _over(story.answered.by_type),
                ),
                below="95 % intervals, not corrected for the number of types; gray where the interval includes 0.",
            )
    alignment = story.alignment
    if alignment is not None:
        right.markdown(f"### CKNNA by layer: {plain(second)} minus {plain(first)}")
        with right:
            chart(
                once(("layers", *key), lambda: _lower(alignment_chart(story, alignment))),
                "by-layer",
                Caption(
                    f"CKNNA with {alignment.vfm} by layer, {second} minus {first}",
                    alignment.over,
                    seeds_of(site, alignment.keys),
                    _over(alignment.changes),
                ),
                below="95 % intervals; dashed: the layer that the alignment loss reads.",
            )


def _lower(figure: figures.Figure) -> figures.Figure:
    """Return a chart as high as the first screen allows."""
    figure.update_yaxes(title=None)  # the heading has it
    return figure.update_layout(height=max(LOWEST, 0.7 * figure.layout.height), margin={"b": 40, "l": 40})


def _over(table: pd.DataFrame) -> str:
    """Return what the intervals of differences are over."""
    over = " or ".join(dict.fromkeys(table["over"]))
    return f"{over}, paired by seed" if over == "seeds" else f"{over}, paired"


def _next(site: Site, story: Story) -> None:
    """Draw links to the other pages, as questions."""
    _, second = story.pair.names
    with st.container(horizontal=True, vertical_alignment="center"):
        st.markdown("**Where to look next**", width="content")
        site.link("layers", "In which layers do they differ most, and in what?")
        site.link(
            "examples",
            f"Which questions does only {plain(second)} answer right?",
            outcome="second",
        )
        site.link("explorer", "What does one image look like inside both?")
        site.link("evidence", "Which claims hold?")
