"""PCA maps as the paper draws them (docs/paper.md, A7): one layer beside image, question and answers; layers; VFMs.

Each map has its own three principal components (`pca_scores`), centered on the median, divided by the interquartile
range and squashed by tanh. Order and sign of components are arbitrary; so that maps can be compared, those of all maps
of an image are put in the order, and given the signs, that correlate most with one of them over the patches: the map of
the first model at the shown layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

from analyses.tokens.options import EDGES, ENCODER
from workbench.figures.panels import Panel, panels, wrapped
from workbench.metrics.geometry import matched_scores, pca_scores, squashed
from workbench.runs import Run

PER_ROW = 12  # panels of a row, at most
NAMES = {ENCODER: "vision encoder"}


class ImageMaps:
    """The PCA maps of one image, of all its runs.

    Args:
        runs: stored runs by label.
        rows: for each run, the row of its table `maps` for the image.
        at: the representation whose map the components of all others are matched with, of the first run.
    """

    def __init__(self, runs: Mapping[str, Run], rows: Mapping[str, Mapping[str, Any]], at: str) -> None:
        self.runs, self.rows = runs, rows
        self.first = next(iter(rows))
        self.picture = runs[self.first].tensors[f"picture.{int(rows[self.first]['number'])}"].numpy()
        scores, _ = pca_scores(self._tokens(self.first, at))
        self._reference = scores.reshape(*self._grid(self.first), 3)

    def _tokens(self, label: str, name: str) -> Float[Tensor, "token d"]:
        return self.runs[label].tensors[self._key(label, name)].float()

    def _key(self, label: str, name: str) -> str:
        return f"map.{int(self.rows[label]['number'])}.{name}"

    def _grid(self, label: str) -> tuple[int, int]:
        return int(self.rows[label]["rows"]), int(self.rows[label]["columns"])

    def has(self, label: str, name: str) -> bool:
        """Return whether a run stored the tokens of the image in a representation."""
        return label in self.rows and self._key(label, name) in self.runs[label].tensors

    def colors(self, label: str, name: str) -> tuple[UInt8[np.ndarray, "h w 3"], float]:
        """Return the colors of the patches, and the share of variance that the three components have."""
        scores, share = pca_scores(self._tokens(label, name))
        grid = self._grid(label)
        reference = torch.from_numpy(self._reference).permute(2, 0, 1)[None]
        if reference.shape[-2:] != grid:
            reference = functional.interpolate(reference, size=grid, mode="bilinear", antialias=True)
        matched = matched_scores(scores, reference[0].flatten(1).T.numpy())
        return (squashed(matched) * 255).round().astype(np.uint8).reshape(*grid, 3), share

    def panel(self, label: str, name: str, title: str = "") -> Panel:
        """Return the map of a run in a representation, in the part of the image that its patches cover."""
        colors, share = self.colors(label, name)
        height, width = self.picture.shape[:2]
        box = [float(self.rows[label][edge]) * size for edge, size in zip(EDGES, (width, height) * 2, strict=True)]
        return Panel(title or f"{NAMES.get(name, name)} · {share:.0%} of variance", colors, tuple(box))  # type: ignore[arg-type]

    def image(self, title: str = "image") -> Panel:
        """Return the image itself."""
        height, width = self.picture.shape[:2]
        return Panel(title, self.picture, (0, 0, width, height))

    def question(self) -> str:
        """Return the question that the models were asked, "" in runs from before it was stored."""
        return str(self.rows[self.first].get("question", ""))

    def answer(self, label: str) -> str:
        """Return the greedy answer of a model."""
        return str(self.rows[label].get("answer", ""))


def shown_layer(runs: Mapping[str, Run]) -> str:
    """Return the layer of which the maps are shown beside the answers: that of the options, else the middle stored one.

    "" if the runs stored no maps of a common layer.
    """
    first, *others = [_representations(run) for run in runs.values()]
    common = [name for name in first if name.startswith("layer ") and all(name in names for names in others)]
    wanted = next(iter(runs.values())).extra.get("config", {}).get("map_layer")
    if f"layer {wanted}" in common:
        return f"layer {wanted}"
    return common[len(common) // 2] if common else ""


def pca_figures(runs: Mapping[str, Run]) -> dict[str, go.Figure]:
    """Draw the PCA maps of the stored images: one layer with the answers, all layers, and the VFMs."""
    layer = shown_layer(runs)
    images = _images(runs, layer) if layer else []
    if not images:
        return {}
    labels = list(images[0].rows)
    width = 150 // (1 + len(labels))
    answers = [
        [
            image.image(wrapped(image.question(), width)),
            *(_with_answer(image, label, layer, width) for label in labels if image.has(label, layer)),
        ]
        for image in images
    ]
    drawn = {f"PCA maps at {layer}, question and answers": panels({"": answers}, images=len(images))}
    layers = {}
    for number, image in enumerate(images, start=1):
        rows = []
        for label in labels:
            names = [n for n in _representations(runs[label]) if n == ENCODER or n.startswith("layer ")]
            line = [image.panel(label, n, _short(label, n, len(labels))) for n in names if image.has(label, n)]
            line = [image.image(), *line]
            rows += [line[start : start + PER_ROW] for start in range(0, len(line), PER_ROW)]
        layers[str(number)] = rows
    drawn["PCA maps by layer"] = panels(layers, images=1)
    first = runs[labels[0]]
    vfms = [name for name in _representations(first) if not name.startswith("layer ")]
    if vfms:
        drawn["PCA maps of vision encoder and VFMs"] = panels(
            {"": [[i.image(), *(i.panel(labels[0], name) for name in vfms if i.has(labels[0], name))] for i in images]},
            images=len(images),
        )
    return drawn


def _representations(run: Run) -> list[str]:
    """Return the representations of which a run stored maps."""
    return list(run.extra.get("map_representations", []))


def _short(label: str, name: str, models: int) -> str:
    return f"{NAMES.get(name, name)}" + (f"<br>{wrapped(label, 14)}" if models > 1 else "")


def _with_answer(image: ImageMaps, label: str, layer: str, width: int) -> Panel:
    """Return the map of a model, with its answer above it."""
    panel = image.panel(label, layer)
    answer = wrapped(image.answer(label), width)
    lines = [wrapped(label, width), f"“{answer}”" if answer else "", panel.title]
    return Panel("<br>".join(filter(None, lines)), panel.pixels, panel.box)


def _images(runs: Mapping[str, Run], layer: str) -> list[ImageMaps]:
    """Return the images of which every run that stored maps has one of `layer`, in the order of the first run."""
    tables = {label: run.tables["maps"].set_index("image_id") for label, run in runs.items() if "maps" in run.tables}
    tables = {label: table for label, table in tables.items() if len(table)}
    if not tables:
        return []
    first, *others = tables.values()
    shared = [image_id for image_id in first.index if all(image_id in table.index for table in others)]
    return [
        ImageMaps(runs, {label: table.loc[image_id].to_dict() for label, table in tables.items()}, layer)
        for image_id in shared
    ]
