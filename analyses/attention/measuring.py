"""Measure the attention maps of the last prompt position, sample by sample."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from analyses.attention.questions import Config, Question, measures_of
from workbench.analysis.chunks import Chunk, Part
from workbench.analysis.declaration import Context
from workbench.capture.attention import attention
from workbench.data import Object
from workbench.metrics import attention as metric
from workbench.mllm.family import Batch, VisualTokens
from workbench.spatial.grids import canvas, object_coverage, sum_onto_grid

EXAMPLE_SIDE = 448  # longer side of a stored example image, in pixels, at most
EDGES = ("left", "top", "right", "bottom")


@dataclass
class Measurements:
    """What was measured on each sample; the axis `measure` follows `measures`."""

    measures: list[str]
    values: list[np.ndarray] = field(default_factory=list)  # of each sample (layer, head, measure)
    chance: list[np.ndarray] = field(default_factory=list)  # of each sample (measure,)
    nulls: list[np.ndarray] = field(default_factory=list)  # of each sample (layer, head, measure), mean over draws
    pairings: list[np.ndarray] = field(default_factory=list)  # of each sample (draw, layer, measure), mean over heads
    null_sums: np.ndarray | None = None  # (draw, layer, head, measure), the sum over samples where the null is defined
    null_counts: np.ndarray | None = None  # same shape, the number of those samples

    def tensors(self) -> dict[str, Tensor]:
        """Return the measurements as tensors to store."""
        assert self.null_sums is not None and self.null_counts is not None
        arrays = {name: np.stack(getattr(self, name)) for name in BY_SAMPLE} | {
            "heads": self.null_sums,
            "counted": self.null_counts,
        }
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Append the stored measurements of the samples that follow."""
        for name in BY_SAMPLE:
            getattr(self, name).extend(tensors[name].numpy())
        self.null_sums = tensors["heads"].numpy() + (0 if self.null_sums is None else self.null_sums)
        self.null_counts = tensors["counted"].numpy() + (0 if self.null_counts is None else self.null_counts)


BY_SAMPLE = ("values", "chance", "nulls", "pairings")


def measure_chunk(
    config: Config,
    context: Context,
    layers: list[int],
    questions: list[Question],
    examples: list[int],
    chunk: Chunk[Question],
) -> Part:
    """Measure the attention of a chunk of `questions`, sample by sample; store the maps of `examples` only."""
    measurements = Measurements(measures_of(config))
    tensors: dict[str, Tensor] = {}
    example_rows: list[tuple] = []
    for start, batch, last_positions in batches(context, chunk):
        attention_rows = last_rows(context, batch, last_positions, layers)
        for number, tiles in enumerate(context.mllm.visual_tokens(batch), start=start):
            grid = canvas(tiles)
            on_image = image_attention(attention_rows[number - start], tiles)
            maps = metric.renormalized(sum_onto_grid(on_image, tiles, grid))
            uniform_mass = on_image.shape[-1] / int(batch.inputs["attention_mask"][number - start].sum())
            _measure(config, measurements, questions, number, grid, on_image.sum(-1), maps, uniform_mass)
            if number in examples:
                name, sample, target = examples.index(number), questions[number].sample, questions[number].target
                image = _reduced(batch.images[number - start][0])
                tensors[f"map_{name}"] = torch.from_numpy(maps.astype(np.float32))
                tensors[f"image_{name}"] = torch.from_numpy(np.array(image))
                target_name = target.name if target else ""
                example_rows.append((name, sample.id, sample.question, target_name, *grid.box, *_box(target)))
    return Part(tensors=measurements.tensors() | tensors, record={"examples": example_rows})


def batches(context: Context, chunk: Chunk[Question]) -> Iterator[tuple[int, Batch, list[int]]]:
    """Yield the number of the first sample of each batch, the batch, and the last position of each prompt."""
    for start, questions in chunk.batches():
        samples = [question.sample for question in questions]
        batch = context.mllm.encode([sample.image for sample in samples], [sample.question for sample in samples])
        mask = batch.inputs["attention_mask"].cpu()
        yield start, batch, (mask.shape[1] - 1 - mask.flip(1).long().argmax(1)).tolist()


def last_rows(context: Context, batch: Batch, last_positions: list[int], layers: list[int]) -> Tensor:
    """Return the attention of the last prompt position, (sample, layer, head, key)."""
    blocks = attention(context.mllm, batch, rows=[[position] for position in last_positions], layers=layers)
    return torch.stack([block[:, :, 0].float() for block in blocks], dim=1)


def image_attention(attention_rows: Tensor, tiles: Sequence[VisualTokens]) -> np.ndarray:
    """Return the attention on the visual tokens, (..., token), one tile after another."""
    return attention_rows[..., torch.cat([tile.index for tile in tiles]).cpu()].numpy()


def other_targets(config: Config, questions: Sequence[Question], number: int, rng: np.random.Generator) -> list[Object]:
    """Draw `null` of the objects that questions about other images name."""
    image = questions[number].sample.image_id
    others = [other.target for other in questions if other.target is not None and other.sample.image_id != image]
    return [others[i] for i in rng.integers(len(others), size=config.null)]


def object_scores(maps: np.ndarray, inside: np.ndarray) -> list[np.ndarray]:
    """Return the OBJECT_MEASURES of maps (..., h, w); `inside` is the share of each patch that the object covers."""
    return [metric.pointing(maps, inside), metric.mass_ratio(maps, inside), metric.best_iou(maps, inside)]


def object_chance(inside: np.ndarray, seed: int) -> list[float]:
    """Return the chance levels of the OBJECT_MEASURES for an object that covers `inside` of each patch."""
    return [float(metric.touched(inside)), 1.0, metric.random_iou(inside, seed=seed)]


def _measure(
    config: Config,
    measurements: Measurements,
    questions: list[Question],
    number: int,
    grid: VisualTokens,
    mass: np.ndarray,
    maps: np.ndarray,
    uniform_mass: float,
) -> None:
    """Add every measure of one sample's maps, and its null, to `measurements`.

    Args:
        number: of the sample, among all.
        mass: (layer, head), attention on the image.
        maps: (layer, head, h, w) on `grid`, each with sum 1.
        uniform_mass: attention on the image if all positions of the prompt got the same.
    """
    rng = np.random.default_rng([config.seed, number])
    patch_orders = rng.permuted(np.tile(np.arange(maps[0, 0].size), (config.null, 1)), axis=1)
    shuffled = maps.reshape(*maps.shape[:2], -1)[..., patch_orders]
    shuffled = np.moveaxis(shuffled.reshape(*maps.shape[:2], config.null, *maps.shape[2:]), 2, 0)
    values = _spread_scores(mass, maps)
    nulls = _spread_scores(np.broadcast_to(uniform_mass, shuffled.shape[:3]), shuffled)
    nulls[1] = np.ones_like(nulls[1])  # shuffling changes no Shannon entropy, so its null is that of a uniform map
    # component entropies by chance differ between heads, so that `summarized` takes the mean of their null
    chance = [uniform_mass, 1.0, np.nan, np.nan, np.nan]
    target = questions[number].target
    if config.localise and target is not None:
        inside = object_coverage(target, grid)
        elsewhere = np.stack([object_coverage(other, grid) for other in other_targets(config, questions, number, rng)])
        values += object_scores(maps, inside)
        nulls += object_scores(maps, elsewhere)
        chance += object_chance(inside, config.seed)
    null = np.stack(nulls, axis=-1)
    measurements.values.append(np.stack(values, axis=-1))
    measurements.chance.append(np.array(chance, dtype=float))
    measurements.nulls.append(nan_mean(null, 0))
    measurements.pairings.append(nan_mean(null, 2))
    null_sums, null_counts = np.nan_to_num(null), ~np.isnan(null)
    measurements.null_sums = null_sums + (0 if measurements.null_sums is None else measurements.null_sums)
    measurements.null_counts = null_counts + (0 if measurements.null_counts is None else measurements.null_counts)


def _spread_scores(mass: np.ndarray, maps: np.ndarray) -> list[np.ndarray]:
    """Return the SPREAD_MEASURES of maps (..., h, w) in their order."""
    entropies = metric.entropies(maps)
    return [mass, entropies.shannon, entropies.component, entropies.per_components, entropies.per_cells]


def nan_mean(values: np.ndarray, axis: int) -> np.ndarray:
    """Return the mean of the values that are not NaN; NaN where there are none."""
    with np.errstate(invalid="ignore"):
        return np.nansum(values, axis=axis) / (~np.isnan(values)).sum(axis=axis)


def _reduced(image: Image.Image) -> Image.Image:
    """Return the image with its longer side at most EXAMPLE_SIDE pixels."""
    scale = min(1.0, EXAMPLE_SIDE / max(image.size))
    if scale == 1:
        return image
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _box(target: Object | None) -> tuple[float, ...]:
    return (float("nan"),) * 4 if target is None else target.box
