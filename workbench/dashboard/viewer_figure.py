"""What the viewer of page Explorer shows, as one figure for a paper."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import plotly.graph_objects as go
from PIL import Image
from torch import Tensor

from workbench.figures import Overlay, colored_patches, overlays_on_one_scale, plain_name
from workbench.looking import Look
from workbench.metrics.geometry import joint_pca_rgb, mean_cosine, similarity_to
from workbench.mllm.family import Box, VisualTokens

SIDE = 1344  # pixels; an inch of a paper has no more
Corners = tuple[int, int, int, int]
Point = tuple[float, float]


@dataclass(frozen=True)
class Shown:
    """What is chosen in the viewer.

    Attributes:
        view: attention, similarity, pca or words.
        layer: 0 is the projector's output.
        row: of attention; 0 is the end of the question, then the tokens of the answer.
        head: None for the mean of heads.
        corners: row, column, row, column of the framed patches of the first model.
    """

    view: str
    layer: int
    row: int
    head: int | None
    corners: Corners


@dataclass(frozen=True)
class Vfm:
    """A vision foundation model's features (token, d) under the visual tokens of `place`."""

    name: str
    patches: Tensor
    place: VisualTokens


def view_figure(shown: Shown, seen: Mapping[str, Look], image: Image.Image, vfm: Vfm | None) -> go.Figure:
    """Draw the image and, beside it, what each model and the VFM make of it, on one scale.

    Args:
        shown: what is chosen.
        seen: {model: what it did}; one that has no such layer, token or head is left out.
        image: upright and in RGB; drawn at most SIDE pixels wide and high, in which places of patches are.
        vfm: what similarity and principal components show beside the models.
    """
    small = image.copy()
    small.thumbnail((SIDE, SIDE))
    pixels = np.asarray(small)
    first = next(iter(seen.values())).place
    frame, point = _frame(first, shown.corners), _center(first, shown.corners)
    plain = _over(Overlay("Image", pixels, np.full(_grid(first), np.nan), first.box, frame=frame), first)
    if shown.view == "pca":
        layers = {name: one.hidden.float() for name, one in seen.items()}
        maps = [
            (plain_name(name), colors[shown.layer].reshape(*seen[name].grid, 3), _in_patches(seen[name].place, frame))
            for name, colors in zip(layers, joint_colors([*layers.values()]), strict=True)
            if shown.layer < len(colors)
        ]
        if vfm is not None:
            title, colors = f"{vfm.name}<br>(a basis of its own)", joint_pca_rgb([vfm.patches])[0][0]
            maps.append((title, colors.reshape(*_grid(vfm.place), 3), _in_patches(vfm.place, frame)))
        return colored_patches(plain, maps)
    drawn: list[Overlay | None] = []
    for name, one in seen.items():
        empty = _over(plain, one.place)
        if shown.view == "attention":
            drawn.append(_attention(plain_name(name), one, shown, empty))
        elif shown.view == "words":
            drawn.append(_words(plain_name(name), one, shown.layer, empty))
        elif shown.layer < len(one.hidden):
            drawn.append(_similarity(plain_name(name), one.hidden[shown.layer].float(), one.place, point, empty))
    if vfm is not None and shown.view == "similarity":
        drawn.append(_similarity(vfm.name, vfm.patches.float(), vfm.place, point, _over(plain, vfm.place)))
    overlays = [overlay for overlay in drawn if overlay is not None]
    values = [overlay.values for overlay in overlays]
    if shown.view == "similarity":
        low = min([1.0, *(float(one.min()) for one in values)])
        return overlays_on_one_scale([plain, *overlays], (low, 1.0), "cosine")
    high = max([1e-9, *(float(one.max()) for one in values)])
    unit = "share of the attention" if shown.view == "attention" else "probability of the word"
    return overlays_on_one_scale([plain, *overlays], (0.0, high), unit)


def joint_colors(layers: list[Tensor]) -> list[np.ndarray]:
    """Return colors (layer, token, 3) of principal components: in one basis where the models' widths are equal."""
    if len({values.shape[-1] for values in layers}) == 1:
        return joint_pca_rgb(layers)
    return [joint_pca_rgb([values])[0] for values in layers]


def what_is_shown(shown: Shown, seen: Mapping[str, Look]) -> str:
    """Return the first sentence of the caption: what is drawn, without the image and the question."""
    layer = f"layer {shown.layer}" if shown.layer else "layer 0 (the projector)"
    if shown.view == "attention":
        texts = list(dict.fromkeys(_read(one, shown.row) for one in seen.values() if shown.row <= len(one.tokens)))
        head = "mean of heads" if shown.head is None else f"head {shown.head}"
        return f"Attention from {' or '.join(texts)} on each patch, {layer}, {head}"
    top, left, *_ = shown.corners
    patch = f"the patch in row {top}, column {left} (from 0)"
    return {
        "similarity": f"Cosine of each visual token with that of {patch}, {layer}",
        "pca": f"First three principal components of the visual tokens as red, green and blue, {layer}",
        "words": f"Most likely word of the logit lens at each visual token, {layer}",
    }[shown.view]


def _read(seen: Look, row: int) -> str:
    """Return the name of a row of attention."""
    return "the end of the question" if row == 0 else f"the token “{seen.tokens[row - 1].text.strip()}”"


# --- one map --------------------------------------------------------------------------------------


def _attention(name: str, seen: Look, shown: Shown, plain: Overlay) -> Overlay | None:
    rows, blocks, heads, _ = seen.attention.shape
    block = shown.layer - 1
    if not 0 <= block < blocks or shown.row >= rows or (shown.head is not None and shown.head >= heads):
        return None
    at = slice(None) if shown.head is None else slice(shown.head, shown.head + 1)
    values, mass = seen.attention[shown.row, block, at].mean(0), float(seen.mass[shown.row, block, at].mean())
    title = f"{name}<br>on the image: {mass:.1%}<br>(chance {float(seen.uniform[shown.row]):.1%})"
    return replace(plain, title=title, values=values.numpy().reshape(seen.grid))


def _similarity(name: str, values: Tensor, place: VisualTokens, point: Point, plain: Overlay) -> Overlay | None:
    if not values.norm(dim=-1).all():
        return None  # a zero token has no direction
    row, column = _nearest(place, point)
    alike = float(mean_cosine(values[None])[0])
    cosines = similarity_to(values, row * _grid(place)[1] + column)
    return replace(plain, title=f"{name}<br>(chance {alike:.2f})", values=cosines.numpy().reshape(_grid(place)))


def _words(name: str, seen: Look, layer: int, plain: Overlay) -> Overlay | None:
    if seen.words is None or layer >= len(seen.words.ids):
        return None
    words = seen.words
    texts = tuple(words.texts[token] for token in words.ids[layer, :, 0].tolist())
    values = words.probabilities[layer, :, 0].float().numpy().reshape(seen.grid)
    return replace(plain, title=f"{name}<br>(chance {1 / words.vocabulary:.2%})", values=values, words=texts)


# --- places ---------------------------------------------------------------------------------------


def _grid(place: VisualTokens) -> tuple[int, int]:
    assert place.grid is not None
    return place.grid


def _over(plain: Overlay, place: VisualTokens) -> Overlay:
    return replace(plain, edges=_edges(place))


def _edges(place: VisualTokens) -> tuple[list[float], list[float]]:
    """Return the edges of the columns and of the rows, in fractions of the image."""
    rows, columns = _grid(place)
    across = [place.token_box(0, column) for column in range(columns)]
    down = [place.token_box(row, 0) for row in range(rows)]
    return [across[0][0], *(box[2] for box in across)], [down[0][1], *(box[3] for box in down)]


def _frame(place: VisualTokens, corners: Corners) -> Box:
    """Return the framed region in fractions of the image."""
    boxes = [place.token_box(*corners[:2]), place.token_box(*corners[2:])]
    left, top = (min(box[side] for box in boxes) for side in (0, 1))
    right, bottom = (max(box[side] for box in boxes) for side in (2, 3))
    return left, top, right, bottom


def _in_patches(place: VisualTokens, frame: Box) -> Box:
    """Return a region as columns and rows of the patch grid, from 0 to their number."""
    across, down = _edges(place)
    left, right = np.interp(frame[::2], across, range(len(across))).tolist()
    top, bottom = np.interp(frame[1::2], down, range(len(down))).tolist()
    return left, top, right, bottom


def _center(place: VisualTokens, corners: Corners) -> Point:
    left, top, right, bottom = place.token_box(*corners[:2])
    return (left + right) / 2, (top + bottom) / 2


def _nearest(place: VisualTokens, point: Point) -> tuple[int, int]:
    """Return the row and column of the patch whose center is nearest, as the viewer chooses it."""
    across, down = (np.array(edges) for edges in _edges(place))
    column, row = (
        int(np.abs((edges[:-1] + edges[1:]) / 2 - at).argmin()) for edges, at in zip((across, down), point, strict=True)
    )
    return row, column
