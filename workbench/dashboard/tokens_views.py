"""Interactive views of the Tokens page: maps of an image in every layer, and sampled tokens on a plane."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import streamlit as st
import torch
from torch import Tensor

from workbench import figures
from workbench.dashboard.again import patches_of
from workbench.dashboard.papers import chart, save_button, seeds_of
from workbench.dashboard.site import Site, choice, choices, complain, write_address
from workbench.dashboard.tokens_figures import (
    POINT_COLUMNS,
    clickable,
    data_url,
    framed_patch,
    small_maps,
    token_planes,
)
from workbench.figures.caption import Caption
from workbench.metrics.geometry import joint_pca_rgb, similarity_to, umap_map
from workbench.mllm.family import VisualTokens
from workbench.runs import Run

MAX_MAPS = 10  # side by side, at first
PATCH = "patch"  # in the address: the framed patch, as row,column
TOKEN = "point"  # in the address: the clicked token of the planes, by NAMES_OF_TOKEN
NAMES_OF_TOKEN = ["image_id", "token", "at", "model"]
BASES = ("all layers and models", "each model", "each map")

# Streamlit does not report hovering, and plotly shows no images in hover labels. This script therefore listens to the
# charts in the container `token-planes` and draws the thumbnails itself.
HOVER = """
export default function({ data }) {
  const card = document.createElement('div');
  Object.assign(card.style, {
    position: 'fixed', display: 'none', zIndex: 1000, pointerEvents: 'none', border: '1px solid #8a8f98',
    background: '#000',
  });
  card.setAttribute('data-testid', 'token-thumbnail');
  card.innerHTML = '<img style="display:block;width:128px">'
    + '<div style="position:absolute;border:2px solid #fff;outline:1px solid #000"></div>';
  document.body.appendChild(card);
  const [thumbnail, frame] = card.children;
  const show = (event) => {
    const [image, left, top, right, bottom] = event.points[0].customdata;
    thumbnail.src = data[image];
    const from = (v) => 100 * Math.min(1, Math.max(0, v)) + '%';
    const size = (a, b) => 100 * (Math.min(1, b) - Math.max(0, a)) + '%';
    Object.assign(frame.style, {
      left: from(left), top: from(top), width: size(left, right), height: size(top, bottom), boxSizing: 'border-box',
    });
    const x = event.event.clientX, y = event.event.clientY;
    Object.assign(card.style, {
      display: 'block', left: (x > 180 ? x - 150 : x + 30) + 'px',
      top: Math.min(y + 16, window.innerHeight - 150) + 'px',
    });
  };
  const hide = () => { card.style.display = 'none'; };
  const charts = new Set();
  const listen = () => document.querySelectorAll('.st-key-token-planes .js-plotly-plot').forEach((chart) => {
    if (charts.has(chart) || !chart.on) return;
    charts.add(chart);
    chart.on('plotly_hover', show);
    chart.on('plotly_unhover', hide);
  });
  listen();
  const timer = setInterval(listen, 300);
  return () => {
    clearInterval(timer);
    charts.forEach((chart) => {
      chart.removeListener('plotly_hover', show);
      chart.removeListener('plotly_unhover', hide);
    });
    card.remove();
  };
}
"""


def maps(site: Site, compared: Mapping[str, Run]) -> None:
    """Draw principal components and the similarity to a clicked patch, in the chosen layers and VFMs of each model."""
    shared = _same_images(compared)
    tables = {label: run.tables["maps"] for label, run in shared.items() if len(run.tables["maps"])}
    if not tables:
        st.info("No tokens were stored for maps. Run the analysis with `--maps 4`.")
        return
    images = sorted(set.intersection(*(set(table["number"]) for table in tables.values())))
    names = list(dict.fromkeys(name for label in tables for name in shared[label].extra["map_representations"]))
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
            n: shared[label].tensors[f"map.{image}.{n}"].float()
            for n in chosen
            if f"map.{image}.{n}" in shared[label].tensors
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


def umap(site: Site, compared: Mapping[str, Run]) -> None:
    """Draw sampled tokens by UMAP; hovering over or clicking a token shows its image with the patch framed."""
    shared = {label: run for label, run in _same_images(compared).items() if len(run.tables["umap"])}
    if not shared:
        st.info("No tokens were stored for UMAP. Run the analysis with `--umap_images 100`.")
        return
    widths = {
        next(v.shape[1] for name, v in run.tensors.items() if name.startswith("umap.layer "))
        for run in shared.values()
        if _has_layers(run)
    }
    columns = st.columns([2, 2, 2])
    together = False
    if len(shared) > 1:
        together = columns[2].toggle(
            "One plane for all models",
            key="together",
            bind="query-params",
            disabled=len(widths) != 1,
            help="Takes about 20 s the first time.",
        )
    table = _joint_planes(shared) if together else _separate_planes(shared)
    varying = [c for c in ("thing", "shape", "colour", "layer", "model") if table[c].nunique() > 1]
    by_what = [*(c for c in varying if c != "model" or together), "row", "column"]
    titles = {
        "thing": "object or background",
        "shape": "object",
        "row": "position: top to bottom",
        "column": "position: left to right",
    }
    with columns[0]:
        by = choice("colour_by", by_what, by_what[0], "Color by", listed=True, format_func=lambda c: titles.get(c, c))
    layers = [f"{layer:g}" for layer in sorted(table["layer"].dropna().unique())]
    with columns[1]:
        shown = choices("umap_layers", layers, layers, "Layers")
    table = table[table["layer"].isna() | table["layer"].isin(list(map(float, shown)))].reset_index(drop=True)
    if by == "layer":
        # what is no layer (NaN), such as a VFM, is named
        table["layer"] = [
            name if layer != layer else layer for layer, name in zip(table["layer"], table["at"], strict=True)
        ]
    stored = next(iter(shared.values())).tensors
    thumbnails = {str(n): stored[f"thumbnail.{n}"].numpy() for n in sorted(table["image"].unique())}
    left, right = st.columns([4, 1])
    planes = token_planes(table, by=by)
    with left, st.container(key="token-planes"):
        event = st.plotly_chart(
            planes,
            width="stretch",
            config=figures.EXPORT,
            key="planes",
            on_select="rerun",
            selection_mode="points",
        )
    hover = st.components.v2.component("token_thumbnails", js=HOVER)
    hover(data={number: data_url(pixels) for number, pixels in thumbnails.items()}, key="thumbnails")
    with right:
        if (point := _clicked_token(event["selection"]["points"], table)) is not None:
            image, *box, image_id, name, at, token, _ = point
            st.image(
                framed_patch(thumbnails[str(image)], box),
                alt=f"Image {image_id} with a frame around the patch of token {token}",
                caption=f"{image_id}, token {token}: {name or 'no objects known'} ({at})",
                width="stretch",
            )
        else:
            st.caption("Point at a token to see its image; click the token to keep the image here.")
    save_button(
        planes,
        "planes",
        Caption(
            f"UMAP of visual tokens by their cosine distances, colored by {titles.get(by, by)}",
            f"{len(table)} points, tokens of {table['image'].nunique()} images of"
            f" {next(iter(shared.values())).record.get('data', '')}",
            seeds_of(site, list(shared)),
            "",
        ),
    )
    st.caption(
        "UMAP of cosine distances, with a fixed seed. Tokens that are close on the plane tend to be close in the"
        " representation; distances between clusters, their sizes and densities mean nothing. Half of an image's"
        " sampled tokens lie on objects, where it has any, so proportions are not those of the image."
    )


def _clicked_token(points: Sequence[Mapping[str, Any]], table: pd.DataFrame) -> list[Any] | None:
    """Return POINT_COLUMNS of the token that was clicked last, which is in the address; None before that."""
    if points:
        clicked = list(points[0]["customdata"])
        write_address(TOKEN, ["~".join(str(clicked[POINT_COLUMNS.index(name)]) for name in NAMES_OF_TOKEN)])
    before: list[str] = st.session_state.get(f"{TOKEN}-address", [])
    if not (named := st.query_params.get_all(TOKEN) or before):
        return None
    names = table[NAMES_OF_TOKEN].astype(str).agg("~".join, axis=1)
    rows = table[names == named[0]]
    if rows.empty and named != before:
        complain(TOKEN, named[0], "none")
    write_address(TOKEN, named, shown=len(rows) > 0)
    return None if rows.empty else list(rows[POINT_COLUMNS].iloc[0])


def _same_images(compared: Mapping[str, Run]) -> dict[str, Run]:
    """Return the runs that have the images of the first one, and warn of the others."""
    images = next(iter(compared.values())).record["data_fingerprint"]
    left_out = [label for label, run in compared.items() if run.record["data_fingerprint"] != images]
    if left_out:
        st.warning(f"Not shown, because of other images: {', '.join(left_out)}.")
    return {label: run for label, run in compared.items() if label not in left_out}


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
        "The vision encoder (tower) and the VFM have other widths and bases of their own: their colors cannot be"
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


def _has_layers(run: Run) -> bool:
    return any(name.startswith("umap.layer ") for name in run.tensors)


def _separate_planes(shared: Mapping[str, Run]) -> pd.DataFrame:
    """Return the tokens with a plane for every model, and one for each VFM."""
    parts, vfms = [], set()
    for label, run in shared.items():
        for group, part in run.tables["umap"].groupby("group", sort=False):
            if group == "layers":
                parts.append(part.assign(panel=label, model=label))
            elif group not in vfms:
                vfms.add(group)
                parts.append(part.assign(panel=group, model=group))
    order = sorted(range(len(parts)), key=lambda i: parts[i]["group"].iloc[0] != "layers")
    return pd.concat([parts[i] for i in order], ignore_index=True)


def _joint_planes(shared: Mapping[str, Run]) -> pd.DataFrame:
    """Return the tokens with one plane for all models, and one for each VFM."""
    of_all = {label: run.tables["umap"] for label, run in shared.items()}
    layers = {label: table[table["group"] == "layers"] for label, table in of_all.items()}
    values = torch.cat(
        [run.tensors[f"umap.{at}"] for label, run in shared.items() for at in layers[label]["at"].unique()]
    ).float()
    first = next(iter(shared.values()))
    plane = _joint_plane(
        tuple(run.key for run in shared.values()),
        values,
        int(first.record["config"]["umap_neighbors"]),
        int(first.record["seed"]),
    )
    table = pd.concat([part.assign(model=label) for label, part in layers.items()], ignore_index=True)
    joint = table.assign(panel="all models", x=plane[:, 0], y=plane[:, 1])
    separate = _separate_planes(shared)
    return pd.concat([joint, separate[separate["group"] != "layers"]], ignore_index=True)


@st.cache_data(max_entries=4, show_spinner="Placing the tokens of all models on one plane")
def _joint_plane(keys: tuple[str, ...], _values: Tensor, neighbors: int, seed: int) -> np.ndarray:
    return umap_map(_values, neighbors=neighbors, seed=seed)
