"""Layers: where in the network it happens, as five questions; every measure of every analysis in one form."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from functools import partial

import pandas as pd
import streamlit as st

from workbench import figures
from workbench.analysis.discover import analysis_names
from workbench.dashboard.analysis_figures import every_figure
from workbench.dashboard.models import several_seeds, training_curves
from workbench.dashboard.papers import chart, seeds_of
from workbench.dashboard.questions import (
    DIFFERENCES,
    IMAGES,
    SCORES,
    in_words,
    layer_name,
    questions,
)
from workbench.dashboard.site import Site, cached, choice, once, plain, read_address, write_address
from workbench.dashboard.stories import stamp
from workbench.figures.caption import Caption
from workbench.overview.differences import Pair, strip
from workbench.overview.measures import MEASURES, Measure, measured
from workbench.overview.stored import Stored

NONE = "No measure of the layers of these models is stored yet. `{}` runs them all; Evidence can start a single one."


def page(site: Site) -> None:
    """Draw the strip of all measures, then each question with one chart."""
    st.title("Where in the network do they differ?" if site.pair else "What happens in each layer?")
    found = measured(site.stored, site.chosen)
    measures = {key: MEASURES[key] for key in found}
    if not measures:
        models = shlex.join(site.words_of_models(site.chosen)) or "runs/baseline runs/viral"
        st.info(NONE.format(f"python -m analyses.all --model {models}"))
    else:
        layers = sorted({layer for _, table in found.values() for layer in table["layer"]})
        table = _strip(site, measures)
        layer = _layer(site, layers, table)
        shown = choice("shown", [SCORES, *([DIFFERENCES] if site.pair else []), IMAGES], SCORES, "Show")
        questions(site, measures, layer, shown, table)
    _training(site)
    _others(site)


@cached
def _strip_table(_pair: Pair, _stored: Stored, stamps: tuple[object, ...]) -> pd.DataFrame:
    return strip(_pair, _stored, MEASURES)


# --- the strip ------------------------------------------------------------------------------------


def _strip(site: Site, measured: Mapping[str, Measure]) -> pd.DataFrame:
    """Return the differences of the pair in all measures, which the page draws below its first sentence."""
    if site.pair is None:
        return pd.DataFrame()
    stamps = stamp(site, site.pair.keys)
    table = _strip_table(site.pair, site.stored, stamps)
    return table[table["measure"].isin(list(measured))]


def _layer(site: Site, layers: list[int], table: pd.DataFrame) -> int:
    """Draw the choice of the layer with, for a pair, the strip, and return the layer."""
    default = _first_layer(site, layers, table)
    if len(table):
        largest = table.loc[table["z"].abs().fillna(-1).idxmax()]
        first, second = site.pair.names if site.pair else ("", "")
        sentence = (
            f"The clearest difference is in {largest['title']} at {in_words(largest['layer'])}: {second} minus {first}"
            f" is {largest['score']:+.3f} [{largest['low']:+.3f}, {largest['high']:+.3f}] over {largest['n']:.0f}"
            f" {largest['over']}."
        )
        picked = "It was picked from all cells below, so it is likely to be smaller in new data."
        st.markdown(f"{plain(sentence)} :gray[{picked}]")
    names = list(map(str, layers))
    read_address("l", names, [str(default)], words=layer_name)
    if len(table):
        with st.expander("In which layer do they differ most? All measures at once", expanded=True):
            marked = int(st.session_state["l"])
            key = ("strip", stamp(site, site.pair.keys if site.pair else []), marked)
            first, second = site.pair.names if site.pair else ("", "")
            over = " or ".join(dict.fromkeys(table["over"]))
            strip_figure = once(key, lambda: figures.layer_strip(table, marked=marked))
            chart(
                strip_figure,
                "strip",
                Caption(
                    f"Difference in every measure and layer, in standard errors: {second} minus {first}",
                    f"{_range(table['n'])} {over}",
                    seeds_of(site, site.pair.keys if site.pair else []),
                    f"{over}, paired; a dot marks one that leaves 0 out, not corrected for the number of cells",
                ),
                below=plain(f"Blue: higher in {second}, orange: higher in {first}.")
                + " A dot: the 95 % interval leaves 0 out, not corrected for the number of cells. A click on a cell"
                " marks its layer.",
                cells=once(("cells", *key), lambda: figures.clickable(strip_figure)),
                clicked=partial(_follow, layers),
            )
    if len(layers) > 1:
        st.select_slider("Layer, marked in every chart", names, key="l", format_func=layer_name)
    write_address("l", [st.session_state["l"]], shown=st.session_state["l"] != str(default))
    return int(st.session_state["l"])


def _follow(layers: Sequence[int]) -> None:
    """Mark the layer of the cell that was clicked."""
    points = st.session_state["strip"]["selection"]["points"]
    column = str(points[0]["x"]) if points else ""
    for layer in map(str, layers):
        if layer_name(layer) == column:
            st.session_state["l"] = layer


def _first_layer(site: Site, layers: list[int], table: pd.DataFrame) -> int:
    if site.pair is not None:
        for model in (site.pair.second[0], site.pair.first[0]):
            if model.layers and model.layers[0] in layers:
                return model.layers[0]
    return layers[len(layers) // 2]


def _range(counts: pd.Series) -> str:
    return " to ".join(dict.fromkeys(f"{end:.0f}" for end in (counts.min(), counts.max())))


# --- what is no measure of layers -----------------------------------------------------------------


def _training(site: Site) -> None:
    """Draw when in training it happens."""
    training_curves(site, site.chosen, few=True, grouped=several_seeds(site), title="When in training?")
    if site.stored.of("dynamics", site.chosen) and st.toggle(
        "Draw every figure and the table of the checkpoints", key="all-dynamics", bind="query-params"
    ):
        every_figure(site, "dynamics", "dynamics")


def _others(site: Site) -> None:
    """Draw analyses that are no measure of layers, such as benchmarks and those of plugins."""
    known = {measure.analysis for measure in MEASURES.values()} | {"dynamics"}
    for name in analysis_names():
        if name not in known and site.stored.of(name, site.chosen):
            st.subheader(plain(name.replace("_", " ").capitalize()))
            if st.toggle("Draw every figure and the table", key=f"all-{name}", bind="query-params"):
                every_figure(site, name, name)
