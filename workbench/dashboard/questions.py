"""The five questions of the page Layers: for each a chart of one measure, by layer, and what it says in a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import streamlit as st

from workbench import figures
from workbench.analysis.discover import opening
from workbench.dashboard.analysis_figures import chosen_runs, every_figure
from workbench.dashboard.models import several_seeds
from workbench.dashboard.papers import chart, seeds_of
from workbench.dashboard.site import Site, cached, choice, once, plain
from workbench.figures.caption import Caption
from workbench.overview.charts import about_scores, by_variant, curves_of, lines_words, over_what
from workbench.overview.differences import Pair, by_layer
from workbench.overview.measures import (
    ENCODER_LAYER,
    LONG,
    MEASURES,
    QUESTIONS,
    Asked,
    Measure,
    by_image,
    scores,
)
from workbench.overview.stored import StoredRun

SCORES, DIFFERENCES, IMAGES = "Scores", "Differences", "Single images"
WEIGHED = (
    " The mean of these values is the score, in which each class or question counts the same; so that of a single image"
    " can lie outside 0 to 1."
)


@cached
def scores_of(measure: str, stamps: tuple[object, ...], _runs: Sequence[StoredRun]) -> pd.DataFrame:
    """Return the scores of a measure (`overview.measures.scores`), once for all sessions."""
    return scores(MEASURES[measure], _runs)


@cached
def _changes(measure: str, _pair: Pair, _runs: Mapping[str, StoredRun], stamps: tuple[object, ...]) -> pd.DataFrame:
    return by_layer(MEASURES[measure], _pair, _runs)


def stamp_of(runs: Sequence[StoredRun]) -> tuple[object, ...]:
    """Return what changes when the runs, or the models that they are of, change."""
    return tuple(run.stamp for run in runs)


def layer_name(layer: str) -> str:
    """Return what a layer is called: its number, or the vision encoder."""
    return "encoder" if layer == str(ENCODER_LAYER) else layer


def in_words(layer: int) -> str:
    """Return a layer as a sentence names it."""
    return "the vision encoder" if layer == ENCODER_LAYER else f"layer {layer}"


def _capital(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}"


def questions(site: Site, measured: Mapping[str, Measure], layer: int, shown: str, differences: pd.DataFrame) -> None:
    """Draw each question that a stored analysis answers, two side by side; name the others.

    Args:
        measured: {key: measure} of those that are stored.
        layer: the marked layer.
        shown: SCORES, DIFFERENCES or IMAGES.
        differences: those of the pair in all measures and layers (`overview.differences.strip`).
    """
    answered = [asked for asked in QUESTIONS if any(measure.asked == asked for measure in measured.values())]
    for start in range(0, len(answered), 2):
        for column, asked in zip(st.columns(2, gap="large"), answered[start : start + 2], strict=False):
            with column:
                of_question = {key: measure for key, measure in measured.items() if measure.asked == asked}
                _question(site, asked, of_question, layer, shown, differences)
    missing = [QUESTIONS[asked] for asked in QUESTIONS if asked not in answered]
    if missing:
        st.caption(f"Not measured yet: {', '.join(missing)} Evidence can start the analyses.")


def _question(
    site: Site, asked: Asked, measures: Mapping[str, Measure], layer: int, shown: str, differences: pd.DataFrame
) -> None:
    with st.container(horizontal=True, vertical_alignment="center", horizontal_alignment="distribute"):
        st.subheader(QUESTIONS[asked], help=LONG[asked])
    titles = {key: measure.title.format(series="a VFM") for key, measure in measures.items()}
    by_title = {title: key for key, title in titles.items()}
    title = choice(f"m-{asked}", list(by_title), next(iter(by_title)), "Measure")
    measure = measures[by_title[title]]
    runs = chosen_runs(site, measure.analysis, f"run-{measure.analysis}-{measure.asked}")
    if shown == DIFFERENCES and site.pair is not None:
        _difference(site, site.pair, measure, runs, layer, differences)
    elif shown == IMAGES:
        _images(site, measure, runs, layer)
    else:
        _score(site, measure, runs, layer, differences)
    drawn = st.query_params.get(f"all-{asked}") == "true"  # in a copied address
    with st.expander("What this number is, and is not; every figure and the table", expanded=drawn):
        st.caption(plain(f"Here: {measure.explained}."))
        for paragraph in opening(measure.analysis):
            if paragraph.startswith("    "):
                st.code(paragraph, language=None)
            else:
                st.markdown(plain(paragraph))
        if st.toggle("Draw every figure and the table", key=f"all-{asked}", bind="query-params"):
            every_figure(site, measure.analysis, f"{asked}", runs)


def _score(site: Site, measure: Measure, runs: Sequence[StoredRun], layer: int, differences: pd.DataFrame) -> None:
    """Draw a measure of the chosen models by layer, and where the pair differs most and the layer's values in words."""
    table = scores_of(measure.key, stamp_of(runs), runs)
    if table.empty:
        st.info("These runs have no values of this measure.")
        return
    series = _series(site, measure, table)
    shown = curves_of(table[table["series"] == series])
    if several_seeds(site):
        shown = by_variant(shown, site.models)
    title = measure.title.format(series=series)
    st.markdown(f"{_largest(runs, title, differences)} {_values(shown, layer)}")
    zero = measure.neutral is not None
    key = ("score", measure.key, stamp_of(runs), title, layer, "group" in shown, site.looks)
    figure = once(key, lambda: figures.layer_curves_named(shown, y=title, marked=layer, zero=zero))
    caption = Caption(
        f"{title} by layer",
        over_what(runs, table["n_images"]),
        seeds_of(site, list(dict.fromkeys(shown["name"]))),
        "seeds" if "group" in shown else "images",
    )
    about = about_scores(runs, table["n_images"], *lines_words(shown, zero=zero))
    chart(figure, f"score-{measure.key}", caption, below=plain(about))


def _largest(runs: Sequence[StoredRun], title: str, differences: pd.DataFrame) -> str:
    """Return in which layer the pair differs most in a measure, in words; "" if that is not known of these runs."""
    of_measure = differences[differences["title"] == title] if len(differences) else differences
    if of_measure.empty or of_measure["runs"].iloc[0] != runs[0].question:
        return ""
    row = of_measure.loc[of_measure["score"].abs().idxmax()]
    return plain(
        f"Largest difference at {in_words(row['layer'])}: {row['score']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}],"
        f" {row['n']:.0f} {row['over']}."
    )


def _series(site: Site, measure: Measure, table: pd.DataFrame) -> str:
    """Return which of the curves of a measure is shown; where there are several, the user chooses."""
    series = list(dict.fromkeys(table["series"]))
    if len(series) < 2:
        return series[0] if series else ""
    aligned = [name for key in reversed(site.chosen) for name in site.models.by_key[key].vfms if name in series]
    return choice(f"s-{measure.key}", series, (aligned or series)[0], "Compared with")


@cached
def _of_images(measure: str, stamps: tuple[object, ...], _runs: Sequence[StoredRun]) -> pd.DataFrame:
    parts = [by_image(MEASURES[measure], run).assign(name=run.model) for run in _runs]
    return pd.concat(parts, ignore_index=True).dropna(subset="value")


def _images(site: Site, measure: Measure, runs: Sequence[StoredRun], layer: int) -> None:
    """Draw how a measure is distributed over the images at the chosen layer, a dot for each image."""
    stamps = stamp_of(runs)
    table = scores_of(measure.key, stamps, runs)
    series = _series(site, measure, table)
    values = _of_images(measure.key, stamps, runs)
    values = values[(values["layer"] == layer) & (values["series"] == series)]
    if values.empty:
        st.info(f"There are no values of single images of this measure in {in_words(layer)}.")
        return
    st.markdown(plain(_ahead(site, values) or f"{_capital(in_words(layer))}: {_spread(values)}"))
    title = f"{measure.title.format(series=series)}, {in_words(layer)}"
    at = curves_of(table[(table["layer"] == layer) & (table["series"] == series)])
    dotted = figures.level_words(at)
    if dotted:
        levels = [float(level.iloc[0]) for level in figures.chance_levels(at)]
    else:
        levels, dotted = [measure.neutral] if measure.neutral is not None else [], "no effect"
    key = ("images", measure.key, stamps, series, layer, site.looks)
    chart(
        once(key, lambda: figures.image_dots(values, x=title, chance=levels)),
        f"images-{measure.key}",
        Caption(
            f"{title}, single images",
            over_what(runs, values.groupby("name")["image_id"].nunique()),
            seeds_of(site, [run.model for run in runs]),
            "",
        ),
        below="A dot is an image, a line the mean"
        + (f"; dotted: {dotted}." if levels else ".")
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
        return f"{_capital(in_words(layer))} is not measured."
    if "group" in at:
        means = at.groupby("group", sort=False)["score"].agg(["mean", "size"])
        values = [f"{name} {mean:.3f} (mean of {size:.0f})" for name, (mean, size) in means.iterrows()]
    else:
        values = [f"{row.name} {row.score:.3f} [{row.low:.3f}, {row.high:.3f}]" for row in at.itertuples(index=False)]
    more = f" and {len(values) - 4} more" if len(values) > 4 else ""
    return plain(f"{_capital(in_words(layer))}: {', '.join(values[:4])}{more}")


def _difference(
    site: Site,
    pair: Pair,
    measure: Measure,
    asked: Sequence[StoredRun],
    layer: int,
    differences: pd.DataFrame,
) -> None:
    """Draw second minus first by layer."""
    runs = {run.model: run for run in asked if run.model in pair.keys}
    stamps = (*pair.names, *stamp_of(list(runs.values())))
    table = _changes(measure.key, pair, runs, stamps)
    if table.empty:
        st.info(
            "This measure cannot be compared: it must be stored for both models with the same options and images and,"
            " where its chance level depends on them, the same number of visual tokens or the same words."
        )
        return
    at = table[table["layer"] == layer]
    names = table["series"].map(lambda series: series or pair.names[1])
    shown = table.rename(columns={"layer": "at"}).assign(
        name=names if table["series"].nunique() > 1 else pair.names[1],
        over=[_over(row) for row in table.itertuples()],
    )
    for series in dict.fromkeys(table["series"]):
        if largest := _largest(asked, measure.title.format(series=series), differences):
            st.markdown(f"{plain(series)}: {largest}" if table["series"].nunique() > 1 else largest)
    for row in at.itertuples():
        values = f"{row.score:+.3f} [{row.low:+.3f}, {row.high:+.3f}], {_over(row)}"
        st.markdown(plain(f"{_capital(in_words(layer))}: {values}"))
    first, second = pair.names
    name = figures.plain_name(f"{second} minus {first}")
    key = ("difference", measure.key, stamps, layer, site.looks)
    figure = once(
        key,
        lambda: figures.layer_curves_named(shown, y=name, marked=layer, zero=True),
    )
    title = measure.title.format(series=", ".join(dict.fromkeys(table["series"])))
    images = scores_of(measure.key, stamp_of(list(runs.values())), list(runs.values()))["n_images"]
    over = " or ".join(dict.fromkeys(table["over"]))
    caption = Caption(
        f"{title} by layer, {second} minus {first}",
        over_what(asked, images),
        seeds_of(site, [each for each in pair.keys if each in runs]),
        f"{over}, paired",
    )
    chart(
        figure,
        f"difference-{measure.key}",
        caption,
        below=plain(f"{title}. {about_scores(asked, images, '95 % intervals', 'no difference')}"),
    )


def _over(row: Any) -> str:
    return f"{row.n:.0f} {row.over}" + (f", Holm p {row.p_holm:.3g}" if row.p_holm == row.p_holm else "")
