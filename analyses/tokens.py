"""Measure whether visual tokens become alike, lose rank or form sinks from layer to layer (docs/paper.md, A7).

    python -m analyses.tokens --model runs/baseline runs/viral --vfm dinov2-small --data shapes:val --limit 200

Each number is computed on the visual tokens of one image; the score is the mean over images, with an interval over
images:

    cosine          mean cosine of two tokens of an image; it grows towards 1 as tokens become alike (homogenized)
    cosine_across   the same for tokens of two different images, with a delete-one-image jackknife. It measures the
                    offset that all tokens share; only what `cosine` has above it belongs to the single image
    effective_rank  exp of the entropy of the singular values over their sum (Roy & Vetterli 2007), of tokens that are
                    neither centered nor normalized
    rank_share      effective_rank / min(n, d), so that layers and networks of other widths can be compared
    norm            median token norm; it has no chance level
    norm_ratio      largest norm over the median norm
    sinks           share of tokens whose norm is above `sink` times the image's median. These are the high-norm tokens
                    of Darcet et al. 2024, who cut at a bend of their histogram (150 for DINOv2-g); we cut at a multiple
                    of the median, since norms differ between layers
    massive         share of tokens with an activation above 100 and above 1000 times the median magnitude (Sun et al.
                    2024)

The chance level is that of isotropic Gaussian tokens of the same n and d, one image for each draw. Two references are
measured on the same pixels: the vision encoder (the features that the projector receives; `tower` in the tables) and
each VFM, resampled to the patch under each token.

What the numbers are not: evidence that information is lost, since a common offset changes them and not what can be read
from the tokens. Sinks are found by their norm, not by attention. Where none of n images has a sink, the interval of the
share still reaches up to about 4 / n.

Two kinds of stored tokens are there to look at, without numbers. `maps` has all tokens of a few images (float16, each
layer divided by its root mean square), for PCA colors and for the similarity to a clicked patch. `umap` has sampled
tokens on a plane: the layers of one model together, and each VFM on its own, because widths differ.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from workbench import figures as fig
from workbench.analysis.chunks import Chunk, Part, joined
from workbench.analysis.command import main
from workbench.analysis.declaration import Analysis, Context, DataOptions, Result
from workbench.capture.hidden_states import check_layers, encoder_rows, read
from workbench.data.base import Sample
from workbench.data.folder import QUESTION
from workbench.data.shapes import COLORS
from workbench.errors import ConfigError, ModelError
from workbench.metrics.geometry import effective_rank, massive_tokens, mean_cosine, norm_ratios, umap_map
from workbench.metrics.neighbors import unit_rows
from workbench.mllm.family import VisualTokens
from workbench.runs import Run
from workbench.spatial.grids import object_coverage, whole_image
from workbench.spatial.vfm_patches import patches_under
from workbench.stats import Interval, Kind, holm, jackknife_ci, mean_interval, paired_test
from workbench.vfm import VFM, find_vfm, load_vfm

log = logging.getLogger(__name__)

ENCODER = "tower"  # the model's own vision encoder, as tables and tensors call it
MEASURES = {
    "cosine": "mean cosine of two tokens of an image",
    "cosine_across": "mean cosine of tokens of two images",
    "effective_rank": "effective rank",
    "rank_share": "effective rank / min(n, d)",
    "norm": "median token norm",
    "norm_ratio": "largest / median norm",
    "sinks": "share of sink tokens",
    "massive": "share of tokens with a massive activation",
}
SHARES: dict[str, Kind] = {"sinks": "proportion", "massive": "proportion"}
EDGES = ("left", "top", "right", "bottom")
THUMBNAIL_SIDE, IMAGE_SIDE = 96, 224  # longer side of a stored image in pixels, at most
ON_OBJECT = 0.5  # share of a token's patch that an object must cover for the token to count as on it


@dataclass(frozen=True)
class Config(DataOptions):
    """What is measured, and which tokens are stored to look at."""

    vfm: tuple[str, ...] = ("dinov2-small",)
    """Vision foundation models to measure beside the layers."""
    layers: tuple[int, ...] = ()
    """Layers of the model, 0 to L; all by default."""
    sink: float = 3.0
    """A token is a sink if its norm is above this multiple of the median norm of its image."""
    null: int = 20
    """Draws of isotropic random tokens."""
    maps: int = 4
    """Images whose tokens are stored for PCA and similarity maps; 0 for none."""
    map_megabytes: int = 256
    """Room for these maps, in MB; if not all layers fit, evenly spaced ones are stored, with the first and the last."""
    umap_images: int = 100
    """Images whose tokens are sampled for UMAP; 0 for none."""
    umap_tokens: int = 12
    """Tokens to sample from each of these images, half of them on objects where there are any."""
    umap_layers: tuple[int, ...] = ()
    """Layers in UMAP; by default the first, the middle and the last."""
    umap_neighbors: int = 15
    """Neighbors of each token in UMAP."""

    def __post_init__(self) -> None:
        for name, least in (
            ("null", 10),
            ("maps", 0),
            ("map_megabytes", 1),
            ("umap_images", 0),
            ("umap_tokens", 1),
            ("umap_neighbors", 2),
            ("seed", 0),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}: expected at least {least}")
        if not self.sink > 1:
            raise ConfigError(f"sink is {self.sink}: expected a multiple of the median norm above 1")


@dataclass(frozen=True)
class ImageTokens:
    """The tokens of one image in every representation.

    Attributes:
        number: of the image, among all.
        grids: its visual tokens, one patch grid after another.
        tokens: by representation: "tower" (the vision encoder), "layer 0", ..., and the name of each VFM.
    """

    number: int
    sample: Sample
    image: Image.Image
    grids: list[VisualTokens]
    tokens: dict[str, Float[Tensor, "token d"]]


@dataclass
class Measured:
    """The measures of one representation by image, and the sums from which the cosine across images follows.

    Attributes:
        values: by measure, one value for each image.
        shapes: (n, d) of the tokens of each image.
        sums: of each image, the sum of its tokens divided by their norms.
    """

    values: dict[str, list[float]] = field(default_factory=dict)
    shapes: list[tuple[int, int]] = field(default_factory=list)
    sums: list[Float[Tensor, " d"]] = field(default_factory=list)

    def take(self, name: str, part: Part) -> None:
        """Append the images of a stored part, as measured in the representation `name`."""
        stored = part.record["measures"][name]
        for measure, values in stored["values"].items():
            self.values.setdefault(measure, []).extend(values)
        self.shapes += [(n, d) for n, d in stored["shapes"]]
        self.sums += list(part.tensors[f"sums.{name}"])

    def add(self, tokens: Float[Tensor, "token d"], sink: float) -> None:
        """Measure the tokens of one more image."""
        for name, value in measures_of(tokens, sink).items():
            self.values.setdefault(name, []).append(value)
        self.shapes.append((tokens.shape[0], tokens.shape[1]))
        self.sums.append(unit_rows(tokens).double().sum(0))


def measures_of(tokens: Float[Tensor, "token d"], sink: float) -> dict[str, float]:
    """Return every measure of the tokens of one image, without those that need several images."""
    rank, ratios = float(effective_rank(tokens)), norm_ratios(tokens)
    return {
        "cosine": float(mean_cosine(tokens)),
        "effective_rank": rank,
        "rank_share": rank / min(tokens.shape),
        "norm": float(tokens.double().norm(dim=-1).quantile(0.5)),
        "norm_ratio": float(ratios.max()),
        "sinks": float((ratios > sink).double().mean()),
        "massive": float(massive_tokens(tokens).double().mean()),
    }


def run(config: Config, context: Context) -> Result:
    """Measure every image in every representation, and store some tokens to look at."""
    layers = check_layers(context.mllm, config.layers)
    umap_layers = [f"layer {layer}" for layer in _umap_layers(config, layers)]
    vfms = {name: load_vfm(name) for name in config.vfm}
    images = [scene[0] for scene in context.data.scenes]
    parts = context.map("visual tokens", images, partial(_measure_chunk, config, context, layers, umap_layers, vfms))
    skipped = next(({ENCODER: part.record["skipped"]} for part in parts if part.record["skipped"]), {})
    names = [
        name
        for name in (ENCODER, *(f"layer {layer}" for layer in layers), *vfms)
        if name in parts[0].record["measures"] and name not in skipped
    ]
    measured = {name: Measured() for name in names}
    samples = SampledTokens(config, umap_layers)
    for part in parts:
        for name, measures in measured.items():
            measures.take(name, part)
        samples.take(part)
    map_names = [name for name in parts[0].record["maps"] if name in measured]  # those of the first image
    map_keys = {f"map.{number}.{name}" for number in range(config.maps) for name in map_names}
    map_tensors = {
        key: value
        for part in parts
        for key, value in part.tensors.items()
        if key in map_keys or key.startswith("picture.")
    }
    sinks = joined(parts, "sinks")
    umap_table, umap_tensors, left_out = samples.umap()
    tables = {
        "scores": _scores(config, measured),
        "per_image": _per_image(measured, [sample.image_id for sample in images]),
        "sinks": sinks[sinks["at"].isin(names)].reset_index(drop=True),
        "maps": joined(parts, "maps"),
        "umap": umap_table,
    }
    record = {
        "vfms": [vfm.record() for vfm in vfms.values()],
        "vfm_fingerprints": {name: vfm.fingerprint for name, vfm in vfms.items()},
        "map_representations": map_names,
        "skipped": skipped | left_out,
    }
    return Result(tables, map_tensors | umap_tensors, record)


def _umap_layers(config: Config, layers: list[int]) -> tuple[int, ...]:
    """Return the layers to draw in UMAP: those of the config, or the first, the middle and the last of `layers`."""
    for layer in config.umap_layers:
        if layer not in layers:
            raise ConfigError(
                f"umap_layers names layer {layer}: expected one of the layers {', '.join(map(str, layers))}"
            )
    return config.umap_layers or tuple(dict.fromkeys((layers[0], layers[len(layers) // 2], layers[-1])))


def _measure_chunk(
    config: Config,
    context: Context,
    layers: list[int],
    umap_layers: list[str],
    vfms: Mapping[str, VFM],
    chunk: Chunk[Sample],
) -> Part:
    """Measure a chunk of images in every representation, and collect the tokens to look at."""
    measured: dict[str, Measured] = {}
    sinks: list[dict[str, object]] = []
    maps, samples = Maps(config), SampledTokens(config, umap_layers)
    skipped: dict[str, str] = {}
    for image in _images(context, layers, vfms, skipped, chunk):
        for name, tokens in image.tokens.items():
            measured.setdefault(name, Measured()).add(tokens, config.sink)
            sinks += _sinks(image, name, tokens, config.sink)
        maps.add(image)
        samples.add(image)
    tables = {
        "sinks": pd.DataFrame(sinks, columns=["at", "image_id", "token", "norm_ratio", *EDGES]),
        "maps": pd.DataFrame(maps.rows, columns=["number", "image_id", "rows", "columns", *EDGES]),
    }
    sums = {f"sums.{name}": torch.stack(measures.sums) for name, measures in measured.items()}
    record = {
        "measures": {name: {"values": own.values, "shapes": own.shapes} for name, own in measured.items()},
        "skipped": skipped.get(ENCODER, ""),
        "maps": maps.names,
        "places": samples.rows,
    }
    return Part(tables, sums | maps.tensors | samples.tensors_to_store(), record)


def _images(
    context: Context, layers: list[int], vfms: Mapping[str, VFM], skipped: dict[str, str], chunk: Chunk[Sample]
) -> Iterator[ImageTokens]:
    """Yield every image of a chunk with its tokens in every representation.

    Where the vision encoder cannot be read token by token, the reason is written to `skipped`, and it is left out from
    there on.
    """
    mllm = context.mllm
    for start, samples in chunk.batches():
        images = [sample.image for sample in samples]
        batch = mllm.encode(images, [sample.question or QUESTION for sample in samples])
        grids = mllm.token_grids(batch)
        try:
            encoder_rows(mllm, grids)
        except ModelError as error:
            skipped[ENCODER] = str(error)
        activations = read(mllm, batch, layers=layers, encoder=not skipped)
        patches = {name: patches_under(vfm, images, grids) for name, vfm in vfms.items()}
        for row, sample in enumerate(samples):
            encoder = activations[row].encoder_features
            tokens = {} if encoder is None else {ENCODER: encoder}
            by_layer = zip(layers, activations[row].values, strict=True)
            tokens |= {f"layer {layer}": values for layer, values in by_layer}
            tokens |= {name: torch.cat([*of_images[row]]) for name, of_images in patches.items()}
            yield ImageTokens(start + row, sample, images[row], grids[row], tokens)


def _boxes(grids: list[VisualTokens]) -> list[tuple[float, float, float, float]]:
    """Return left, top, right, bottom of the patch of every token, in fractions of the image."""
    return [
        grid.token_box(*divmod(number, grid.grid[1]))
        for grid in grids
        if grid.grid
        for number in range(len(grid.index))
    ]


def _edges(box: tuple[float, float, float, float]) -> dict[str, float]:
    return dict(zip(EDGES, box, strict=True))


def _sinks(image: ImageTokens, name: str, tokens: Float[Tensor, "token d"], sink: float) -> list[dict[str, object]]:
    """Return one row for each sink token of an image in the representation `name`, with the box of its patch."""
    ratios = norm_ratios(tokens)
    indices = (ratios > sink).nonzero().flatten().tolist()
    boxes = _boxes(image.grids) if indices else []
    return [
        {"at": name, "image_id": image.sample.image_id, "token": i, "norm_ratio": float(ratios[i])} | _edges(boxes[i])
        for i in indices
    ]


# --- scores ---------------------------------------------------------------------------------------


def _per_image(measured: Mapping[str, Measured], image_ids: list[str]) -> pd.DataFrame:
    """Return one row for each representation, measure and image."""
    tables = [
        pd.DataFrame({"at": name, "layer": _layer(name), "measure": measure, "image_id": image_ids, "value": values})
        for name, measures in measured.items()
        for measure, values in measures.values.items()
    ]
    return pd.concat(tables, ignore_index=True)


def _layer(name: str) -> float:
    """Return the layer number of a representation for figures: -1 for the vision encoder, NaN for a VFM."""
    if name == ENCODER:
        return -1
    return float(name.removeprefix("layer ")) if name.startswith("layer ") else np.nan


def _scores(config: Config, measured: Mapping[str, Measured]) -> pd.DataFrame:
    """Return one row for each representation and measure, with interval and null."""
    rows = []
    nulls: dict[tuple[tuple[int, int], ...], dict[str, np.ndarray]] = {}  # layers of one width share their nulls
    for name, measures in measured.items():
        shapes = tuple(measures.shapes)
        if shapes not in nulls:
            nulls[shapes] = isotropic(measures.shapes, config.sink, draws=config.null, seed=config.seed)
        intervals = _intervals(measures)
        for measure in MEASURES:
            if measure not in intervals:
                continue
            interval, null = intervals[measure], nulls[shapes].get(measure, np.array([np.nan]))
            rows.append(
                {
                    "at": name,
                    "layer": _layer(name),
                    "measure": measure,
                    "score": interval.estimate,
                    "low": interval.low,
                    "high": interval.high,
                    "null_mean": null.mean(),
                    "null_q95": np.quantile(null, 0.95),
                    "n_images": interval.n,
                    "n": int(np.median([n for n, _ in shapes])),
                    "d": shapes[0][1],
                    "seed": config.seed,
                }
            )
    return pd.DataFrame(rows)


def _intervals(measures: Measured) -> dict[str, Interval]:
    """Return the mean of every measure over images with its interval; `cosine_across` needs at least 3 images."""
    intervals = {name: mean_interval(values, kind=SHARES.get(name, "real")) for name, values in measures.values.items()}
    across = cosine_across(measures)
    if across is not None:
        intervals["cosine_across"] = jackknife_ci(across[0], across[1], len(measures.sums))
    return intervals


def cosine_across(measures: Measured) -> tuple[float, np.ndarray] | None:
    """Return the mean cosine of tokens of two different images, and the same without each image in turn.

    All pairs of tokens of different images count. None below 3 images.
    """
    if len(measures.sums) < 3:
        return None
    sums = torch.stack(measures.sums).numpy()
    n = np.array([shape[0] for shape in measures.shapes], dtype=np.float64)
    rest = sums.sum(0) - sums
    products, pairs = (sums * rest).sum(1), n * (n.sum() - n)
    return float(products.sum() / pairs.sum()), (products.sum() - 2 * products) / (pairs.sum() - 2 * pairs)


def isotropic(shapes: list[tuple[int, int]], sink: float, *, draws: int, seed: int) -> dict[str, np.ndarray]:
    """Return every measure but the norm, (draw,), of Gaussian tokens.

    Each draw has the n and d of one image; the images are taken evenly from all.
    """
    generator = torch.Generator().manual_seed(seed)
    by_measure: dict[str, list[float]] = {}
    for draw in range(draws):
        n, d = shapes[draw * len(shapes) // draws]
        tokens, other = (torch.randn(n, d, generator=generator) for _ in range(2))
        across = float(unit_rows(tokens).sum(0) @ unit_rows(other).sum(0)) / n**2
        for measure, value in (measures_of(tokens, sink) | {"cosine_across": across}).items():
            by_measure.setdefault(measure, []).append(value)
    return {measure: np.array(values) for measure, values in by_measure.items() if measure != "norm"}


# --- tokens to look at ----------------------------------------------------------------------------


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
            | _edges(grid.box)
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
        objects, boxes = image.sample.objects, _boxes(image.grids)
        cover = [np.concatenate([object_coverage(target, grid).ravel() for grid in image.grids]) for target in objects]
        most = np.max(cover, axis=0) if cover else np.zeros(len(boxes))
        chosen = self._choose(most, image.number)
        for token in chosen:
            covering = objects[int(np.argmax([shares[token] for shares in cover]))].name if cover else None
            self.rows.append(
                {"image": image.number, "image_id": image.sample.image_id, "token": int(token)}
                | _labels(covering, float(most[token]))
                | _edges(boxes[token])
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
                places = {"group": group, "at": name, "layer": _layer(name), "x": points[:, 0], "y": points[:, 1]}
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


# --- tables and figures ---------------------------------------------------------------------------


def _table(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Return the scores of all models, one below another."""
    table = pd.concat([run.tables["scores"].assign(model=label) for label, run in runs.items()], ignore_index=True)
    return table[["model", *(column for column in table if column != "model")]]


def summary(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Return one row for each model, representation and measure."""
    return _table(runs).drop(columns=["layer", "seed"])


def differences(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Subtract the first model from every other, by layer and measure, on the images that both were measured on.

    p_holm corrects over the layers of a measure. Interval and p are over images, for these very models: they say
    nothing about other training seeds.
    """
    first, *others = runs
    rows: list[dict[str, Any]] = []
    for name in others:
        pair = [
            runs[label].tables["per_image"].dropna(subset="layer").set_index(["measure", "layer", "image_id"])["value"]
            for label in (first, name)
        ]
        shared = pd.concat(pair, axis=1, keys=["a", "b"], join="inner")
        for measure, by_layer in shared.groupby(level="measure", sort=False):
            tested = []
            for layer, part in by_layer.groupby(level="layer"):
                test = paired_test(part["a"], part["b"], seed=int(runs[first].record["seed"]))
                tested.append(
                    {
                        "model": name,
                        "against": first,
                        "measure": measure,
                        "layer": layer,
                        "score": test.difference,
                        "low": test.low,
                        "high": test.high,
                        "p": test.p,
                        "n_images": test.n,
                    }
                )
            rows += [row | {"p_holm": p} for row, p in zip(tested, holm([row["p"] for row in tested]), strict=True)]
    columns = ["model", "against", "measure", "layer", "score", "low", "high", "p", "p_holm", "n_images"]
    return pd.DataFrame(rows, columns=columns)


def figures(runs: Mapping[str, Run]) -> dict[str, go.Figure]:
    """Draw each measure by layer beside VFMs and isotropic tokens, and the paired difference of two models."""
    table, all_changes = _table(runs), differences(runs)
    drawn = {}
    curves_of = {
        "cosine": ("cosine", "cosine_across"),
        "rank_share": ("rank_share",),
        "norm": ("norm",),
        "sinks": ("sinks", "massive"),
    }
    titles = {"cosine": "Homogenization", "rank_share": "Effective rank", "norm": "Token norm", "sinks": "Sink tokens"}
    for measure, names in curves_of.items():
        scores = table[table["measure"].isin(names)]
        figure = fig.layer_curves(
            _with_references(scores, measure),
            y=MEASURES[measure],
            kind="kind",
            null="isotropic random tokens (mean to 95 %)",
        )
        if measure == "cosine":
            figure.update_yaxes(title="mean cosine of two tokens")
        if measure == "sinks":
            highest = scores["high"].replace(np.inf, np.nan).max()
            figure.update_yaxes(title="share of tokens", range=[0, max(0.05, 1.1 * highest)])
        if measure == "norm":
            figure.update_yaxes(type="log")
        drawn[f"{titles[measure]} by layer"] = figure
        changes = all_changes[all_changes["measure"] == measure]
        if len(changes) and measure != "sinks":
            drawn[f"{titles[measure]}: difference by layer"] = fig.difference_curves(
                changes, y=f"{MEASURES[measure]}, minus {changes['against'].iloc[0]}"
            )
    return drawn


KINDS = {"cosine": "same image", "cosine_across": "other images", "sinks": "norm", "massive": "massive activation"}


def _with_references(scores: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Return the curves of the models, and each VFM as a constant line over the layers.

    Norms of VFMs are left out: those of another network are no reference.
    """
    layers = scores.dropna(subset="layer").assign(kind=lambda t: t["measure"].map(KINDS).fillna("layers"))
    ends = dict.fromkeys([layers["layer"].min(), layers["layer"].max()])
    of_vfms = scores["layer"].isna() & (scores["measure"] == measure)
    vfms = scores[:0] if measure == "norm" else scores[of_vfms].drop_duplicates("at")
    lines = [vfms.assign(model=vfms["at"], kind="VFM", layer=end, null_mean=np.nan, null_q95=np.nan) for end in ends]
    return pd.concat([layers, *lines], ignore_index=True)


def uses(config: Config) -> dict[str, str]:
    """Return the identity of every VFM, so that other weights under its name make another run."""
    return {f"vfm {name}": find_vfm(name).identity() for name in config.vfm}


# version 2: intervals with their stated coverage
ANALYSIS = Analysis(
    "tokens",
    "Visual tokens by layer: homogenization, rank, norms and sinks, maps to look at",
    Config,
    run,
    figures,
    summary,
    version=2,
    uses=uses,
)

if __name__ == "__main__":
    main(ANALYSIS)
