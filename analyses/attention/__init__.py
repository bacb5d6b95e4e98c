"""Measure where each attention head looks in the image as the model answers (docs/paper.md, A3 and A4).

    python -m analyses.attention --model runs/baseline runs/viral --data shapes:val --limit 200 --output_dir runs

By default the analysis reads the attention of the last prompt position, which predicts the first answer token.
`--positions generated` reads that of the generated answer, as the paper does: each token of the greedy answer is the
query at its own position (not at the one before, which predicts it), and special tokens do not count. `--positions
WORD` reads the last token of that word wherever the question has it or, if it does not, wherever the generated answer
has it. Every score is computed for the map of each position, and then averaged over positions, images and questions.

Where a question names exactly one object of its image, the map of each head is compared with that object; with
`--objects 2`, where it names two, with the area that either covers, and with each. Layers are the blocks 1 to L, heads
count from 0. Raw attention, head by head, is set beside two maps that combine layers: rollout, and the positive part of
gradient x attention (gradient of the logit of the predicted token), averaged over heads and layers. Where a model cuts
an image into several patch grids, the attention of all of them is summed on the finest one by area, so that none is
left out.

Each score has two chance levels. `chance` is the score of a map that knows nothing about the object. `null_mean` and
`null_q95` are the scores of the same maps with objects of other images, so a habit of looking at the center raises them
too. For component entropies both come from the same maps with their patches shuffled, for mass and Shannon entropy from
uniform attention. The `gain` of a chosen head is its pointing minus that with objects of other images; every image
counts once in it, and every question in all other scores.

Publications do not say how spatial entropy is scaled. There are four normalizations: component entropy in nats, / ln
of the number of components, / ln of the number of patches, and Shannon entropy / ln(patches). The figure by head has a
menu of all four; the printed table names the one that it has.

What the numbers do not show is that the model uses what a head reads: only an intervention can show that.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from analyses.attention.drawing import figures
from analyses.attention.measuring import EXAMPLE_COLUMNS, EXAMPLES, Measurements, measure_chunk
from analyses.attention.methods import compare_methods
from analyses.attention.positions import with_positions
from analyses.attention.questions import MEASURES, Config, first_samples, measures_of, questions_of, reported_half
from analyses.attention.tables import chosen_heads, differences, samples_table, scores_by_head, scores_by_layer, summary
from workbench.analysis.declaration import Analysis, Context, Result
from workbench.capture.hidden_states import check_layers

__all__ = ["ANALYSIS", "MEASURES", "Config", "differences", "figures", "run", "summary"]


def run(config: Config, context: Context) -> Result:
    """Measure every head of every layer, and report the best heads on images that they were not chosen on."""
    layers = check_layers(context.mllm, config.layers, first=1)
    questions, left_out = with_positions(config, context, questions_of(config, context.data))
    images = [question.sample.image_id for question in questions]
    reported = reported_half(images, config.seed) if config.localise else np.ones(len(questions), dtype=bool)
    examples = first_samples(images, reported, config.examples)
    parts = context.map(
        "attention",
        questions,
        partial(measure_chunk, config, context, layers, questions, examples),
        depends=context.data.fingerprint,
    )
    measurements, example_rows, word_rows = Measurements(list(measures_of(config))), [], []
    tensors: dict[str, Tensor] = {}
    for part in parts:
        measurements.take(part.tensors)
        tensors |= {name: value for name, value in part.tensors.items() if name.startswith(EXAMPLES)}
        example_rows += part.record["examples"]
        word_rows += part.record["words"]
    values, nulls = np.stack(measurements.values), np.stack(measurements.nulls)
    tables = {
        "scores": scores_by_head(measurements, values, images, layers, config.seed),
        "layers": scores_by_layer(measurements, values, images, layers, config.seed),
        "samples": samples_table(questions, reported, measurements),
        "examples": pd.DataFrame(example_rows, columns=EXAMPLE_COLUMNS),
    }
    if word_rows:
        tables["words"] = pd.DataFrame(word_rows, columns=["number", "position", "word"])
    if config.localise:
        tables["heads"] = chosen_heads(config, measurements, values, nulls, images, reported, layers)
        if config.compare and len(tables["heads"]):
            compared = first_samples(images, reported, config.compare)
            tables["methods"], tables["compared"], maps = compare_methods(
                config, context, layers, questions, compared, tables["heads"]
            )
            tensors |= maps
    # (sample, layer, head, measure), from which two models are compared pairwise
    by_sample = {"values": values, "nulls": nulls}
    tensors |= {name: torch.from_numpy(array.astype(np.float32)) for name, array in by_sample.items()}
    return Result(tables, tensors, {"measures": measurements.measures, "layers": layers}, left_out)


# versions: 2 intervals with their stated coverage; 3 `component_entropy` renamed; 4 null draws of each sample;
# 5 ends of intervals of few images
ANALYSIS = Analysis(
    "attention", "Where attention heads look, and which find the object", Config, run, figures, summary, version=5
)
