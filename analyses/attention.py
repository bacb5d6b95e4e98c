"""Where each attention head looks in the image when the answer is due (docs/paper.md, A3 and A4).

    python -m analyses.attention --model runs/baseline runs/viral --data shapes:val --limit 200 --output_dir runs

The row read is that of the last prompt position, which predicts the first answer token; later answer tokens are not
read. Where a question names one object of its image, the map is compared with that object. What the numbers are not:
evidence that the model uses what a head reads (that takes an intervention). Layers are the blocks 1 to L, heads count
from 0. Raw attention, head by head, is set beside two maps that combine layers: rollout, and the positive part of
gradient x attention (of the logit of the predicted token), averaged over heads and layers.

A model that cuts an image into several rasters has all of them laid on the finest one by area, so that no attention is
left out. Each score has its chance level twice: `chance` is that of a map that knows nothing, `null_mean` to `null_q95`
that of the same maps with another image's object, which a habit of looking at the centre raises too. For component
entropies both are those of the shuffled maps, for mass and Shannon of uniform attention.
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

SPREAD = {
    "mass": "attention on the image",
    "entropy_shannon": "Shannon entropy / ln(cells)",
    "entropy_raw": "component entropy (nats)",
    "entropy_components": "component entropy / ln(components)",
    "component_entropy": "component entropy / ln(cells)",
}
FINDING = {"pointing": "pointing accuracy", "mass_ratio": "mass in the object / its area", "iou": "best-threshold IoU"}
MEASURES = SPREAD | FINDING
SIDE = 448  # pixels of a stored example at most
HALF = 2  # images in each half, at least


@dataclass(frozen=True)
class Config(DataOptions):
    """What to read, and what to compare it with."""

    layers: tuple[int, ...] = ()
    """Blocks of the model, 1 to L; all by default."""
    questions: int = 4
    """Questions of each image, at most; those that name exactly one of its objects."""
    localise: bool = True
    """Compare the maps with objects; --no-localise takes any question and any data, for mass and entropies alone."""
    null: int = 20
    """Other images' objects, and shuffles, for the null of each map."""
    top: int = 5
    """Heads to choose on one half of the images and to report on the other."""
    examples: int = 3
    """Images whose maps are stored for the overlays."""
    compare: int = 50
    """Images of the half reported on, at most, where raw attention is set beside rollout and gradient x attention; 0
    for none."""

    def __post_init__(self) -> None:
        for name, least in (("questions", 1), ("null", 10), ("top", 1), ("examples", 0), ("compare", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}: expected at least {least}")


@dataclass(frozen=True)
class Asked:
    """A question, and the object that it names."""

    sample: Sample
    thing: Object | None


@dataclass
class Reading:
    """What was measured, by sample; an axis `measure` follows MEASURES, as far as they apply."""

    measures: list[str]
    values: list[np.ndarray] = field(default_factory=list)  # (layer, head, measure)
    chance: list[np.ndarray] = field(default_factory=list)  # (measure,)
    nulls: list[np.ndarray] = field(default_factory=list)  # (layer, head, measure), mean over the pairings
    pairings: list[np.ndarray] = field(default_factory=list)  # (pairing, layer, measure), mean over heads, and
    heads: np.ndarray | None = None  # (pairing, layer, head, measure), sums over samples, and
    counted: np.ndarray | None = None  # how many of them were defined

    def tensors(self) -> dict[str, Tensor]:
        """Its state, to be stored."""
        assert self.heads is not None and self.counted is not None
        arrays = {name: np.stack(getattr(self, name)) for name in BY_SAMPLE} | {
            "heads": self.heads,
            "counted": self.counted,
        }
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Add the state of another reading, of the samples that follow."""
        for name in BY_SAMPLE:
            getattr(self, name).extend(tensors[name].numpy())
        self.heads = tensors["heads"].numpy() + (0 if self.heads is None else self.heads)
        self.counted = tensors["counted"].numpy() + (0 if self.counted is None else self.counted)


BY_SAMPLE = ("values", "chance", "nulls", "pairings")


def run(config: Config, context: Context) -> Result:
    """Measure every head of every layer, and report the heads that find the object on images they were not chosen
    on."""
    layers = check_layers(context.mllm, config.layers, first=1)
    asked = _questions(config, context.data)
    images = [a.sample.image_id for a in asked]
    report = _reported(images, config.seed) if config.localise else np.ones(len(asked), dtype=bool)
    shown = _examples(images, report, config.examples)
    parts = context.map(
        "attention", asked, partial(_read, config, context, layers, asked, shown), depends=context.data.fingerprint
    )
    reading, rows = Reading(list(MEASURES if config.localise else SPREAD)), []
    tensors: dict[str, Tensor] = {}
    for part in parts:
        reading.take(part.tensors)
        tensors |= {name: value for name, value in part.tensors.items() if name.startswith(("map_", "image_"))}
        rows += part.record["examples"]
    values, nulls = np.stack(reading.values), np.stack(reading.nulls)
    tables = {
        "scores": _scores(reading, values, images, layers, config.seed),
        "layers": _by_layer(reading, values, images, layers, config.seed),
        "samples": pd.DataFrame(
            {
                **{
                    "sample_id": [a.sample.id for a in asked],
                    "image_id": images,
                    "question": [a.sample.question for a in asked],
                },
                **{
                    "asked": [a.thing.name if a.thing else "" for a in asked],
                    "half": np.where(report, "report", "choose"),
                },
                **{
                    f"chance_{name}": np.array(reading.chance)[:, number]
                    for number, name in enumerate(reading.measures)
                    if name in ("mass", *FINDING)
                },
            }
        ),
        "examples": pd.DataFrame(
            rows, columns=["number", "sample_id", "question", "asked", *EDGES, *(f"asked_{e}" for e in EDGES)]
        ),
    }
    if config.localise:
        tables["heads"] = _heads(config, reading, values, nulls, images, report, layers)
        if config.compare and len(tables["heads"]):
            tables["methods"], tables["compared"], maps = _methods(
                config, context, layers, asked, _examples(images, report, config.compare), tables["heads"]
            )
            tensors |= maps
    # (sample, layer, head, measure), so that two models are compared pairwise
    stored = {"values": values, "nulls": nulls}
    tensors |= {name: torch.from_numpy(array.astype(np.float32)) for name, array in stored.items()}
    return Result(tables, tensors, {"measures": reading.measures, "layers": layers})


# --- what is asked --------------------------------------------------------------------------------


def _questions(config: Config, data: Dataset) -> list[Asked]:
    """The first questions of each image, those that name exactly one object where maps are compared with objects."""
    if not config.localise:
        return [Asked(sample, None) for scene in data.scenes for sample in scene[: config.questions]]
    if not any(sample.objects for sample in data):
        raise DataError(
            f"data set '{data.name}' knows no objects: expected one that does, such as shapes:val, or --no-localise for"
            " mass and entropies alone"
        )
    found = []
    for scene in data.scenes:
        own = [(sample, asked_object(sample)) for sample in scene]
        found += [Asked(sample, thing) for sample, thing in own if thing is not None][: config.questions]
    if not found:
        raise DataError(
            f"none of the {len(data)} questions of '{data.name}' names exactly one object of its image: expected some,"
            " or --no-localise"
        )
    images = len({a.sample.image_id for a in found})
    if images < 2 * HALF:
        raise DataError(
            f"{images} images have a question about exactly one object: expected at least {2 * HALF}, half to choose"
            " heads on and half to report"
        )
    return found


def _reported(images: Sequence[str], seed: int) -> np.ndarray:
    """Which samples belong to the half of the images that heads are reported on."""
    names = list(dict.fromkeys(images))
    order = np.random.default_rng(seed).permutation(len(names))
    chosen = {names[i] for i in order[: len(names) // 2]}
    return np.array([image not in chosen for image in images])


def _examples(images: Sequence[str], report: np.ndarray, count: int) -> list[int]:
    """The first sample of each of the first images that are reported on."""
    first = {image: number for number, image in reversed(list(enumerate(images))) if report[number]}
    return sorted(first.values())[:count]


# --- reading --------------------------------------------------------------------------------------

EDGES = ("left", "top", "right", "bottom")


def _read(
    config: Config, context: Context, layers: list[int], asked: list[Asked], shown: list[int], chunk: Chunk[Asked]
) -> Part:
    """Read the attention of a chunk of `asked` and measure it sample by sample; maps are kept of the samples `shown`
    only."""
    reading = Reading(list(MEASURES if config.localise else SPREAD))
    tensors: dict[str, Tensor] = {}
    rows: list[tuple] = []
    for start, batch, last in _batches(context, chunk):
        blocks = attention(context.mllm, batch, rows=[[position] for position in last], layers=layers)
        given = torch.stack([block[:, :, 0].float() for block in blocks], dim=1)  # (sample, layer, head, key)
        for number, parts in enumerate(context.mllm.visual_tokens(batch), start=start):
            raster = canvas(parts)
            own = _on_image(given[number - start], parts)
            maps = metric.renormalized(sum_onto_grid(own, parts, raster))
            uniform = own.shape[-1] / int(batch.inputs["attention_mask"][number - start].sum())
            _measure(config, reading, asked, number, raster, own.sum(-1), maps, uniform)
            if number in shown:
                name, sample, thing = shown.index(number), asked[number].sample, asked[number].thing
                tensors[f"map_{name}"] = torch.from_numpy(maps.astype(np.float32))
                tensors[f"image_{name}"] = torch.from_numpy(np.array(_reduced(batch.images[number - start][0])))
                rows.append((name, sample.id, sample.question, thing.name if thing else "", *raster.box, *_box(thing)))
    return Part(tensors=reading.tensors() | tensors, record={"examples": rows})


def _batches(context: Context, chunk: Chunk[Asked]) -> Iterator[tuple[int, Batch, list[int]]]:
    """(number of its first sample, the batch, the last position of each prompt)."""
    for start, part in chunk.batches():
        batch = context.mllm.encode([a.sample.image for a in part], [a.sample.question for a in part])
        mask = batch.inputs["attention_mask"].cpu()
        yield start, batch, (mask.shape[1] - 1 - mask.flip(1).long().argmax(1)).tolist()


def _on_image(rows: Tensor, parts: Sequence[VisualTokens]) -> np.ndarray:
    """What rows of attention give to the visual tokens, all parts one after another."""
    return rows[..., torch.cat([part.index for part in parts]).cpu()].numpy()


def _others(config: Config, asked: Sequence[Asked], number: int, rng: np.random.Generator) -> list[Object]:
    """Objects that questions about other images name, drawn at random."""
    others = [
        other.thing
        for other in asked
        if other.thing is not None and other.sample.image_id != asked[number].sample.image_id
    ]
    return [others[i] for i in rng.integers(len(others), size=config.null)]


def _find(maps: np.ndarray, inside: np.ndarray) -> list[np.ndarray]:
    return [metric.pointing(maps, inside), metric.mass_ratio(maps, inside), metric.best_iou(maps, inside)]


def _finding_chance(inside: np.ndarray, seed: int) -> list[float]:
    return [float(metric.touched(inside)), 1.0, metric.random_iou(inside, seed=seed)]


def _measure(
    config: Config,
    reading: Reading,
    asked: list[Asked],
    number: int,
    raster: VisualTokens,
    mass: np.ndarray,
    maps: np.ndarray,
    uniform: float,
) -> None:
    """Every measure of one sample's maps (layer, head, h, w), beside its null."""
    rng = np.random.default_rng([config.seed, number])
    cells = rng.permuted(np.tile(np.arange(maps[0, 0].size), (config.null, 1)), axis=1)
    shuffled = np.moveaxis(
        maps.reshape(*maps.shape[:2], -1)[..., cells].reshape(*maps.shape[:2], config.null, *maps.shape[2:]), 2, 0
    )
    values, nulls = _spread(mass, maps), _spread(np.broadcast_to(uniform, shuffled.shape[:3]), shuffled)
    nulls[1] = np.ones_like(nulls[1])
    # of shuffled maps: it depends on the head, so it is the null's mean
    chance = [uniform, 1.0, np.nan, np.nan, np.nan]
    thing = asked[number].thing
    if config.localise and thing is not None:
        inside = object_coverage(thing, raster)
        elsewhere = np.stack([object_coverage(other, raster) for other in _others(config, asked, number, rng)])
        values += _find(maps, inside)
        nulls += _find(maps, elsewhere)
        chance += _finding_chance(inside, config.seed)
    reading.values.append(np.stack(values, axis=-1))
    reading.chance.append(np.array(chance, dtype=float))
    null = np.stack(nulls, axis=-1)
    reading.nulls.append(_mean(null, 0))
    defined = ~np.isnan(null)
    reading.heads = np.nan_to_num(null) + (0 if reading.heads is None else reading.heads)
    reading.counted = defined + (0 if reading.counted is None else reading.counted)
    reading.pairings.append(_mean(null, 2))


def _spread(mass: np.ndarray, maps: np.ndarray) -> list[np.ndarray]:
    found = metric.entropies(maps)
    return [mass, found.shannon, found.component, found.per_components, found.per_cells]


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
    """The mean of what is defined; NaN where nothing is."""
    with np.errstate(invalid="ignore"):
        return np.nansum(values, axis=axis) / (~np.isnan(values)).sum(axis=axis)


def _reduced(image: Image.Image) -> Image.Image:
    scale = min(1.0, SIDE / max(image.size))
    return (
        image
        if scale == 1
        else image.resize(
            (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.LANCZOS
        )
    )


def _box(thing: Object | None) -> tuple[float, ...]:
    return (float("nan"),) * 4 if thing is None else thing.box


def _methods(
    config: Config, context: Context, layers: list[int], asked: list[Asked], picks: list[int], heads: pd.DataFrame
) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, Tensor]]:
    """Raw attention beside rollout and gradient x attention, on one question of each image; table, per-sample values,
    and the examples' maps."""
    layer, head = int(heads["layer"][0]), int(heads["head"][0])
    names = [f"raw, L{layer} H{head}", "raw, mean of heads and layers", "rollout", "gradient x attention"]
    part = [asked[i] for i in picks]
    fn = partial(_compared, config, context, layers, asked, picks, (layer, head))
    parts = context.map("rollout and gradients", part, fn, depends=(context.data.fingerprint, layer, head))
    found = stacked(parts, "values").numpy()
    means = _mean(stacked(parts, "nulls").numpy(), 0)
    chances = _mean(stacked(parts, "chance").numpy(), 0)
    tensors = {name: value for one in parts for name, value in one.tensors.items() if name.startswith("methods_")}
    intervals = _intervals(found, list(FINDING), [a.sample.image_id for a in part])
    rows, single = [], []
    for at, name in enumerate(names):
        for m, measure in enumerate(FINDING):
            n = int((~np.isnan(found[:, at, m])).sum())
            rows.append(
                {"method": name, "measure": measure}
                | _row(next(intervals), chances[m], means[:, at, m], n, config.seed)
            )
            single += [
                (a.sample.id, a.sample.image_id, name, measure, v)
                for a, v in zip(part, found[:, at, m].tolist(), strict=True)
            ]
    return (
        pd.DataFrame(rows),
        pd.DataFrame(single, columns=["sample_id", "image_id", "method", "measure", "value"]),
        tensors,
    )


def _compared(
    config: Config,
    context: Context,
    layers: list[int],
    asked: list[Asked],
    picks: list[int],
    best: tuple[int, int],
    chunk: Chunk[Asked],
) -> Part:
    """Values (sample, method, measure), nulls and chance of a chunk of the samples `picks`, and the maps of the
    examples; `best` is a layer and its head."""
    layer, head = best
    values, nulls, chance, tensors = [], [], [], {}
    for start, batch, last in _batches(context, chunk):
        blocks = attention(context.mllm, batch, rows=[[position] for position in last], layers=layers)
        raw = torch.stack([block[:, :, 0].float() for block in blocks], dim=1)
        helped = torch.stack(
            [
                block.float().clamp_min(0).mean(1)
                for block in gradient_attention(context.mllm, batch, rows=last, layers=layers)
            ]
        ).mean(0)
        each = torch.stack(
            [raw[:, layers.index(layer), head], raw.mean((1, 2)), rollout(context.mllm, batch, rows=last), helped],
            dim=1,
        )
        for number, parts in enumerate(context.mllm.visual_tokens(batch), start=start):
            raster, thing, rng = (
                canvas(parts),
                asked[picks[number]].thing,
                np.random.default_rng([config.seed, picks[number], 1]),
            )
            assert thing is not None
            maps = metric.renormalized(sum_onto_grid(_on_image(each[number - start], parts), parts, raster))
            inside = object_coverage(thing, raster)
            elsewhere = np.stack(
                [object_coverage(other, raster) for other in _others(config, asked, picks[number], rng)]
            )
            values.append(np.stack(_find(maps, inside), axis=-1))
            nulls.append(np.stack(_find(maps, elsewhere), axis=-1))
            chance.append(_finding_chance(inside, config.seed))
            if number < config.examples:
                tensors[f"methods_{number}"] = torch.from_numpy(maps[2:].astype(np.float32))
    arrays = {"values": np.stack(values), "nulls": np.stack(nulls), "chance": np.array(chance, dtype=float)}
    return Part(tensors={name: torch.from_numpy(array) for name, array in arrays.items()} | tensors)


# --- tables ---------------------------------------------------------------------------------------


def _scores(reading: Reading, values: np.ndarray, images: list[str], layers: list[int], seed: int) -> pd.DataFrame:
    """Every head's mean over samples, with its interval over images."""
    assert reading.heads is not None and reading.counted is not None
    with np.errstate(invalid="ignore"):
        nulls = reading.heads / reading.counted
    intervals = _intervals(values, reading.measures, images)
    chance = _mean(np.array(reading.chance), 0)
    rows = []
    for at, layer in enumerate(layers):
        for head in range(values.shape[2]):
            for m, name in enumerate(reading.measures):
                n = int((~np.isnan(values[:, at, head, m])).sum())
                rows.append(
                    {"layer": layer, "head": head, "measure": name}
                    | _row(next(intervals), chance[m], nulls[:, at, head, m], n, seed)
                )
    return pd.DataFrame(rows)


def _by_layer(reading: Reading, values: np.ndarray, images: list[str], layers: list[int], seed: int) -> pd.DataFrame:
    """The mean over a layer's heads, with its interval over images."""
    means, nulls, chance = _mean(values, 2), _mean(np.stack(reading.pairings), 0), _mean(np.array(reading.chance), 0)
    intervals = _intervals(means, reading.measures, images)
    rows = []
    for at, layer in enumerate(layers):
        for m, name in enumerate(reading.measures):
            n = int((~np.isnan(means[:, at, m])).sum())
            rows.append({"layer": layer, "measure": name} | _row(next(intervals), chance[m], nulls[:, at, m], n, seed))
    return pd.DataFrame(rows)


def _intervals(values: np.ndarray, measures: Sequence[str], images: Sequence[str]) -> Iterator[Interval]:
    """Means of `values` (sample, ..., measure) over samples with intervals over images, the measure running fastest;
    pointing is right or wrong."""
    kinds: list[Kind] = ["proportion" if measure == "pointing" else "real" for measure in measures]
    each = [
        mean_intervals(values[..., m].reshape(len(values), -1), kind=kind, groups=images)
        for m, kind in enumerate(kinds)
    ]
    return (interval for column in zip(*each, strict=True) for interval in column)


def _row(interval: Interval, chance: float, nulls: np.ndarray, n: int, seed: int) -> dict[str, float]:
    known = float(nulls.mean() if np.isnan(chance) else chance)
    return {
        **{"score": interval.estimate, "low": interval.low, "high": interval.high, "chance": known},
        **{
            "null_mean": float(nulls.mean()),
            "null_q95": float(np.quantile(nulls, 0.95)),
            "n_images": interval.n,
            "n": n,
            "seed": seed,
        },
    }


def _heads(
    config: Config,
    reading: Reading,
    values: np.ndarray,
    nulls: np.ndarray,
    images: list[str],
    report: np.ndarray,
    layers: list[int],
) -> pd.DataFrame:
    """The `top` heads by pointing above other images' objects on one half of the images, and what they do on the other
    half.

    `p` is a paired test over images, the question's own object against other images' objects; `p_holm` corrects it for
    the heads chosen.
    """
    m = reading.measures.index("pointing")
    gain = _mean((values - nulls)[~report][..., m], 0)
    order = np.argsort(-np.nan_to_num(gain, nan=-np.inf), axis=None, kind="stable")[: config.top]
    groups = np.array(images)[report]
    chance = _mean(np.array(reading.chance)[report], 0)
    rows = []
    for rank, (at, head) in enumerate(zip(*np.unravel_index(order, gain.shape), strict=True), start=1):
        own, other = values[report, at, head], nulls[report, at, head]
        kept = ~np.isnan(own[:, m] - other[:, m])
        if not kept.any():
            continue  # attends the image nowhere in this half
        interval = mean_interval(own[kept, m], kind="proportion", groups=groups[kept])
        per_image = (
            pd.DataFrame({"image": groups[kept], "own": own[kept, m], "other": other[kept, m]})
            .groupby("image", sort=False)
            .mean()
        )
        tested = paired_test(per_image["other"], per_image["own"], seed=config.seed)
        also = [reading.measures.index(name) for name in ("mass_ratio", "iou")]
        ratio, iou = mean_intervals(own[kept][:, also], kind="real", groups=groups[kept])
        rows.append(
            {
                **{
                    "rank": rank,
                    "layer": layers[at],
                    "head": int(head),
                    "pointing": interval.estimate,
                    "low": interval.low,
                    "high": interval.high,
                },
                **{
                    "chance": chance[m],
                    "null_mean": float(other[kept, m].mean()),
                    "gain": tested.difference,
                    "gain_low": tested.low,
                },
                **{"gain_high": tested.high, "p": tested.p, "gain_when_chosen": float(gain[at, head])},
                **{"mass_ratio": ratio.estimate, "mass_ratio_low": ratio.low, "mass_ratio_high": ratio.high},
                **{
                    "iou": iou.estimate,
                    "iou_low": iou.low,
                    "iou_high": iou.high,
                    "iou_chance": chance[reading.measures.index("iou")],
                },
                **{"n_images": interval.n, "n": int(kept.sum()), "seed": config.seed},
            }
        )
    table = pd.DataFrame(rows)
    if len(table):
        table.insert(table.columns.get_loc("p") + 1, "p_holm", holm(table["p"].to_numpy()))
    return table


def differences(found: Mapping[str, Run]) -> pd.DataFrame:
    """Every model minus the first, by layer and measure: mean over heads, paired over the images that both were asked
    about, Holm-corrected.

    The interval and p are over images, of these very models: they say nothing about other training seeds. Empty where
    there is one model, or where the models share no image.
    """
    seed = int(next(iter(found.values())).record["seed"])
    means = {label: _image_means(run).rename("value").reset_index() for label, run in found.items()}
    return paired_differences(means, by=("measure", "layer"), seed=seed)


def _image_means(run: Run) -> pd.Series:
    """Mean over heads and over the questions of an image, indexed by measure, layer and image."""
    measures, layers = run.record["measures"], run.record["layers"]
    means = _mean(run.tensors["values"].double().numpy(), 2)
    samples = run.tables["samples"]["image_id"]
    columns = pd.MultiIndex.from_product([layers, measures], names=["layer", "measure"])
    table = (
        pd.DataFrame(means.reshape(len(means), -1), columns=columns, index=samples).groupby(level=0, sort=False).mean()
    )
    return table.stack(["measure", "layer"], future_stack=True).reorder_levels(["measure", "layer", "image_id"])


def summary(found: Mapping[str, Run]) -> pd.DataFrame:
    """The heads chosen on one half of the images, as they do on the other; the layers' means where nothing was
    localised."""
    if any("heads" not in run.tables for run in found.values()):
        return pd.concat([run.tables["layers"].assign(model=label) for label, run in found.items()])[
            ["model", *next(iter(found.values())).tables["layers"]]
        ]
    columns = [
        "model",
        "layer",
        "head",
        "pointing",
        "low",
        "high",
        "chance",
        "null_mean",
        "gain",
        "gain_low",
        "gain_high",
        "p_holm",
        "mass_ratio",
        "iou",
    ]
    return pd.concat([run.tables["heads"].assign(model=label) for label, run in found.items()])[
        [*columns, "iou_chance", "n_images", "n"]
    ]


# --- figures --------------------------------------------------------------------------------------


def figures(found: Mapping[str, Run]) -> dict[str, go.Figure]:
    """Overlays of the best head, the chosen heads, the methods, then each measure by layer, its difference between
    models, and by head."""
    drawn: dict[str, go.Figure] = {}
    overlays = [row for label, run in found.items() for row in _overlays(label, run)]
    if overlays:
        drawn["Attention over the image, of a head that was chosen on other images"] = fig.overlays(overlays)
    chosen = {label: run.tables["heads"] for label, run in found.items() if len(run.tables.get("heads", ()))}
    if chosen:
        heads = pd.concat(
            [
                table.assign(model=label, name=[f"L{r.layer} H{r.head}" for r in table.itertuples()])
                for label, table in chosen.items()
            ]
        )
        drawn["Chosen heads on the held-out half"] = fig.points(heads, y="pointing", title=FINDING["pointing"])
    compared = {label: run.tables["methods"] for label, run in found.items() if "methods" in run.tables}
    if compared:
        methods = pd.concat([table.assign(model=label, name=table["method"]) for label, table in compared.items()])
        for name, title in FINDING.items():
            drawn[f"{title}: raw attention, rollout and gradient x attention"] = fig.points(
                methods[methods["measure"] == name], y="score", title=title
            )
    by_head = pd.concat([run.tables["scores"].assign(model=label) for label, run in found.items()])
    by_layer = pd.concat([run.tables["layers"].assign(model=label) for label, run in found.items()])
    changes = differences(found)
    for name, title in MEASURES.items():
        if name not in set(by_layer["measure"]):
            continue
        drawn[f"{title}: by layer"] = fig.layer_curves(by_layer[by_layer["measure"] == name], y=title, kind="measure")
        change = changes[changes["measure"] == name]
        if len(change):
            drawn[f"{title}: difference by layer"] = fig.difference_curves(
                change, y=f"{title}, minus {change['against'].iloc[0]}"
            )
        drawn[f"{title}: by head"] = fig.head_maps(by_head[by_head["measure"] == name], title=title)
    return drawn


def _overlays(label: str, run: Run) -> list[list[fig.Overlay]]:
    """The stored examples under the head that was best on the other half, and under the other methods; without objects,
    under the last layer's mean."""
    layers, table = run.record["layers"], run.tables.get("heads")
    rows: list[list[fig.Overlay]] = [[], [], []]
    for row in run.tables["examples"].itertuples():
        maps = run.tensors[f"map_{row.number}"].numpy()
        if table is not None and len(table):
            layer, head = int(table["layer"][0]), int(table["head"][0])
            drawn = [(f"L{layer} H{head}", maps[layers.index(layer), head])]
        else:
            drawn = [(f"L{layers[-1]}, all heads", _mean(maps[-1], 0))]
        if f"methods_{row.number}" in run.tensors:
            drawn += zip(("rollout", "gradient x attention"), run.tensors[f"methods_{row.number}"].numpy(), strict=True)
        outline = (row.asked_left, row.asked_top, row.asked_right, row.asked_bottom) if row.asked else None
        picture, box = run.tensors[f"image_{row.number}"].numpy(), (row.left, row.top, row.right, row.bottom)
        for line, (name, values) in zip(rows, drawn, strict=False):
            line.append(fig.Overlay(f"{label} · {name}<br>{row.question}", picture, values, box, outline))
    return [line for line in rows if line]


# 2: intervals that cover what they say
ANALYSIS = Analysis(
    "attention", "Where attention heads look, and which find the object", Config, run, figures, summary, version=4
)

if __name__ == "__main__":
    main(ANALYSIS)
