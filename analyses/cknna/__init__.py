"""Measure how well visual tokens align with vision foundation models, layer by layer (docs/paper.md, A2 and A8).

    python -m analyses.cknna --model runs/baseline runs/viral --vfm dinov2-small --data shapes:val --limit 200 --k 10
    python -m analyses.cknna --model runs/baseline runs/viral --vfm dinov2-small --vfm_layers 3 6 9 12 --metric cka
    python -m analyses.cknna --model runs/baseline runs/viral --vfm own --by tile --data shapes:val --limit 200 --k 10

The default metric is CKNNA: 1 where the visual tokens of layer l and the VFM's patches have the same neighborhoods.
`--metric` takes any metric of workbench/metrics: unbiased CKA, mutual kNN, SVCCA, RSA. The VFM is represented by its
own output, or with `--vfm_layers` by its blocks; layer m is the output of block m, before a norm. An image of several
patch grids (tiles, a thumbnail) counts as the mean over its grids; `n` is then the median number of tokens of a grid.

`--vfm own` compares with the model's own vision encoder: for each visual token with the features z that the projector
receives for it, without the class token where the model drops it, and those of several patches side by side where the
projector merges patches. `--by tile` cuts the grids that LLaVA-NeXT and LLaVA-OneVision join from the tiles of an image
into these tiles again, without their padding; each tile is scored by itself, and a VFM sees each tile by itself too.
Other models have a grid for each tile already.

What the number is not: a measure of what the model uses. Several of the metrics are never 0 by chance, so each score
comes with its permutation null, and scores with another metric, n, k or pooling may not share an axis without their
nulls.

Two models are compared in pairs: image by image with pooling `within`, otherwise in the same random halves of the
images. The interval and p are over images, for these very models; they say nothing about other training seeds. p_holm
corrects over all layers (and layers of the VFM) of a pair.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import pandas as pd

from analyses.cknna.across_images import AcrossImages
from analyses.cknna.comparison import figures, summary
from analyses.cknna.options import Config, Target
from workbench.analysis.chunks import Chunk, Part
from workbench.analysis.declaration import Analysis, Context, Result, vfm_inputs
from workbench.capture.hidden_states import check_layers
from workbench.data import Sample
from workbench.data.folder import QUESTION
from workbench.metrics import METRICS
from workbench.spatial.tiles import by_tile
from workbench.spatial.vfm_patches import layers_under
from workbench.spatial.within_image import GridFeatures, Scores, Within, read_by_grid
from workbench.stats import null_of
from workbench.vfm import OWN, VFM, load_vfm


def run(config: Config, context: Context) -> Result:
    """Score every layer of the model against every VFM, or against every chosen layer of it."""
    layers, metric = check_layers(context.mllm, config.layers, final_norm=config.final_norm), METRICS.get(config.metric)
    vfms = {name: load_vfm(name) for name in dict.fromkeys(config.vfm) if name != OWN}
    for vfm in vfms.values():
        vfm.check_layers(config.vfm_layers)
    targets = [
        Target(name, layer)
        for name in dict.fromkeys(config.vfm)
        for layer in dict.fromkeys(config.vfm_layers or (None,))
    ]
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
        left_out = within.sentences([sample.image_name for sample in samples])
    else:
        across = AcrossImages(config, metric)
        for part in parts:
            across.take(part)
        results = across.finish()
    record = {
        "vfm_fingerprints": {name: vfm.fingerprint for name, vfm in vfms.items()},
        "vfms": [vfm.record() for vfm in vfms.values()],
    }
    if OWN in config.vfm:
        family = context.mllm.family
        rows = family.rows_per_token(context.mllm.config)
        record |= {"own_encoder": f"input of model.{family.projector}, rows of it for each visual token: {rows}"}
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
                    "by": config.by,
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
    """Read the visual tokens of a chunk in each layer and the features to compare them with, and score or collect them.

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
        grids = by_tile(grids) if config.by == "tile" else grids
        hidden, features = read_by_grid(
            context.mllm, batch, grids, layers, encoder=OWN in config.vfm, final_norm=config.final_norm
        )
        patches: list[GridFeatures] = []
        for name in dict.fromkeys(config.vfm):
            if features is not None and name == OWN:
                patches.append(features)
            else:
                patches += layers_under(vfms[name], config.vfm_layers, images, grids)
        if config.pooling == "within":
            within.add(hidden, patches)
        else:
            across.add(hidden, patches, first)
    return Part(tensors=within.tensors(), record=within.record()) if config.pooling == "within" else across.part()


TITLE = "Layer-wise alignment with vision foundation models (CKNNA and other metrics)"
# version 3: neighbors in float64, ties broken at random, intervals with their stated coverage
ANALYSIS = Analysis("cknna", TITLE, Config, run, figures, summary, version=3, uses=vfm_inputs)
