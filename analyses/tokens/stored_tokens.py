"""Tokens that are stored to look at: maps of whole images, and samples for UMAP."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from analyses.tokens.options import EDGES, ENCODER, Config
from analyses.tokens.representations import ImageTokens, edges_of, layer_number, token_boxes
from workbench.analysis.chunks import Part
from workbench.data.shapes import COLORS
from workbench.errors import ConfigError
from workbench.metrics.geometry import umap_map
from workbench.spatial.grids import object_coverage, whole_image

THUMBNAIL_SIDE, IMAGE_SIDE = 96, 224  # longer side of a stored image in pixels, at most
ON_OBJECT = 0.5  # share of a token's patch that an object must cover for the token to count as on it

log = logging.getLogger(__name__)


@dataclass
class Maps:
    """All tokens of the first images, on the patch grid that shows most of the image in one piece.

    Attributes:
        names: the representations that are stored.
        rows: of the table `maps`, one for each image.
    """

    config: Config
    names: list[str] = field(default_factory=list)
    rows: list[dict[str, object]] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def add(self, image: ImageTokens) -> None:
        """Store the tokens of an image, if it is one of the first."""
        if image.number >= self.config.maps:
            return
        on_grid, grid = whole_image(image.grids)
        assert grid.grid is not None
        tokens = {name: values[on_grid] for name, values in image.tokens.items()}
        self.names = self.names or self._fitting(tokens)
        self.rows.append(
            {"number": image.number, "image_id": image.sample.image_id, "rows": grid.grid[0], "columns": grid.grid[1]}
            | edges_of(grid.box)
            | {"question": image.question, "answer": image.answer}
        )
        for name in self.names:
            if name in tokens:
                self.tensors[f"map.{image.number}.{name}"] = _scaled_half(tokens[name])
        self.tensors[f"picture.{image.number}"] = _pixels(image.image, IMAGE_SIDE)

    def _fitting(self, tokens: Mapping[str, Tensor]) -> list[str]:
        """Return the representations that fit: encoder and VFMs first, then as many evenly spaced layers as fit.

        Raises:
            ConfigError: not even one layer fits.
        """
        megabytes = {name: 2 * values.numel() * self.config.maps / 2**20 for name, values in tokens.items()}
        layers = [name for name in tokens if name.startswith("layer ")]
        references = [name for name in tokens if name not in layers]
        used, per_layer = sum(megabytes[name] for name in references), megabytes[layers[0]]
        fitting = int((self.config.map_megabytes - used) // per_layer)
        if fitting < 1:
            least = int(np.ceil(used + per_layer))
            raise ConfigError(
                f"map_megabytes is {self.config.map_megabytes}: expected at least {least} for maps of"
                f" {self.config.maps} images in one layer"
            )
        if fitting < len(layers):
            spaced = [layers[round(i)] for i in np.linspace(0, len(layers) - 1, fitting)]
            layers = spaced if fitting > 1 else layers[-1:]
            log.warning(
                "map_megabytes is %d, so maps are stored of %d layers only: %s",
                self.config.map_megabytes,
                len(layers),
                ", ".join(layers),
            )
        stored = {*references, *layers}
        return [name for name in tokens if name in stored]


def _scaled_half(tokens: Float[Tensor, "token d"]) -> Float[Tensor, "token d"]:
    """Return tokens divided by their root mean square, in float16.

    Directions are kept to 1e-3, and a massive activation does not overflow.
    """
    return (tokens / tokens.double().pow(2).mean().sqrt()).half()


def _pixels(image: Image.Image, side: int) -> Tensor:
    """Return the image with its longer side at most `side` pixels, as (height, width, 3) bytes."""
    small = image.convert("RGB")
    small.thumbnail((side, side))
    return torch.from_numpy(np.array(small))


@dataclass
class SampledTokens:
    """Sampled tokens of the first images for UMAP, the same tokens in every representation.

    Attributes:
        layers: the representations of the model to sample, such as "layer 0".
        rows: one for each sampled token: its image, its patch, and what lies there.
        tokens: by representation, the sampled tokens of each image.
        tensors: thumbnails of the images, and the stored tokens.
    """

    config: Config
    layers: list[str]
    rows: list[dict[str, object]] = field(default_factory=list)
    tokens: dict[str, list[Tensor]] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def add(self, image: ImageTokens) -> None:
        """Sample tokens of an image, if it is one of the first."""
        if image.number >= self.config.umap_images:
            return
        objects, boxes = image.sample.objects, token_boxes(image.grids)
        cover = [np.concatenate([object_coverage(target, grid).ravel() for grid in image.grids]) for target in objects]
        most = np.max(cover, axis=0) if cover else np.zeros(len(boxes))
        chosen = self._choose(most, image.number)
        for token in chosen:
            covering = objects[int(np.argmax([shares[token] for shares in cover]))].name if cover else None
            self.rows.append(
                {"image": image.number, "image_id": image.sample.image_id, "token": int(token)}
                | _labels(covering, float(most[token]))
                | edges_of(boxes[token])
            )
        for name, tokens in image.tokens.items():
            if name != ENCODER and (name in self.layers or not name.startswith("layer ")):
                self.tokens.setdefault(name, []).append(tokens[torch.from_numpy(chosen)])
        self.tensors[f"thumbnail.{image.number}"] = _pixels(image.image, THUMBNAIL_SIDE)

    def _choose(self, cover: np.ndarray, number: int) -> np.ndarray:
        """Draw the tokens of image `number`, half of them on objects where there are as many; ascending.

        Args:
            cover: the share of each token's patch that an object covers.
        """
        on_object = np.flatnonzero(cover >= ON_OBJECT)
        rng = np.random.default_rng([self.config.seed, number])
        count = min(self.config.umap_tokens, len(cover))
        on_object = rng.permutation(on_object)[: count // 2]
        others = rng.permutation(np.setdiff1d(np.arange(len(cover)), on_object))[: count - len(on_object)]
        return np.sort(np.concatenate([on_object, others]))

    def tensors_to_store(self) -> dict[str, Tensor]:
        """Return the sampled tokens by representation, in the order of `rows`, and the thumbnails."""
        return {f"sampled.{name}": torch.cat(tokens) for name, tokens in self.tokens.items()} | self.tensors

    def take(self, part: Part) -> None:
        """Append the sampled tokens of a stored part, whose images follow."""
        self.rows += part.record["places"]
        for key, values in part.tensors.items():
            kind, _, name = key.partition(".")
            if kind == "sampled":
                self.tokens.setdefault(name, []).append(values)
            elif kind == "thumbnail":
                self.tensors[key] = values

    def umap(self) -> tuple[pd.DataFrame, dict[str, Tensor], dict[str, str]]:
        """Lay the sampled tokens on a plane, all layers of the model in one map and each VFM in its own.

        Returns:
            The place of each token, tokens and thumbnails to store, and which maps are left out and why.
        """
        tables, left_out = [], {}
        groups = {"layers": self.layers} | {name: [name] for name in self.config.vfm if name in self.tokens}
        neighbors = self.config.umap_neighbors
        for group, names in groups.items() if self.rows else ():
            values = torch.cat([torch.cat(self.tokens[name]) for name in names])
            if len(values) <= neighbors:
                left_out[f"umap of {group}"] = f"{len(values)} tokens are too few for {neighbors} neighbors"
                continue
            plane = umap_map(values, neighbors=neighbors, seed=self.config.seed)
            self.tensors |= {f"umap.{name}": _scaled_half(torch.cat(self.tokens[name])) for name in names}
            for name, points in zip(names, np.split(plane, len(names)), strict=True):
                places = {"group": group, "at": name, "layer": layer_number(name), "x": points[:, 0], "y": points[:, 1]}
                tables.append(pd.DataFrame(self.rows).assign(**places))
        columns = ["group", "at", "layer", "image", "image_id", "token", "thing", "name", "colour", "shape"]
        columns += [*EDGES, "x", "y"]
        table = pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)
        return table, self.tensors, left_out


def _labels(covering: str | None, share: float) -> dict[str, object]:
    """Return what lies under a token, as the table `umap` names it.

    Args:
        covering: name of the object that covers most of the token's patch; None if the image has no known objects.
        share: the share of the patch that it covers.
    """
    if covering is None:
        return {"thing": "", "name": "", "colour": "", "shape": ""}
    if share >= ON_OBJECT:
        kind, name = "object", covering
    else:
        kind = name = "edge" if share > 0 else "background"
    color = next((word for word in name.split() if word in COLORS), kind)
    shape = " ".join(word for word in name.split() if word != color) or kind
    return {"thing": kind, "name": name, "colour": color, "shape": shape}
