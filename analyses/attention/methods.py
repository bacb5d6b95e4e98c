"""Compare raw attention with rollout and gradient x attention."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from analyses.attention.measuring import (
    batches,
    coverages,
    image_rows,
    nan_mean,
    object_chance,
    object_scores,
    other_targets,
    visual_index,
)
from analyses.attention.questions import OBJECT_MEASURES, Config, Question
from analyses.attention.tables import score_intervals, summarized
from workbench.analysis.chunks import Chunk, Part, stacked
from workbench.analysis.declaration import Context
from workbench.capture.attention import gradient_attention, rollout
from workbench.metrics import attention as metric
from workbench.mllm.family import Batch
from workbench.spatial.grids import canvas, sum_onto_grid


def compare_methods(
    config: Config,
    context: Context,
    layers: list[int],
    questions: list[Question],
    compared: list[int],
    heads: pd.DataFrame,
) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, Tensor]]:
    """Compare raw attention with rollout and gradient x attention on the samples numbered `compared`.

    Returns:
        Scores by method, values by sample, and the maps of the examples.
    """
    layer, head = int(heads["layer"][0]), int(heads["head"][0])
    methods = [f"raw, L{layer} H{head}", "raw, mean of heads and layers", "rollout", "gradient x attention"]
    compared_questions = [questions[i] for i in compared]
    parts = context.map(
        "rollout and gradients",
        compared_questions,
        partial(_compare_chunk, config, context, layers, questions, compared, (layer, head)),
        depends=(context.data.fingerprint, layer, head),
    )
    values = stacked(parts, "values").numpy()  # (sample, method, measure)
    nulls = nan_mean(stacked(parts, "nulls").numpy(), 0)
    chance = nan_mean(stacked(parts, "chance").numpy(), 0)
    tensors = {name: value for part in parts for name, value in part.tensors.items() if name.startswith("methods_")}
    intervals = score_intervals(
        values, list(OBJECT_MEASURES), [question.sample.image_id for question in compared_questions]
    )
    score_rows, value_rows = [], []
    for number, method in enumerate(methods):
        for m, measure in enumerate(OBJECT_MEASURES):
            n = int((~np.isnan(values[:, number, m])).sum())
            scores = summarized(next(intervals), chance[m], nulls[:, number, m], n, config.seed)
            score_rows.append({"method": method, "measure": measure} | scores)
            value_rows += [
                (question.sample.id, question.sample.image_id, method, measure, value)
                for question, value in zip(compared_questions, values[:, number, m].tolist(), strict=True)
            ]
    by_sample = pd.DataFrame(value_rows, columns=["sample_id", "image_id", "method", "measure", "value"])
    return pd.DataFrame(score_rows), by_sample, tensors


def _compare_chunk(
    config: Config,
    context: Context,
    layers: list[int],
    questions: list[Question],
    compared: list[int],
    best_head: tuple[int, int],
    chunk: Chunk[Question],
) -> Part:
    """Score the maps of every method on a chunk of the samples numbered `compared`, as means over their positions.

    Returns:
        values (sample, method, measure), nulls (sample, draw, method, measure), chance (sample, measure), and the maps
        of the examples.
    """
    values, nulls, chance, tensors = [], [], [], {}
    for start, batch, positions in batches(context, chunk):
        visual = context.mllm.visual_tokens(batch)
        index = [visual_index(tiles) for tiles in visual]
        by_position = [
            _by_method(context, batch, list(rows), layers, best_head, index) for rows in zip(*positions, strict=True)
        ]
        for number, tiles in enumerate(visual, start=start):
            grid, question = canvas(tiles), questions[compared[number]]
            rng = np.random.default_rng([config.seed, compared[number], 1])
            inside = coverages(question.targets, grid)[0]
            others = other_targets(config, questions, compared[number], rng)
            elsewhere = np.stack([coverages(other, grid)[0] for other in others])
            maps = [
                metric.renormalized(sum_onto_grid(methods[number - start].numpy(), tiles, grid))
                for methods in by_position[: len(question.offsets)]
            ]
            values.append(nan_mean(np.stack([np.stack(object_scores(each, inside), axis=-1) for each in maps]), 0))
            nulls.append(nan_mean(np.stack([np.stack(object_scores(each, elsewhere), axis=-1) for each in maps]), 0))
            chance.append(object_chance(inside, config.seed))
            if number < config.examples:
                tensors[f"methods_{number}"] = torch.from_numpy(nan_mean(np.stack(maps), 0)[2:].astype(np.float32))
    arrays = {"values": np.stack(values), "nulls": np.stack(nulls), "chance": np.array(chance, dtype=float)}
    return Part(tensors={name: torch.from_numpy(array) for name, array in arrays.items()} | tensors)


def _by_method(
    context: Context,
    batch: Batch,
    rows: list[int],
    layers: list[int],
    best_head: tuple[int, int],
    index: list[Tensor],
) -> list[Tensor]:
    """Return the attention on each image by every method, (method, token), from one position of each sample."""
    layer, head = best_head
    raw = image_rows(context, batch, [[row] for row in rows], layers, index)
    gradient_blocks = gradient_attention(context.mllm, batch, rows=rows, layers=layers)
    gradient = torch.stack([block.float().clamp_min(0).mean(1) for block in gradient_blocks]).mean(0)
    rolled_out = rollout(context.mllm, batch, rows=rows)
    return [
        torch.stack(
            [
                sample_raw[layers.index(layer), head, 0],
                sample_raw[:, :, 0].mean((0, 1)),
                rolled_out[number][tokens],
                gradient[number][tokens],
            ]
        )
        for number, (sample_raw, tokens) in enumerate(zip(raw, index, strict=True))
    ]
