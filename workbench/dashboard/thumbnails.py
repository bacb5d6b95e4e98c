"""Images of a data set as small pictures, and a few on which two models disagree."""

from __future__ import annotations

import base64
import io

import pandas as pd
import streamlit as st
from PIL import WebPImagePlugin  # noqa: F401  # without it, Pillow loads all its 40 formats to write one

from workbench.dashboard.site import Site, cached, plain
from workbench.data import Dataset, Sample, load_data
from workbench.data.easy_vqa import SOURCE as EASY_VQA
from workbench.data.photos import BACKGROUNDS, STAMPS
from workbench.data.sources import is_here
from workbench.errors import DataError, WorkbenchError
from workbench.overview.answers import Answered

FETCHED = {"easy_vqa": (EASY_VQA,), "photos": (STAMPS, BACKGROUNDS)}  # data sets whose files are of packages
FEW = 64  # images from which the first page draws its examples
SIDE = 128  # of a thumbnail, in pixels


@cached
def dataset(spec: str, limit: int | None = None) -> Dataset:
    """Load a data set once.

    Raises:
        DataError: it cannot be loaded, or its files would have to be fetched, which no page does.
    """
    check_here(spec)
    return load_data(spec, limit=limit)


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


@cached
def samples_of(spec: str, limit: int | None = None) -> dict[str, Sample]:
    """Return {id: question} of a data set; {} if it cannot be loaded on this machine."""
    try:
        return {sample.id: sample for sample in dataset(spec, limit)}
    except WorkbenchError:
        return {}


@st.cache_data(max_entries=4000, show_spinner=False)
def thumbnail(spec: str, image_id: str, _sample: Sample) -> str:
    """Return an image as a data URL, at most SIDE pixels wide and high."""
    image = _sample.image.copy()
    image.thumbnail((SIDE, SIDE))
    content = io.BytesIO()
    image.save(content, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"


def thumbnail_of(spec: str, question: str, limit: int | None = None) -> str | None:
    """Return the image of a question as a data URL, None if the data set is not on this machine."""
    sample = samples_of(spec, limit).get(question)
    try:
        return None if sample is None else thumbnail(spec, sample.image_id, sample)
    except (WorkbenchError, OSError):
        return None


def disagreements(site: Site, answered: Answered) -> None:
    """Draw two questions that only one model answers right, and two that only the other does."""
    a, b = answered.pair.shared[0]
    spec = a.test_data
    samples = samples_of(spec, FEW)
    table = answered.table[answered.table["id"].isin(list(samples))]
    outcome = answered.outcome(a, b)[table.index]
    chosen: list[tuple[str, pd.Series]] = []
    for number, names in ((0, f"only {b.key} right"), (1, f"only {a.key} right")):
        rows = table[outcome == f"only {(b, a)[number].key} right"].drop_duplicates("image_id")
        rows = rows[~rows["image_id"].isin([row["image_id"] for _, row in chosen])]
        chosen += [(names, row) for _, row in rows.head(2).iterrows()]
    if not chosen:
        return
    st.markdown("### Where they disagree")
    for number, (column, (words, row)) in enumerate(zip(st.columns(4), chosen, strict=False)):
        sample = samples[row["id"]]
        given = {model.key: row.get(f"given:{model.key}") for model in (a, b)}
        said = ", ".join(f"{key}: {answer}" for key, answer in given.items() if isinstance(answer, str))
        with column.container(key=f"look-{number}"):  # the link covers all of it
            left, right = st.columns([1, 2.6], wrap=False)
            if url := thumbnail_of(spec, row["id"], FEW):
                left.image(url, width="stretch", alt=f"Image {sample.image_name}")
            else:
                left.caption("image not readable")
            with right:
                st.markdown(f"{plain(sample.question)} **{plain(sample.answer)}**")
                st.caption(plain(f"{words}{f' ({said})' if said else ''}"))
                site.link("explorer", "Look inside both →", i=sample.image_id, q=sample.id)
