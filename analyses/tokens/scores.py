"""Measure the tokens of each image, and summarize the measures with interval and null."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from analyses.tokens.options import MEASURES, Config
from analyses.tokens.representations import ImageTokens, edges_of, layer_number, token_boxes
from workbench.analysis.chunks import Part
from workbench.metrics.geometry import effective_rank, massive_tokens, mean_cosine, norm_ratios
from workbench.metrics.neighbors import unit_rows
from workbench.stats import Interval, Kind, jackknife_ci, mean_interval

SHARES: dict[str, Kind] = {"sinks": "proportion", "massive": "proportion"}


@dataclass
class Measured:
    """The measures of one representation by image, and the sums from which the cosine across images follows.

    Attributes:
        values: by measure, one value for each image.
        shapes: (n, d) of the tokens of each image.
        sums: of each image, the sum of its tokens divided by their norms.
    """

    values: dict[str, list[float]] = field(default_factory=dict)
    shapes: list[tuple[int, int]] = field(default_factory=list)
    sums: list[Float[Tensor, " d"]] = field(default_factory=list)

    def take(self, name: str, part: Part) -> None:
        """Append the images of a stored part, as measured in the representation `name`."""
        stored = part.record["measures"][name]
        for measure, values in stored["values"].items():
            self.values.setdefault(measure, []).extend(values)
        self.shapes += [(n, d) for n, d in stored["shapes"]]
        self.sums += list(part.tensors[f"sums.{name}"])

    def add(self, tokens: Float[Tensor, "token d"], sink: float) -> None:
        """Measure the tokens of one more image."""
        for name, value in measures_of(tokens, sink).items():
            self.values.setdefault(name, []).append(value)
        self.shapes.append((tokens.shape[0], tokens.shape[1]))
        self.sums.append(unit_rows(tokens).double().sum(0))


def measures_of(tokens: Float[Tensor, "token d"], sink: float) -> dict[str, float]:
    """Return every measure of the tokens of one image, without those that need several images."""
    rank, ratios = float(effective_rank(tokens)), norm_ratios(tokens)
    return {
        "cosine": float(mean_cosine(tokens)),
        "effective_rank": rank,
        "rank_share": rank / min(tokens.shape),
        "norm": float(tokens.double().norm(dim=-1).quantile(0.5)),
        "norm_ratio": float(ratios.max()),
        "sinks": float((ratios > sink).double().mean()),
        "massive": float(massive_tokens(tokens).double().mean()),
    }


def sink_rows(image: ImageTokens, name: str, tokens: Float[Tensor, "token d"], sink: float) -> list[dict[str, object]]:
    """Return one row for each sink token of an image in the representation `name`, with the box of its patch."""
    ratios = norm_ratios(tokens)
    indices = (ratios > sink).nonzero().flatten().tolist()
    boxes = token_boxes(image.grids) if indices else []
    return [
        {"at": name, "image_id": image.sample.image_id, "token": i, "norm_ratio": float(ratios[i])} | edges_of(boxes[i])
        for i in indices
    ]


def values_by_image(measured: Mapping[str, Measured], image_ids: list[str]) -> pd.DataFrame:
    """Return one row for each representation, measure and image."""
    tables = [
        pd.DataFrame(
            {"at": name, "layer": layer_number(name), "measure": measure, "image_id": image_ids, "value": values}
        )
        for name, measures in measured.items()
        for measure, values in measures.values.items()
    ]
    return pd.concat(tables, ignore_index=True)


def scores_table(config: Config, measured: Mapping[str, Measured]) -> pd.DataFrame:
    """Return one row for each representation and measure, with interval and null."""
    rows = []
    nulls: dict[tuple[tuple[int, int], ...], dict[str, np.ndarray]] = {}  # layers of one width share their nulls
    for name, measures in measured.items():
        shapes = tuple(measures.shapes)
        if shapes not in nulls:
            nulls[shapes] = isotropic(measures.shapes, config.sink, draws=config.null, seed=config.seed)
        intervals = _intervals(measures)
        for measure in MEASURES:
            if measure not in intervals:
                continue
            interval, null = intervals[measure], nulls[shapes].get(measure, np.array([np.nan]))
            rows.append(
                {
                    "at": name,
                    "layer": layer_number(name),
                    "measure": measure,
                    "score": interval.estimate,
                    "low": interval.low,
                    "high": interval.high,
                    "null_mean": null.mean(),
                    "null_q95": np.quantile(null, 0.95),
                    "n_images": interval.n,
                    "n": int(np.median([n for n, _ in shapes])),
                    "d": shapes[0][1],
                    "seed": config.seed,
                }
            )
    return pd.DataFrame(rows)


def _intervals(measures: Measured) -> dict[str, Interval]:
    """Return the mean of every measure over images with its interval; `cosine_across` needs at least 3 images."""
    intervals = {name: mean_interval(values, kind=SHARES.get(name, "real")) for name, values in measures.values.items()}
    across = cosine_across(measures)
    if across is not None:
        intervals["cosine_across"] = jackknife_ci(across[0], across[1], len(measures.sums))
    return intervals


def cosine_across(measures: Measured) -> tuple[float, np.ndarray] | None:
    """Return the mean cosine of tokens of two different images, and the same without each image in turn.

    All pairs of tokens of different images count. None below 3 images.
    """
    if len(measures.sums) < 3:
        return None
    sums = torch.stack(measures.sums).numpy()
    n = np.array([shape[0] for shape in measures.shapes], dtype=np.float64)
    rest = sums.sum(0) - sums
    products, pairs = (sums * rest).sum(1), n * (n.sum() - n)
    return float(products.sum() / pairs.sum()), (products.sum() - 2 * products) / (pairs.sum() - 2 * pairs)


def isotropic(shapes: list[tuple[int, int]], sink: float, *, draws: int, seed: int) -> dict[str, np.ndarray]:
    """Return every measure but the norm, (draw,), of Gaussian tokens.

    Each draw has the n and d of one image; the images are taken evenly from all.
    """
    generator = torch.Generator().manual_seed(seed)
    by_measure: dict[str, list[float]] = {}
    for draw in range(draws):
        n, d = shapes[draw * len(shapes) // draws]
        tokens, other = (torch.randn(n, d, generator=generator) for _ in range(2))
        across = float(unit_rows(tokens).sum(0) @ unit_rows(other).sum(0)) / n**2
        for measure, value in (measures_of(tokens, sink) | {"cosine_across": across}).items():
            by_measure.setdefault(measure, []).append(value)
    return {measure: np.array(values) for measure, values in by_measure.items() if measure != "norm"}
