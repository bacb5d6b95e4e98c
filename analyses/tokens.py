"""What becomes of the cloud of visual tokens on its way through the layers: do they grow alike, lose dimensions, form
sinks (docs/paper.md, A7)?

    python -m analyses.tokens --model runs/baseline runs/viral --vfm dinov2-small --data shapes:val --limit 200
    --output_dir runs

What the numbers are, each for the visual tokens of one image, then a mean over images with an interval over images:

    cosine          mean cosine of two tokens of an image; it grows towards 1 where tokens are homogenised
    cosine_across   the same for tokens of two different images, with a delete-one-image jackknife. What both share is
                    an offset that all tokens have; only what `cosine` has above it is an image's own
    effective_rank  exp of the entropy of the singular values over their sum (Roy & Vetterli 2007), tokens neither
                    centred nor normalised
    rank_share      effective_rank / min(n, d), so that layers and networks of other widths can be compared
    norm            median token norm; it has no chance level
    norm_ratio      largest norm over the median norm
    sinks           share of tokens whose norm is above `sink` times the image's median: high-norm tokens as of Darcet
                    et al. 2024, who cut at a bend of their histogram (150 for DINOv2-g) where we cut at a multiple,
                    since norms differ between layers
    massive         share of tokens with an activation above 100 and above 1000 times the median magnitude (Sun et al.
                    2024)

The chance level is that of isotropic Gaussian tokens of the same n and d, one image a draw. The tower (what the
connector receives) and each VFM, on the same pixels under each token, are references. What the numbers are not: a loss
of information (a common offset changes them and not what can be read); and sinks are found by norm, not by attention.
Where none of the n images has one, the interval of a share of 0 leaves room for some in about 4 in n.

Pictures to look at, without numbers: `maps` keeps the tokens of a few images (float16, each layer divided by its root
mean square) for PCA colours and the similarity of a clicked patch; `umap` holds sampled tokens on a plane, the layers
of one model together, each VFM on its own, as widths differ.
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
from workbench.stats import Kind, holm, jackknife_ci, mean_interval, paired_test
from workbench.vfm import VFM, find_vfm, load_vfm

log = logging.getLogger(__name__)

TOWER = "tower"
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
THUMBNAIL, PICTURE = 96, 224  # pixels of the longer side
ON_OBJECT = 0.5  # share of a token's cell that an object covers


@dataclass(frozen=True)
class Config(DataOptions):
    """What is measured, and what is kept to look at."""

    vfm: tuple[str, ...] = ("dinov2-small",)
    """Vision foundation models to set beside the layers."""
    layers: tuple[int, ...] = ()
    """Layers of the model, 0 to L; all by default."""
    sink: float = 3.0
    """A token is a sink where its norm is above this many times the median of its image."""
    null: int = 20
    """Draws of isotropic random tokens."""
    maps: int = 4
    """Images whose tokens are kept for PCA and similarity maps; 0 for none."""
    map_megabytes: int = 256
    """At most that much for them: where it does not hold all layers, evenly spaced ones are kept, first and last among
    them."""
    umap_images: int = 100
    """Images whose tokens are sampled for UMAP; 0 for none."""
    umap_tokens: int = 12
    """Tokens sampled from each of them, half of them on objects where there are any."""
    umap_layers: tuple[int, ...] = ()
    """Layers in UMAP; by default the first, the middle and the last."""
    umap_neighbors: int = 15
    """Neighbours of UMAP."""

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
class Seen:
    """One image as every representation has it.

    Attributes:
        rasters: its visual tokens, one part after another.
        tokens: by representation: "tower", "layer 0", ..., and the name of each VFM.
    """

    number: int
    sample: Sample
    picture: Image.Image
    rasters: list[VisualTokens]
    tokens: dict[str, Float[Tensor, "token d"]]


@dataclass
class Cloud:
    """What is kept of one representation: its measures by image, and what the cosine across images needs."""

    values: dict[str, list[float]] = field(default_factory=dict)
    shapes: list[tuple[int, int]] = field(default_factory=list)
    sums: list[Float[Tensor, " d"]] = field(default_factory=list)

    def take(self, name: str, part: Part) -> None:
        """Add the state of another one, of the images that follow: what `part` has of the representation `name`."""
        state = part.record["measures"][name]
        for measure, values in state["values"].items():
            self.values.setdefault(measure, []).extend(values)
        self.shapes += [(n, d) for n, d in state["shapes"]]
        self.sums += list(part.tensors[f"sums.{name}"])

    def add(self, tokens: Float[Tensor, "token d"], sink: float) -> None:
        """Measure one image."""
        for name, value in measured(tokens, sink).items():
            self.values.setdefault(name, []).append(value)
        self.shapes.append((tokens.shape[0], tokens.shape[1]))
        self.sums.append(unit_rows(tokens).double().sum(0))


def measured(tokens: Float[Tensor, "token d"], sink: float) -> dict[str, float]:
    """The measures of one image's tokens."""
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
    """Measure every image in every representation, and keep some tokens to look at."""
    layers = check_layers(context.mllm, config.layers)
    middle = layers[len(layers) // 2]
    shown = config.umap_layers or tuple(dict.fromkeys((layers[0], middle, layers[-1])))
    for layer in shown:
        if layer not in layers:
            raise ConfigError(
                f"umap_layers names layer {layer}: expected one of the layers {', '.join(map(str, layers))}"
            )
    vfms = {name: load_vfm(name) for name in config.vfm}
    images = [scene[0] for scene in context.data.scenes]
    umap_layers = [f"layer {layer}" for layer in shown]
    parts = context.map("visual tokens", images, partial(_measured, config, context, layers, umap_layers, vfms))
    skipped = next(({TOWER: part.record["skipped"]} for part in parts if part.record["skipped"]), {})
    names = [
        name
        for name in (TOWER, *(f"layer {layer}" for layer in layers), *vfms)
        if name in parts[0].record["measures"] and name not in skipped
    ]
    clouds = {name: Cloud() for name in names}
    places = Places(config, umap_layers)
    for part in parts:
        for name, cloud in clouds.items():
            cloud.take(name, part)
        places.take(part)
    maps = parts[0].record["maps"]  # the representations of the first image
    kept = {f"map.{number}.{name}" for number in range(config.maps) for name in maps if name in clouds}
    tensors = {
        key: value for part in parts for key, value in part.tensors.items() if key in kept or key.startswith("picture.")
    }
    sinks = joined(parts, "sinks")
    image_ids = [sample.image_id for sample in images]
    tables = {
        "scores": _scores(config, clouds),
        "per_image": _per_image(clouds, image_ids),
        "sinks": sinks[sinks["at"].isin(names)].reset_index(drop=True),
    }
    tables["maps"] = joined(parts, "maps")
    table, sampled, left_out = places.mapped()
    record = {
        "vfms": [vfm.record() for vfm in vfms.values()],
        "vfm_fingerprints": {name: vfm.fingerprint for name, vfm in vfms.items()},
        "map_representations": [name for name in maps if name in clouds],
        "skipped": skipped | left_out,
    }
    return Result(tables | {"umap": table}, tensors | sampled, record)


def _measured(
    config: Config,
    context: Context,
    layers: list[int],
    umap_layers: list[str],
    vfms: Mapping[str, VFM],
    chunk: Chunk[Sample],
) -> Part:
    """The measures of a chunk of images in every representation, and what is kept of them to look at."""
    clouds: dict[str, Cloud] = {}
    sinks: list[dict[str, object]] = []
    maps, places = Maps(config), Places(config, umap_layers)
    skipped: dict[str, str] = {}
    for seen in _images(context, layers, vfms, skipped, chunk):
        for name, tokens in seen.tokens.items():
            clouds.setdefault(name, Cloud()).add(tokens, config.sink)
            sinks += _sinks(seen, name, tokens, config.sink)
        maps.add(seen)
        places.add(seen)
    edges = ["left", "top", "right", "bottom"]
    tables = {
        "sinks": pd.DataFrame(sinks, columns=["at", "image_id", "token", "norm_ratio", *edges]),
        "maps": pd.DataFrame(maps.rows, columns=["number", "image_id", "rows", "columns", *edges]),
    }
    tensors = (
        {f"sums.{name}": torch.stack(cloud.sums) for name, cloud in clouds.items()} | maps.tensors | places.state()
    )
    measures = {name: {"values": cloud.values, "shapes": cloud.shapes} for name, cloud in clouds.items()}
    return Part(
        tables,
        tensors,
        {"measures": measures, "skipped": skipped.get(TOWER, ""), "maps": maps.names, "places": places.rows},
    )


def _images(
    context: Context, layers: list[int], vfms: Mapping[str, VFM], skipped: dict[str, str], chunk: Chunk[Sample]
) -> Iterator[Seen]:
    """Every image of a chunk in every representation; where the tower cannot be read token by token, `skipped` says
    why."""
    mllm = context.mllm
    for start, part in chunk.batches():
        pictures = [sample.image for sample in part]
        batch = mllm.encode(pictures, [sample.question or QUESTION for sample in part])
        rasters = mllm.token_grids(batch)
        try:
            encoder_rows(mllm, rasters)
        except ModelError as error:
            skipped[TOWER] = str(error)
        found = read(mllm, batch, layers=layers, encoder=not skipped)
        patches = {name: patches_under(vfm, pictures, rasters) for name, vfm in vfms.items()}
        for row, sample in enumerate(part):
            tower = found[row].encoder_features
            tokens = {} if tower is None else {TOWER: tower}
            tokens |= {f"layer {layer}": values for layer, values in zip(layers, found[row].values, strict=True)}
            tokens |= {name: torch.cat([*own[row]]) for name, own in patches.items()}
            yield Seen(start + row, sample, pictures[row], rasters[row], tokens)


def _boxes(rasters: list[VisualTokens]) -> list[tuple[float, float, float, float]]:
    """Left, top, right, bottom of every token's cell, in fractions of the image."""
    return [
        part.token_box(*divmod(number, part.grid[1]))
        for part in rasters
        if part.grid
        for number in range(len(part.index))
    ]


def _sinks(seen: Seen, name: str, tokens: Float[Tensor, "token d"], sink: float) -> list[dict[str, object]]:
    """The sink tokens of an image, with their cells."""
    ratios = norm_ratios(tokens)
    found = (ratios > sink).nonzero().flatten().tolist()
    boxes = _boxes(seen.rasters) if found else []
    named = ("left", "top", "right", "bottom")
    return [
        {"at": name, "image_id": seen.sample.image_id, "token": i, "norm_ratio": float(ratios[i])}
        | dict(zip(named, boxes[i], strict=True))
        for i in found
    ]


# --- scores ---------------------------------------------------------------------------------------


def _per_image(clouds: Mapping[str, Cloud], image_ids: list[str]) -> pd.DataFrame:
    parts = [
        pd.DataFrame({"at": name, "layer": _layer(name), "measure": measure, "image_id": image_ids, "value": values})
        for name, cloud in clouds.items()
        for measure, values in cloud.values.items()
    ]
    return pd.concat(parts, ignore_index=True)


def _layer(name: str) -> float:
    """Layer number for figures: -1 for the tower, none (NaN) for a VFM."""
    return -1 if name == TOWER else float(name.removeprefix("layer ")) if name.startswith("layer ") else np.nan


def _scores(config: Config, clouds: Mapping[str, Cloud]) -> pd.DataFrame:
    rows = []
    nulls: dict[tuple[tuple[int, int], ...], dict[str, np.ndarray]] = {}  # layers of one width have one
    for name, cloud in clouds.items():
        shapes = tuple(cloud.shapes)
        if shapes not in nulls:
            nulls[shapes] = isotropic(cloud.shapes, config.sink, draws=config.null, seed=config.seed)
        scores = {
            measure: mean_interval(values, kind=SHARES.get(measure, "real")) for measure, values in cloud.values.items()
        }
        across = cosine_across(cloud)
        if across is not None:
            scores["cosine_across"] = jackknife_ci(across[0], across[1], len(cloud.sums))
        for measure in MEASURES:
            if measure in scores:
                interval, null = scores[measure], nulls[shapes].get(measure, np.array([np.nan]))
                rows.append(
                    {
                        **{
                            "at": name,
                            "layer": _layer(name),
                            "measure": measure,
                            "score": interval.estimate,
                            "low": interval.low,
                            "high": interval.high,
                        },
                        **{"null_mean": null.mean(), "null_q95": np.quantile(null, 0.95), "n_images": interval.n},
                        **{"n": int(np.median([n for n, _ in shapes])), "d": shapes[0][1], "seed": config.seed},
                    }
                )
    return pd.DataFrame(rows)


def cosine_across(cloud: Cloud) -> tuple[float, np.ndarray] | None:
    """Mean cosine of tokens of two different images over all such pairs, and the same without each image in turn; None
    below 3 images."""
    if len(cloud.sums) < 3:
        return None
    sums, n = torch.stack(cloud.sums).numpy(), np.array([shape[0] for shape in cloud.shapes], dtype=np.float64)
    rest = sums.sum(0) - sums
    products, pairs = (sums * rest).sum(1), n * (n.sum() - n)
    return float(products.sum() / pairs.sum()), (products.sum() - 2 * products) / (pairs.sum() - 2 * pairs)


def isotropic(shapes: list[tuple[int, int]], sink: float, *, draws: int, seed: int) -> dict[str, np.ndarray]:
    """Every measure but the norm for Gaussian tokens of the images' n and d, one image a draw, images taken evenly from
    all."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, list[float]] = {}
    for draw in range(draws):
        n, d = shapes[draw * len(shapes) // draws]
        tokens, other = (torch.randn(n, d, generator=generator) for _ in range(2))
        values = measured(tokens, sink) | {
            "cosine_across": float(unit_rows(tokens).sum(0) @ unit_rows(other).sum(0)) / n**2
        }
        for measure, value in values.items():
            found.setdefault(measure, []).append(value)
    return {measure: np.array(values) for measure, values in found.items() if measure != "norm"}


# --- what is kept to look at ----------------------------------------------------------------------


@dataclass
class Maps:
    """The tokens of the first images, on the raster that shows most of the image in one piece."""

    config: Config
    names: list[str] = field(default_factory=list)
    rows: list[dict[str, object]] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def add(self, seen: Seen) -> None:
        """Keep an image, if it is one of the first."""
        if seen.number >= self.config.maps:
            return
        own, raster = whole_image(seen.rasters)
        assert raster.grid is not None
        self.names = self.names or self._fitting({name: values[own] for name, values in seen.tokens.items()})
        self.rows.append(
            {"number": seen.number, "image_id": seen.sample.image_id, "rows": raster.grid[0], "columns": raster.grid[1]}
            | dict(zip(("left", "top", "right", "bottom"), raster.box, strict=True))
        )
        for name in self.names:
            if name in seen.tokens:
                self.tensors[f"map.{seen.number}.{name}"] = _half(seen.tokens[name][own])
        self.tensors[f"picture.{seen.number}"] = _pixels(seen.picture, PICTURE)

    def _fitting(self, tokens: Mapping[str, Tensor]) -> list[str]:
        """The representations that fit: references first, then as many evenly spaced layers as there is room for."""
        sizes = {name: 2 * values.numel() * self.config.maps / 2**20 for name, values in tokens.items()}
        layers = [name for name in tokens if name.startswith("layer ")]
        references = [name for name in tokens if name not in layers]
        used, each = sum(sizes[name] for name in references), sizes[layers[0]]
        room = int((self.config.map_megabytes - used) // each)
        if room < 1:
            least = int(np.ceil(used + each))
            raise ConfigError(
                f"map_megabytes is {self.config.map_megabytes}: expected at least {least} for maps of"
                f" {self.config.maps} images in one layer"
            )
        if room < len(layers):
            layers = [layers[round(i)] for i in np.linspace(0, len(layers) - 1, room)] if room > 1 else layers[-1:]
            log.warning(
                "maps of %d layers fit into %d MB: %s", len(layers), self.config.map_megabytes, ", ".join(layers)
            )
        kept = {*references, *layers}
        return [name for name in tokens if name in kept]


def _half(tokens: Float[Tensor, "token d"]) -> Float[Tensor, "token d"]:
    """Tokens over their root mean square in float16: directions are kept to 1e-3, and a massive activation does not
    overflow."""
    return (tokens / tokens.double().pow(2).mean().sqrt()).half()


def _pixels(image: Image.Image, side: int) -> Tensor:
    """The picture with its longer side at most `side`, (height, width, 3) bytes."""
    small = image.convert("RGB")
    small.thumbnail((side, side))
    return torch.from_numpy(np.array(small))


@dataclass
class Places:
    """Sampled tokens of the first images, the same ones in every representation, for UMAP."""

    config: Config
    layers: list[str]
    rows: list[dict[str, object]] = field(default_factory=list)
    tokens: dict[str, list[Tensor]] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def add(self, seen: Seen) -> None:
        """Sample an image, if it is one of the first."""
        if seen.number >= self.config.umap_images:
            return
        shares = [
            np.concatenate([object_coverage(thing, part).ravel() for part in seen.rasters])
            for thing in seen.sample.objects
        ]
        best = np.max(shares, axis=0) if shares else np.zeros(len(_boxes(seen.rasters)))
        on = np.flatnonzero(best >= ON_OBJECT)
        generator = np.random.default_rng([self.config.seed, seen.number])
        count = min(self.config.umap_tokens, len(best))
        on = generator.permutation(on)[: count // 2]
        others = generator.permutation(np.setdiff1d(np.arange(len(best)), on))[: count - len(on)]
        chosen, boxes = np.sort(np.concatenate([on, others])), _boxes(seen.rasters)
        for token in chosen:
            covering = int(np.argmax([own[token] for own in shares])) if shares else -1
            thing = (
                ""
                if not shares
                else "object"
                if best[token] >= ON_OBJECT
                else "edge"
                if best[token] > 0
                else "background"
            )
            name = seen.sample.objects[covering].name if thing == "object" else thing
            colour = next((word for word in name.split() if word in COLORS), thing)
            shape = " ".join(word for word in name.split() if word != colour) or thing
            named = {
                "image": seen.number,
                "image_id": seen.sample.image_id,
                "token": int(token),
                "thing": thing,
                "name": name,
                "colour": colour,
            }
            self.rows.append(
                named | {"shape": shape} | dict(zip(("left", "top", "right", "bottom"), boxes[token], strict=True))
            )
        for at, tokens in seen.tokens.items():
            if at != TOWER and (at in self.layers or not at.startswith("layer ")):
                self.tokens.setdefault(at, []).append(tokens[torch.from_numpy(chosen)])
        self.tensors[f"thumbnail.{seen.number}"] = _pixels(seen.picture, THUMBNAIL)

    def state(self) -> dict[str, Tensor]:
        """The sampled tokens by representation, and thumbnails; `rows` say of which image each token is."""
        return {f"sampled.{name}": torch.cat(own) for name, own in self.tokens.items()} | self.tensors

    def take(self, part: Part) -> None:
        """Add the state of another one, of the images that follow."""
        self.rows += part.record["places"]
        for key, values in part.tensors.items():
            kind, _, name = key.partition(".")
            if kind == "sampled":
                self.tokens.setdefault(name, []).append(values)
            elif kind == "thumbnail":
                self.tensors[key] = values

    def mapped(self) -> tuple[pd.DataFrame, dict[str, Tensor], dict[str, str]]:
        """Where each sampled token lies in the plane, layers of the model in one map; the tokens; and what was left out
        and why."""
        parts, left_out = [], {}
        groups = {"layers": self.layers} | {name: [name] for name in self.config.vfm if name in self.tokens}
        for group, names in groups.items() if self.rows else ():
            values = torch.cat([torch.cat(self.tokens[name]) for name in names])
            if len(values) <= self.config.umap_neighbors:
                left_out[f"umap of {group}"] = f"{len(values)} tokens with {self.config.umap_neighbors} neighbours"
                continue
            plane = umap_map(values, neighbors=self.config.umap_neighbors, seed=self.config.seed)
            self.tensors |= {f"umap.{name}": _half(torch.cat(self.tokens[name])) for name in names}
            for name, own in zip(names, np.split(plane, len(names)), strict=True):
                parts.append(
                    pd.DataFrame(self.rows).assign(group=group, at=name, layer=_layer(name), x=own[:, 0], y=own[:, 1])
                )
        columns = [
            "group",
            "at",
            "layer",
            "image",
            "image_id",
            "token",
            "thing",
            "name",
            "colour",
            "shape",
            "left",
            "top",
            "right",
            "bottom",
            "x",
            "y",
        ]
        table = pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)
        return table, self.tensors, left_out


# --- tables and figures ---------------------------------------------------------------------------


def _table(found: Mapping[str, Run]) -> pd.DataFrame:
    table = pd.concat([run.tables["scores"].assign(model=label) for label, run in found.items()], ignore_index=True)
    return table[["model", *(column for column in table if column != "model")]]


def summary(found: Mapping[str, Run]) -> pd.DataFrame:
    """One row per model, representation and measure."""
    return _table(found).drop(columns=["layer", "seed"])


def differences(found: Mapping[str, Run]) -> pd.DataFrame:
    """Every model minus the first, by layer and measure, paired over the images both were measured on, Holm-corrected
    over the layers of a measure.

    The interval and p are over images, of these very models: they say nothing about other training seeds.
    """
    first, *others = found
    rows: list[dict[str, Any]] = []
    for name in others:
        pair = [
            found[label].tables["per_image"].dropna(subset="layer").set_index(["measure", "layer", "image_id"])["value"]
            for label in (first, name)
        ]
        both = pd.concat(pair, axis=1, keys=["a", "b"], join="inner")
        for measure, own in both.groupby(level="measure", sort=False):
            tested = []
            for layer, part in own.groupby(level="layer"):
                test = paired_test(part["a"], part["b"], seed=int(found[first].record["seed"]))
                named = {
                    "model": name,
                    "against": first,
                    "measure": measure,
                    "layer": layer,
                    "score": test.difference,
                    "low": test.low,
                }
                tested.append(named | {"high": test.high, "p": test.p, "n_images": test.n})
            rows += [row | {"p_holm": p} for row, p in zip(tested, holm([row["p"] for row in tested]), strict=True)]
    return pd.DataFrame(
        rows, columns=["model", "against", "measure", "layer", "score", "low", "high", "p", "p_holm", "n_images"]
    )


def figures(found: Mapping[str, Run]) -> dict[str, go.Figure]:
    """Each measure by layer beside the VFMs and the isotropic reference, and the paired difference of two models."""
    table, changes = _table(found), differences(found)
    drawn = {}
    shown = {
        "cosine": ("cosine", "cosine_across"),
        "rank_share": ("rank_share",),
        "norm": ("norm",),
        "sinks": ("sinks", "massive"),
    }
    titles = {"cosine": "Homogenisation", "rank_share": "Effective rank", "norm": "Token norm", "sinks": "Sink tokens"}
    for measure, names in shown.items():
        part = table[table["measure"].isin(names)]
        figure = fig.layer_curves(
            _with_references(part, measure),
            y=MEASURES[measure],
            kind="kind",
            null="isotropic random tokens (mean to 95 %)",
        )
        if measure == "cosine":
            figure.update_yaxes(title="mean cosine of two tokens")
        if measure == "sinks":
            figure.update_yaxes(
                title="share of tokens", range=[0, max(0.05, 1.1 * part["high"].replace(np.inf, np.nan).max())]
            )
        if measure == "norm":
            figure.update_yaxes(type="log")
        drawn[f"{titles[measure]} by layer"] = figure
        change = changes[changes["measure"] == measure]
        if len(change) and measure != "sinks":
            drawn[f"{titles[measure]}: difference by layer"] = fig.difference_curves(
                change, y=f"{MEASURES[measure]}, minus {change['against'].iloc[0]}"
            )
    return drawn


KINDS = {"cosine": "same image", "cosine_across": "other images", "sinks": "norm", "massive": "massive activation"}


def _with_references(table: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Curves by model, and each VFM as a constant line over the layers; a norm of another network is no reference."""
    layers = table.dropna(subset="layer").assign(kind=lambda t: t["measure"].map(KINDS).fillna("layers"))
    ends = [layers["layer"].min(), layers["layer"].max()]
    vfms = (
        table[table["layer"].isna() & (table["measure"] == measure)].drop_duplicates("at")
        if measure != "norm"
        else table[:0]
    )
    constant = [
        vfms.assign(model=vfms["at"], kind="VFM", layer=end, null_mean=np.nan, null_q95=np.nan)
        for end in dict.fromkeys(ends)
    ]
    return pd.concat([layers, *constant], ignore_index=True)


def uses(config: Config) -> dict[str, str]:
    """The identity of every VFM: another copy of its weights is another question."""
    return {f"vfm {name}": find_vfm(name).identity() for name in config.vfm}


# 2: intervals that cover what they say
ANALYSIS = Analysis(
    "tokens",
    "Visual tokens by layer: homogenisation, rank, norms and sinks, maps to look at",
    Config,
    run,
    figures,
    summary,
    version=2,
    uses=uses,
)

if __name__ == "__main__":
    main(ANALYSIS)
