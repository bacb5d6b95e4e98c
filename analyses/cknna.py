"""Layer-wise alignment of a model's visual tokens with vision foundation models (docs/paper.md, A2).

    python -m analyses.cknna --model runs/baseline runs/viral --vfm dinov2-small --data shapes:val --limit 200 --k 10
    --output_dir runs python -m analyses.cknna --model runs/baseline runs/viral --vfm dinov2-small --vfm_layers 3 6 9 12
    --metric cka --output_dir runs

Images of several rasters (tiles, a thumbnail) count as the mean over their rasters; `n` is then the median number of
tokens of a raster.

What the number is: by default CKNNA, 1 where the visual tokens of layer l and the VFM's patches have the same
neighbourhoods; `--metric` takes any of workbench/metrics (unbiased CKA, mutual kNN, SVCCA, RSA). `--vfm_layers`
compares with blocks of the VFM (layer m is the output of block m, before a norm) instead of its own output. What it is
not: a measure of what the model uses; and several of the metrics are never 0 by chance, so each score carries its
permutation null. Scores with another metric, n, k or pooling may not share an axis without their nulls.

Two models are compared in pairs: image by image with pooling `within`, otherwise in the same random halves of the
images. The interval and p are over images, of these very models; they say nothing about other training seeds. p_holm
corrects for all layers (and layers of the VFM) of a pair.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from torch import Tensor

from workbench import figures as fig
from workbench.analysis.chunks import Chunk, Part
from workbench.analysis.command import main
from workbench.analysis.declaration import Analysis, Context, DataOptions, Result
from workbench.capture.hidden_states import check_layers
from workbench.data import Sample
from workbench.data.folder import QUESTION
from workbench.errors import ConfigError, DataError
from workbench.metrics import METRICS, Metric
from workbench.metrics.alignment import MIN_ROWS
from workbench.runs import Run
from workbench.spatial.vfm_patches import layers_under
from workbench.spatial.within_image import GridFeatures, Scores, Within, read_by_grid
from workbench.stats import (
    Paired,
    half_splits,
    holm,
    null_of,
    null_scores,
    paired_columns,
    permutations,
    split_half_ci,
    split_half_test,
)
from workbench.vfm import VFM, find_vfm, load_vfm

PAGE = "Alignment"
SPLITS = 20  # of the images into halves, for the interval of a score that is not a mean over images


@dataclass(frozen=True)
class Config(DataOptions):
    """What to compare with, and how."""

    vfm: tuple[str, ...] = ("dinov2-small",)
    """Vision foundation models."""
    vfm_layers: tuple[int, ...] = ()
    """Layers of each VFM, 1 to its depth; its own output by default."""
    layers: tuple[int, ...] = ()
    """Layers of the model, 0 to L; all by default."""
    metric: Literal["cknna", "cka", "mutual_knn", "svcca", "rsa"] = "cknna"
    """How alike."""
    k: int = 10
    """Neighbours, for cknna and mutual_knn."""
    dim: int = 10
    """Principal components, for svcca."""
    pooling: Literal["within", "tokens", "pooled"] = "within"
    """within: tokens of one image, mean over images; tokens: sampled tokens of all images; pooled: one mean token per
    image."""
    tokens_per_image: int = 16
    """With pooling `tokens`: tokens sampled from each image."""
    null: int = 100
    """Permutations for the null."""

    def __post_init__(self) -> None:
        for name, least in (("k", 1), ("dim", 1), ("tokens_per_image", 1), ("null", 10), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}: expected at least {least}")
        if not self.vfm:
            raise ConfigError("no VFM given: expected --vfm NAME ...")

    @property
    def option(self) -> int:
        """Value of the metric's own option, 0 where it has none."""
        own = METRICS.get(self.metric).option
        return int(getattr(self, own)) if own else 0


@dataclass(frozen=True)
class Target:
    """What the model is compared with: a VFM's own output, or one of its layers."""

    vfm: str
    layer: int | None

    @property
    def label(self) -> str:
        return self.vfm if self.layer is None else f"{self.vfm} L{self.layer}"


class Together:
    """Tokens of all images are compared with one another: a sample of each image's, or their mean."""

    def __init__(self, config: Config, metric: Metric) -> None:
        self.config, self.metric = config, metric
        self.hidden: list[list[Tensor]] = []  # of each image, by layer
        self.patches: list[list[Tensor]] = []
        self.rasters = 0

    def add(self, hidden: Sequence[GridFeatures], patches: Sequence[GridFeatures], first: int) -> None:
        """Take a batch of images, whose first is number `first`: a representation for each layer, and for each target;
        only what is compared is kept."""
        for image, rasters in enumerate(hidden[0]):
            rng = np.random.default_rng([self.config.seed, first + image])
            chosen = torch.from_numpy(rng.permutation(sum(map(len, rasters)))[: self.config.tokens_per_image])
            for kept, sides in ((self.hidden, hidden), (self.patches, patches)):
                tokens = [torch.cat(list(side[image])) for side in sides]
                kept.append(
                    [
                        own.mean(dim=0, keepdim=True) if self.config.pooling == "pooled" else own[chosen]
                        for own in tokens
                    ]
                )
            self.rasters += len(rasters)

    def part(self) -> Part:
        """Its state: tokens of all images one after another, by layer and by target."""
        sides = {"hidden": self.hidden, "patches": self.patches}
        tensors = {
            f"{name}_{n}": torch.cat([image[n] for image in side])
            for name, side in sides.items()
            for n in range(len(side[0]))
        }
        return Part(
            tensors=tensors, record={"tokens": [len(image[0]) for image in self.hidden], "rasters": self.rasters}
        )

    def take(self, part: Part) -> None:
        """Add the state of another one, of the images that follow."""
        for name, side in (("hidden", self.hidden), ("patches", self.patches)):
            columns = [
                part.tensors[f"{name}_{n}"].split(part.record["tokens"])
                for n in range(sum(key.startswith(name) for key in part.tensors))
            ]
            side += [list(image) for image in zip(*columns, strict=True)]
        self.rasters += part.record["rasters"]

    def finish(self) -> Scores:
        """Intervals from random halves of the images."""
        n_images = len(self.hidden)
        halves = [
            [(split == side).nonzero()[0] for side in (1, 0)]
            for split in half_splits(n_images, splits=SPLITS, seed=self.config.seed)
        ]
        self._check(min(sum(len(self.hidden[i][0]) for i in half) for split in halves for half in split), n_images)
        n = sum(len(tokens[0]) for tokens in self.hidden)
        scores, nulls = self._scores(range(n_images), permutations(n, self.config.null, (self.config.seed,)))
        parts = np.stack([np.subtract(*(self._scores(half)[0] for half in split)) for split in halves])
        intervals = [
            [split_half_ci(float(v), parts[:, row, column], n_images) for column, v in enumerate(line)]
            for row, line in enumerate(scores)
        ]
        return Scores(intervals, nulls, n, self.rasters, parts)

    def _check(self, smallest: int, n_images: int) -> None:
        """Raise unless there are enough rows in half of the images."""
        option, least = self.metric.option, max(self.config.option + 1, MIN_ROWS)
        if smallest < least:
            given = f"{option} is {self.config.option} with {n_images} images" if option else f"{n_images} images"
            raise DataError(
                f"{given}: the interval compares the {smallest} tokens of half of the images; expected at least {least}"
            )

    def _scores(self, images: Iterable[int], orders: Tensor | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Scores (layer, target) of these images, and with `orders` their nulls (draw, layer, target)."""
        images = list(images)
        n, layers = sum(len(self.hidden[i][0]) for i in images), len(self.hidden[0])

        def prepared(side: list[list[Tensor]], number: int) -> object:
            return self.metric.prepare(
                torch.cat([side[i][number] for i in images]),
                self.config.option,
                "the tokens of all images",
                int(side is self.patches),
            )

        scores = np.zeros((layers, len(self.patches[0])))
        nulls = np.zeros((0 if orders is None else len(orders), *scores.shape))
        step = self.metric.max_batch(n, 1)
        for start in range(0, layers, step):
            block = range(start, min(start + step, layers))
            xs = [prepared(self.hidden, layer) for layer in block]
            for target in range(scores.shape[1]):
                y = prepared(self.patches, target)
                scores[block, target] = [float(self.metric.score(x, y)) for x in xs]
                if orders is not None:
                    nulls[:, block, target] = null_scores(self.metric, xs, y, orders)
        return scores, nulls


def run(config: Config, context: Context) -> Result:
    """Score every layer against every VFM, or every chosen layer of it."""
    layers, metric = check_layers(context.mllm, config.layers), METRICS.get(config.metric)
    vfms = {name: load_vfm(name) for name in dict.fromkeys(config.vfm)}
    for vfm in vfms.values():
        vfm.check_layers(config.vfm_layers)
    targets = [Target(name, layer) for name in vfms for layer in dict.fromkeys(config.vfm_layers or (None,))]
    samples = [scene[0] for scene in context.data.scenes]
    parts = context.map(
        "visual tokens and VFMs",
        samples,
        partial(_part, config, context, layers, vfms),
        keep=config.pooling == "within",
    )
    collector = (
        Within(metric, config.option, null=config.null, seed=config.seed)
        if config.pooling == "within"
        else Together(config, metric)
    )
    for part in parts:
        if isinstance(collector, Within):
            collector.take(part.tensors, part.record)
        else:
            collector.take(part)
    found = collector.finish()
    image_ids, left_out = [sample.image_id for sample in samples], list[str]()
    if isinstance(collector, Within):
        image_ids, left_out = (
            [image_ids[n] for n in collector.scored],
            collector.sentences([sample.source for sample in samples]),
        )
    knobs = {"k": config.k if metric.option == "k" else None, "dim": config.dim if metric.option == "dim" else None}
    rows, each = [], []
    names = image_ids if config.pooling == "within" else range(len(found.parts))
    for row, layer in enumerate(layers):
        for column, target in enumerate(targets):
            interval = found.intervals[row][column]
            named = {"layer": layer, "vfm": target.vfm, "vfm_layer": target.layer, "target": target.label}
            null = null_of(interval.estimate, found.nulls[:, row, column])
            rows.append(
                {
                    **named,
                    **{"metric": config.metric, "score": interval.estimate, "low": interval.low, "high": interval.high},
                    **{"null_mean": null.mean, "null_q95": null.q95, "p": null.p, "n_images": len(image_ids)},
                    **{"n": found.n, "rasters": found.n_grids, **knobs, "pooling": config.pooling, "seed": config.seed},
                }
            )
            each += [
                named | {"part": str(name), "score": score}
                for name, score in zip(names, found.parts[:, row, column].tolist(), strict=True)
            ]
    whole = {"vfm_layer": "Int64", "k": "Int64", "dim": "Int64"}  # numbers that can be absent
    scores, table = pd.DataFrame(rows).astype(whole), pd.DataFrame(each).astype({"vfm_layer": "Int64"})
    named_parts = (
        {"per_image": table.rename(columns={"part": "image_id"})} if config.pooling == "within" else {"halves": table}
    )
    record = {
        "vfm_fingerprints": {name: vfm.fingerprint for name, vfm in vfms.items()},
        "vfms": [vfm.record() for vfm in vfms.values()],
    }
    return Result({"scores": scores, **named_parts}, record=record, left_out=left_out)


def _part(config: Config, context: Context, layers: list[int], vfms: Mapping[str, VFM], chunk: Chunk[Sample]) -> Part:
    """The visual tokens of a chunk by layer against the VFMs' patches on each raster's own grid."""
    metric = METRICS.get(config.metric)
    within = Within(metric, config.option, null=config.null, seed=config.seed, first=chunk.start)
    together = Together(config, metric)
    for first, samples in chunk.batches():
        images = [s.image for s in samples]
        batch = context.mllm.encode(images, [s.question or QUESTION for s in samples])
        places = context.mllm.token_grids(batch)
        targets = [rasters for vfm in vfms.values() for rasters in layers_under(vfm, config.vfm_layers, images, places)]
        hidden = read_by_grid(context.mllm, batch, places, layers)
        if config.pooling == "within":
            within.add(hidden, targets)
        else:
            together.add(hidden, targets, first)
    return Part(tensors=within.tensors(), record=within.record()) if config.pooling == "within" else together.part()


def differences(found: Mapping[str, Run]) -> pd.DataFrame:
    """Every model minus the first, for each layer and target, with interval, p and Holm's p over all cells of a VFM;
    empty where nothing can be paired.

    Runs are paired where they were asked the same question of the same images; runs stored before version 2 are paired
    by image only.
    """
    first, *others = found
    rows: list[pd.DataFrame] = []
    for name in others:
        pair = [found[first], found[name]]
        if _question(pair[0]) != _question(pair[1]):
            continue
        tables = [_parts(run) for run in pair]
        if any(table is None for table in tables):
            continue
        both = pd.merge(*tables, on=["target", "layer", "part"], suffixes=("_a", "_b"))
        scores = [_scores(run).set_index(["target", "layer"]) for run in pair]
        for vfm, own in scores[0].groupby("vfm", sort=False):
            part = both[both["vfm_a"] == vfm]
            cells = [cell for cell in own.index if cell in set(zip(part["target"], part["layer"], strict=True))]
            if not cells:
                continue
            tests = _tests(part.assign(score=part["score_b"] - part["score_a"]), cells, [s.loc[cells] for s in scores])
            table = (
                own.loc[cells, ["vfm", "vfm_layer", "metric", "pooling"]]
                .reset_index()
                .assign(model=name, against=first)
            )
            table["score"], table["low"], table["high"] = (
                [getattr(t, f) for t in tests] for f in ("difference", "low", "high")
            )
            table["p"], table["p_holm"], table["n_images"] = (
                [t.p for t in tests],
                holm([t.p for t in tests]),
                [t.n for t in tests],
            )
            rows.append(table)
    columns = [
        "model",
        "against",
        "metric",
        "vfm",
        "vfm_layer",
        "target",
        "layer",
        "score",
        "low",
        "high",
        "p",
        "p_holm",
        "n_images",
    ]
    return pd.concat(rows, ignore_index=True)[columns] if rows else pd.DataFrame(columns=columns)


def _tests(changes: pd.DataFrame, cells: list[tuple[str, int]], scores: list[pd.DataFrame]) -> list[Paired]:
    """The paired test of each cell (target, layer): over images, or over the same halves of the images."""
    wide = changes.pivot(index="part", columns=["target", "layer"], values="score")[cells].to_numpy()
    if scores[0]["pooling"].iloc[0] == "within":
        # so that the smallest p stays below .05 when it is corrected for all cells
        flips = max(10_000, 40 * len(cells))
        return paired_columns(wide, n=flips, seed=int(scores[0]["seed"].iloc[0]))
    whole = (scores[1]["score"] - scores[0]["score"]).to_numpy()
    n_images = int(scores[0]["n_images"].iloc[0])
    return [split_half_test(float(value), column, n_images) for value, column in zip(whole, wide.T, strict=True)]


def _question(run: Run) -> tuple[object, ...]:
    """What must be the same for two scores to be subtracted."""
    row = _scores(run).iloc[0]
    return (
        run.record["data_fingerprint"],
        run.record["config"]["tokens_per_image"],
        *(str(row[c]) for c in ("metric", "k", "dim", "pooling", "n", "seed")),
    )


def _scores(run: Run) -> pd.DataFrame:
    """The scores of a run; one stored before version 2 is CKNNA with the VFM's own output."""
    table = run.tables["scores"]
    if "metric" not in table:
        table = table.assign(
            metric="cknna", target=table["vfm"], vfm_layer=pd.array([None] * len(table), dtype="Int64"), dim=None
        )
    return table


def _parts(run: Run) -> pd.DataFrame | None:
    """What two runs are paired by: scores of single images, or differences of halves, which a run stored before version
    3 does not have."""
    if _scores(run)["pooling"].iloc[0] != "within":
        return run.tables.get("halves")
    table = run.tables["per_image"].rename(columns={"image_id": "part"})
    return table if "target" in table else table.assign(target=table["vfm"])


def summary(found: Mapping[str, Run]) -> pd.DataFrame:
    """One row per model, VFM, its layer and the model's layer."""
    table = pd.concat([_scores(run).assign(model=label) for label, run in found.items()], ignore_index=True)
    columns = [
        "model",
        "metric",
        "vfm",
        "vfm_layer",
        "layer",
        "score",
        "low",
        "high",
        "null_mean",
        "null_q95",
        "p",
        "n_images",
        "n",
        "k",
        "dim",
        "pooling",
    ]
    empty = [column for column in ("vfm_layer", "k", "dim") if table[column].isna().all()]
    return table[columns].drop(columns=empty)


def figures(found: Mapping[str, Run]) -> dict[str, go.Figure]:
    """Layer curves over their null band, or maps of layers against layers of a VFM; then what changes from the first
    model to the others."""
    tables = {label: _scores(run) for label, run in found.items()}
    drawn: dict[str, go.Figure] = {}
    for metric in dict.fromkeys(table["metric"].iloc[0] for table in tables.values()):
        own = {label: run for label, run in found.items() if tables[label]["metric"].iloc[0] == metric}
        scores = pd.concat([tables[label].assign(model=label) for label in own], ignore_index=True)
        changes, name = differences(own), METRICS.get(metric).label
        several = "" if len(own) == len(found) else f", {name}"
        layered = scores["vfm_layer"].notna()
        if not layered.all():
            drawn[f"Alignment by layer{several}"] = fig.layer_curves(scores[~layered], y=name, kind="target")
        curves, cells = changes[changes["vfm_layer"].isna()], changes[changes["vfm_layer"].notna()]
        if len(curves):
            drawn[f"Difference by layer{several}"] = fig.difference_curves(
                curves, y=f"{name}, minus {curves['against'].iloc[0]}", kind="target"
            )
        if layered.any():
            drawn[f"Alignment by layer and layer of the VFM{several}"] = fig.matrix_maps(scores[layered], title=name)
        if len(cells):
            title = f"{name}, minus {cells['against'].iloc[0]}"
            drawn[f"Difference by layer and layer of the VFM{several}"] = fig.matrix_maps(
                cells, title=title, difference=True
            )
    return drawn


def uses(config: Config) -> dict[str, str]:
    """The identity of every VFM: another copy of its weights is another question."""
    return {f"vfm {name}": find_vfm(name).identity() for name in config.vfm}


TITLE = "Layer-wise alignment with vision foundation models (CKNNA and other metrics)"
# 3: neighbours by float64, ties at random, intervals that cover what they say
ANALYSIS = Analysis("cknna", TITLE, Config, run, figures, summary, PAGE, version=3, uses=uses)

if __name__ == "__main__":
    main(ANALYSIS)
