"""The viewer of page Explorer: images, maps and answers of two models, moved through in the browser alone.

The browser receives everything that the viewer shows, so that another layer, patch, token or head needs no answer of
the server; the server is told of it afterwards, for the address. Arrays that are larger than LIMIT are sent for the
chosen patch or token alone, and the next one is asked for.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import streamlit as st
import torch
from PIL import Image
from torch import Tensor

from workbench.dashboard.viewer_figure import joint_colors
from workbench.data import Object
from workbench.errors import DataError
from workbench.looking import Alignment, Look
from workbench.metrics.geometry import cosines, joint_pca_rgb, mean_cosine
from workbench.mllm.family import VisualTokens
from workbench.spatial.grids import object_coverage

LIMIT = 4_000_000  # bytes of one array of one model
SIDE = 672  # longer side of the image in pixels, at most
SHOW = {"attention": "Attention", "similarity": "Similarity", "pca": "Principal components", "words": "Words"}
STATE = ("show", "l", "p", "t", "h")
"""What the address keeps of the viewer: the view, layer, patch (row,column or a region row,column-row,column), row of
attention (0 is the end of the question, then the tokens of the answer), and attention head (`mean` or a number)."""


@cache
def _component() -> Any:
    parts = {part: Path(__file__).with_name(f"viewer.{part}").read_text(encoding="utf-8") for part in ("js", "css")}
    return st.components.v2.component("look_viewer", js=parts["js"], css=parts["css"])


def viewer(data: Mapping[str, Any], key: str = "viewer") -> dict[str, Any]:
    """Draw the viewer; return what is chosen in it ({} before anything is)."""
    result = _component()(key=key, data=data, default={"chosen": {}}, on_chosen_change=lambda: None)
    return dict(result.chosen or {})


def shared(image: Image.Image, objects: Sequence[Any], layer: int) -> dict[str, Any]:
    """Return what the viewer needs once: the image, names of objects, and the layer to show first."""
    small = image.copy()
    small.thumbnail((SIDE, SIDE))
    content = io.BytesIO()
    small.save(content, "PNG")
    return {
        "image": f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}",
        "size": list(small.size),
        "objects": [item.name for item in objects],
        "layer": layer,
        "views": SHOW,
    }


def panel_of(
    name: str,
    color: str,
    seen: Look,
    objects: Sequence[Object],
    others: Sequence[Object],
    aligned: Alignment | str | None,
    chosen: tuple[int, int],
) -> dict[str, Any]:
    """Return what the viewer shows of one model, without colors of principal components.

    Args:
        name: of the model.
        color: of the model on all pages.
        seen: what it did.
        objects: those that the question asks about.
        others: objects of other images, for how much attention their places get here.
        aligned: CKNNA with a VFM by layer, why there is none, or None without a VFM.
        chosen: number of the patch and of the row of attention, to which arrays above LIMIT are cut.
    """
    patch, row = chosen
    ends: list[dict[str, Any]] = [{"text": "end of question", "p": None, "likely": []}]
    tokens = [{"text": t.text, "p": t.probability, "likely": [list(one) for one in t.likely]} for t in seen.tokens]
    cosine, alike = _cosines(seen.hidden.float())
    return {
        "name": name,
        "color": color,
        **_place(seen.place),
        "layers": len(seen.hidden),
        "heads": seen.attention.shape[2],
        "rows": ends + tokens,
        "answer": seen.answer,
        "cut": seen.cut,
        "attention": _array(seen.attention, row),
        "mass": _packed(seen.mass),
        "uniform": seen.uniform.tolist(),
        "cosine": None if cosine is None else _array(cosine.movedim(1, 0), patch),
        "alike": alike,
        "words": _words(seen),
        "whyNoWords": seen.why_no_words,
        "covered": [object_coverage(item, seen.place).ravel().round(6).tolist() for item in objects],
        "others": _places_of(others, seen.place) if objects else [],
        "aligned": None if not isinstance(aligned, Alignment) else {"s": aligned.scores, "chance": aligned.chance},
        "why": aligned if isinstance(aligned, str) else "",
    }


def _places_of(others: Sequence[Object], place: VisualTokens) -> list[float]:
    """Return for each patch how often objects lie on it, 1 where they lie anywhere equally; [] without objects.

    The mean of a map's values with these weights, divided by its mean, is how much more than by its area an object of
    another image gets.
    """
    coverages = [object_coverage(item, place).ravel() for item in others]
    shares = [covered / covered.sum() for covered in coverages if covered.sum() > 0]
    if not shares:
        return []
    weights: list[float] = (np.mean(shares, 0) * shares[0].size).round(6).tolist()
    return weights


def panel_of_vfm(name: str, patches: Tensor, place: VisualTokens) -> dict[str, Any]:
    """Return what the viewer shows of a vision foundation model."""
    cosine, alike = _cosines(patches.float()[None])
    return {
        "name": name,
        "color": "",
        "vfm": True,
        **_place(place),
        "layers": 1,
        "cosine": None if cosine is None else {"at": None, "v": _packed(cosine.movedim(1, 0))},
        "alike": alike,
        "pca": _packed(_bytes(joint_pca_rgb([patches])[0])),
    }


def colors_of(seen: Sequence[Look]) -> tuple[list[str], str]:
    """Return the colors of principal components of each model's layers, and what their basis is."""
    layers = [one.hidden.float() for one in seen]
    together = len({values.shape[-1] for values in layers}) == 1
    colors = joint_colors(layers)
    basis = "One basis for all layers" + (" of both models" if len(seen) > 1 and together else "")
    if not together:
        basis += " of a model; the models' widths differ, so colors cannot be compared between them"
    return [_packed(_bytes(rgb)) for rgb in colors], basis


def _bytes(rgb: np.ndarray) -> np.ndarray:
    return (rgb * 255).round().astype(np.uint8)


def _place(place: VisualTokens) -> dict[str, Any]:
    """Return left and right of each column and top and bottom of each row of the patches, in fractions of the image."""
    assert place.grid is not None
    rows, columns = place.grid
    boxes = [place.token_box(0, column) for column in range(columns)]
    lines = [place.token_box(row, 0) for row in range(rows)]
    return {"x": [[left, right] for left, _, right, _ in boxes], "y": [[top, bottom] for _, top, _, bottom in lines]}


def _cosines(values: Tensor) -> tuple[Tensor | None, list[float]]:
    """Return the cosine of each two tokens in each layer, and its mean over pairs; None and [] if a token is zero."""
    try:
        return cosines(values), mean_cosine(values).tolist()
    except DataError:
        return None, []


def _words(seen: Look) -> dict[str, Any] | None:
    if seen.words is None:
        return None
    words = seen.words
    return {
        "ids": _packed(words.ids.int()),
        "p": _packed(words.probabilities),
        "texts": {str(token): text for token, text in words.texts.items()},
        "special": sorted(words.special),
        "most": words.ids.shape[-1],
        "vocabulary": words.vocabulary,
    }


def is_cut(seen: Look) -> bool:
    """Return whether the viewer receives the arrays of a look for what is chosen alone."""
    layers, tokens = seen.hidden.shape[:2]
    return 4 * max(layers * tokens**2, seen.attention.numel()) > LIMIT


def _array(values: Tensor, chosen: int) -> dict[str, Any]:
    """Return an array, or the chosen part of its first axis if it is larger than LIMIT."""
    if values.numel() * 4 <= LIMIT:
        return {"at": None, "v": _packed(values)}
    chosen = min(chosen, len(values) - 1)
    return {"at": chosen, "v": _packed(values[chosen : chosen + 1])}


def _packed(values: Tensor | np.ndarray) -> str:
    """Return an array as base64, float32 unless it holds integers; little-endian, which JavaScript reads."""
    array = values.contiguous().numpy() if isinstance(values, torch.Tensor) else values
    if array.dtype.kind == "f":
        array = array.astype("<f4")
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
