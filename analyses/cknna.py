"""Measure how well visual tokens align with vision foundation models, layer by layer (docs/paper.md, A2 and A8).

    python -m analyses.cknna --model runs/baseline runs/viral --vfm dinov2-small --data shapes:val --limit 200 --k 10
    python -m analyses.cknna --model runs/baseline runs/viral --vfm dinov2-small --vfm_layers 3 6 9 12 --metric cka

The default metric is CKNNA: 1 where the visual tokens of layer l and the VFM's patches have the same neighborhoods.
`--metric` takes any metric of workbench/metrics: unbiased CKA, mutual kNN, SVCCA, RSA. The VFM is represented by its
own output, or with `--vfm_layers` by its blocks; layer m is the output of block m, before a norm. An image of several
patch grids (tiles, a thumbnail) counts as the mean over its grids; `n` is then the median number of tokens of a grid.

What the number is not: a measure of what the model uses. Several of the metrics are never 0 by chance, so each score
comes with its permutation null, and scores with another metric, n, k or pooling may not share an axis without their
nulls.

Two models are compared in pairs: image by image with pooling `within`, otherwise in the same random halves of the
images. The interval and p are over images, for these very models; they say nothing about other training seeds. p_holm
corrects over all layers (and layers of the VFM) of a pair.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from annotated_types import Ge
from torch import Tensor

from workbench import figures as fig
from workbench.analysis.chunks import Chunk, Part
from workbench.analysis.command import main
from workbench.analysis.declaration import Analysis, Context, DataOptions, Result, vfm_inputs
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
from workbench.vfm import VFM, load_vfm

PAGE = "Alignment"
SPLITS = 20  # random splits of the images into halves, for the interval of a score that is not a mean over images


@dataclass(frozen=True)
class Config(DataOptions):
    """What to compare the visual tokens with, and how."""

    vfm: tuple[str, ...] = ("dinov2-small",)
    """Vision foundation models to compare with."""
    vfm_layers: tuple[int, ...] = ()
    """Layers of each VFM, 1 to its depth; by default its own output."""
    layers: tuple[int, ...] = ()
    """Layers of the model, 0 to L; all by default."""
    metric: Literal["cknna", "cka", "mutual_knn", "svcca", "rsa"] = "cknna"
    """Metric of alignment."""
    k: Annotated[int, Ge(1)] = 10
    """Nearest neighbors, for cknna and mutual_knn."""
    dim: Annotated[int, Ge(1)] = 10
    """Principal components, for svcca."""
    pooling: Literal["within", "tokens", "pooled"] = "within"
    """within: tokens of one image, mean over images; tokens: sampled tokens of all images; pooled: one mean token per
    image."""
    tokens_per_image: Annotated[int, Ge(1)] = 16
    """Tokens sampled from each image, with pooling `tokens`."""
    null: Annotated[int, Ge(10)] = 100
    """Permutations for the null."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.vfm:
            raise ConfigError("no VFM given: name at least one with --vfm NAME ...")

    @property
    def option(self) -> int:
        """Value of the metric's option (`k` or `dim`), 0 where it has none."""
        name = METRICS.get(self.metric).option
        return int(getattr(self, name)) if name else 0


@dataclass(frozen=True)
class Target:
    """What the model is compared with: a VFM's own output (`layer` None), or one of its layers."""

    vfm: str
    layer: int | None

    @property
    def label(self) -> str:
        return self.vfm if self.layer is None else f"{self.vfm} L{self.layer}"


class AcrossImages:
    """Compares tokens of all images with one another: sampled tokens of each image, or their mean.

    Only the tokens that are compared are kept.
    """

    def __init__(self, config: Config, metric: Metric) -> None:
        self.config, self.metric = config, metric
        self.hidden: list[list[Tensor]] = []  # [image][layer]
        self.patches: list[list[Tensor]] = []  # [image][target]
        self.grids = 0

    def add(self, hidden: Sequence[GridFeatures], patches: Sequence[GridFeatures], first: int) -> None:
        """Add a batch of images.

        Args:
            hidden: the visual tokens in each layer.
            patches: the patches of each target.
            first: number of the first image of the batch, among all.
        """
        for image, grids in enumerate(hidden[0]):
            rng = np.random.default_rng([self.config.seed, first + image])
            chosen = torch.from_numpy(rng.permutation(sum(map(len, grids)))[: self.config.tokens_per_image])
            for kept, representations in ((self.hidden, hidden), (self.patches, patches)):
                all_tokens = [torch.cat(list(representation[image])) for representation in representations]
                if self.config.pooling == "pooled":
                    kept.append([tokens.mean(dim=0, keepdim=True) for tokens in all_tokens])
                else:
                    kept.append([tokens[chosen] for tokens in all_tokens])
            self.grids += len(grids)

    def part(self) -> Part:
        """Return all tokens to store, by layer and by target, one image after another."""
        sides = {"hidden": self.hidden, "patches": self.patches}
        tensors = {
            f"{name}_{n}": torch.cat([image[n] for image in side])
            for name, side in sides.items()
            for n in range(len(side[0]))
        }
        return Part(tensors=tensors, record={"tokens": [len(image[0]) for image in self.hidden], "rasters": self.grids})

    def take(self, part: Part) -> None:
        """Add the stored tokens of the images that follow."""
        for name, side in (("hidden", self.hidden), ("patches", self.patches)):
            columns = [
                part.tensors[f"{name}_{n}"].split(part.record["tokens"])
                for n in range(sum(key.startswith(name) for key in part.tensors))
            ]
            side += [list(image) for image in zip(*columns, strict=True)]
        self.grids += part.record["rasters"]

    def finish(self) -> Scores:
        """Return the scores, with intervals from random halves of the images.

        Raises:
            DataError: half of the images have too few tokens for the metric.
        """
        n_images = len(self.hidden)
        splits = [
            [(split == side).nonzero()[0] for side in (1, 0)]
            for split in half_splits(n_images, splits=SPLITS, seed=self.config.seed)
        ]
        self._check(min(sum(len(self.hidden[i][0]) for i in half) for halves in splits for half in halves), n_images)
        n = sum(len(tokens[0]) for tokens in self.hidden)
        scores, nulls = self._scores(range(n_images), permutations(n, self.config.null, (self.config.seed,)))
        gaps = np.stack([np.subtract(*(self._scores(half)[0] for half in halves)) for halves in splits])
        intervals = [
            [split_half_ci(float(score), gaps[:, row, column], n_images) for column, score in enumerate(by_target)]
            for row, by_target in enumerate(scores)
        ]
        return Scores(intervals, nulls, n, self.grids, gaps)

    def _check(self, smallest: int, n_images: int) -> None:
        """Raise a DataError if half of the images have too few tokens, `smallest`, for the metric."""
        option, least = self.metric.option, max(self.config.option + 1, MIN_ROWS)
        if smallest < least:
            given = f"{option} is {self.config.option} with {n_images} images" if option else f"{n_images} images"
            raise DataError(
                f"{given}: half of the images have {smallest} tokens together, expected at least {least}; raise --limit"
            )

    def _scores(self, images: Iterable[int], orders: Tensor | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return scores (layer, target) of these images, and with `orders` their nulls (draw, layer, target)."""
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
    """Score every layer of the model against every VFM, or against every chosen layer of it."""
    layers, metric = check_layers(context.mllm, config.layers), METRICS.get(config.metric)
    vfms = {name: load_vfm(name) for name in dict.fromkeys(config.vfm)}
    for vfm in vfms.values():
        vfm.check_layers(config.vfm_layers)
    targets = [Target(name, layer) for name in vfms for layer in dict.fromkeys(config.vfm_layers or (None,))]
    samples = [scene[0] for scene in context.data.scenes]
    parts = context.map(
        "visual tokens and VFMs",
        samples,
        partial(_compare_chunk, config, context, layers, vfms),
        keep=config.pooling == "within",
    )
    image_ids, left_out = [sample.image_id for sample in samples], list[str]()
    if config.pooling == "within":
        within = Within(metric, config.option, null=config.null, seed=config.seed)
        for part in parts:
            within.take(part.tensors, part.record)
        results = within.finish()
        image_ids = [image_ids[n] for n in within.scored]
        left_out = within.sentences([sample.source for sample in samples])
    else:
        across = AcrossImages(config, metric)
        for part in parts:
            across.take(part)
        results = across.finish()
    record = {
        "vfm_fingerprints": {name: vfm.fingerprint for name, vfm in vfms.items()},
        "vfms": [vfm.record() for vfm in vfms.values()],
    }
    return Result(_tables(config, layers, targets, results, image_ids), record=record, left_out=left_out)


def _tables(
    config: Config, layers: list[int], targets: list[Target], results: Scores, image_ids: list[str]
) -> dict[str, pd.DataFrame]:
    """Return the scores, and the values by which two models are paired: of each image, or of each split into halves."""
    metric = METRICS.get(config.metric)
    options = {"k": config.k if metric.option == "k" else None, "dim": config.dim if metric.option == "dim" else None}
    names = image_ids if config.pooling == "within" else range(len(results.parts))
    score_rows, part_rows = [], []
    for row, layer in enumerate(layers):
        for column, target in enumerate(targets):
            interval = results.intervals[row][column]
            pair = {"layer": layer, "vfm": target.vfm, "vfm_layer": target.layer, "target": target.label}
            null = null_of(interval.estimate, results.nulls[:, row, column])
            score_rows.append(
                {
                    **pair,
                    "metric": config.metric,
                    "score": interval.estimate,
                    "low": interval.low,
                    "high": interval.high,
                    "null_mean": null.mean,
                    "null_q95": null.q95,
                    "p": null.p,
                    "n_images": len(image_ids),
                    "n": results.n,
                    "rasters": results.n_grids,
                    **options,
                    "pooling": config.pooling,
                    "seed": config.seed,
                }
            )
            part_rows += [
                pair | {"part": str(name), "score": score}
                for name, score in zip(names, results.parts[:, row, column].tolist(), strict=True)
            ]
    nullable = {"vfm_layer": "Int64", "k": "Int64", "dim": "Int64"}  # integers that can be absent
    scores, by_part = pd.DataFrame(score_rows).astype(nullable), pd.DataFrame(part_rows).astype({"vfm_layer": "Int64"})
    if config.pooling == "within":
        return {"scores": scores, "per_image": by_part.rename(columns={"part": "image_id"})}
    return {"scores": scores, "halves": by_part}


def _compare_chunk(
    config: Config, context: Context, layers: list[int], vfms: Mapping[str, VFM], chunk: Chunk[Sample]
) -> Part:
    """Read the visual tokens of a chunk in each layer and the VFMs' patches under them, and score or collect them.

    With pooling `within` each image is scored here; otherwise its tokens are stored, to be compared with those of all
    other images.
    """
    metric = METRICS.get(config.metric)
    within = Within(metric, config.option, null=config.null, seed=config.seed, first=chunk.start)
    across = AcrossImages(config, metric)
    for first, samples in chunk.batches():
        images = [sample.image for sample in samples]
        batch = context.mllm.encode(images, [sample.question or QUESTION for sample in samples])
        grids = context.mllm.token_grids(batch)
        patches = [target for vfm in vfms.values() for target in layers_under(vfm, config.vfm_layers, images, grids)]
        hidden = read_by_grid(context.mllm, batch, grids, layers)
        if config.pooling == "within":
            within.add(hidden, patches)
        else:
            across.add(hidden, patches, first)
    return Part(tensors=within.tensors(), record=within.record()) if config.pooling == "within" else across.part()


def differences(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Subtract the first model from every other, for each layer and target, with interval, p and Holm's p.

    Holm's p corrects over all layers and targets of a VFM. Only runs that asked the same question about the same images
    are paired, those stored before version 2 by image only; the table is empty where none can be.
    """
    first, *others = runs
    tables: list[pd.DataFrame] = []
    for name in others:
        pair = [runs[first], runs[name]]
        if _question(pair[0]) != _question(pair[1]):
            continue
        parts = [_parts(run) for run in pair]
        if any(table is None for table in parts):
            continue
        paired = pd.merge(*parts, on=["target", "layer", "part"], suffixes=("_a", "_b"))
        scores = [_scores(run).set_index(["target", "layer"]) for run in pair]
        for vfm, of_vfm in scores[0].groupby("vfm", sort=False):
            part = paired[paired["vfm_a"] == vfm]
            shared = set(zip(part["target"], part["layer"], strict=True))
            cells = [cell for cell in of_vfm.index if cell in shared]
            if not cells:
                continue
            tests = _tests(part.assign(score=part["score_b"] - part["score_a"]), cells, [s.loc[cells] for s in scores])
            table = of_vfm.loc[cells, ["vfm", "vfm_layer", "metric", "pooling"]].reset_index()
            p_values = [test.p for test in tests]
            tables.append(
                table.assign(
                    model=name,
                    against=first,
                    score=[test.difference for test in tests],
                    low=[test.low for test in tests],
                    high=[test.high for test in tests],
                    p=p_values,
                    p_holm=holm(p_values),
                    n_images=[test.n for test in tests],
                )
            )
    columns = ["model", "against", "metric", "vfm", "vfm_layer", "target", "layer"]
    columns += ["score", "low", "high", "p", "p_holm", "n_images"]
    return pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)


def _tests(changes: pd.DataFrame, cells: list[tuple[str, int]], scores: list[pd.DataFrame]) -> list[Paired]:
    """Return the paired test of each cell (target, layer), over images or over the same halves of the images.

    Args:
        changes: the second model minus the first, for each part (image or split) and cell.
        scores: of both models, by cell.
    """
    wide = changes.pivot(index="part", columns=["target", "layer"], values="score")[cells].to_numpy()
    if scores[0]["pooling"].iloc[0] == "within":
        # enough flips for the smallest possible p to stay below .05 when it is corrected for all cells
        flips = max(10_000, 40 * len(cells))
        return paired_columns(wide, n=flips, seed=int(scores[0]["seed"].iloc[0]))
    differences_of_scores = (scores[1]["score"] - scores[0]["score"]).to_numpy()
    n_images = int(scores[0]["n_images"].iloc[0])
    return [
        split_half_test(float(difference), gaps, n_images)
        for difference, gaps in zip(differences_of_scores, wide.T, strict=True)
    ]


def _question(run: Run) -> tuple[object, ...]:
    """Return all that must be equal for scores of two runs to be subtracted."""
    row = _scores(run).iloc[0]
    return (
        run.record["data_fingerprint"],
        run.record["config"]["tokens_per_image"],
        *(str(row[column]) for column in ("metric", "k", "dim", "pooling", "n", "seed")),
    )


def _scores(run: Run) -> pd.DataFrame:
    """Return the scores of a run; one stored before version 2 has CKNNA with the VFM's own output only."""
    table = run.tables["scores"]
    if "metric" not in table:
        table = table.assign(
            metric="cknna", target=table["vfm"], vfm_layer=pd.array([None] * len(table), dtype="Int64"), dim=None
        )
    return table


def _parts(run: Run) -> pd.DataFrame | None:
    """Return the values by which two runs are paired: scores of images, or differences between halves of the images.

    Runs stored before version 3 have no halves: None.
    """
    if _scores(run)["pooling"].iloc[0] != "within":
        return run.tables.get("halves")
    table = run.tables["per_image"].rename(columns={"image_id": "part"})
    return table if "target" in table else table.assign(target=table["vfm"])


def summary(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Return one row for each model, VFM, layer of the VFM and layer of the model."""
    table = pd.concat([_scores(run).assign(model=label) for label, run in runs.items()], ignore_index=True)
    columns = ["model", "metric", "vfm", "vfm_layer", "layer", "score", "low", "high", "null_mean", "null_q95", "p"]
    columns += ["n_images", "n", "k", "dim", "pooling"]
    empty = [column for column in ("vfm_layer", "k", "dim") if table[column].isna().all()]
    return table[columns].drop(columns=empty)


def figures(runs: Mapping[str, Run]) -> dict[str, go.Figure]:
    """Draw, for each metric, scores over their null and differences from the first model.

    Scores against the output of a VFM are curves by layer; those against its layers are maps of layer by layer.
    """
    tables = {label: _scores(run) for label, run in runs.items()}
    drawn: dict[str, go.Figure] = {}
    for metric in dict.fromkeys(table["metric"].iloc[0] for table in tables.values()):
        of_metric = {label: run for label, run in runs.items() if tables[label]["metric"].iloc[0] == metric}
        scores = pd.concat([tables[label].assign(model=label) for label in of_metric], ignore_index=True)
        changes, name = differences(of_metric), METRICS.get(metric).label
        suffix = "" if len(of_metric) == len(runs) else f", {name}"
        layered = scores["vfm_layer"].notna()
        if not layered.all():
            drawn[f"Alignment by layer{suffix}"] = fig.layer_curves(scores[~layered], y=name, kind="target")
        curves, maps = changes[changes["vfm_layer"].isna()], changes[changes["vfm_layer"].notna()]
        if len(curves):
            drawn[f"Difference by layer{suffix}"] = fig.difference_curves(
                curves, y=f"{name}, minus {curves['against'].iloc[0]}", kind="target"
            )
        if layered.any():
            drawn[f"Alignment by layer and layer of the VFM{suffix}"] = fig.matrix_maps(scores[layered], title=name)
        if len(maps):
            title = f"{name}, minus {maps['against'].iloc[0]}"
            drawn[f"Difference by layer and layer of the VFM{suffix}"] = fig.matrix_maps(
                maps, title=title, difference=True
            )
    return drawn


TITLE = "Layer-wise alignment with vision foundation models (CKNNA and other metrics)"
# version 3: neighbors in float64, ties broken at random, intervals with their stated coverage
ANALYSIS = Analysis("cknna", TITLE, Config, run, figures, summary, PAGE, version=3, uses=vfm_inputs)

if __name__ == "__main__":
    main(ANALYSIS)
