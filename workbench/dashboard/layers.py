"""Layers: where in the network it happens, as five questions; every measure of every analysis in one form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd
import streamlit as st

from workbench import figures
from workbench.analysis.discover import analysis_names, opening
from workbench.dashboard.analysis_figures import every_figure
from workbench.dashboard.models import several_seeds, training_curves
from workbench.dashboard.papers import chart, seeds_of
from workbench.dashboard.site import Site, cached, choice, once, plain, read_address, write_address
from workbench.dashboard.stories import stamp
from workbench.figures.caption import Caption
from workbench.overview.charts import curves_of
from workbench.overview.differences import Pair, by_layer, strip
from workbench.overview.measures import (
    ENCODER_LAYER,
    LONG,
    MEASURES,
    QUESTIONS,
    Asked,
    Measure,
    by_image,
    images_words,
    scores,
)
from workbench.overview.stored import Stored, StoredRun, options_text

SCORES, DIFFERENCES, IMAGES = "Scores", "Differences", "Single images"
WEIGHED = (
    " The mean of these values is the score, in which each class counts the same; so that of a single image can lie"
    " outside 0 to 1."
)
NONE = "No analysis of these models is stored yet. `{}` runs them all; Evidence can start a single one."


def page(site: Site) -> None:
    """Draw the strip of all measures, then each question with one chart."""
    st.title("Where in the network do they differ?" if site.pair else "What happens in each layer?")
    measured = {key: measure for key, measure in MEASURES.items() if site.stored.of(measure.analysis, site.chosen)}
    if not measured:
        models = " ".join(str(site.root / key) for key in site.chosen) or "runs/baseline runs/viral"
        st.info(NONE.format(f"python -m analyses.all --model {models}"))
    else:
        layers = _layers(site, measured)
        table = _strip(site, measured)
        layer = _layer(site, layers, table)
        shown = choice("shown", [SCORES, *([DIFFERENCES] if site.pair else []), IMAGES], SCORES, "Show")
        _questions(site, measured, layer, shown)
    _training(site)
    _others(site)


def _layers(site: Site, measured: Mapping[str, Measure]) -> list[int]:
    """Return all layers that any measure has."""
    layers: set[int] = set()
    for measure in measured.values():
        for runs in site.stored.of(measure.analysis, site.chosen)[:1]:
            layers |= set(_scores(measure.key, _stamp_of(runs), runs)["layer"])
    return sorted(layers)


@cached
def _scores(measure: str, folders: tuple[str, ...], _runs: Sequence[StoredRun]) -> pd.DataFrame:
    return scores(MEASURES[measure], _runs)


@cached
def _strip_table(_pair: Pair, _stored: Stored, stamps: tuple[object, ...]) -> pd.DataFrame:
    return strip(_pair, _stored, MEASURES)


@cached
def _changes(measure: str, _pair: Pair, _runs: Mapping[str, StoredRun], stamps: tuple[object, ...]) -> pd.DataFrame:
    return by_layer(MEASURES[measure], _pair, _runs)


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
            f"The clearest difference is in {largest['title']} at layer {largest['layer']}: {second} minus {first} is"
            f" {largest['score']:+.3f} [{largest['low']:+.3f}, {largest['high']:+.3f}] over {largest['n']:.0f}"
            f" {largest['over']}."
        )
        picked = "It was picked from all cells below, so it is likely to be smaller in new data."
        st.markdown(f"{plain(sentence)} :gray[{picked}]")
    names = list(map(str, layers))
    read_address("l", names, [str(default)])
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
                    f"{second} minus {first} in every measure and layer, in standard errors",
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
        st.select_slider("Layer, marked in every chart", names, key="l", format_func=_layer_name)
    write_address("l", [st.session_state["l"]], shown=st.session_state["l"] != str(default))
    return int(st.session_state["l"])


def _layer_name(layer: str) -> str:
    return "encoder" if layer == str(ENCODER_LAYER) else layer


def _follow(layers: Sequence[int]) -> None:
    """Mark the layer of the cell that was clicked."""
    points = st.session_state["strip"]["selection"]["points"]
    column = str(points[0]["x"]) if points else ""
    for layer in map(str, layers):
        if _layer_name(layer) == column:
            st.session_state["l"] = layer


def _first_layer(site: Site, layers: list[int], table: pd.DataFrame) -> int:
    if site.pair is not None:
        for model in (site.pair.second[0], site.pair.first[0]):
            if model.layers and model.layers[0] in layers:
                return model.layers[0]
    return layers[len(layers) // 2]


# --- the questions --------------------------------------------------------------------------------


def _questions(site: Site, measured: Mapping[str, Measure], layer: int, shown: str) -> None:
    """Draw each question that a stored analysis answers, two side by side; name the others."""
    answered = [asked for asked in QUESTIONS if any(measure.asked == asked for measure in measured.values())]
    for start in range(0, len(answered), 2):
        for column, asked in zip(st.columns(2, gap="large"), answered[start : start + 2], strict=False):
            with column:
                of_question = {key: measure for key, measure in measured.items() if measure.asked == asked}
                _question(site, asked, of_question, layer, shown)
    missing = [QUESTIONS[asked] for asked in QUESTIONS if asked not in answered]
    if missing:
        st.caption(f"Not measured yet: {', '.join(missing)} Evidence can start the analyses.")


def _question(site: Site, asked: Asked, measures: dict[str, Measure], layer: int, shown: str) -> None:
    with st.container(horizontal=True, vertical_alignment="center", horizontal_alignment="distribute"):
        st.subheader(QUESTIONS[asked], help=LONG[asked])
    titles = {key: measure.title.format(series="a VFM") for key, measure in measures.items()}
    by_title = {title: key for key, title in titles.items()}
    title = choice(f"m-{asked}", list(by_title), next(iter(by_title)), "Measure")
    measure = measures[by_title[title]]
    if shown == DIFFERENCES and site.pair is not None:
        _difference(site, site.pair, measure, layer)
    elif shown == IMAGES:
        _images(site, measure, layer)
    else:
        _score(site, measure, layer)
    with st.expander("What this number is, and is not; every figure and the table"):
        st.caption(plain(f"Here: {measure.explained}."))
        for paragraph in opening(measure.analysis):
            if paragraph.startswith("    "):
                st.code(paragraph, language=None)
            else:
                st.markdown(plain(paragraph))
        if st.toggle("Draw every figure and the table", key=f"all-{asked}", bind="query-params"):
            every_figure(site, measure.analysis, f"{asked}")


def _score(site: Site, measure: Measure, layer: int) -> None:
    """Draw a measure of the chosen models by layer, and its value at the chosen layer in a sentence."""
    runs = _chosen_question(site, measure)
    table = _scores(measure.key, _stamp_of(runs), runs)
    series = _series(site, measure, table)
    shown = curves_of(table[table["series"] == series])
    if several_seeds(site):
        shown["group"] = [site.models.by_key[key].variant for key in shown["name"]]
    st.markdown(_values(shown, layer))
    title = measure.title.format(series=series)
    zero = measure.neutral is not None
    key = ("score", measure.key, _stamp_of(runs), title, layer, "group" in shown, site.looks)
    figure = once(key, lambda: figures.layer_curves_named(shown, y=title, marked=layer, zero=zero))
    caption = Caption(
        f"{title} by layer",
        f"{images_words(table['n_images'])} of {runs[0].record.get('data')}",
        seeds_of(site, [run.model for run in runs]),
        "images",
    )
    drawn_as_map = (shown["group"] if "group" in shown else shown["name"]).nunique() > figures.LINES
    below = _about(runs, table["n_images"], dotted="" if drawn_as_map else "chance")
    chart(figure, f"score-{measure.key}", caption, below=below)


def _series(site: Site, measure: Measure, table: pd.DataFrame) -> str:
    """Return which of the curves of a measure is shown; where there are several, the user chooses."""
    series = list(dict.fromkeys(table["series"]))
    if len(series) < 2:
        return series[0] if series else ""
    aligned = [name for key in reversed(site.chosen) for name in site.models.by_key[key].vfms if name in series]
    return choice(f"s-{measure.key}", series, (aligned or series)[0], "Compared with")


@cached
def _of_images(measure: str, folders: tuple[str, ...], _runs: Sequence[StoredRun]) -> pd.DataFrame:
    parts = [by_image(MEASURES[measure], run).assign(name=run.model) for run in _runs]
    return pd.concat(parts, ignore_index=True).dropna(subset="value")


def _images(site: Site, measure: Measure, layer: int) -> None:
    """Draw how a measure is distributed over the images at the chosen layer, a dot for each image."""
    runs = _chosen_question(site, measure)
    stamps = _stamp_of(runs)
    table = _scores(measure.key, stamps, runs)
    series = _series(site, measure, table)
    values = _of_images(measure.key, stamps, runs)
    values = values[(values["layer"] == layer) & (values["series"] == series)]
    if values.empty:
        st.info(f"There are no values of single images of this measure in layer {layer}.")
        return
    st.markdown(plain(_ahead(site, values) or f"Layer {layer}: {_spread(values)}"))
    title = f"{measure.title.format(series=series)}, layer {_layer_name(str(layer))}"
    at = curves_of(table[(table["layer"] == layer) & (table["series"] == series)])
    level, dotted = (at["chance"].max(), "chance") if at["chance"].notna().any() else (measure.neutral, "no effect")
    key = ("images", measure.key, stamps, series, layer, site.looks)
    chart(
        once(key, lambda: figures.image_dots(values, x=title, chance=level)),
        f"images-{measure.key}",
        Caption(
            f"{title}, single images",
            f"{images_words(values.groupby('name')['image_id'].nunique())} of {runs[0].record.get('data')}",
            seeds_of(site, [run.model for run in runs]),
            "",
        ),
        below="A dot is an image, a line the mean"
        + ("." if level is None else f"; dotted: {dotted}.")
        + (WEIGHED if measure.share and not values["value"].between(0, 1).all() else ""),
    )


def _ahead(site: Site, values: pd.DataFrame) -> str:
    """Return on how many images the second of two trainings is higher; "" for groups of trainings."""
    if site.pair is None or len(site.pair.shared) != 1:
        return ""
    first, second = (model.key for model in site.pair.shared[0])
    wide = values.pivot_table(index="image_id", columns="name", values="value")
    if not {first, second} <= set(wide):
        return ""
    change = (wide[second] - wide[first]).dropna()
    return f"{second} is higher on {(change > 0).sum()} of {len(change)} images, lower on {(change < 0).sum()}."


def _spread(values: pd.DataFrame) -> str:
    quarters = values.groupby("name", sort=False)["value"].quantile([0.25, 0.75]).unstack()
    words = [f"{name} {low:.3f} to {high:.3f}" for name, low, high in list(quarters.itertuples(name=None))[:4]]
    return f"half of the images are within {', '.join(words)}"


def _values(shown: pd.DataFrame, layer: int) -> str:
    """Return the values at a layer in words: with intervals, or the means of groups of seeds."""
    at = shown[shown["at"] == layer]
    if at.empty:
        return f"Layer {layer} is not measured."
    if "group" in at:
        means = at.groupby("group", sort=False)["score"].agg(["mean", "size"])
        values = [f"{name} {mean:.3f} (mean of {size:.0f})" for name, (mean, size) in means.iterrows()]
    else:
        values = [f"{row.name} {row.score:.3f} [{row.low:.3f}, {row.high:.3f}]" for row in at.itertuples(index=False)]
    more = f" and {len(values) - 4} more" if len(values) > 4 else ""
    return plain(f"Layer {layer}: {', '.join(values[:4])}{more}")


def _difference(site: Site, pair: Pair, measure: Measure, layer: int) -> None:
    """Draw second minus first by layer."""
    runs = {run.model: run for run in _chosen_question(site, measure)}
    stamps = (str(site.root), *pair.names, *_stamp_of(list(runs.values())))
    table = _changes(measure.key, pair, runs, stamps)
    if table.empty:
        st.info("This measure is not stored of both models with the same options and images.")
        return
    at = table[table["layer"] == layer]
    names = table["series"].map(lambda series: series or pair.names[1])
    shown = table.rename(columns={"layer": "at"}).assign(
        name=names if table["series"].nunique() > 1 else pair.names[1],
        over=[_over(row) for row in table.itertuples()],
    )
    for row in at.itertuples():
        st.markdown(plain(f"Layer {layer}: {row.score:+.3f} [{row.low:+.3f}, {row.high:+.3f}], {_over(row)}"))
    first, second = pair.names
    name = figures.plain_name(f"{second} minus {first}")
    key = ("difference", measure.key, stamps, layer, site.looks)
    figure = once(
        key,
        lambda: figures.layer_curves_named(shown, y=name, marked=layer, zero=True),
    )
    title = measure.title.format(series=", ".join(dict.fromkeys(table["series"])))
    images = _scores(measure.key, _stamp_of(list(runs.values())), list(runs.values()))["n_images"]
    over = " or ".join(dict.fromkeys(table["over"]))
    caption = Caption(
        f"{title} by layer, {second} minus {first}",
        f"{images_words(images)} of {next(iter(runs.values())).record.get('data')}",
        seeds_of(site, [each for each in pair.keys if each in runs]),
        f"{over}, paired",
    )
    chart(
        figure,
        f"difference-{measure.key}",
        caption,
        below=f"{plain(title)}. {_about(list(runs.values()), images, dotted='no difference')}",
    )


def _over(row: Any) -> str:
    return f"{row.n:.0f} {row.over}" + (f", Holm p {row.p_holm:.3g}" if row.p_holm == row.p_holm else "")


def _chosen_question(site: Site, measure: Measure) -> list[StoredRun]:
    """Return the runs to show; where runs with several options or images are stored, the user chooses."""
    lists = site.stored.of(measure.analysis, site.chosen)
    if len(lists) == 1:
        return lists[0]
    texts = {
        runs[0].question: f"at most {runs[0].record['config'].get('limit')} images of {runs[0].record.get('data')},"
        f" {len(runs)} models ({options_text(runs[0].record['config'])})"
        for runs in lists
    }
    key = f"run-{measure.analysis}-{measure.asked}"
    with st.popover(f"{len(texts)} sets of images and options", type="tertiary"):
        picked = choice(key, list(texts), next(iter(texts)), "Shown", listed=True, format_func=texts.__getitem__)
    return next(runs for runs in lists if runs[0].question == picked)


def _about(runs: Sequence[StoredRun], counts: pd.Series, dotted: str = "chance") -> str:
    """Return over what scores are, and what was left out.

    Args:
        counts: the number of images of each score; the option `limit` is only the most that there can be.
        dotted: what the dotted line stands for, "" if there is none.
    """
    left_out = [sentence for run in runs for sentence in run.record.get("left_out", [])]
    notes = f" Left out: {'; '.join(dict.fromkeys(left_out))}" if left_out else ""
    over = f"{images_words(counts)} of {runs[0].record.get('data')}, 95 % intervals"
    return plain(f"{over}{f'; dotted: {dotted}' if dotted else ''}.{notes}")


def _range(counts: pd.Series) -> str:
    return " to ".join(dict.fromkeys(f"{end:.0f}" for end in (counts.min(), counts.max())))


def _stamp_of(runs: Sequence[StoredRun]) -> tuple[str, ...]:
    """Return what changes when the runs, or the models that they are of, change."""
    return tuple(f"{run.folder.name} {run.model}" for run in runs)


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
