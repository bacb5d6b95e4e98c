"""Layer-wise alignment of a model's visual tokens with vision foundation models (PAPER.md, A2).

    python -m analyses.cknna --model runs/baseline runs/viral --vfm dinov2-small --data shapes:val --limit 200 --k 10 --output_dir runs

What the number is: CKNNA, 1 where the visual tokens of layer l and the VFM's patches have the same neighbourhoods. What it is not: a measure of
what the model uses; and it is never 0 by chance, so each score carries its permutation null. Scores with another n, k or pooling may not share
an axis without their nulls.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from torch import Tensor

from workbench import figures as fig
from workbench.analysis import Analysis, Context, DataOptions, Result, main
from workbench.capture import check_layers, read
from workbench.data.folder import QUESTION
from workbench.errors import ConfigError, DataError
from workbench.metrics.alignment import cknna_from_neighbors
from workbench.metrics.neighbors import Neighbors, nearest_neighbors
from workbench.runs import Run
from workbench.stats import Interval, bootstrap_ci, cknna_nulls, jackknife_ci, null_of
from workbench.vfm import load_vfm

GROUPS = 10  # of images, left out in turn, for the interval of a score that is not a mean over images


@dataclass(frozen=True)
class Config(DataOptions):
    """What to compare with, and how."""

    vfm: tuple[str, ...] = ("dinov2-small",)
    """Vision foundation models."""
    layers: tuple[int, ...] = ()
    """Layers of the model, 0 to L; all by default."""
    k: int = 10
    """Neighbours."""
    pooling: Literal["within", "tokens", "pooled"] = "within"
    """within: tokens of one image, mean over images; tokens: sampled tokens of all images; pooled: one mean token per image."""
    tokens_per_image: int = 16
    """With pooling `tokens`: tokens sampled from each image."""
    null: int = 100
    """Permutations for the null."""

    def __post_init__(self) -> None:
        for name, least in (("k", 1), ("tokens_per_image", 1), ("null", 10)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}: expected at least {least}")
        if not self.vfm:
            raise ConfigError("no VFM given: expected --vfm NAME ...")


def run(config: Config, context: Context) -> Result:
    """Score every layer against every VFM."""
    layers = check_layers(context.mllm, config.layers)
    vfms = {name: load_vfm(name) for name in config.vfm}
    hidden, patches, image_ids = _features(config, context, layers, vfms)
    rows, per_image = [], []
    sides = {name: _neighbors(values, config) for name, values in patches.items()}
    for number, layer in enumerate(context.progress(layers, "cknna", len(layers))):
        tokens = hidden[:, number]
        near = _neighbors(tokens, config)
        for name in config.vfm:
            score, images = _score(near, sides[name], tokens, patches[name], config)
            null = null_of(score.estimate, cknna_nulls(near, sides[name], n=config.null, seed=config.seed))
            rows.append(
                {
                    **{"layer": layer, "vfm": name, "score": score.estimate, "low": score.low, "high": score.high},
                    **{"null_mean": null.mean, "null_q95": null.q95, "p": null.p, "n_images": len(image_ids)},
                    **{"n": near.n, "k": config.k, "pooling": config.pooling, "seed": config.seed},
                }
            )
            per_image += [{"layer": layer, "vfm": name, "image_id": i, "score": float(v)} for i, v in zip(image_ids, images, strict=False)]
    tables = {"scores": pd.DataFrame(rows), "per_image": pd.DataFrame(per_image, columns=["layer", "vfm", "image_id", "score"])}
    return Result(tables, record={"vfm_fingerprints": {name: vfm.fingerprint for name, vfm in vfms.items()}})


def _features(config: Config, context: Context, layers: list[int], vfms: Mapping[str, object]) -> tuple[Tensor, dict[str, Tensor], list[str]]:
    """Visual tokens (image, layer, token, d), VFM patches {name: (image, token, dim)} on the model's own grid, and image ids."""
    images = [scene[0] for scene in context.data.scenes]
    hidden: list[Tensor] = []
    patches: dict[str, list[Tensor]] = {name: [] for name in vfms}
    starts = range(0, len(images), context.batch_size)
    for start in context.progress(starts, "reading layers", len(starts)):
        part = images[start : start + context.batch_size]
        batch = context.mllm.encode([s.image for s in part], [s.question or QUESTION for s in part])
        places = context.mllm.visual_tokens(batch)
        for sample, activations in zip(places, read(context.mllm, batch, layers=layers), strict=True):
            if len(sample) != 1 or sample[0].grid is None:
                raise DataError(f"{context.mllm.name} gives {len(sample)} tiles an image: expected one raster of visual tokens")
            hidden.append(activations.values)
        grid = places[0][0].grid
        seen = [_covered(s.image, sample[0].box) for s, sample in zip(part, places, strict=True)]
        for name, vfm in vfms.items():
            patches[name].append(vfm(seen, grid=grid).tokens())  # type: ignore[operator]
    return torch.stack(hidden), {name: torch.cat(parts) for name, parts in patches.items()}, [s.image_id for s in images]


def _covered(image: object, box: tuple[float, float, float, float]) -> object:
    """The part of the image that the visual tokens cover, so that both sides see the same pixels under the same token."""
    if box == (0.0, 0.0, 1.0, 1.0):
        return image
    width, height = image.size  # type: ignore[attr-defined]
    return image.crop((box[0] * width, box[1] * height, box[2] * width, box[3] * height))  # type: ignore[attr-defined]


def _points(values: Tensor, config: Config, keep: np.ndarray | None = None) -> Tensor:
    """The rows that are compared: (image, token, d) for `within`, (n, d) for the others."""
    kept = values if keep is None else values[torch.from_numpy(keep)]
    if config.pooling == "within":
        return kept
    if config.pooling == "pooled":
        return kept.mean(dim=1)
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.rand(values.shape[:2], generator=generator).argsort(dim=1)[:, : config.tokens_per_image]
    order = order if keep is None else order[torch.from_numpy(keep)]
    return kept.gather(1, order[..., None].expand(*order.shape, values.shape[-1])).flatten(0, 1)


def _neighbors(values: Tensor, config: Config, keep: np.ndarray | None = None) -> Neighbors:
    return nearest_neighbors(_points(values, config, keep), config.k, name="the set of tokens")


def _score(x: Neighbors, y: Neighbors, tokens: Tensor, patches: Tensor, config: Config) -> tuple[Interval, np.ndarray]:
    """The score with an interval over images, and the score of each image where that exists."""
    scores = cknna_from_neighbors(x, y)
    if config.pooling == "within":
        images = scores.numpy()
        return bootstrap_ci(images, seed=config.seed), images
    groups = np.random.default_rng(config.seed).permutation(len(tokens)) % GROUPS
    left_out = [
        float(cknna_from_neighbors(_neighbors(tokens, config, keep), _neighbors(patches, config, keep)))
        for keep in ((groups != group).nonzero()[0] for group in range(GROUPS))
    ]
    return jackknife_ci(float(scores), left_out, len(tokens)), np.array([])


def summary(found: Mapping[str, Run]) -> pd.DataFrame:
    """One row per model, VFM and layer."""
    return pd.concat([run.tables["scores"].assign(model=label) for label, run in found.items()])[
        ["model", "vfm", "layer", "score", "low", "high", "null_mean", "null_q95", "p", "n_images", "n", "k", "pooling"]
    ]


def figures(found: Mapping[str, Run]) -> dict[str, go.Figure]:
    """Layer curves of all models and VFMs with their intervals, over the null band."""
    curves = summary(found)
    return {"Alignment by layer": fig.layer_curves(curves, y="CKNNA", kind="vfm")}


ANALYSIS = Analysis("cknna", "Layer-wise alignment with vision foundation models (CKNNA)", Config, run, figures, summary)

if __name__ == "__main__":
    main(ANALYSIS)
