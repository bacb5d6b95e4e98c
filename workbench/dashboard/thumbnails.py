"""Images of a data set as small pictures, and a few on which two models disagree."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import streamlit as st
from PIL import WebPImagePlugin  # noqa: F401  # without it, Pillow loads all its 40 formats to write one

from workbench.dashboard.site import Site, cached, plain
from workbench.data import Dataset, Sample, load_data
from workbench.data.easy_vqa import SOURCE as EASY_VQA
from workbench.data.photos import BACKGROUNDS, STAMPS
from workbench.data.selection import DECODED
from workbench.data.sources import is_here
from workbench.data.specs import paths_in
from workbench.errors import DataError, WorkbenchError
from workbench.overview.answers import Answered, content_asked

FETCHED = {"easy_vqa": (EASY_VQA,), "photos": (STAMPS, BACKGROUNDS)}  # data sets whose files are of packages
FEW = 64  # images from which the first page draws its examples
SIDE = 128  # of a thumbnail, in pixels
UNKNOWN = "(question not stored)"


def dataset(spec: str, limit: int | None = None) -> Dataset:
    """Load a data set, once until what it is read from has `changed`.

    Raises:
        DataError: it cannot be loaded, or its files would have to be fetched, which no page does.
    """
    check_here(spec)
    return _dataset(spec, limit, changed(spec))


@cached
def _dataset(spec: str, limit: int | None, stamps: tuple[object, ...]) -> Dataset:
    return load_data(spec, limit=limit)


def paths_of(spec: str) -> list[Path]:
    """Return the files and folders that are read for a spec, if they are there: its own first, then its options'."""
    name, _, rest = spec.partition(":")
    if name in FETCHED:  # SPLIT or SPLIT:FOLDER
        rest = rest.partition(":")[2]
    return paths_in(rest) if rest else []


def changed(spec: str) -> tuple[object, ...]:
    """Return what changes when a data set appears on this machine, or the file or folder that it names changes.

    It does not notice a file that is written anew inside the folder, or a change in a subfolder.
    """
    fetched = map(is_here, FETCHED.get(spec.partition(":")[0], ()))
    here = [path for path in paths_of(spec) if os.path.exists(path)]
    return (*fetched, *((str(path), path.stat().st_mtime_ns) for path in here))


def check_here(spec: str) -> None:
    """Refuse a data set whose files must be fetched first.

    Raises:
        DataError: they are not on this machine.
    """
    name = spec.partition(":")[0]
    if not all(map(is_here, FETCHED.get(name, ()))):
        raise DataError(
            f"{name} is not on this machine: expected its files, which a command that uses it fetches, such as"
            f" `python -m analyses.cknna --data {spec}`"
        )


def samples_of(spec: str, limit: int | None = None) -> Mapping[str, Sample]:
    """Return {id: question} of a data set; {} if it cannot be loaded on this machine."""
    try:
        return _samples(spec, limit, changed(spec))
    except (WorkbenchError, OSError):
        return {}


@cached
def _samples(spec: str, limit: int | None, stamps: tuple[object, ...]) -> dict[str, Sample]:
    return {sample.id: sample for sample in dataset(spec, limit)}


def asked_samples(answered: Answered, limit: int | None = None) -> tuple[Mapping[str, Sample], str]:
    """Return {id: question} of a pair's evaluation data, and a note.

    The questions are {} if the data cannot be loaded, or if they are another version than the models were asked about;
    only then there is a note.
    """
    model = answered.pair.shared[0][0]
    spec = model.test_data
    samples = samples_of(spec, limit)
    table = answered.table[answered.table["id"].isin(list(samples))]
    same = bool(as_asked(table, [samples[question] for question in table["id"]], of=answered.table).all())
    all_asked = (model.recipe.get("data") or {}).get("questions") is None and len(answered.table) == len(samples)
    if same and len(table) == len(samples) and all_asked and (stored := content_asked(model)):
        try:
            same = dataset(spec, limit).fingerprint == stored
        except (WorkbenchError, OSError):  # one of its files is gone
            same = False
    if same:
        return samples, ""
    return {}, f"Without images: {spec} on this machine is not the version that these models were asked about."


def as_asked(table: pd.DataFrame, samples: Sequence[Sample], *, of: pd.DataFrame) -> pd.Series:
    """Return for each row of a table of stored answers whether this sample is what was asked: its id says too little.

    Args:
        table: the rows.
        samples: the question with the id of each row.
        of: the whole table; images are compared if there are so few that their ids are hashes of their pixels.
    """
    same = pd.Series(True, table.index)
    for name in ("question", "answer", *(["image_id"] if of["image_id"].nunique() <= DECODED else [])):
        if name in table:
            same &= table[name] == [getattr(sample, name) for sample in samples]
    return same


@st.cache_data(max_entries=4000, show_spinner=False)
def _thumbnail(spec: str, image_id: str, stamps: tuple[object, ...], _sample: Sample) -> str:
    image = _sample.image.copy()
    image.thumbnail((SIDE, SIDE))
    content = io.BytesIO()
    image.save(content, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"


def thumbnail(spec: str, sample: Sample | None) -> str | None:
    """Return the image of a question as a data URL, at most SIDE pixels wide and high; None if it cannot be read."""
    try:
        return None if sample is None else _thumbnail(spec, sample.image_id, changed(spec), sample)
    except (WorkbenchError, OSError):
        return None


def disagreements(site: Site, answered: Answered) -> None:
    """Draw two questions that only one model answers right, and two that only the other does."""
    a, b = answered.pair.shared[0]
    samples, other_version = asked_samples(answered, FEW)
    table = answered.table if other_version else answered.table[answered.table["id"].isin(list(samples))]
    outcome = answered.outcome(a, b)[table.index]
    chosen: list[tuple[str, pd.Series]] = []
    for number, names in ((0, f"only {b.key} right"), (1, f"only {a.key} right")):
        rows = table[outcome == f"only {(b, a)[number].key} right"].drop_duplicates("image_id")
        rows = rows[~rows["image_id"].isin([row["image_id"] for _, row in chosen])]
        chosen += [(names, row) for _, row in rows.head(2).iterrows()]
    if not chosen:
        return
    st.markdown("### Where they disagree")
    if other_version:
        st.caption(plain(other_version))
    for number, (column, (words, row)) in enumerate(zip(st.columns(4), chosen, strict=False)):
        sample = samples.get(row["id"])
        given = {model.key: row.get(f"given:{model.key}") for model in (a, b)}
        said = ", ".join(f"{key}: {answer}" for key, answer in given.items() if isinstance(answer, str))
        with column.container(key=f"look-{number}"):  # the link covers all of it
            left, right = st.columns([1, 2.6], wrap=False)
            if sample and (url := thumbnail(a.test_data, sample)):
                left.image(url, width="stretch", alt=f"Image {sample.image_name}")
            elif sample:
                left.caption("image not readable")
            with right:
                question = row.get("question", sample.question if sample else UNKNOWN)
                st.markdown(f"{plain(question)} **{plain(row['answer'])}**")
                st.caption(plain(f"{words}{f' ({said})' if said else ''}"))
                if sample:
                    site.link("explorer", "Look inside both →", i=sample.image_id, q=sample.id)
