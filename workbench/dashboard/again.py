"""Ask the question again after a change to the framed region, or to all visual tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pandas as pd
import streamlit as st

from workbench.capture.edit import Site as Place
from workbench.changing import Change, Reply
from workbench.dashboard.asking import Asked
from workbench.dashboard.engine import Engine, asked_again
from workbench.dashboard.site import cached, choice, plain, whole_number, write_address
from workbench.data.base import content_hash
from workbench.errors import WorkbenchError
from workbench.looking import Look
from workbench.mllm.family import WHOLE, Box

CHANGES = {
    "paint": "Paint over the framed region",
    "mean": "Replace its visual tokens by the mean of the others",
    "permute": "Permute all visual tokens",
    "all": "Replace all visual tokens by their mean",
}
MEANS = {
    "paint": "The pixels of the region get the mean color of the rest, and the image is encoded anew.",
    "mean": "The vision encoder saw the region, so that tokens around it may still tell what was there.",
    "permute": "The same random order for both models, from one seed.",
    "all": "What is left of the image is one token, many times.",
}


def draw(engines: Mapping[str, Engine], seen: Mapping[str, Look], asked: Asked, chosen: Mapping[str, str]) -> None:
    """Draw the choice of a change, and the answers before and after it.

    Args:
        engines: {model: the loaded model}.
        seen: {model: what it did with the unchanged image}.
        asked: the image and question.
        chosen: what is chosen in the viewer, of which this needs the region (`p`) and the layer (`l`).
    """
    st.subheader("What if something were not there?")
    left, middle, right = st.columns([4, 3, 1], vertical_alignment="bottom")
    with left:
        kind = choice("change", list(CHANGES), "paint", "Change", listed=True, format_func=CHANGES.__getitem__)
    layers = min(len(one.hidden) for one in seen.values()) - 1
    layer = whole_number(chosen.get("l", "")) or 0
    sites = {"encoder": "before the projector", "projector": "after the projector (layer 0)"}
    sites |= {"layer": f"after layer {min(max(1, layer), layers)}, that of the slider"}
    with middle:
        more: dict[str, Any] = {"format_func": sites.__getitem__, "disabled": kind == "paint"}
        place = choice("change-at", list(sites), "encoder", "Where", listed=True, **more)
    at: Place = min(max(1, layer), layers) if place == "layer" else place  # type: ignore[assignment]
    first = next(iter(seen.values()))
    box = WHOLE if kind in ("permute", "all") else region_of(chosen.get("p", ""), first)
    change = Change("mean" if kind == "all" else kind, box, at)  # type: ignore[arg-type]
    about = content_hash(asked.pixels, asked.key, change, *engines)[:8]
    pressed = right.button("Ask again", type="primary", key="ask-again", width="stretch")
    st.caption(f"{MEANS[kind]} Drag over the image to frame a region.")
    write_address("again", [about], shown=pressed or st.query_params.get("again") == about)
    if "again" not in st.query_params:
        return
    table: dict[str, dict[str, str]] = {}
    for key, model in engines.items():
        try:
            reply = _reply(model.mllm.fingerprint, asked.pixels, asked.key, change, model, asked)
        except WorkbenchError as error:
            st.warning(f"{plain(key)}: {plain(error)}")
            continue
        for name, one in (("before", seen[key]), ("after", reply)):
            for what, value in _values(one).items():
                table.setdefault(what, {})[f"{key} {name}"] = value
    if table:
        st.dataframe(pd.DataFrame(table).T, width="stretch")


@cached
def _reply(
    model: str, pixels: bytes, question: tuple[object, ...], change: Change, _engine: Engine, _asked: Asked
) -> Reply:
    sample = replace(_asked.sample, load=lambda: _asked.image)
    return asked_again(_engine, sample, change)


def _values(one: Look | Reply) -> dict[str, str]:
    """Return the answer and the probability of each option, as texts by what they are."""
    return {"answer": one.answer or "(empty)"} | {f"p of {name}": f"{share:.3f}" for name, share in one.options.items()}


def patches_of(text: str, grid: tuple[int, int]) -> tuple[int, int, int, int] | None:
    """Return the corners (row, column, row, column) of a region of patches; None if the address names none that fits.

    Args:
        text: `row,column` or `row,column-row,column`, from 0.
        grid: rows and columns.
    """
    match = re.fullmatch(r"(\d{1,9}),(\d{1,9})(?:-(\d{1,9}),(\d{1,9}))?", text, re.ASCII)
    if match is None:
        return None
    row, column, *more = (int(part) for part in match.groups() if part is not None)
    corners = (row, column, *(more or (row, column)))
    if any(corner >= size for corner, size in zip(corners, grid * 2, strict=True)):
        return None
    return corners  # type: ignore[return-value]


def region_of(text: str, seen: Look) -> Box:
    """Return the framed region in fractions of the image: the patches that the address names, else the central one."""
    rows, columns = seen.grid
    top, left, bottom, right = patches_of(text, seen.grid) or (rows // 2, columns // 2, rows // 2, columns // 2)
    boxes = [seen.place.token_box(row, column) for row, column in ((top, left), (bottom, right))]
    return (
        min(box[0] for box in boxes),
        min(box[1] for box in boxes),
        max(box[2] for box in boxes),
        max(box[3] for box in boxes),
    )
