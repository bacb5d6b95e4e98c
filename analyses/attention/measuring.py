"""Measure the attention maps of the positions that are read, sample by sample."""

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
from workbench.spatial.grids import canvas, object_coverage, sum_onto_grid, union_coverage

EXAMPLE_SIDE = 448  # longer side of a stored example image, in pixels, at most
EDGES = ("left", "top", "right", "bottom")
# edges of the patch grid, of the object, and of the second object, in fractions of the image
EXAMPLE_COLUMNS = ["number", "sample_id", "question", "asked"]
EXAMPLE_COLUMNS += [f"{what}{edge}" for what in ("", "asked_", "second_") for edge in EDGES]
EXAMPLES = ("map_", "image_", "words_")  # beginnings of the names of stored tensors of examples


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


@dataclass(frozen=True)
class ImageMaps:
    """The attention of one sample on its image, from each position that is read.

    Attributes:
        grid: the patch grid of the maps.
        maps: (position, layer, head, h, w), each with sum 1.
        mass: (position, layer, head), attention on the image.
        uniform_mass: (position,), attention on the image if all keys that the position sees got the same.
    """

    grid: VisualTokens
    maps: np.ndarray
    mass: np.ndarray
    uniform_mass: np.ndarray


def measure_chunk(
    config: Config,
    context: Context,
    layers: list[int],
    questions: list[Question],
    examples: list[int],
    chunk: Chunk[Question],
) -> Part:
    """Measure the attention of a chunk of `questions`, sample by sample; store the maps of `examples` only."""
    measurements = Measurements(list(measures_of(config)))
    tensors: dict[str, Tensor] = {}
    example_rows: list[tuple] = []
    word_rows: list[tuple] = []
    for start, batch, positions in batches(context, chunk):
        asked = questions[start : start + len(batch)]
        for number, sample_maps in enumerate(image_maps(context, batch, positions, layers, asked), start=start):
            _measure(config, measurements, questions, number, sample_maps)
            if number in examples:
                name, question, grid = examples.index(number), questions[number], sample_maps.grid
                image = _reduced(batch.images[number - start][0])
                tensors[f"map_{name}"] = torch.from_numpy(nan_mean(sample_maps.maps, 0).astype(np.float32))
                tensors[f"image_{name}"] = torch.from_numpy(np.array(image))
                target_names = ", ".join(target.name for target in question.targets)
                boxes = [_box(question.targets[at : at + 1]) for at in (0, 1)]
                sample = question.sample
                example_rows.append((name, sample.id, sample.question, target_names, *grid.box, *boxes[0], *boxes[1]))
                if question.words:
                    tensors[f"words_{name}"] = torch.from_numpy(nan_mean(sample_maps.maps, 2).astype(np.float32))
                    word_rows += [(name, at, text) for at, text in enumerate(question.words)]
    record = {"examples": example_rows, "words": word_rows}
    return Part(tensors=measurements.tensors() | tensors, record=record)


def batches(context: Context, chunk: Chunk[Question]) -> Iterator[tuple[int, Batch, list[list[int]]]]:
    """Yield the number of the first sample of each batch, the batch with its answers, and the positions to read.

    Every sample has as many positions as the one with the most; those with fewer repeat their last one.
    """
    for start, questions in chunk.batches():
        samples = [question.sample for question in questions]
        batch = context.mllm.encode([sample.image for sample in samples], [sample.question for sample in samples])
        mask = batch.inputs["attention_mask"].cpu()
        ends = (mask.shape[1] - mask.flip(1).long().argmax(1)).tolist()
        if any(question.answer for question in questions):
            ends = mask.sum(1).tolist()  # where the padding comes last
            batch = context.mllm.continued(batch, [question.answer for question in questions])
        positions = [
            [end + offset for offset in question.offsets] for end, question in zip(ends, questions, strict=True)
        ]
        most = max(map(len, positions))
        yield start, batch, [row + row[-1:] * (most - len(row)) for row in positions]


def image_rows(
    context: Context, batch: Batch, positions: list[list[int]], layers: list[int], index: Sequence[Tensor]
) -> list[Tensor]:
    """Return the attention of each sample's positions on chosen keys, (layer, head, position, key) in float32.

    Args:
        index: the positions of the keys of each sample, such as its visual tokens.
    """
    by_layer: list[list[Tensor]] = []
    for block in attention(context.mllm, batch, rows=positions, layers=layers):
        by_layer.append([block[number][..., keys].float() for number, keys in enumerate(index)])
    return [torch.stack(sample_layers) for sample_layers in zip(*by_layer, strict=True)]


def visual_index(tiles: Sequence[VisualTokens]) -> Tensor:
    """Return the positions of the visual tokens of an image, one tile after another."""
    return torch.cat([tile.index for tile in tiles]).cpu()


def image_maps(
    context: Context, batch: Batch, positions: list[list[int]], layers: list[int], questions: Sequence[Question]
) -> Iterator[ImageMaps]:
    """Yield the maps of each question of a batch from its positions."""
    visual = context.mllm.visual_tokens(batch)
    rows = image_rows(context, batch, positions, layers, [visual_index(tiles) for tiles in visual])
    mask = batch.inputs["attention_mask"].cpu()
    for number, (question, tiles) in enumerate(zip(questions, visual, strict=True)):
        grid = canvas(tiles)
        on_image = np.moveaxis(rows[number][:, :, : len(question.offsets)].numpy(), 2, 0)
        # where the family marks answers, prompts are not causal: each of their positions sees the whole prompt
        prompt_end = positions[number][0] - question.offsets[0]
        ends = [
            prompt_end if offset < 0 and context.mllm.family.answer_type else position + 1
            for position, offset in zip(positions[number], question.offsets, strict=False)
        ]
        keys = np.array([int(mask[number, :end].sum()) for end in ends])
        maps = metric.renormalized(sum_onto_grid(on_image, tiles, grid))
        yield ImageMaps(grid, maps, on_image.sum(-1), on_image.shape[-1] / keys)


def other_targets(
    config: Config, questions: Sequence[Question], number: int, rng: np.random.Generator
) -> list[tuple[Object, ...]]:
    """Draw `null` times the objects that a question about another image names."""
    image = questions[number].sample.image_id
    others = [other.targets for other in questions if other.targets and other.sample.image_id != image]
    return [others[i] for i in rng.integers(len(others), size=config.null)]


def coverages(targets: Sequence[Object], grid: VisualTokens) -> list[np.ndarray]:
    """Return the share of each patch that the objects cover: all of them together and, if there are two, each."""
    single = [object_coverage(target, grid) for target in targets] if len(targets) > 1 else []
    return [union_coverage(targets, grid), *single]


def object_scores(maps: np.ndarray, inside: np.ndarray) -> list[np.ndarray]:
    """Return the OBJECT_MEASURES of maps (..., h, w); `inside` is the share of each patch that the object covers."""
    return [metric.pointing(maps, inside), metric.mass_ratio(maps, inside), metric.best_iou(maps, inside)]


def object_chance(inside: np.ndarray, seed: int) -> list[float]:
    """Return the chance levels of the OBJECT_MEASURES for an object that covers `inside` of each patch."""
    return [float(metric.touched(inside)), 1.0, metric.random_iou(inside, seed=seed)]


def _measure(
    config: Config, measurements: Measurements, questions: list[Question], number: int, sample_maps: ImageMaps
) -> None:
    """Add every measure of the maps of sample `number`, and its null, to `measurements`.

    Each is the mean over the positions of the measure of one position's map, not the measure of their mean map.
    """
    rng = np.random.default_rng([config.seed, number])
    height, width = sample_maps.maps.shape[-2:]
    patch_orders = rng.permuted(np.tile(np.arange(height * width), (config.null, 1)), axis=1)
    targets, grid = questions[number].targets, sample_maps.grid
    chance: list[float] = []
    inside: list[np.ndarray] = []
    elsewhere: list[np.ndarray] = []
    if targets:
        others = [coverages(other, grid) for other in other_targets(config, questions, number, rng)]
        inside, elsewhere = coverages(targets, grid), [np.stack(area) for area in zip(*others, strict=True)]
        chance = [level for area in inside for level in object_chance(area, config.seed)]
    values, nulls = [], []
    for maps, mass, uniform_mass in zip(sample_maps.maps, sample_maps.mass, sample_maps.uniform_mass, strict=True):
        spread, spread_nulls = _spread(maps, mass, float(uniform_mass), patch_orders)
        values.append(np.stack(spread + [s for area in inside for s in object_scores(maps, area)], axis=-1))
        nulls.append(np.stack(spread_nulls + [s for area in elsewhere for s in object_scores(maps, area)], axis=-1))
    null = nan_mean(np.stack(nulls), 0)
    measurements.values.append(nan_mean(np.stack(values), 0))
    # component entropies by chance differ between heads, so that `summarized` takes the mean of their null
    spread_chance = [float(sample_maps.uniform_mass.mean()), 1.0, np.nan, np.nan, np.nan]
    measurements.chance.append(np.array(spread_chance + chance, dtype=float))
    measurements.nulls.append(nan_mean(null, 0))
    measurements.pairings.append(nan_mean(null, 2))
    null_sums, null_counts = np.nan_to_num(null), ~np.isnan(null)
    measurements.null_sums = null_sums + (0 if measurements.null_sums is None else measurements.null_sums)
    measurements.null_counts = null_counts + (0 if measurements.null_counts is None else measurements.null_counts)


def _spread(
    maps: np.ndarray, mass: np.ndarray, uniform_mass: float, patch_orders: np.ndarray
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return the SPREAD_MEASURES of one position's maps (layer, head, h, w), and their nulls with a leading axis."""
    draws = len(patch_orders)
    shuffled = maps.reshape(*maps.shape[:2], -1)[..., patch_orders]
    shuffled = np.moveaxis(shuffled.reshape(*maps.shape[:2], draws, *maps.shape[2:]), 2, 0)
    nulls = _spread_scores(np.broadcast_to(uniform_mass, shuffled.shape[:3]), shuffled)
    nulls[1] = np.ones_like(nulls[1])  # shuffling changes no Shannon entropy, so its null is that of a uniform map
    return _spread_scores(mass, maps), nulls


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


def _box(targets: Sequence[Object]) -> tuple[float, ...]:
    return targets[0].box if targets else (float("nan"),) * 4
