"""Compare raw attention with rollout and gradient x attention."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from analyses.attention.measuring import (
    batches,
    image_attention,
    last_rows,
    nan_mean,
    object_chance,
    object_scores,
    other_targets,
)
from analyses.attention.questions import OBJECT_MEASURES, Config, Question
from analyses.attention.tables import score_intervals, summarized
from workbench.analysis.chunks import Chunk, Part, stacked
from workbench.analysis.declaration import Context
from workbench.capture.attention import gradient_attention, rollout
from workbench.metrics import attention as metric
from workbench.spatial.grids import canvas, object_coverage, sum_onto_grid


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
    """Score the maps of every method on a chunk of the samples numbered `compared`.

    Returns:
        values (sample, method, measure), nulls (sample, draw, method, measure), chance (sample, measure), and the maps
        of the examples.
    """
    layer, head = best_head
    values, nulls, chance, tensors = [], [], [], {}
    for start, batch, last_positions in batches(context, chunk):
        raw = last_rows(context, batch, last_positions, layers)
        gradient_blocks = gradient_attention(context.mllm, batch, rows=last_positions, layers=layers)
        gradient = torch.stack([block.float().clamp_min(0).mean(1) for block in gradient_blocks]).mean(0)
        rolled_out = rollout(context.mllm, batch, rows=last_positions)
        by_method = torch.stack([raw[:, layers.index(layer), head], raw.mean((1, 2)), rolled_out, gradient], dim=1)
        for number, tiles in enumerate(context.mllm.visual_tokens(batch), start=start):
            grid, target = canvas(tiles), questions[compared[number]].target
            assert target is not None
            rng = np.random.default_rng([config.seed, compared[number], 1])
            maps = metric.renormalized(sum_onto_grid(image_attention(by_method[number - start], tiles), tiles, grid))
            inside = object_coverage(target, grid)
            others = other_targets(config, questions, compared[number], rng)
            elsewhere = np.stack([object_coverage(other, grid) for other in others])
            values.append(np.stack(object_scores(maps, inside), axis=-1))
            nulls.append(np.stack(object_scores(maps, elsewhere), axis=-1))
            chance.append(object_chance(inside, config.seed))
            if number < config.examples:
                tensors[f"methods_{number}"] = torch.from_numpy(maps[2:].astype(np.float32))
    arrays = {"values": np.stack(values), "nulls": np.stack(nulls), "chance": np.array(chance, dtype=float)}
    return Part(tensors={name: torch.from_numpy(array) for name, array in arrays.items()} | tensors)
