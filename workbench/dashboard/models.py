"""Models: which there are, which is best at what, and how their trainings went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import streamlit as st

from workbench import figures
from workbench.dashboard import live, one_model
from workbench.dashboard.folders import below_root
from workbench.dashboard.glossary import meaning
from workbench.dashboard.papers import chart, seeds_of
from workbench.dashboard.rows import chosen_rows
from workbench.dashboard.site import Site, cached, choice, choices, once, plain, sweeps
from workbench.dashboard.stories import stamp, story_of
from workbench.errors import one_line
from workbench.figures.caption import Caption
from workbench.overview import table as tables
from workbench.overview.charts import accuracies_chart, by_variant
from workbench.overview.measures import images_words
from workbench.overview.models import Model, Models
from workbench.training_folder import MEAN, cknna_log, score_log

REASONS = 6  # why models are damaged, at most; Evidence has all
OPENED = 4  # links to pages of single models, at most
OF_A_SWEEP = ("variant", "type", "against", "seeds", "n", "chance", "accuracy", "low", "high", "difference")  # columns


def page(site: Site) -> None:
    """Draw the table of models, and curves and accuracies of the chosen ones."""
    live.watch()
    one = one_model.opened(site)
    if one is not None:
        one_model.heading(site, one)
        training_curves(site, [one.key])
        _by_type(site, [one.key])
        _warnings([one])
        one_model.details(site, one)
        return
    st.title("Which models are there, and which is best at what?")
    if not site.models.by_key:
        st.info(
            f"No model is in `{site.root}` yet. Train one with `python -m trainer shapes_viral`, or run `viral demo`."
        )
        return
    _answer(site)
    _table(site)
    grouped = _toggle_groups(site)
    training_curves(site, site.chosen, grouped=grouped)
    _by_type(site, site.chosen, grouped=grouped)
    _warnings([site.models.by_key[key] for key in site.chosen])
    _sweeps(site)


def _answer(site: Site) -> None:
    """Draw the sentence that answers the page's question."""
    if site.pair is not None:
        story = story_of(site, site.pair)
        st.markdown(plain(story.finding) + (f" :gray[{plain(story.caveat)}]" if story.caveat else ""))


# --- the table ------------------------------------------------------------------------------------


def rows_of(site: Site, keys: Sequence[str], *, by_seed: bool) -> pd.DataFrame:
    """Return a row for each of these models, or for each of their variants, as `overview.table` has them."""
    stamps = (*stamp(site, keys), *logs_stamp(site, keys), site.looks)
    return _rows(Models({key: site.models.by_key[key] for key in keys}), site.baseline, by_seed, stamps)


@cached
def _rows(_models: Models, baseline: str, by_seed: bool, stamps: tuple[object, ...]) -> pd.DataFrame:
    return tables.variant_rows(_models, baseline) if by_seed else tables.model_rows(_models, baseline)


def _table(site: Site) -> None:
    left, middle, right, last = st.columns([2, 2, 1.4, 1], vertical_alignment="bottom")
    text = left.text_input("Find a model", key="find", bind="query-params", placeholder="part of a name or variant")
    variants = list(site.models.variants)
    with middle:
        wanted = choices("variant", variants, [], "Variants", placeholder="all")
    data = list(dict.fromkeys(model.test_data for model in site.models.by_key.values() if model.test_data))
    with right:
        asked = choices("evaluated", data, [], "Evaluated on", placeholder="all")
    by_seed = last.toggle("Group seeds", key="group", bind="query-params", help=meaning("seed"))
    rows = rows_of(site, list(site.models.by_key), by_seed=by_seed)
    name = "variant" if by_seed else "key"
    shown = rows[rows[name].str.contains(text, case=False, regex=False)] if text else rows
    for column, chosen in (("variant", wanted), ("data", asked)):
        shown = shown[shown[column].isin(chosen)] if chosen else shown
    first = site.models.by_key[site.baseline].variant if by_seed else site.baseline
    shown = shown.sort_values(name, key=lambda names: names != first, kind="stable", ignore_index=True)
    alike = _alike(shown)
    chosen = chosen_rows(
        shown.drop(columns=["why", "chance", *alike], errors="ignore"),
        shown[name].tolist(),
        "row",
        [*site.models.by_key, *variants],
        column_config=columns(by_seed=by_seed),
        height=min(38 + 35 * max(1, len(shown)), 460),
    )
    st.caption(_about(shown, by_seed, alike))
    for each, why in shown.loc[shown["why"] != "", [name, "why"]].head(REASONS).itertuples(index=False):
        st.caption(plain(f"{each}: {why}"))
    keys = [model.key for each in chosen for model in site.models.variants[each]] if by_seed else chosen
    if not keys:
        st.caption("Choose rows to compare them with the baseline, or to see everything about one of them.")
        return
    with st.container(horizontal=True, vertical_alignment="center"):
        if others := [key for key in keys if key != site.baseline]:
            words = f"these {len(others)}" if len(others) > 1 else plain(others[0])
            st.button(f"Compare {words} with {plain(site.baseline)}", on_click=_compare, args=(site, others))
        for key in keys[:OPENED]:
            site.link("models", f"Everything about {plain(key)} →", **{one_model.ONE: key})


def _compare(site: Site, keys: Sequence[str]) -> None:
    """Compare the chosen rows; together with the baseline, its other seeds stay."""
    own = site.models.by_key[site.baseline].variant
    seeds = [key for key in site.others if site.models.by_key[key].variant == own]
    st.session_state["m"] = [key for key in dict.fromkeys([*seeds, *keys]) if key != site.baseline]


def _alike(shown: pd.DataFrame) -> dict[str, str]:
    """Return {column: its value} of columns that need no place, since all models that have a value have the same."""
    alike = {}
    for column in ("objective", "steps", "data"):
        values = shown[column].replace("", None).dropna().unique()
        if len(values) == 1:
            words = {"steps": "{:.0f} steps", "objective": "objective {} where there is an alignment loss"}
            alike[column] = words.get(column, "{}").format(values[0])
    if "key" in shown and len(shown) and (shown["key"] == shown["variant"]).all():
        alike["variant"] = ""
    return alike


def columns(*, by_seed: bool) -> dict[str, Any]:
    """Return how the columns of `rows_of` are shown."""
    config = st.column_config
    over = "over seeds" if by_seed else "over images"
    return {
        "key": config.TextColumn("model", pinned=True),
        "variant": config.TextColumn("variant", pinned=by_seed),
        "seed": config.NumberColumn("seed", help=meaning("seed")),
        "target": config.TextColumn("aligned with", help=meaning("alignment loss")),
        "layer": config.TextColumn("layer", help=meaning("aligned layer")),
        "weight": config.NumberColumn("weight", help="of the alignment loss"),
        "data": config.TextColumn("evaluated on"),
        "accuracy": config.NumberColumn("accuracy", help=meaning("accuracy"), format="%.3f"),
        "low": config.NumberColumn("low", help=f"95 % interval {over}", format="%.3f"),
        "high": config.NumberColumn("high", help=f"95 % interval {over}", format="%.3f"),
        "difference": config.NumberColumn("minus baseline", help=f"{meaning('baseline')}", format="%+.3f"),
        "d_low": config.NumberColumn("low ", help=f"95 % interval of the difference, {over}", format="%+.3f"),
        "d_high": config.NumberColumn("high ", help=f"95 % interval of the difference, {over}", format="%+.3f"),
        "p_holm": config.NumberColumn("Holm p", help=meaning("Holm p"), format="%.3g"),
        "CKNNA": config.NumberColumn(
            "CKNNA",
            help=f"{meaning('CKNNA')} Measured at the end of training, mean of the aligned layers.",
            format="%.3f",
        ),
        "curve": config.LineChartColumn("over training", help="accuracy (or loss) over the steps of the training"),
        "state": config.TextColumn("state"),
    }


def _about(shown: pd.DataFrame, by_seed: bool, alike: Mapping[str, str]) -> str:
    data = list(dict.fromkeys(shown["data"][shown["data"].fillna("") != ""]))
    chance = shown["chance"].dropna().unique() if "chance" in shown else np.array([])
    ends = list(dict.fromkeys(f"{level:.3f}" for level in (chance.min(), chance.max()))) if len(chance) else []
    level = f", chance {' to '.join(ends)}" if ends else ""
    over = (
        "seeds; differences are paired by seed, Holm-corrected over the variants"
        if by_seed
        else ("images, paired by question, and p is Holm-corrected over the models; they say nothing about other seeds")
    )
    same = ", ".join(value for column, value in alike.items() if value and column != "data")
    return plain(
        f"Accuracy on {', '.join(data) or 'no data yet'}, mean of question types{level}. Intervals are over {over}."
        + (f" The same for all: {same}." if same else "")
    )


def _toggle_groups(site: Site) -> bool:
    if not several_seeds(site):
        return False
    return st.toggle("One mean per variant, over its seeds", value=True, key="means", bind="query-params")


def several_seeds(site: Site) -> bool:
    """Return whether seeds of one variant are chosen beside another model."""
    trainings = {(site.models.by_key[key].variant, site.models.by_key[key].seed) for key in site.chosen}
    return len(trainings) > max(2, len({variant for variant, _ in trainings}))


# --- curves ---------------------------------------------------------------------------------------


def training_curves(
    site: Site, keys: Sequence[str], *, grouped: bool = False, few: bool = False, title: str = "Training"
) -> None:
    """Draw measures over the steps of training.

    Args:
        keys: the models.
        grouped: whether seeds are thin lines around the mean of their variant.
        few: whether to draw the first three measures without a choice.
        title: the heading.
    """
    models = [site.models.by_key[key] for key in keys if site.models.by_key[key].folder is not None]
    stamps = logs_stamp(site, [model.key for model in models])
    curves = once(("curves", stamps), lambda: _curves(models))
    if not curves:
        return
    measures = list(curves)
    first: list[str] = [name for name in ("accuracy, mean of types", "loss on answers (training)") if name in measures]
    first += [name for name in measures if name.startswith("CKNNA")][:1]
    first = first or measures[:2]
    st.subheader(title)
    shown: list[str] = first
    if not few:
        shown = choices("curves", measures, first, "Curves")
    front = tuple(site.pair.keys) if site.pair is not None else ()
    many = " With so many models, the two that are compared have colors; point at a gray line for its name."
    for column, measure in zip(st.columns(max(1, min(3, len(shown)))) * len(shown), shown, strict=False):
        table = by_variant(curves[measure], site.models) if grouped else curves[measure]
        figure = once(
            ("curve", stamps, site.looks, measure, grouped, front),
            partial(figures.named_curves, table, x="step", y=measure, front=front),
        )
        steps = f"{table['at'].nunique()} steps of training; {_counts(table['over'])}"
        over = "conversations" if measure == _measure("val_lm_loss") else "images"
        with column:
            chart(
                figure,
                f"curve-{measure}",
                Caption(f"{measure} over the steps of training", steps, seeds_of(site, keys_of(table)), over),
            )
    bands = (
        "Bands: 95 % intervals over the images (or conversations) of the validation split. Losses of training batches"
        " have none."
    )
    st.caption(
        ("Thick: mean over seeds, thin: each seed." if grouped else bands)
        + " Dotted: chance; for CKNNA the 95th percentile of its null."
        + (many if not grouped and len(models) > figures.LINES else "")
    )


def keys_of(table: pd.DataFrame) -> list[str]:
    """Return the models of a table of curves, in order."""
    return list(dict.fromkeys(table["name"]))


def _counts(over: pd.Series) -> str:
    """Return what the points of curves are over, the most frequent first."""
    words = list(over.value_counts().index)
    return ", ".join(words[:3]) + (f" and {len(words) - 3} more counts" if len(words) > 3 else "")


def logs_stamp(site: Site, keys: Sequence[str]) -> tuple[object, ...]:
    """Return what changes when the training log of one of these models changes."""
    return (str(site.root), *((key, site.models.by_key[key].stamps) for key in keys))


def _curves(models: Sequence[Model]) -> dict[str, pd.DataFrame]:
    """Return {measure: columns name, at, score, low, high, over, chance, level} of the logs of some models."""
    parts: dict[str, list[pd.DataFrame]] = {}
    for model in models:
        log = tables.log_of(model)
        for column in log.columns:
            if column.startswith("accuracy/") or column == "val_lm_loss":
                scored = score_log(log, column)
                over = [f"n = {n:.0f}" if n == n else "no interval stored" for n in scored["n"]]
                chance = scored["chance"] if column.startswith("accuracy/") else np.nan
                part = scored.rename(columns={"step": "at"}).assign(over=over, chance=chance, level=figures.CHANCE)
            elif column.endswith("_loss"):
                rows = log.dropna(subset=[column]).drop_duplicates("step")
                part = rows[["step", column]].set_axis(["at", "score"], axis=1)
                part = part.assign(low=np.nan, high=np.nan, over="batches", chance=np.nan, level="")
            else:
                continue
            if len(part):  # not yet measured, where the training has just begun
                parts.setdefault(_measure(column), []).append(part.assign(name=model.key))
        if len(log) and model.folder is not None:
            for of, rows in cknna_log(model.folder).groupby("of", sort=False):
                over = [f"{n:.0f} tokens of {i:.0f} images" for n, i in zip(rows["n"], rows["n_images"], strict=True)]
                part = rows.rename(columns={"step": "at", "null_q95": "chance"}).assign(over=over, name=model.key)
                parts.setdefault(f"CKNNA, {of}", []).append(part.assign(level=figures.Q95))
    columns = ["name", "at", "score", "low", "high", "over", "chance", "level"]
    return {name: pd.concat(tables_, ignore_index=True)[columns] for name, tables_ in parts.items()}


def _measure(column: str) -> str:
    """Return what a column of the log is called on the page."""
    names = {
        "accuracy/mean": "accuracy, mean of types",
        "lm_loss": "loss on answers (training)",
        "alignment_loss": "alignment loss (training)",
        "val_lm_loss": "loss on answers (validation)",
        "val_alignment_loss": "alignment loss (validation)",
    }
    return names.get(column, column.replace("accuracy/", "accuracy, ").replace("_", " "))


# --- accuracy by type, warnings, sweeps -----------------------------------------------------------


def _by_type(site: Site, keys: Sequence[str], *, grouped: bool = False) -> None:
    models = [site.models.by_key[key] for key in keys]
    notes = []
    if grouped:
        groups = {name: [m for m in models if m.variant == name] for name in dict.fromkeys(m.variant for m in models)}
        accuracies = {name: tables.variant_accuracies(group) for name, group in groups.items()}
        alike = {name: tables.asked_alike(group) for name, group in groups.items()}
        notes = [f" {name}: {why}." for name, (_, why) in alike.items() if why]
        models = [model for kept, _ in alike.values() for model in kept]
    else:
        accuracies = {model.key: tables.accuracies_of(model) for model in models}
    accuracies = {name: table for name, table in accuracies.items() if len(table)}
    if not accuracies:
        return
    st.subheader("Accuracy by question type")
    figure = once(("types", grouped, logs_stamp(site, keys), site.looks), partial(accuracies_chart, accuracies))
    scored = [model for model in models if len(tables.accuracies_of(model))]
    data = ", ".join(dict.fromkeys(model.test_data for model in scored if model.test_data)) or "data not known"
    counts = images_words(pd.concat([table["n_images"] for table in accuracies.values()]))
    over = "seeds" if grouped else "images"
    rest = "".join(notes) if grouped else " They say nothing about other seeds."
    chart(
        figure,
        "accuracy",
        Caption("Accuracy by question type", f"{counts} of {data}", seeds_of(site, [m.key for m in scored]), over),
        below=plain(f"On {data}; 95 % intervals over {over}.{rest}"),
    )


def _warnings(models: Sequence[Model]) -> None:
    lines = []
    for model in models:
        log = tables.log_of(model)
        if "warning" in log:
            rows = log.dropna(subset=["warning"])
            lines += [f"{model.key}, step {row.step}: {row.warning}" for row in rows.itertuples()]
    for line in lines:
        st.warning(plain(line))


def _sweeps(site: Site) -> None:
    """Draw the tables that `python -m trainer.sweep` stored."""
    problems = sweeps(site.root)
    if not problems:
        return
    st.subheader("Sweeps")
    name = choice("sweep", list(problems), next(iter(problems)), "Sweep")
    if problems[name]:
        st.warning(plain(f"{name} cannot be read: the file {problems[name]}."))
        return
    try:
        table = pd.read_parquet(below_root(f"{name}.parquet"))
        table[list(OF_A_SWEEP)]
    except (OSError, ValueError, KeyError) as error:
        st.warning(plain(f"{name} cannot be read ({one_line(error)}): expected the table of a sweep."))
        return
    kinds = list(dict.fromkeys(table["type"]))
    kind = choice("type", kinds, MEAN if MEAN in kinds else kinds[0], "Question type")
    of_type = table[table["type"] == kind]
    seeds = of_type.groupby("variant", sort=False)["seeds"].first()
    chart(
        figures.sweep_figure(of_type),
        "sweep-points",
        Caption(
            f"Sweep {name}: accuracy, {kind}",
            f"{', '.join(dict.fromkeys(f'{n:,.0f}' for n in of_type['n'].dropna()))} questions",
            "; ".join(f"{variant}: seeds {words}" for variant, words in seeds.items()),
            "seeds; differences are paired by seed",
        ),
        below="95 % intervals over seeds; differences are paired by seed, with Holm's correction over the variants. A"
        " variant with one seed has no interval.",
    )
    shown = of_type.drop(columns=["type", "against", "few"], errors="ignore").replace([np.inf, -np.inf], np.nan)
    if {"p", "p_holm", "pairs"} <= set(shown):
        shown.loc[~(shown["pairs"] > 1), ["p", "p_holm"]] = np.nan  # a single seed has no test
    st.dataframe(shown, hide_index=True, width="stretch")
