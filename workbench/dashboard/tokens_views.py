"""What the Tokens page shows besides curves: maps of an image in every layer, and sampled tokens on a plane."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import streamlit as st
import torch
from torch import Tensor

from workbench import figures
from workbench.dashboard.tokens_figures import clickable, data_url, located, small_maps, token_planes
from workbench.metrics.geometry import joint_pca_rgb, similarity_to, umap_map
from workbench.mllm.family import VisualTokens
from workbench.runs import Run

MANY = 10  # maps side by side to begin with
BASES = ("all layers and models", "each model", "each map")

# Streamlit reports clicks but no hover, and plotly shows no pictures in hover labels: this listens to the charts in the
# container `token-planes`.
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
  const [picture, frame] = card.children;
  const show = (event) => {
    const [image, left, top, right, bottom] = event.points[0].customdata;
    picture.src = data[image];
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
  const heard = new Set();
  const listen = () => document.querySelectorAll('.st-key-token-planes .js-plotly-plot').forEach((chart) => {
    if (heard.has(chart) || !chart.on) return;
    heard.add(chart);
    chart.on('plotly_hover', show);
    chart.on('plotly_unhover', hide);
  });
  listen();
  const timer = setInterval(listen, 300);
  return () => {
    clearInterval(timer);
    heard.forEach((chart) => {
      chart.removeListener('plotly_hover', show);
      chart.removeListener('plotly_unhover', hide);
    });
    card.remove();
  };
}
"""


def maps(found: Mapping[str, Run]) -> None:
    """Principal components and the similarity of a clicked patch, in every layer and the VFM, models below one
    another."""
    shared = _same_images(found)
    tables = {label: run.tables["maps"] for label, run in shared.items() if len(run.tables["maps"])}
    if not tables:
        st.info("No tokens were kept for maps. Run the analysis with `--maps 4`.")
        return
    images = sorted(set.intersection(*(set(table["number"]) for table in tables.values())))
    names = list(dict.fromkeys(name for label in tables for name in shared[label].record["map_representations"]))
    left, right = st.columns([1, 2], gap="large")
    image = left.selectbox(
        "Image",
        images,
        format_func=lambda n: next(iter(tables.values())).set_index("number")["image_id"][n],
        key="image",
    )
    chosen = right.multiselect("Shown", names, default=_spread(names), key="shown")
    if not chosen:
        st.info("Choose one or more representations.")
        return
    places = {label: _raster(table.set_index("number").loc[image]) for label, table in tables.items()}
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
        cell = _clicked(shared[first].tensors[f"picture.{image}"].numpy(), places[first], image)
    with right:
        basis = st.radio("One basis for", BASES, horizontal=True, key="basis", bind="query-params")
        st.caption(_about(tokens, basis))
        own_scale = st.toggle("Each map of similarities on its own scale", key="own_scale", bind="query-params")
        st.caption(
            "Click a patch of the picture: the lower maps are the cosine of every token with that one, in the model's"
            " own space, from float16 (error below 0.002). A layer in which all tokens share an offset is bright"
            " everywhere: on its own scale it shows its shape."
        )
    here = _middle(places[first], cell)
    cells = {label: _at(raster, *here) for label, raster in places.items()}
    st.subheader("Principal components")
    rgb = {
        label: {n: values.reshape(*_grid(places[label]), 3) for n, values in own.items()}
        for label, own in _colours(tokens, basis).items()
    }
    st.plotly_chart(small_maps(rgb, cells), width="stretch", config=figures.EXPORT, key="pca")
    st.subheader("Similarity to the framed patch")
    near = {
        label: {n: similarity_to(values, cells[label]).numpy() for n, values in own.items()}
        for label, own in tokens.items()
    }
    ends = [edge for own in near.values() for values in own.values() for edge in (values.min(), values.max())]
    bounds = None if own_scale or not ends else (float(min(ends)), 1.0)
    laid = {
        label: {n: values.reshape(_grid(places[label])) for n, values in own.items()} for label, own in near.items()
    }
    st.plotly_chart(small_maps(laid, cells, bounds=bounds), width="stretch", config=figures.EXPORT, key="similarity")


def umap(found: Mapping[str, Run]) -> None:
    """Sampled tokens by UMAP: a picture on hover, the image with its patch framed on click."""
    shared = {label: run for label, run in _same_images(found).items() if len(run.tables["umap"])}
    if not shared:
        st.info("No tokens were kept for UMAP. Run the analysis with `--umap_images 100`.")
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
            disabled=len(widths) != 1,
            help="Takes about 20 s the first time.",
        )
    table = _together(shared) if together else _apart(shared)
    choices = [
        c
        for c in ("thing", "shape", "colour", "layer", "model")
        if table[c].nunique() > 1 and (c != "model" or together)
    ] + ["row", "column"]
    called = {
        "thing": "object or background",
        "shape": "object",
        "row": "position: top to bottom",
        "column": "position: left to right",
    }
    by = columns[0].selectbox(
        "Colour by", choices, format_func=lambda c: called.get(c, c), key="colour_by", bind="query-params"
    )
    layers = sorted(table["layer"].dropna().unique())
    kept = columns[1].multiselect("Layers", layers, default=layers, format_func=lambda n: f"{n:g}", key="umap_layers")
    table = table[table["layer"].isna() | table["layer"].isin(kept)].reset_index(drop=True)
    if by == "layer":
        table["layer"] = [
            value if layer != layer else layer for layer, value in zip(table["layer"], table["at"], strict=True)
        ]
    pictures = {
        str(n): next(iter(shared.values())).tensors[f"thumbnail.{n}"].numpy() for n in sorted(table["image"].unique())
    }
    left, right = st.columns([4, 1])
    with left, st.container(key="token-planes"):
        event = st.plotly_chart(
            token_planes(table, by=by),
            width="stretch",
            config=figures.EXPORT,
            key="planes",
            on_select="rerun",
            selection_mode="points",
        )
    hover = st.components.v2.component("token_thumbnails", js=HOVER)
    hover(data={number: data_url(pixels) for number, pixels in pictures.items()}, key="thumbnails")
    with right:
        points = event["selection"]["points"]
        if points:
            image, *box, image_id, name, at, token, _ = points[0]["customdata"]
            st.image(
                located(pictures[str(image)], box),
                caption=f"{image_id}, token {token}: {name or 'no objects known'} ({at})",
                width="stretch",
            )
        else:
            st.caption("Point at a token to see its picture, click it to keep it here.")
    st.caption(
        "UMAP of cosine distances, seed fixed. Neighbours on the plane tend to be neighbours; distances between"
        " clusters, sizes and densities mean nothing. Half of an image's sampled tokens lie on objects where there are"
        " any, so proportions are not those of the image."
    )


VIEWS = {"Maps of an image": maps, "UMAP of tokens": umap}


def _same_images(found: Mapping[str, Run]) -> dict[str, Run]:
    """The runs on the images of the first one."""
    images = next(iter(found.values())).record["data_fingerprint"]
    left_out = [label for label, run in found.items() if run.record["data_fingerprint"] != images]
    if left_out:
        st.warning(f"Other images, so not shown beside these: {', '.join(left_out)}.")
    return {label: run for label, run in found.items() if label not in left_out}


def _spread(names: list[str]) -> list[str]:
    """References and evenly spaced layers, first and last among them."""
    layers = [name for name in names if name.startswith("layer ")]
    room = max(2, MANY - (len(names) - len(layers)))
    kept = {layers[round(i)] for i in np.linspace(0, len(layers) - 1, min(room, len(layers)))}
    return [name for name in names if name in kept or name not in layers]


def _raster(row: pd.Series) -> VisualTokens:
    rows, columns = int(row["rows"]), int(row["columns"])
    return VisualTokens(
        torch.arange(rows * columns), (rows, columns), (row["left"], row["top"], row["right"], row["bottom"])
    )


def _grid(raster: VisualTokens) -> tuple[int, int]:
    assert raster.grid is not None
    return raster.grid


def _clicked(picture: np.ndarray, raster: VisualTokens, image: int) -> int:
    """The cell that was clicked last, the middle one to begin with."""
    rows, columns = _grid(raster)
    key = f"cell-{image}-{rows}x{columns}"

    def take() -> None:  # before the page is drawn again, so that the frame is already around the new cell
        points = st.session_state[f"click-{key}"]["selection"]["points"]
        if points:  # a second click on a patch takes the selection back: it stays framed
            st.session_state[key] = int(np.ravel(points[0]["customdata"])[0])

    cell = int(st.session_state.get(key, (rows // 2) * columns + columns // 2))
    chart = clickable(picture, raster, cell)
    st.plotly_chart(
        chart,
        width="stretch",
        config={"displayModeBar": False},
        key=f"click-{key}",
        on_select=take,
        selection_mode="points",
    )
    return cell


def _middle(raster: VisualTokens, cell: int) -> tuple[float, float]:
    left, top, right, bottom = raster.token_box(*divmod(cell, _grid(raster)[1]))
    return (left + right) / 2, (top + bottom) / 2


def _at(raster: VisualTokens, x: float, y: float) -> int:
    """The cell of a raster at a point of the image, the nearest one where the raster does not reach it."""
    (rows, columns), (left, top, right, bottom) = _grid(raster), raster.box
    row, column = int(np.floor((y - top) / (bottom - top) * rows)), int(np.floor((x - left) / (right - left) * columns))
    return min(max(row, 0), rows - 1) * columns + min(max(column, 0), columns - 1)


def _colours(tokens: Mapping[str, Mapping[str, Tensor]], basis: str) -> dict[str, dict[str, np.ndarray]]:
    """(token, 3) colours of every map: layers in the basis asked for; the tower and VFMs, which have other widths, each
    in its own."""
    found: dict[str, dict[str, np.ndarray]] = {
        label: {
            name: joint_pca_rgb([values])[0][0]
            for name, values in own.items()
            if basis == BASES[2] or not name.startswith("layer ")
        }
        for label, own in tokens.items()
    }
    if basis != BASES[2]:
        layers = {
            label: {name: values for name, values in own.items() if name.startswith("layer ")}
            for label, own in tokens.items()
        }
        stacked = {label: torch.stack(list(own.values())) for label, own in layers.items() if own}
        jointly = basis == BASES[0] and len({values.shape[-1] for values in stacked.values()}) == 1
        groups = [list(stacked)] if jointly else [[label] for label in stacked]
        for group in groups:
            for label, rgb in zip(
                group, joint_pca_rgb([stacked[label] for label in group]) if group else (), strict=True
            ):
                found[label] |= dict(zip(layers[label], rgb, strict=True))
    return {label: {name: found[label][name] for name in own} for label, own in tokens.items()}


def _about(tokens: Mapping[str, Mapping[str, Tensor]], basis: str) -> str:
    """What the colours of the maps mean."""
    widths = {values.shape[-1] for own in tokens.values() for name, values in own.items() if name.startswith("layer ")}
    text = (
        "First three principal components as red, green and blue; tokens divided by the root mean square of their"
        " layer. "
    )
    if basis == BASES[2]:
        return text + "Every map has a basis of its own: colours of two maps cannot be compared, only their shapes."
    text += (
        "The tower and the VFM have other widths and bases of their own: their colours cannot be compared with the"
        " layers', only the shapes. "
    )
    if basis == BASES[0] and len(widths) > 1:
        return text + f"The models' widths differ ({sorted(widths)}), so each model has a basis of its own too."
    if basis == BASES[0] and len(tokens) > 1:
        return (
            text + "One basis for all layers of all models; models that do not start from the same weights have no"
            " coordinates in common."
        )
    return text + "One basis for all layers of a model."


def _has_layers(run: Run) -> bool:
    return any(name.startswith("umap.layer ") for name in run.tensors)


def _apart(shared: Mapping[str, Run]) -> pd.DataFrame:
    """Every model in its own plane, and each VFM once."""
    parts, seen = [], set()
    for label, run in shared.items():
        for group, part in run.tables["umap"].groupby("group", sort=False):
            if group == "layers":
                parts.append(part.assign(panel=label, model=label))
            elif group not in seen:
                seen.add(group)
                parts.append(part.assign(panel=group, model=group))
    order = sorted(range(len(parts)), key=lambda i: parts[i]["group"].iloc[0] != "layers")
    return pd.concat([parts[i] for i in order], ignore_index=True)


def _together(shared: Mapping[str, Run]) -> pd.DataFrame:
    """All models in one plane, and each VFM once."""
    own = {label: run.tables["umap"].query("group == 'layers'") for label, run in shared.items()}
    values = torch.cat(
        [run.tensors[f"umap.{at}"] for label, run in shared.items() for at in own[label]["at"].unique()]
    ).float()
    first = next(iter(shared.values()))
    plane = _joint_plane(
        tuple(run.key for run in shared.values()),
        values,
        int(first.record["config"]["umap_neighbors"]),
        int(first.record["seed"]),
    )
    table = pd.concat([part.assign(model=label) for label, part in own.items()], ignore_index=True)
    joint = table.assign(panel="all models", x=plane[:, 0], y=plane[:, 1])
    rest = _apart(shared).query("group != 'layers'")
    return pd.concat([joint, rest], ignore_index=True)


@st.cache_data(max_entries=4, show_spinner="Laying the tokens of all models on one plane")
def _joint_plane(keys: tuple[str, ...], _values: Tensor, neighbors: int, seed: int) -> np.ndarray:
    return umap_map(_values, neighbors=neighbors, seed=seed)
