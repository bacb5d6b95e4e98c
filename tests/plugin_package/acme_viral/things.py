"""A metric, a data set, a VFM, a family and an analysis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from workbench.analysis.chunks import Chunk, Part, joined
from workbench.analysis.declaration import Analysis, Context, DataOptions, Result
from workbench.data import Dataset, Sample
from workbench.metrics import METRICS, Metric
from workbench.mllm import Family
from workbench.mllm.families.llava import one_grid
from workbench.runs import Run
from workbench.vfm import VFMEntry, load_vfm
from workbench.vfm.base import HALF, Network
from workbench.weights.catalogue import CATALOGUE as WEIGHTS
from workbench.weights.catalogue import Weights
from workbench.weights.fetch import check_unchanged, load_weights

# --- a metric: mean cosine of rows ----------------------------------------------------------------


def cosine(x: Tensor, y: Tensor) -> float:
    """Mean cosine of the rows of `x` and `y`, both (n, d)."""
    return float(_score(_prepare(x, 0, "x", 0), _prepare(y, 0, "y", 1)))


def _prepare(x: Tensor, option: int, name: str, side: int) -> Tensor:
    return functional.normalize(torch.as_tensor(x).double(), dim=-1)


def _score(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1).mean(-1)


COSINE = Metric("mean cosine", cosine, _prepare, _score)

# --- a data set: images of one color --------------------------------------------------------------


def plain(
    rest: str, *, limit: int | None = None, seed: int = 0, draw: int | None = None, decode: bool | None = None
) -> Dataset:
    """`plain:` is eight images, each of one color."""
    levels = range(0, 256, 32)[:limit]
    samples = [
        Sample(
            str(level), str(level), lambda level=level: Image.new("RGB", (28, 28), (level, 0, 255 - level)), "what ?"
        )
        for level in levels
    ]
    return Dataset("plain:", samples, f"plain-{len(samples)}")


# --- a VFM: the mean color of each patch, times a scale -------------------------------------------


class Colors(nn.Module):
    """Mean color of patches of 14 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, pixels: Tensor) -> Tensor:
        return functional.avg_pool2d(pixels, 14) * self.scale[:, None, None]


def _build(weights: str | None, **sizes: Any) -> Network:
    module = Colors()
    state = load_weights(weights) if weights else module.state_dict()
    module.load_state_dict(state)
    fingerprint = check_unchanged(str(weights), module.state_dict(), state)

    def blocks(pixels: Tensor, layers: Sequence[int]) -> list[Tensor]:
        return [module(pixels) for _ in layers]

    return Network(module, module, fingerprint, blocks, depth=1)


WEIGHTS.add("acme-colors", Weights("acme-colors", licence="CC0", folder=Path(__file__).parent / "weights"))
COLORS = VFMEntry("acme-colors", "acme-colors", _build, 14, 3, *HALF, (2, 2), "a toy", "mean colors", "tests alone")

# --- a model family -------------------------------------------------------------------------------

FAMILY = Family("acme", ("AcmeForConditionalGeneration",), one_grid)

# --- an analysis: how alike the VFM's features of one image are -----------------------------------


@dataclass(frozen=True)
class Config(DataOptions):
    """What is compared."""

    vfm: str = "acme-colors"
    """Vision foundation model."""
    metric: str = "acme_cosine"
    """Metric."""


def run(config: Config, context: Context) -> Result:
    vfm, metric = load_vfm(config.vfm), METRICS.get(config.metric)

    def scores(chunk: Chunk[Sample]) -> Part:
        features = [vfm([sample.image]).tokens()[0] for sample in chunk.items]
        rows = [{"image": chunk.start + number, "score": metric(own, own)} for number, own in enumerate(features)]
        return Part({"scores": pd.DataFrame(rows)})

    return Result({"scores": joined(context.map("scores", list(context.data), scores), "scores")})


def summary(found: Mapping[str, Run]) -> pd.DataFrame:
    return pd.concat([run.tables["scores"].assign(model=label) for label, run in found.items()])


def figures(found: Mapping[str, Run]) -> dict[str, go.Figure]:
    return {"Scores": go.Figure()}


ANALYSIS = Analysis("acme_scores", "How alike colors are", Config, run, figures, summary)
