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
layer divided by its root mean square), with question and greedy answer: for PCA maps as in the paper, and for the
similarity to a clicked patch. `umap` has sampled tokens on a plane: the layers of one model together, and each VFM on
its own, because widths differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import pandas as pd
import torch

from analyses.tokens.drawing import differences, figures, summary
from analyses.tokens.options import EDGES, ENCODER, Config
from analyses.tokens.representations import images_of_chunk
from analyses.tokens.scores import Measured, scores_table, sink_rows, values_by_image
from analyses.tokens.stored_tokens import Maps, SampledTokens
from workbench.analysis.chunks import Chunk, Part, joined
from workbench.analysis.declaration import Analysis, Context, Result, vfm_inputs
from workbench.capture.hidden_states import check_layers
from workbench.data.base import Sample
from workbench.errors import ConfigError
from workbench.vfm import OWN, VFM, load_vfm

__all__ = ["ANALYSIS", "ENCODER", "Config", "differences", "figures", "run", "summary"]


def run(config: Config, context: Context) -> Result:
    """Measure every image in every representation, and store some tokens to look at."""
    layers = check_layers(context.mllm, config.layers, final_norm=config.final_norm)
    if config.map_layer is not None and config.map_layer not in layers:
        raise ConfigError(f"map_layer is {config.map_layer}: expected one of the layers {', '.join(map(str, layers))}")
    umap_layers = [f"layer {layer}" for layer in _umap_layers(config, layers)]
    vfms = {name: load_vfm(name) for name in config.vfm if name != OWN}
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
        "scores": scores_table(config, measured),
        "per_image": values_by_image(measured, [sample.image_id for sample in images]),
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
    for image in images_of_chunk(
        context,
        layers,
        vfms,
        skipped,
        chunk,
        final_norm=config.final_norm,
        answers=(config.maps, config.answer_tokens),
    ):
        for name, tokens in image.tokens.items():
            measured.setdefault(name, Measured()).add(tokens, config.sink)
            sinks += sink_rows(image, name, tokens, config.sink)
        maps.add(image)
        samples.add(image)
    tables = {
        "sinks": pd.DataFrame(sinks, columns=["at", "image_id", "token", "norm_ratio", *EDGES]),
        "maps": pd.DataFrame(
            maps.rows, columns=["number", "image_id", "rows", "columns", *EDGES, "question", "answer"]
        ),
    }
    sums = {f"sums.{name}": torch.stack(measures.sums) for name, measures in measured.items()}
    record = {
        "measures": {name: {"values": each.values, "shapes": each.shapes} for name, each in measured.items()},
        "skipped": skipped.get(ENCODER, ""),
        "maps": maps.names,
        "places": samples.rows,
    }
    return Part(tables, sums | maps.tensors | samples.tensors_to_store(), record)


# version 2: intervals with their stated coverage
ANALYSIS = Analysis(
    "tokens",
    "Visual tokens by layer: homogenization, rank, norms and sinks, maps to look at",
    Config,
    run,
    figures,
    summary,
    version=2,
    uses=vfm_inputs,
)
