"""Maps of stored images: principal components of their tokens, and the similarity to a clicked patch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
import pandas as pd
import streamlit as st
import torch
from torch import Tensor

from workbench.dashboard.again import patches_of
from workbench.dashboard.papers import chart, seeds_of
from workbench.dashboard.site import Site, choice, choices, complain, write_address
from workbench.dashboard.tokens_figures import clickable, small_maps
from workbench.figures.caption import Caption
from workbench.metrics.geometry import joint_pca_rgb, similarity_to
from workbench.mllm.family import VisualTokens
from workbench.runs import Run

MAX_MAPS = 10  # side by side, at first
PATCH = "patch"  # in the address: the framed patch, as row,column
STORED = {"encoder": "tower"}  # the stored name of a representation, where it is not the shown one
BASES = ("all layers and models", "each model", "each map")


def maps(site: Site, shared: Mapping[str, Run]) -> None:
    """Draw principal components and the similarity to a clicked patch, in the chosen layers and VFMs of each model.

    Args:
        site: what is chosen.
        shared: {model: its run}, all about the same images.
    """
    tables = {label: run.tables["maps"] for label, run in shared.items() if len(run.tables["maps"])}
    if not tables:
        st.info("No tokens were stored for maps. Run the analysis with `--maps 4`.")
        return
    images = sorted(set.intersection(*(set(table["number"]) for table in tables.values())))
    shown = {value: name for name, value in STORED.items()}
    names = [
        shown.get(name, name)
        for name in dict.fromkeys(name for label in tables for name in shared[label].extra["map_representations"])
    ]
    left, right = st.columns([1, 2], gap="large")
    numbers = {str(row["image_id"]): row["number"] for row in next(iter(tables.values())).to_dict("records")}
    stored = [name for name, number in numbers.items() if number in images]
    with left:
        image = numbers[choice("image", stored, stored[0], "Image", listed=True)]
    with right:
        chosen = choices("shown-images", names, _spread(names), "Shown")
    if not chosen:
        st.info("Choose one or more representations.")
        return
    places = {label: _visual_tokens(table.set_index("number").loc[image]) for label, table in tables.items()}
    tokens = {
        label: {
            n: shared[label].tensors[key].float()
            for n in chosen
            if (key := f"map.{image}.{STORED.get(n, n)}") in shared[label].tensors
        }
        for label in tables
    }
    first = next(iter(tables))
    with left:
        clicked = _clicked_patch(shared[first].tensors[f"picture.{image}"].numpy(), places[first])
    with right:
        basis = choice("basis", BASES, BASES[0], "One basis for")
        st.caption(_about(tokens, basis))
        own_scale = st.toggle("Each map of similarities on its own scale", key="own_scale", bind="query-params")
        st.caption(
            "Click a patch of the image: the lower maps show the cosine of every token with the token there, in the"
            " same representation, from float16 (error below 0.002). A layer in which all tokens share an offset is"
            " bright everywhere; its own scale makes its structure visible."
        )
    point = _center(places[first], clicked)
    framed = {label: _patch_at(place, *point) for label, place in places.items()}
    st.subheader("Principal components")
    rgb = {
        label: {n: values.reshape(*_grid(places[label]), 3) for n, values in colors.items()}
        for label, colors in _map_colors(tokens, basis).items()
    }
    name = tables[first].set_index("number")["image_id"][image]
    seen = f"image {name} of {shared[first].record.get('data', '')}"
    of_image = partial(Caption, n=f"{seen}: an example, not a measurement", seeds=seeds_of(site, list(tables)))
    words = f"First three principal components of the visual tokens as red, green and blue, one basis for {basis}"
    chart(small_maps(rgb, framed), "pca", of_image(words, interval=""))
    st.subheader("Similarity to the framed patch")
    similarity = {
        label: {
            n: similarity_to(values, framed[label]).numpy().reshape(_grid(places[label])) for n, values in of.items()
        }
        for label, of in tokens.items()
    }
    lowest = [values.min() for of in similarity.values() for values in of.values()]
    bounds = None if own_scale or not lowest else (float(min(lowest)), 1.0)
    row, column = divmod(framed[first], _grid(places[first])[1])
    words = f"Cosine of each visual token with the framed one (row {row}, column {column} of {first}, from 0)"
    chart(small_maps(similarity, framed, bounds=bounds), "similarity", of_image(words, interval=""))


def _spread(names: list[str]) -> list[str]:
    """Return the representations to show first: all that are no layers, and evenly spaced layers with both ends."""
    layers = [name for name in names if name.startswith("layer ")]
    room = max(2, MAX_MAPS - (len(names) - len(layers)))
    chosen = {layers[round(i)] for i in np.linspace(0, len(layers) - 1, min(room, len(layers)))}
    return [name for name in names if name in chosen or name not in layers]


def _visual_tokens(row: pd.Series) -> VisualTokens:
    """Return the patch grid of an image from its row of the table `maps`."""
    rows, columns = int(row["rows"]), int(row["columns"])
    return VisualTokens(
        torch.arange(rows * columns), (rows, columns), (row["left"], row["top"], row["right"], row["bottom"])
    )


def _grid(place: VisualTokens) -> tuple[int, int]:
    assert place.grid is not None
    return place.grid


def _clicked_patch(pixels: np.ndarray, place: VisualTokens) -> int:
    """Draw an image, and return the patch that was clicked last, which is in the address, at first the central one."""
    rows, columns = _grid(place)
    key = f"click-{rows}x{columns}"

    def store() -> None:  # runs before the page is redrawn, so that the frame is already around the new patch
        points = st.session_state[key]["selection"]["points"]
        if points:  # none after a second click on a patch, which deselects it; the patch stays framed
            row, column = divmod(int(np.ravel(points[0]["customdata"])[0]), columns)
            write_address(PATCH, [f"{row},{column}"])

    central = f"{rows // 2},{columns // 2}"
    before: list[str] = st.session_state.get(f"{PATCH}-address", [])
    named = st.query_params.get_all(PATCH) or before or [central]
    corners = patches_of(named[0], (rows, columns))
    if corners is None and named != before:
        complain(PATCH, named[0], central)
    row, column, *_ = corners or (rows // 2, columns // 2)
    write_address(PATCH, [f"{row},{column}"], shown=f"{row},{column}" != central)
    patch = row * columns + column
    st.plotly_chart(
        clickable(pixels, place, patch),
        width="stretch",
        config={"displayModeBar": False},
        key=key,
        on_select=store,
        selection_mode="points",
    )
    return patch


def _center(place: VisualTokens, patch: int) -> tuple[float, float]:
    left, top, right, bottom = place.token_box(*divmod(patch, _grid(place)[1]))
    return (left + right) / 2, (top + bottom) / 2


def _patch_at(place: VisualTokens, x: float, y: float) -> int:
    """Return the number of the patch at a point of the image, or of the nearest patch if the grid does not reach it."""
    (rows, columns), (left, top, right, bottom) = _grid(place), place.box
    row, column = int(np.floor((y - top) / (bottom - top) * rows)), int(np.floor((x - left) / (right - left) * columns))
    return min(max(row, 0), rows - 1) * columns + min(max(column, 0), columns - 1)


def _map_colors(tokens: Mapping[str, Mapping[str, Tensor]], basis: str) -> dict[str, dict[str, np.ndarray]]:
    """Return the colors (token, 3) of every map.

    Layers are in the basis that `basis` names. The vision encoder and VFMs have other widths, so each has its own.
    """
    result: dict[str, dict[str, np.ndarray]] = {
        label: {
            name: joint_pca_rgb([values])[0][0]
            for name, values in of_model.items()
            if basis == BASES[2] or not name.startswith("layer ")
        }
        for label, of_model in tokens.items()
    }
    if basis != BASES[2]:
        layers = {
            label: {name: values for name, values in of_model.items() if name.startswith("layer ")}
            for label, of_model in tokens.items()
        }
        stacked = {label: torch.stack(list(of_model.values())) for label, of_model in layers.items() if of_model}
        jointly = basis == BASES[0] and len({values.shape[-1] for values in stacked.values()}) == 1
        groups = [list(stacked)] if jointly else [[label] for label in stacked]
        for group in groups:
            colors = joint_pca_rgb([stacked[label] for label in group]) if group else []
            for label, rgb in zip(group, colors, strict=True):
                result[label] |= dict(zip(layers[label], rgb, strict=True))
    return {label: {name: result[label][name] for name in of_model} for label, of_model in tokens.items()}


def _about(tokens: Mapping[str, Mapping[str, Tensor]], basis: str) -> str:
    """Return a text that says what the colors of the maps mean."""
    widths = {
        values.shape[-1]
        for of_model in tokens.values()
        for name, values in of_model.items()
        if name.startswith("layer ")
    }
    text = (
        "First three principal components as red, green and blue; tokens divided by the root mean square of their"
        " layer. "
    )
    if basis == BASES[2]:
        return text + "Every map has a basis of its own: colors of two maps cannot be compared, only their shapes."
    text += (
        "The vision encoder and the VFM have other widths and bases of their own: their colors cannot be"
        " compared with the layers', only the shapes. "
    )
    if basis == BASES[0] and len(widths) > 1:
        return text + f"The models' widths differ ({sorted(widths)}), so each model has a basis of its own too."
    if basis == BASES[0] and len(tokens) > 1:
        return text + (
            "One basis for all layers of all models; models that do not start from the same weights have no coordinates"
            " in common."
        )
    return text + "One basis for all layers of a model."
