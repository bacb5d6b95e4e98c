"""Measure which attention heads are aligned with a vision foundation model (VFM): a map of layer by head.

    python -m analyses.heads --model runs/baseline runs/viral --vfm dinov2-small --data shapes:val --limit 100 --k 10

The score of a head is the mutual kNN of its outputs at the visual tokens (the part of o_proj's input that comes from
it) with the VFM's patches under these tokens: the share of a token's k nearest neighbors that are the same on both
sides, within an image, mean over its tokens and over images. There is one score for each query head, also where several
query heads share their keys and values. The least aligned heads are those that `alignment.where: heads` trains.

What the number is not: a measure of what a head does for the answer, or of where it looks (see `attention`). Chance is
about k / (n - 1) with n tokens; each score has its permutation null, and scores with another k or n may not be
compared. Heads of one model are measured on the same images. A head without any output, as pruning leaves it, has no
score, and is named.

Two models are compared in pairs, image by image. Interval and p are over images, for these very models; they say
nothing about other training seeds. p_holm corrects over all heads of a pair and VFM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import pandas as pd
import plotly.graph_objects as go
from annotated_types import Ge

from workbench import figures as fig
from workbench.analysis.chunks import Chunk, Part
from workbench.analysis.command import main
from workbench.analysis.declaration import Analysis, Context, DataOptions, Result, vfm_inputs
from workbench.attention_heads import Head, attention_heads
from workbench.capture.heads import read_heads
from workbench.capture.hidden_states import check_layers
from workbench.data import Sample
from workbench.data.folder import QUESTION
from workbench.errors import ConfigError, ModelError
from workbench.metrics import METRICS
from workbench.mllm import MLLM
from workbench.runs import Run
from workbench.spatial.vfm_patches import patches_under
from workbench.spatial.within_image import Scores, Within
from workbench.stats import null_of, paired_differences
from workbench.vfm import VFM, load_vfm

NAME = "mutual kNN"


@dataclass(frozen=True)
class Config(DataOptions):
    """Which attention heads to compare with which VFMs."""

    limit: Annotated[int, Ge(1)] = 100
    """Number of images."""
    vfm: tuple[str, ...] = ("dinov2-small",)
    """Vision foundation models to compare with."""
    layers: tuple[int, ...] = ()
    """Layers of the model, 1 to L, whose heads are measured; all by default."""
    k: Annotated[int, Ge(1)] = 10
    """Nearest neighbors."""
    null: Annotated[int, Ge(10)] = 100
    """Permutations for the null."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.vfm:
            raise ConfigError("no VFM given: name at least one with --vfm NAME ...")


def run(config: Config, context: Context) -> Result:
    """Score every attention head of the chosen layers against every VFM."""
    samples = [scene[0] for scene in context.data.scenes]
    every = attention_heads(context.mllm.model, check_layers(context.mllm, config.layers, first=1))
    heads = _with_output(context.mllm, every, samples[0])
    vfms = {name: load_vfm(name) for name in dict.fromkeys(config.vfm)}
    parts = context.map("attention heads and VFMs", samples, partial(_score_chunk, config, context, heads, vfms))
    within = Within(METRICS.get("mutual_knn"), config.k, null=config.null, seed=config.seed)
    for part in parts:
        within.take(part.tensors, part.record)
    results, left_out = within.finish(), within.sentences([sample.image_name for sample in samples])
    if silent := [f"{layer}.{head}" for layer, head in every if (layer, head) not in heads]:
        left_out = [f"{len(silent)} of {len(every)} heads have no output (layer.head {', '.join(silent)})", *left_out]
    images = [samples[n].image_id for n in within.scored]
    return Result(
        _tables(config, heads, list(vfms), results, images),
        record={"vfm_fingerprints": {name: vfm.fingerprint for name, vfm in vfms.items()}},
        left_out=left_out,
    )


def _with_output(mllm: MLLM, heads: list[Head], sample: Sample) -> list[Head]:
    """Return the heads whose outputs at the visual tokens of an image are not all zero.

    Raises:
        ModelError: there is none.
    """
    batch = mllm.encode([sample.image], [sample.question or QUESTION])
    outputs = read_heads(mllm, batch, mllm.token_grids(batch), heads)
    kept = [head for head, (grids,) in zip(heads, outputs, strict=True) if any(bool(grid.any()) for grid in grids)]
    if not kept:
        raise ModelError(f"none of the {len(heads)} attention heads has any output: expected a trained model")
    return kept


def _score_chunk(
    config: Config, context: Context, heads: list[Head], vfms: Mapping[str, VFM], chunk: Chunk[Sample]
) -> Part:
    """Score the heads on the images of a chunk."""
    within = Within(METRICS.get("mutual_knn"), config.k, null=config.null, seed=config.seed, first=chunk.start)
    for _, samples in chunk.batches():
        images = [sample.image for sample in samples]
        batch = context.mllm.encode(images, [sample.question or QUESTION for sample in samples])
        grids = context.mllm.token_grids(batch)
        patches = [patches_under(vfm, images, grids) for vfm in vfms.values()]
        within.add(read_heads(context.mllm, batch, grids, heads), patches)
    return Part(tensors=within.tensors(), record=within.record())


def _tables(
    config: Config, heads: list[Head], vfms: list[str], results: Scores, images: list[str]
) -> dict[str, pd.DataFrame]:
    """Return the score of each head and VFM, and the scores of the single images by which two models are paired."""
    rows, parts = [], []
    for row, (layer, head) in enumerate(heads):
        for column, vfm in enumerate(vfms):
            interval = results.intervals[row][column]
            null = null_of(interval.estimate, results.nulls[:, row, column])
            place = {"vfm": vfm, "layer": layer, "head": head}
            scores = {"score": interval.estimate, "low": interval.low, "high": interval.high}
            chance = {"chance": config.k / (results.n - 1), "null_mean": null.mean, "null_q95": null.q95, "p": null.p}
            counts = {"n_images": len(images), "n": results.n, "k": config.k, "seed": config.seed}
            rows.append(place | scores | chance | counts)
            values = results.parts[:, row, column].tolist()
            parts += [place | {"image_id": name, "value": value} for name, value in zip(images, values, strict=True)]
    return {"scores": pd.DataFrame(rows), "per_image": pd.DataFrame(parts)}


def summary(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Return the least and the most aligned head of each layer, for each model and VFM."""
    table = pd.concat([run.tables["scores"].assign(model=label) for label, run in runs.items()], ignore_index=True)
    by_layer = table.groupby(["model", "vfm", "layer"], sort=False)["score"]
    rows = table.loc[[index for both in zip(by_layer.idxmin(), by_layer.idxmax(), strict=True) for index in both]]
    columns = ["model", "vfm", "layer", "head", "score", "low", "high", "null_mean", "null_q95", "p"]
    return rows[[*columns, "n_images", "n", "k"]].drop_duplicates()


def differences(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Subtract the first model from every other, head by head, over the images that both were measured on.

    Models that were measured with another k or number of tokens, other VFM weights, or on other data, are left out.
    """
    first = next(iter(runs.values()))
    comparable = {label: run for label, run in runs.items() if _question(run) == _question(first)}
    tables = {label: run.tables["per_image"] for label, run in comparable.items()}
    return paired_differences(tables, by=("vfm", "layer", "head"), within=("vfm",), seed=int(first.record["seed"]))


def _question(run: Run) -> tuple[object, ...]:
    row = run.tables["scores"].iloc[0]
    return run.record["data_fingerprint"], row["k"], row["n"], str(run.extra.get("vfm_fingerprints"))


def figures(runs: Mapping[str, Run]) -> dict[str, go.Figure]:
    """Draw a map of layer by head for each model, and for each difference from the first model."""
    scores = pd.concat([run.tables["scores"].assign(model=label) for label, run in runs.items()], ignore_index=True)
    changes, drawn = differences(runs), {}
    for vfm, table in scores.groupby("vfm", sort=False):
        title = f"{NAME} (chance {table['chance'].mean():.3f})"
        drawn[f"Attention heads and {vfm}"] = fig.head_maps(table, title=title)
        part = changes[changes["vfm"] == vfm]
        if len(part):
            title = f"{NAME}, minus {part['against'].iloc[0]}"
            drawn[f"Attention heads and {vfm}: difference"] = fig.head_maps(part, title=title, difference=True)
    return drawn


TITLE = "Attention heads and vision foundation models (mutual kNN by layer and head)"
ANALYSIS = Analysis("heads", TITLE, Config, run, figures, summary, uses=vfm_inputs)

if __name__ == "__main__":
    main(ANALYSIS)
