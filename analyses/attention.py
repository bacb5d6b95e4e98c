"""Measure where each attention head looks in the image as the answer begins (docs/paper.md, A3 and A4).

    python -m analyses.attention --model runs/baseline runs/viral --data shapes:val --limit 200 --output_dir runs

The analysis reads the attention of the last prompt position, which predicts the first answer token; it does not read
later answer tokens. Where a question names exactly one object of its image, the map of each head is compared with that
object. Layers are the blocks 1 to L, heads count from 0. Raw attention, head by head, is set beside two maps that
combine layers: rollout, and the positive part of gradient x attention (gradient of the logit of the predicted token),
averaged over heads and layers. Where a model cuts an image into several patch grids, the attention of all of them is
summed on the finest one by area, so that none is left out.

Each score has two chance levels. `chance` is the score of a map that knows nothing about the object. `null_mean` and
`null_q95` are the scores of the same maps with objects of other images, so a habit of looking at the center raises them
too. For component entropies both come from the same maps with their patches shuffled, for mass and Shannon entropy from
uniform attention.

What the numbers do not show is that the model uses what a head reads: only an intervention can show that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from PIL import Image
from torch import Tensor

from workbench import figures as fig
from workbench.analysis.chunks import Chunk, Part, stacked
from workbench.analysis.command import main
from workbench.analysis.declaration import Analysis, Context, DataOptions, Result
from workbench.capture.attention import attention, gradient_attention, rollout
from workbench.capture.hidden_states import check_layers
from workbench.data import Dataset, Object, Sample, asked_object
from workbench.errors import ConfigError, DataError
from workbench.metrics import attention as metric
from workbench.mllm.family import Batch, VisualTokens
from workbench.runs import Run
from workbench.spatial.grids import canvas, object_coverage, sum_onto_grid
from workbench.stats import Interval, Kind, holm, mean_interval, mean_intervals, paired_differences, paired_test

SPREAD_MEASURES = {
    "mass": "attention on the image",
    "entropy_shannon": "Shannon entropy / ln(patches)",
    "entropy_raw": "component entropy (nats)",
    "entropy_components": "component entropy / ln(components)",
    "component_entropy": "component entropy / ln(patches)",
}
OBJECT_MEASURES = {
    "pointing": "pointing accuracy",
    "mass_ratio": "mass in the object / its area",
    "iou": "best-threshold IoU",
}
MEASURES = SPREAD_MEASURES | OBJECT_MEASURES
EXAMPLE_SIDE = 448  # longer side of a stored example image, in pixels, at most
MIN_IMAGES_PER_HALF = 2


@dataclass(frozen=True)
class Config(DataOptions):
    """What to read, and what to compare it with."""

    layers: tuple[int, ...] = ()
    """Blocks of the model to read, counted from 1; all by default."""
    questions: int = 4
    """Questions to ask about each image, at most; only those that name exactly one object, unless --no-localise."""
    localise: bool = True
    """Compare the maps with objects; --no-localise takes any data and any question, for mass and entropies alone."""
    null: int = 20
    """Draws for the null of each map: objects of other images, and shuffles of the map."""
    top: int = 5
    """Heads to choose on one half of the images and to report on the other."""
    examples: int = 3
    """Images whose attention maps are stored and drawn over them; 0 for none."""
    compare: int = 50
    """Reported images on which raw attention is compared with rollout and gradient x attention, at most; 0 for none."""

    def __post_init__(self) -> None:
        for name, least in (("questions", 1), ("null", 10), ("top", 1), ("examples", 0), ("compare", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}: expected at least {least}")


@dataclass(frozen=True)
class Question:
    """A question, and the object that it names (None with --no-localise)."""

    sample: Sample
    target: Object | None


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


def run(config: Config, context: Context) -> Result:
    """Measure every head of every layer, and report the best heads on images that they were not chosen on."""
    layers = check_layers(context.mllm, config.layers, first=1)
    questions = _questions(config, context.data)
    images = [question.sample.image_id for question in questions]
    reported = _reported(images, config.seed) if config.localise else np.ones(len(questions), dtype=bool)
    examples = _first_samples(images, reported, config.examples)
    parts = context.map(
        "attention",
        questions,
        partial(_measure_chunk, config, context, layers, questions, examples),
        depends=context.data.fingerprint,
    )
    measurements, example_rows = Measurements(_measures(config)), []
    tensors: dict[str, Tensor] = {}
    for part in parts:
        measurements.take(part.tensors)
        tensors |= {name: value for name, value in part.tensors.items() if name.startswith(("map_", "image_"))}
        example_rows += part.record["examples"]
    values, nulls = np.stack(measurements.values), np.stack(measurements.nulls)
    tables = {
        "scores": _scores(measurements, values, images, layers, config.seed),
        "layers": _by_layer(measurements, values, images, layers, config.seed),
        "samples": _samples(questions, reported, measurements),
        "examples": pd.DataFrame(
            example_rows, columns=["number", "sample_id", "question", "asked", *EDGES, *(f"asked_{e}" for e in EDGES)]
        ),
    }
    if config.localise:
        tables["heads"] = _chosen_heads(config, measurements, values, nulls, images, reported, layers)
        if config.compare and len(tables["heads"]):
            compared = _first_samples(images, reported, config.compare)
            tables["methods"], tables["compared"], maps = _compare_methods(
                config, context, layers, questions, compared, tables["heads"]
            )
            tensors |= maps
    # (sample, layer, head, measure), from which two models are compared pairwise
    by_sample = {"values": values, "nulls": nulls}
    tensors |= {name: torch.from_numpy(array.astype(np.float32)) for name, array in by_sample.items()}
    return Result(tables, tensors, {"measures": measurements.measures, "layers": layers})


# --- questions ------------------------------------------------------------------------------------


def _measures(config: Config) -> list[str]:
    return list(MEASURES if config.localise else SPREAD_MEASURES)


def _questions(config: Config, data: Dataset) -> list[Question]:
    """Return the first questions about each image; with `localise` only those that name exactly one object.

    Raises:
        DataError: with `localise`, the data set has no objects, or too few images have such a question.
    """
    if not config.localise:
        return [Question(sample, None) for scene in data.scenes for sample in scene[: config.questions]]
    if not any(sample.objects for sample in data):
        raise DataError(
            f"data set '{data.name}' has no objects to compare attention with: choose one that has, such as shapes:val,"
            " or pass --no-localise for mass and entropies alone"
        )
    questions: list[Question] = []
    for scene in data.scenes:
        targets = [(sample, asked_object(sample)) for sample in scene]
        questions += [Question(sample, target) for sample, target in targets if target is not None][: config.questions]
    if not questions:
        raise DataError(
            f"none of the {len(data)} questions of '{data.name}' names exactly one object of its image: choose other"
            " data, or pass --no-localise for mass and entropies alone"
        )
    images = len({question.sample.image_id for question in questions})
    if images < 2 * MIN_IMAGES_PER_HALF:
        raise DataError(
            f"{images} images have a question about exactly one object: expected at least {2 * MIN_IMAGES_PER_HALF},"
            " half to choose heads on and half to report; try a larger --limit"
        )
    return questions


def _reported(images: Sequence[str], seed: int) -> np.ndarray:
    """Return which samples belong to the half of the images that heads are reported on; bool, (sample,)."""
    image_ids = list(dict.fromkeys(images))
    order = np.random.default_rng(seed).permutation(len(image_ids))
    choosing = {image_ids[i] for i in order[: len(image_ids) // 2]}
    return np.array([image not in choosing for image in images])


def _first_samples(images: Sequence[str], reported: np.ndarray, count: int) -> list[int]:
    """Return the number of the first sample of each of the first `count` reported images."""
    first_of_image = {image: number for number, image in reversed(list(enumerate(images))) if reported[number]}
    return sorted(first_of_image.values())[:count]


def _samples(questions: list[Question], reported: np.ndarray, measurements: Measurements) -> pd.DataFrame:
    """Return one row for each sample: its question, the object it names, its half, and chance where that varies."""
    chance = np.array(measurements.chance)
    return pd.DataFrame(
        {
            "sample_id": [question.sample.id for question in questions],
            "image_id": [question.sample.image_id for question in questions],
            "question": [question.sample.question for question in questions],
            "asked": [question.target.name if question.target else "" for question in questions],
            "half": np.where(reported, "report", "choose"),
        }
        | {
            f"chance_{name}": chance[:, number]
            for number, name in enumerate(measurements.measures)
            if name in ("mass", *OBJECT_MEASURES)
        }
    )


# --- measuring ------------------------------------------------------------------------------------

EDGES = ("left", "top", "right", "bottom")


def _measure_chunk(
    config: Config,
    context: Context,
    layers: list[int],
    questions: list[Question],
    examples: list[int],
    chunk: Chunk[Question],
) -> Part:
    """Measure the attention of a chunk of `questions`, sample by sample; store the maps of `examples` only."""
    measurements = Measurements(_measures(config))
    tensors: dict[str, Tensor] = {}
    example_rows: list[tuple] = []
    for start, batch, last_positions in _batches(context, chunk):
        attention_rows = _last_rows(context, batch, last_positions, layers)
        for number, tiles in enumerate(context.mllm.visual_tokens(batch), start=start):
            grid = canvas(tiles)
            on_image = _on_image(attention_rows[number - start], tiles)
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


def _batches(context: Context, chunk: Chunk[Question]) -> Iterator[tuple[int, Batch, list[int]]]:
    """Yield the number of the first sample of each batch, the batch, and the last position of each prompt."""
    for start, questions in chunk.batches():
        samples = [question.sample for question in questions]
        batch = context.mllm.encode([sample.image for sample in samples], [sample.question for sample in samples])
        mask = batch.inputs["attention_mask"].cpu()
        yield start, batch, (mask.shape[1] - 1 - mask.flip(1).long().argmax(1)).tolist()


def _last_rows(context: Context, batch: Batch, last_positions: list[int], layers: list[int]) -> Tensor:
    """Return the attention of the last prompt position, (sample, layer, head, key)."""
    blocks = attention(context.mllm, batch, rows=[[position] for position in last_positions], layers=layers)
    return torch.stack([block[:, :, 0].float() for block in blocks], dim=1)


def _on_image(attention_rows: Tensor, tiles: Sequence[VisualTokens]) -> np.ndarray:
    """Return the attention on the visual tokens, (..., token), one tile after another."""
    return attention_rows[..., torch.cat([tile.index for tile in tiles]).cpu()].numpy()


def _others(config: Config, questions: Sequence[Question], number: int, rng: np.random.Generator) -> list[Object]:
    """Draw `null` of the objects that questions about other images name."""
    image = questions[number].sample.image_id
    others = [other.target for other in questions if other.target is not None and other.sample.image_id != image]
    return [others[i] for i in rng.integers(len(others), size=config.null)]


def _object_scores(maps: np.ndarray, inside: np.ndarray) -> list[np.ndarray]:
    """Return the OBJECT_MEASURES of maps (..., h, w); `inside` is the share of each patch that the object covers."""
    return [metric.pointing(maps, inside), metric.mass_ratio(maps, inside), metric.best_iou(maps, inside)]


def _object_chance(inside: np.ndarray, seed: int) -> list[float]:
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
    # component entropies by chance differ between heads, so that `_summarized` takes the mean of their null
    chance = [uniform_mass, 1.0, np.nan, np.nan, np.nan]
    target = questions[number].target
    if config.localise and target is not None:
        inside = object_coverage(target, grid)
        elsewhere = np.stack([object_coverage(other, grid) for other in _others(config, questions, number, rng)])
        values += _object_scores(maps, inside)
        nulls += _object_scores(maps, elsewhere)
        chance += _object_chance(inside, config.seed)
    null = np.stack(nulls, axis=-1)
    measurements.values.append(np.stack(values, axis=-1))
    measurements.chance.append(np.array(chance, dtype=float))
    measurements.nulls.append(_mean(null, 0))
    measurements.pairings.append(_mean(null, 2))
    null_sums, null_counts = np.nan_to_num(null), ~np.isnan(null)
    measurements.null_sums = null_sums + (0 if measurements.null_sums is None else measurements.null_sums)
    measurements.null_counts = null_counts + (0 if measurements.null_counts is None else measurements.null_counts)


def _spread_scores(mass: np.ndarray, maps: np.ndarray) -> list[np.ndarray]:
    """Return the SPREAD_MEASURES of maps (..., h, w) in their order."""
    entropies = metric.entropies(maps)
    return [mass, entropies.shannon, entropies.component, entropies.per_components, entropies.per_cells]


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
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


# --- raw attention beside rollout and gradients ---------------------------------------------------


def _compare_methods(
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
    nulls = _mean(stacked(parts, "nulls").numpy(), 0)
    chance = _mean(stacked(parts, "chance").numpy(), 0)
    tensors = {name: value for part in parts for name, value in part.tensors.items() if name.startswith("methods_")}
    intervals = _intervals(values, list(OBJECT_MEASURES), [question.sample.image_id for question in compared_questions])
    score_rows, value_rows = [], []
    for number, method in enumerate(methods):
        for m, measure in enumerate(OBJECT_MEASURES):
            n = int((~np.isnan(values[:, number, m])).sum())
            scores = _summarized(next(intervals), chance[m], nulls[:, number, m], n, config.seed)
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
    for start, batch, last_positions in _batches(context, chunk):
        raw = _last_rows(context, batch, last_positions, layers)
        gradient_blocks = gradient_attention(context.mllm, batch, rows=last_positions, layers=layers)
        gradient = torch.stack([block.float().clamp_min(0).mean(1) for block in gradient_blocks]).mean(0)
        rolled_out = rollout(context.mllm, batch, rows=last_positions)
        by_method = torch.stack([raw[:, layers.index(layer), head], raw.mean((1, 2)), rolled_out, gradient], dim=1)
        for number, tiles in enumerate(context.mllm.visual_tokens(batch), start=start):
            grid, target = canvas(tiles), questions[compared[number]].target
            assert target is not None
            rng = np.random.default_rng([config.seed, compared[number], 1])
            maps = metric.renormalized(sum_onto_grid(_on_image(by_method[number - start], tiles), tiles, grid))
            inside = object_coverage(target, grid)
            others = _others(config, questions, compared[number], rng)
            elsewhere = np.stack([object_coverage(other, grid) for other in others])
            values.append(np.stack(_object_scores(maps, inside), axis=-1))
            nulls.append(np.stack(_object_scores(maps, elsewhere), axis=-1))
            chance.append(_object_chance(inside, config.seed))
            if number < config.examples:
                tensors[f"methods_{number}"] = torch.from_numpy(maps[2:].astype(np.float32))
    arrays = {"values": np.stack(values), "nulls": np.stack(nulls), "chance": np.array(chance, dtype=float)}
    return Part(tensors={name: torch.from_numpy(array) for name, array in arrays.items()} | tensors)


# --- tables ---------------------------------------------------------------------------------------


def _scores(
    measurements: Measurements, values: np.ndarray, images: list[str], layers: list[int], seed: int
) -> pd.DataFrame:
    """Return the mean of every head over samples, with its interval over images."""
    assert measurements.null_sums is not None and measurements.null_counts is not None
    with np.errstate(invalid="ignore"):
        nulls = measurements.null_sums / measurements.null_counts
    intervals = _intervals(values, measurements.measures, images)
    chance = _mean(np.array(measurements.chance), 0)
    rows = []
    for number, layer in enumerate(layers):
        for head in range(values.shape[2]):
            for m, name in enumerate(measurements.measures):
                n = int((~np.isnan(values[:, number, head, m])).sum())
                scores = _summarized(next(intervals), chance[m], nulls[:, number, head, m], n, seed)
                rows.append({"layer": layer, "head": head, "measure": name} | scores)
    return pd.DataFrame(rows)


def _by_layer(
    measurements: Measurements, values: np.ndarray, images: list[str], layers: list[int], seed: int
) -> pd.DataFrame:
    """Return the mean over the heads of each layer, with its interval over images."""
    means, nulls = _mean(values, 2), _mean(np.stack(measurements.pairings), 0)
    chance = _mean(np.array(measurements.chance), 0)
    intervals = _intervals(means, measurements.measures, images)
    rows = []
    for number, layer in enumerate(layers):
        for m, name in enumerate(measurements.measures):
            n = int((~np.isnan(means[:, number, m])).sum())
            scores = _summarized(next(intervals), chance[m], nulls[:, number, m], n, seed)
            rows.append({"layer": layer, "measure": name} | scores)
    return pd.DataFrame(rows)


def _intervals(values: np.ndarray, measures: Sequence[str], images: Sequence[str]) -> Iterator[Interval]:
    """Yield the means of `values` (sample, ..., measure) over samples with intervals over images, last axis fastest.

    Pointing is right or wrong, so its interval is that of a proportion.
    """
    kinds: list[Kind] = ["proportion" if measure == "pointing" else "real" for measure in measures]
    by_measure = [
        mean_intervals(values[..., m].reshape(len(values), -1), kind=kind, groups=images)
        for m, kind in enumerate(kinds)
    ]
    return (interval for column in zip(*by_measure, strict=True) for interval in column)


def _summarized(interval: Interval, chance: float, nulls: np.ndarray, n: int, seed: int) -> dict[str, float]:
    """Return the columns of one score; where `chance` is NaN it is the mean of `nulls` (draw,)."""
    return {
        "score": interval.estimate,
        "low": interval.low,
        "high": interval.high,
        "chance": float(nulls.mean() if np.isnan(chance) else chance),
        "null_mean": float(nulls.mean()),
        "null_q95": float(np.quantile(nulls, 0.95)),
        "n_images": interval.n,
        "n": n,
        "seed": seed,
    }


def _chosen_heads(
    config: Config,
    measurements: Measurements,
    values: np.ndarray,
    nulls: np.ndarray,
    images: list[str],
    reported: np.ndarray,
    layers: list[int],
) -> pd.DataFrame:
    """Choose the `top` heads on one half of the images, and report them on the other half.

    Heads are chosen by how much more often they point at the question's object than at objects of other images. `p` is
    a paired test of that gain over the reported images; `p_holm` corrects it for the number of chosen heads.
    """
    pointing, mass_ratio, iou = (measurements.measures.index(name) for name in OBJECT_MEASURES)
    gain = _mean((values - nulls)[~reported][..., pointing], 0)
    order = np.argsort(-np.nan_to_num(gain, nan=-np.inf), axis=None, kind="stable")[: config.top]
    reported_images = np.array(images)[reported]
    chance = _mean(np.array(measurements.chance)[reported], 0)
    rows = []
    for rank, (number, head) in enumerate(zip(*np.unravel_index(order, gain.shape), strict=True), start=1):
        asked, others = values[reported, number, head], nulls[reported, number, head]
        defined = ~np.isnan(asked[:, pointing] - others[:, pointing])
        if not defined.any():
            continue  # this head gives the image no attention at all in this half
        asked, others, groups = asked[defined], others[defined], reported_images[defined]
        interval = mean_interval(asked[:, pointing], kind="proportion", groups=groups)
        by_question = pd.DataFrame({"image": groups, "asked": asked[:, pointing], "others": others[:, pointing]})
        by_image = by_question.groupby("image", sort=False).mean()
        tested = paired_test(by_image["others"], by_image["asked"], seed=config.seed)
        ratio_interval, iou_interval = mean_intervals(asked[:, [mass_ratio, iou]], kind="real", groups=groups)
        rows.append(
            {
                "rank": rank,
                "layer": layers[number],
                "head": int(head),
                "pointing": interval.estimate,
                "low": interval.low,
                "high": interval.high,
                "chance": chance[pointing],
                "null_mean": float(others[:, pointing].mean()),
                "gain": tested.difference,
                "gain_low": tested.low,
                "gain_high": tested.high,
                "p": tested.p,
                "gain_when_chosen": float(gain[number, head]),
                "mass_ratio": ratio_interval.estimate,
                "mass_ratio_low": ratio_interval.low,
                "mass_ratio_high": ratio_interval.high,
                "iou": iou_interval.estimate,
                "iou_low": iou_interval.low,
                "iou_high": iou_interval.high,
                "iou_chance": chance[iou],
                "n_images": interval.n,
                "n": len(asked),
                "seed": config.seed,
            }
        )
    table = pd.DataFrame(rows)
    if len(table):
        table.insert(table.columns.get_loc("p") + 1, "p_holm", holm(table["p"].to_numpy()))
    return table


def differences(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Subtract the first model from every other, by layer and measure, on the images that both were asked about.

    Values are means over heads, paired by image; p_holm corrects over all layers and measures. Interval and p are over
    images, for these very models: they say nothing about other training seeds. The table is empty for a single model,
    or for models that share no image.
    """
    seed = int(next(iter(runs.values())).record["seed"])
    means = {label: _image_means(run).rename("value").reset_index() for label, run in runs.items()}
    return paired_differences(means, by=("measure", "layer"), seed=seed)


def _image_means(run: Run) -> pd.Series:
    """Return the mean over heads and over the questions of an image, indexed by measure, layer and image."""
    measures, layers = run.record["measures"], run.record["layers"]
    means = _mean(run.tensors["values"].double().numpy(), 2)
    images = run.tables["samples"]["image_id"]
    columns = pd.MultiIndex.from_product([layers, measures], names=["layer", "measure"])
    by_sample = pd.DataFrame(means.reshape(len(means), -1), columns=columns, index=images)
    by_image = by_sample.groupby(level=0, sort=False).mean()
    return by_image.stack(["measure", "layer"], future_stack=True).reorder_levels(["measure", "layer", "image_id"])


def summary(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Return the chosen heads on the reported half of the images, or the layers' means where maps met no objects."""
    if any("heads" not in run.tables for run in runs.values()):
        layer_tables = pd.concat([run.tables["layers"].assign(model=label) for label, run in runs.items()])
        return layer_tables[["model", *next(iter(runs.values())).tables["layers"]]]
    columns = ["model", "layer", "head", "pointing", "low", "high", "chance", "null_mean"]
    columns += ["gain", "gain_low", "gain_high", "p_holm", "mass_ratio", "iou", "iou_chance", "n_images", "n"]
    return pd.concat([run.tables["heads"].assign(model=label) for label, run in runs.items()])[columns]


# --- figures --------------------------------------------------------------------------------------


def figures(runs: Mapping[str, Run]) -> dict[str, go.Figure]:
    """Draw overlays of the best head, the chosen heads and the methods; then each measure by layer and by head."""
    drawn: dict[str, go.Figure] = {}
    overlays = [row for label, run in runs.items() for row in _overlays(label, run)]
    if overlays:
        drawn["Attention over the image, of a head that was chosen on other images"] = fig.overlays(overlays)
    head_tables = {label: run.tables["heads"] for label, run in runs.items() if len(run.tables.get("heads", ()))}
    if head_tables:
        heads = pd.concat(
            [
                table.assign(model=label, name=[f"L{row.layer} H{row.head}" for row in table.itertuples()])
                for label, table in head_tables.items()
            ]
        )
        drawn["Chosen heads on the held-out half"] = fig.points(heads, y="pointing", title=OBJECT_MEASURES["pointing"])
    method_tables = {label: run.tables["methods"] for label, run in runs.items() if "methods" in run.tables}
    if method_tables:
        methods = pd.concat([table.assign(model=label, name=table["method"]) for label, table in method_tables.items()])
        for name, title in OBJECT_MEASURES.items():
            drawn[f"{title}: raw attention, rollout and gradient x attention"] = fig.points(
                methods[methods["measure"] == name], y="score", title=title
            )
    by_head = pd.concat([run.tables["scores"].assign(model=label) for label, run in runs.items()])
    by_layer = pd.concat([run.tables["layers"].assign(model=label) for label, run in runs.items()])
    all_changes = differences(runs)
    for name, title in MEASURES.items():
        if name not in set(by_layer["measure"]):
            continue
        drawn[f"{title}: by layer"] = fig.layer_curves(by_layer[by_layer["measure"] == name], y=title, kind="measure")
        changes = all_changes[all_changes["measure"] == name]
        if len(changes):
            drawn[f"{title}: difference by layer"] = fig.difference_curves(
                changes, y=f"{title}, minus {changes['against'].iloc[0]}"
            )
        drawn[f"{title}: by head"] = fig.head_maps(by_head[by_head["measure"] == name], title=title)
    return drawn


def _overlays(label: str, run: Run) -> list[list[fig.Overlay]]:
    """Return rows of overlays on the stored examples: the best head, rollout, gradient x attention.

    The best head was chosen on the other half of the images; where there is none, the mean of the last layer is drawn.
    """
    layers, heads = run.record["layers"], run.tables.get("heads")
    rows: list[list[fig.Overlay]] = [[], [], []]
    for example in run.tables["examples"].itertuples():
        head_maps = run.tensors[f"map_{example.number}"].numpy()
        if heads is not None and len(heads):
            layer, head = int(heads["layer"][0]), int(heads["head"][0])
            maps = [(f"L{layer} H{head}", head_maps[layers.index(layer), head])]
        else:
            maps = [(f"L{layers[-1]}, all heads", _mean(head_maps[-1], 0))]
        if f"methods_{example.number}" in run.tensors:
            method_maps = run.tensors[f"methods_{example.number}"].numpy()
            maps += zip(("rollout", "gradient x attention"), method_maps, strict=True)
        target_box = (example.asked_left, example.asked_top, example.asked_right, example.asked_bottom)
        image = run.tensors[f"image_{example.number}"].numpy()
        grid_box = (example.left, example.top, example.right, example.bottom)
        for row, (name, values) in zip(rows, maps, strict=False):
            title = f"{label} · {name}<br>{example.question}"
            row.append(fig.Overlay(title, image, values, grid_box, target_box if example.asked else None))
    return [row for row in rows if row]


# versions: 2 intervals with their stated coverage; 3 `component_entropy` renamed; 4 null draws of each sample
ANALYSIS = Analysis(
    "attention", "Where attention heads look, and which find the object", Config, run, figures, summary, version=4
)

if __name__ == "__main__":
    main(ANALYSIS)
