"""Examples: every question with both models' answers, where they disagree, sorted by any number of an image."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd
import streamlit as st

from workbench.dashboard import live
from workbench.dashboard.lasso import chosen_by_lasso
from workbench.dashboard.site import Site, cached, choice, choices, complain, plain, write_address
from workbench.dashboard.stories import pair_stamp, stamp
from workbench.dashboard.thumbnails import UNKNOWN, asked_samples, thumbnail
from workbench.data import Sample
from workbench.data.base import content_hash
from workbench.errors import RunError
from workbench.overview.answers import Answered, answered, image_numbers, runs_about
from workbench.overview.differences import Pair
from workbench.overview.measures import MEASURES
from workbench.overview.stored import Stored, StoredRun

ROWS = 50  # on a page
OUTCOMES = {
    "all": "all questions",
    "second": "only {second} right",
    "first": "only {first} right",
    "disagree": "they disagree",
    "wrong": "both wrong",
}
BY_P = "p of the right answer, difference"
BY_SHARE = "share of right answers, difference"
MEAN = "mean of layers"


def page(site: Site) -> None:
    """Draw the filters, counts and scatter, the table of questions, and downloads of what is shown."""
    st.title("On which images do they differ?")
    if site.pair is None:
        st.info("Choose two models above. Each needs the answers that `python -m trainer` stores when it finishes.")
        return
    try:
        data = _answered(site.pair, pair_stamp(site, site.pair))
    except RunError as error:
        if not live.unfinished(site):
            raise
        st.info(f"Nothing to compare yet: {plain(error)}.")
        return
    for sentence in data.left_out:
        st.caption(f"{plain(sentence)}")
    first, second = data.pair.names
    samples, other_version = asked_samples(data)
    table = _table(data, stamp(site, data.pair.keys))
    if "question" not in table:  # stored by an older version: from the data set, if it is on this machine
        asked = [samples[each].question if each in samples else UNKNOWN for each in table["id"]]
        table = table.assign(question=asked)
    spec = data.pair.first[0].test_data
    _answer(data)
    if other_version:
        st.caption(plain(other_version))
    filters, right = st.columns([3, 2], gap="large")
    with filters:
        shown, title = _filtered(site, data, table, samples)
    with right:
        _counts(table, first, second)
    shown = chosen_by_lasso(site, shown, data.pair, stamp(site, data.pair.keys))
    if shown.empty:
        st.info("No question is left: widen the filters.")
        return
    _rows(site, data, shown, samples, title)
    _downloads(site, shown, spec)


@cached
def _answered(_pair: Pair, stamps: tuple[object, ...]) -> Answered:
    return answered(_pair)


@cached
def _table(_data: Answered, stamps: tuple[object, ...]) -> pd.DataFrame:
    """Return the questions with the share of right trainings, the outcome, and the probabilities where stored."""
    table = _data.table[[c for c in ("id", "image_id", "category", "question", "answer", "chance") if c in _data.table]]
    table = table.assign(first=_data.share_right(0), second=_data.share_right(1))
    for side, name in enumerate(("given_first", "given_second")):
        column = f"given:{_data.pair.shared[0][side].key}"
        if column in _data.table:
            table[name] = _data.table[column]
    probabilities = [
        [f"p_right:{models[side].key}" for models in _data.pair.shared if f"p_right:{models[side].key}" in _data.table]
        for side in (0, 1)
    ]
    if all(probabilities):
        table["p_first"], table["p_second"] = (_data.table[columns].mean(axis=1) for columns in probabilities)
        table["p_difference"] = table["p_second"] - table["p_first"]
    return table


def _answer(data: Answered) -> None:
    d, (first, second) = data.disagreement, data.pair.names
    per = " (mean of the seeds)" if d.over == "seeds" else ""
    sentence = (
        f"{second} alone answers {d.only_second:,.0f} of {d.questions:,} questions right, {first} alone"
        f" {d.only_first:,.0f}{per}."
    )
    independent = (
        f"If both were right independently, they would disagree on {100 * d.chance:.0f} %; here it is"
        f" {100 * d.share.estimate:.0f} %."
    )
    st.markdown(f"{plain(sentence)} :gray[{plain(independent)}]")


# --- filters --------------------------------------------------------------------------------------


def _filtered(
    site: Site, data: Answered, table: pd.DataFrame, samples: Mapping[str, Sample]
) -> tuple[pd.DataFrame, str]:
    """Draw the filters and return the questions that pass, sorted, and what they are sorted by."""
    first, second = data.pair.names
    names = {key: text.format(first=first, second=second) for key, text in OUTCOMES.items()}
    outcome = choice("outcome", list(names), "all", "Outcome", format_func=names.__getitem__)
    left, middle, right = st.columns(3)
    with left:
        types = choices("types", sorted(table["category"].unique()), [], "Question types", placeholder="all")
    of_image = {sample.image_id: frozenset(o.name for o in sample.objects) for sample in samples.values()}
    names_of_objects = sorted({name for objects in of_image.values() for name in objects})
    with middle:
        objects = choices("objects", names_of_objects, [], "Objects in the image", placeholder="any")
    text = right.text_input("Words in question or answer", key="text", bind="query-params", placeholder="such as red")
    table = _with_number(site, data, table)
    sortable = [name for name in (BY_P, BY_SHARE) if name in table]
    runs = _runs(data, site.stored, stamp(site, data.pair.keys))
    titles = {m.title.format(series="a VFM"): key for key, m in MEASURES.items() if runs.get(m.analysis)}
    left, middle, right = st.columns([3, 2, 2], vertical_alignment="bottom")
    with left:
        by = choice("sort", [*sortable, *titles], sortable[0], "Sort by", listed=True)
    if by in titles:
        of_measure = runs[MEASURES[titles[by]].analysis]
        table = _with_measure(site, data, table, titles[by], of_measure, middle, by)
    descending = right.toggle("Largest first", value=True, key="down", bind="query-params")
    if others := [name for name, of in runs.items() if not of]:
        spec = plain(data.pair.first[0].test_data)
        st.caption(
            f"Stored for other images only, so not in this list: {plain(', '.join(others))}."
            f" `python -m analyses.all` with \\--data {spec} makes them of these images."
        )
    shown = table[_passes(table, outcome)]
    if types:
        shown = shown[shown["category"].isin(types)]
    if objects:
        shown = shown[shown["image_id"].map(lambda image: set(objects) <= of_image.get(image, frozenset()))]
    if text:
        hit = shown["question"].str.contains(text, case=False, regex=False)
        shown = shown[hit | shown["answer"].str.contains(text, case=False, regex=False)]
    if by in shown:
        without = int(shown[by].isna().sum())
        if without:
            st.caption(f"{without:,} questions are left out, because this number is not stored for their image.")
        shown = shown.dropna(subset=[by]).sort_values(by, ascending=not descending, kind="stable")
    return shown.reset_index(drop=True), by


def _with_number(site: Site, data: Answered, table: pd.DataFrame) -> pd.DataFrame:
    table = table.assign(**{BY_SHARE: table["second"] - table["first"]})
    return table.assign(**{BY_P: table["p_difference"]}) if "p_difference" in table else table


def _with_measure(
    site: Site,
    data: Answered,
    table: pd.DataFrame,
    key: str,
    runs: Sequence[StoredRun],
    column: st.delta_generator.DeltaGenerator,
    by: str,
) -> pd.DataFrame:
    """Return the table with the difference of a measure of its image as the column `by`."""
    layers = [MEAN, *map(str, sorted(set(MEASURES[key].select(runs[0])["layer"].astype(int))))]
    with column:
        layer = choice("el", layers, MEAN, "Layer", listed=True)
    numbers = _numbers(key, stamp(site, data.pair.keys), layer, data.pair, runs)
    series = list(dict.fromkeys(numbers["series"]))
    if len(series) > 1:
        with column:
            picked = choice("es", series, series[0], "Compared with", listed=True)
        numbers = numbers[numbers["series"] == picked]
    return table.assign(**{by: table["image_id"].map(numbers.set_index("image_id")["difference"])})


@cached
def _runs(_data: Answered, _stored: Stored, stamps: tuple[object, ...]) -> dict[str, list[StoredRun]]:
    """Return {analysis: its runs about images of the questions, none if all are about others}."""
    images, keys = frozenset(_data.table["image_id"]), _data.pair.keys
    analyses = dict.fromkeys(measure.analysis for measure in MEASURES.values())
    return {name: runs_about(images, _stored, name, keys) for name in analyses if _stored.of(name, keys)}


@cached
def _numbers(key: str, stamps: tuple[object, ...], layer: str, _pair: Pair, _runs: Sequence[StoredRun]) -> pd.DataFrame:
    return image_numbers(MEASURES[key], _pair, _runs, None if layer == MEAN else int(layer))


def _passes(table: pd.DataFrame, outcome: str) -> pd.Series:
    """Return which questions have an outcome; with several seeds, by the larger share of right trainings."""
    first, second = table["first"], table["second"]
    return {
        "all": first >= 0,
        "second": (second > first) & (first < 1) & ((first == 0) | (second - first >= 0.5)),
        "first": (first > second) & (second < 1) & ((second == 0) | (first - second >= 0.5)),
        "disagree": first != second,
        "wrong": (first == 0) & (second == 0),
    }[outcome]


def _counts(table: pd.DataFrame, first: str, second: str) -> None:
    """Draw how many questions each, both or none has right; with seeds, more than half of them."""
    a, b = table["first"] > 0.5, table["second"] > 0.5
    counts = pd.DataFrame(
        [[int((a & b).sum()), int((a & ~b).sum())], [int((~a & b).sum()), int((~a & ~b).sum())]],
        index=[f"{first} right", "wrong"],
        columns=[f"{second} right", "wrong"],
    )
    shares = set(table["first"]) | set(table["second"])
    st.caption("Questions" + (", by more than half of the seeds" if shares - {0.0, 1.0} else ""))
    st.dataframe(counts, width="stretch", height=108)


# --- the table ------------------------------------------------------------------------------------


def _rows(site: Site, data: Answered, shown: pd.DataFrame, samples: Mapping[str, Sample], by: str) -> None:
    """Draw one page of the questions with thumbnails, and the chosen one large, with its neighbors by J and K."""
    spec, ids = data.pair.first[0].test_data, shown["id"].tolist()
    place = _place(ids, data)
    pages = -(-len(ids) // ROWS)
    state = st.session_state
    turned = int(state.get("turned", 0))  # a new widget, since its page can't be set otherwise
    if state.pop("turn-page", False) or state.get(f"page-{turned}", 1) > pages:
        state["turned"] = turned = turned + 1
    number = 1
    if pages > 1:
        number = st.pagination(pages, default=place // ROWS + 1, key=f"page-{turned}") or 1
    start = (number - 1) * ROWS
    if not start <= place < start + ROWS:  # the user has turned the page
        place = start
    rows = shown.iloc[start : start + ROWS].reset_index(drop=True)
    write_address("q", [ids[place]], shown=place > 0)
    st.caption(f"{len(ids):,} questions; {start + 1} to {start + len(rows)} are shown.")
    left, right = st.columns([3, 1], gap="medium")
    table = f"questions-{content_hash(*rows['id'])}"  # the numbers of chosen rows are of these rows alone
    left.dataframe(
        _view(rows, [thumbnail(spec, samples.get(question)) for question in rows["id"]], by, place - start),
        hide_index=True,
        width="stretch",
        row_height=56,
        height=620,
        column_config=_columns(data, by),
        key=table,
        on_select=partial(_pick, table, rows["id"].tolist()),
        selection_mode="single-row",
    )
    with right:
        with st.container(horizontal=True, vertical_alignment="center"):
            for label, step, key in (("Previous", -1, "K"), ("Next", 1, "J")):
                st.button(
                    label,
                    key=f"step-{key}",
                    shortcut=key,
                    disabled=not 0 <= place + step < len(ids),
                    on_click=_go,
                    args=(ids[min(max(place + step, 0), len(ids) - 1)],),
                )
            st.caption(f"{place + 1:,} of {len(ids):,}", width="content")
        _one(site, data, shown.iloc[place], samples)


def _place(ids: list[str], data: Answered) -> int:
    """Return the place of the question that the address names, 0 if it names none that is shown."""
    named = st.query_params.get("q")
    if named in ids:
        if st.session_state.get("q-address") != [named]:  # the address is new, so its page is shown
            st.session_state["turn-page"] = True
        return ids.index(named)
    if named is not None and not (data.table["id"] == named).any() and st.session_state.get("q-address") != [named]:
        complain("q", named, ids[0])
        write_address("q", [], shown=False)
        st.rerun()
    return 0


def _pick(table: str, ids: list[str]) -> None:
    """Choose the question of the row that was clicked."""
    rows = st.session_state[table]["selection"]["rows"]
    if rows and rows[0] < len(ids):
        write_address("q", [ids[rows[0]]])


def _go(question: str) -> None:
    """Choose a question, and turn to its page."""
    write_address("q", [question])
    st.session_state["turn-page"] = True


def _view(rows: pd.DataFrame, images: list[str | None], by: str, chosen: int) -> pd.DataFrame:
    """Return the columns that the table of questions has, with a mark at the chosen row."""
    view = pd.DataFrame({"chosen": ["▸" if place == chosen else "" for place in range(len(rows))]})
    view["image"] = images
    names = ("question", "answer", "given_first", "given_second", "category", "first", "second", "p_first", "p_second")
    for column in names:
        if column in rows:
            view[column] = rows[column]
    if by in rows and by not in (BY_P, BY_SHARE):
        view["number"] = rows[by]
    return view


def _columns(data: Answered, by: str) -> dict[str, Any]:
    config, (first, second) = st.column_config, data.pair.names
    several = len(data.pair.shared) > 1
    share = "share of its seeds that answer right" if several else "1 if right, 0 if wrong"
    given = data.pair.shared[0]
    return {
        "chosen": config.TextColumn("", width=24),
        "image": config.ImageColumn("image", width="small"),
        "question": config.TextColumn("question", width="medium"),
        "answer": config.TextColumn("right answer"),
        "category": config.TextColumn("type"),
        "given_first": config.TextColumn(f"{given[0].key} says"),
        "given_second": config.TextColumn(f"{given[1].key} says"),
        "first": config.NumberColumn(f"{first} right", help=share, format="%.2f" if several else "%d"),
        "second": config.NumberColumn(f"{second} right", help=share, format="%.2f" if several else "%d"),
        "p_first": config.NumberColumn(f"p, {first}", help="probability of the right answer", format="%.2f"),
        "p_second": config.NumberColumn(f"p, {second}", help="probability of the right answer", format="%.2f"),
        "number": config.NumberColumn(by, format="%+.3f"),
    }


def _one(site: Site, data: Answered, row: pd.Series, samples: Mapping[str, Sample]) -> None:
    """Draw one question with the answers of every training."""
    if url := thumbnail(data.pair.first[0].test_data, samples.get(row["id"])):
        st.image(url, width=224, alt=f"Image {row['image_id']}")
    st.markdown(
        f"**{plain(row['question'])}**  \nright: **{plain(row['answer'])}** :gray[(chance {row['chance']:.0%})]"
    )
    full = data.table[data.table["id"] == row["id"]].iloc[0]
    for side, name in enumerate(data.pair.names):
        models = [pair[side] for pair in data.pair.shared]
        if len(models) == 1:
            st.markdown(f"{plain(models[0].key)}{_said(full, models[0].key)}")
            continue
        right = sum(bool(full[f"correct:{model.key}"]) for model in models)
        seeds = " \u2002 ".join(f"{model.seed}{_said(full, model.key)}" for model in models)
        st.markdown(f"{plain(name)}, {right} of {len(models)} right, by seed:  \n{seeds}")
    site.link("explorer", "Look inside both", i=row["image_id"], q=row["id"])


def _said(full: pd.Series, key: str) -> str:
    """Return whether a training answers right, and what it says, as far as it is stored."""
    given, p = full.get(f"given:{key}"), full.get(f"p_right:{key}")
    words = f" {plain(given)}" if isinstance(given, str) else ""  # a training of an older version stored none
    chance = f" :gray[p = {p:.2f}]" if isinstance(p, float) else ""
    return f" {':green[✓]' if full[f'correct:{key}'] else ':red[✗]'}{words}{chance}"


def _downloads(site: Site, shown: pd.DataFrame, spec: str) -> None:
    """Draw downloads of the questions that are shown, as a table and as a list that analyses accept."""
    with st.container(horizontal=True, vertical_alignment="center"):
        st.download_button("Table as CSV", partial(shown.to_csv, index=False), "questions.csv", "text/csv")
        st.download_button("As a data set", "\n".join(shown["id"]) + "\n", "ids.txt", "text/plain")
    st.caption("An analysis of these questions alone:")
    models = site.words_of_models(site.pair.keys) if site.pair else []
    words = ["python", "-m", "analyses.permutation", "--model", *models, "--data", spec, "--ids", "ids.txt"]
    words += ["--questions", "0", "--limit", str(shown["image_id"].nunique())]  # the defaults leave some of them out
    st.code(shlex.join(words), language="bash", wrap_lines=True)
