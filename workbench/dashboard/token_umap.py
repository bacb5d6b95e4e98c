"""Sampled tokens of stored images on planes, by UMAP; pointing at a token shows its image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import streamlit as st
import torch
from torch import Tensor

from workbench import figures
from workbench.dashboard.papers import save_button, seeds_of
from workbench.dashboard.site import Site, choice, choices, complain, write_address
from workbench.dashboard.tokens_figures import POINT_COLUMNS, data_url, framed_patch, token_planes
from workbench.figures.caption import Caption
from workbench.metrics.geometry import umap_map
from workbench.runs import Run

TOKEN = "point"  # in the address: the clicked token, by NAMES_OF_TOKEN
NAMES_OF_TOKEN = ["image_id", "token", "at", "model"]

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


def umap(site: Site, shared: Mapping[str, Run]) -> None:
    """Draw sampled tokens by UMAP; hovering over or clicking a token shows its image with the patch framed.

    Args:
        site: what is chosen.
        shared: {model: its run}, all about the same images.
    """
    shared = {label: run for label, run in shared.items() if len(run.tables["umap"])}
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
