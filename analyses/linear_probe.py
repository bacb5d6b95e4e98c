"""What can be read off the visual tokens of each layer by a linear probe: class, colour, foreground, place and count.

    python -m analyses.linear_probe --model runs/baseline runs/viral --vfm dinov2-small --data shapes:val --limit 200
    --output_dir runs

Probes are scikit-learn's logistic regression (class, colour, foreground) and ridge regression (x, y, count), fitted on
some images and scored on others (GroupKFold over images, the same folds for every layer, target and model), with
features standardised on the fitted images and a fixed penalty `l2`. Rows are the layers 0 to L, the tower (what the
connector receives) and frozen VFMs on the same pixels, as ceilings.

    class, colour   of the object that covers at least `cover` of a token's cell; balanced accuracy, chance 1 / classes
    foreground      such a cell against one that no object touches; balanced accuracy, chance 1 / 2
    x, y            middle of the token's cell, in fractions of the image; R2, chance 0
    count           objects of the image, from the mean of all its visual tokens; R2, chance 0

Controls (Hewitt and Liang 2019, arXiv 1909.03368) have the same inputs, probe and folds, and labels without meaning.
Selectivity is score - control, or score - chance where the control is below chance: a ridge regression on labels
without meaning has a negative R2, and that is no merit of the score.

    class, colour   labels change places between the objects of all images; all tokens of an object share one
    foreground      the objects of another image: what the place alone tells
    x, y            places change places between the cells of the raster, once for all images: a probe that only knows
                    which cell it is in scores here
    count           labels change places between images

What the numbers are: whether a linear read-out exists and generalises to other images. What they are not: whether the
model uses it. Intervals and paired differences resample images, at fixed out-of-fold predictions: that the probes were
fitted on these images, and training seeds, are not in them.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int

from workbench import figures as fig
from workbench.analysis.chunks import Chunk, Part
from workbench.analysis.command import main
from workbench.analysis.declaration import Analysis, Context, DataOptions, Result
from workbench.capture.hidden_states import check_layers, encoder_rows, read
from workbench.data.base import Sample, class_and_color
from workbench.data.folder import QUESTION
from workbench.errors import ConfigError, DataError, ModelError
from workbench.metrics.probing import balanced_accuracy, classify, folds_of, r_squared, regress
from workbench.mllm.family import VisualTokens
from workbench.runs import Run
from workbench.spatial.grids import BACKGROUND, OUTSIDE, object_per_token, token_centers
from workbench.spatial.vfm_patches import patches_under
from workbench.stats import mean_interval, paired_differences
from workbench.vfm import VFM, find_vfm, load_vfm

log = logging.getLogger(__name__)

PAGE = "Linear probe"
Target = Literal["class", "colour", "foreground", "x", "y", "count"]
TARGETS: tuple[Target, ...] = get_args(Target)
REGRESSED = ("x", "y", "count")
TOWER = "tower"


@dataclass(frozen=True)
class Config(DataOptions):
    """What to read off, and from what."""

    vfm: tuple[str, ...] = ("dinov2-small",)
    """Frozen vision foundation models, as ceilings."""
    layers: tuple[int, ...] = ()
    """Layers of the model, 0 to L; all by default."""
    targets: tuple[Target, ...] = ()
    """What to predict; all that the data has by default."""
    tokens_per_image: int = 16
    """Random tokens of each image for foreground and place, and as many on objects for class and colour, at most."""
    cover: float = 0.5
    """Share of a cell that an object has to cover."""
    folds: int = 5
    """Parts of the images, each scored by probes fitted on the others."""
    l2: float = 10.0
    """Penalty of the probes: l2 / 2 |w|^2 beside the summed log-loss, l2 |w|^2 beside the squared errors."""
    controls: int = 3
    """Random labellings whose control scores are averaged."""

    def __post_init__(self) -> None:
        for name, least in (("tokens_per_image", 1), ("folds", 2), ("controls", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}: expected at least {least}")
        if not 0 < self.cover <= 1:
            raise ConfigError(f"cover is {self.cover:g}: expected more than 0, 1 at most")
        if not self.l2 > 0:
            raise ConfigError(f"l2 is {self.l2:g}: expected more than 0")


@dataclass
class Tokens:
    """The tokens that were kept, one row for each, and the mean token of each image.

    Attributes:
        image: number of its image.
        thing: number of the object it lies on, over all images; BACKGROUND and below as in `object_per_token`.
        elsewhere: the same on the objects of other images, (row, control).
        place: x and y.
        cell: (raster, rows, columns, number): which cell of which raster.
        spread: whether the token is one of those drawn from all cells; the others were drawn from those on objects.
        features, means: by row of the result (layer number, tower, VFM).
    """

    image: list[int] = field(default_factory=list)
    thing: list[int] = field(default_factory=list)
    elsewhere: list[np.ndarray] = field(default_factory=list)
    place: list[np.ndarray] = field(default_factory=list)
    cell: list[tuple[int, ...]] = field(default_factory=list)
    spread: list[bool] = field(default_factory=list)
    features: dict[str, list[np.ndarray]] = field(default_factory=dict)
    means: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def part(self, skipped: str) -> Part:
        """Its state, to be stored."""
        tensors = {
            f"{kind}.{name}": torch.from_numpy(np.concatenate(own))
            for kind in ("features", "means")
            for name, own in getattr(self, kind).items()
        }
        tensors |= {
            name: torch.from_numpy(np.stack(getattr(self, name))) for name in ("elsewhere", "place") if self.image
        }
        plain = {name: getattr(self, name) for name in ("image", "thing", "cell", "spread")}
        return Part(tensors=tensors, record=plain | {"skipped": skipped})

    def take(self, part: Part, without: set[str]) -> None:
        """Add the state of another one, of the images that follow, but for the features of `without`."""
        for name in ("image", "thing", "spread"):
            getattr(self, name).extend(part.record[name])
        self.cell += [tuple(cell) for cell in part.record["cell"]]
        for name in ("elsewhere", "place"):
            if name in part.tensors:
                getattr(self, name).extend(part.tensors[name].numpy())
        for key, values in part.tensors.items():
            kind, _, name = key.partition(".")
            if kind in ("features", "means") and name not in without:
                getattr(self, kind).setdefault(name, []).append(values.numpy())

    def keep(
        self, name: str, values: Float[np.ndarray, "token d"], chosen: Int[np.ndarray, " row"], *, image: bool
    ) -> None:
        """Features of an image's tokens: those of the chosen ones, and their mean if the image is to be counted."""
        self.features.setdefault(name, []).append(values[chosen])
        self.means.setdefault(name, []).append(values.mean(0, keepdims=True) if image else values[:0])


@dataclass(frozen=True)
class Task:
    """What one target asks.

    Attributes:
        rows: which tokens, or None where it is asked of images.
        labels: the true ones in column 0, those of the control tasks after it; codes of classes, or numbers.
        groups: image of each row, 0 to G - 1, and `images` their numbers.
    """

    name: Target
    rows: Int[np.ndarray, " row"] | None
    labels: np.ndarray
    groups: Int[np.ndarray, " row"]
    images: Int[np.ndarray, " group"]
    classes: tuple[str, ...] = ()

    @property
    def chance(self) -> float:
        return 0.0 if self.name in REGRESSED else 1 / len(self.classes)


def run(config: Config, context: Context) -> Result:
    """Read tokens of every layer, the tower and the VFMs, and fit every probe with its controls."""
    layers = check_layers(context.mllm, config.layers)
    images = [scene[0] for scene in context.data.scenes]
    if len(images) < config.folds:
        raise DataError(f"{len(images)} images for {config.folds} folds: expected at least as many images as folds")
    vfms = {name: load_vfm(name) for name in config.vfm}
    fn = partial(_read, config, context, layers, images, vfms)
    parts = context.map("tokens to probe", images, fn, depends=context.data.fingerprint, keep=False)
    skipped = next(({TOWER: part.record["skipped"]} for part in parts if part.record["skipped"]), {})
    if skipped:
        log.warning("%s: the tower is left out: %s", context.mllm.name, skipped[TOWER])
    tokens = Tokens()
    for part in parts:
        tokens.take(part, without=set(skipped))
    tasks, left_out = _tasks(config, context.data.name, images, tokens)
    rows, each = [], []
    order = [name for name in (*map(str, layers), TOWER, *vfms) if name in tokens.features]
    for name in context.progress(order, "fitting probes", len(order)):
        x, means = np.concatenate(tokens.features[name]), np.concatenate(tokens.means[name])
        for task in tasks:
            row, per_image = _probed(config, task, x[task.rows] if task.rows is not None else means[task.images])
            place = {
                "layer": int(name) if name.isdigit() else -1,
                "source": "model" if name.isdigit() else name,
                "target": task.name,
            }
            rows.append(place | row)
            each.append(per_image.assign(**place, image_id=[images[i].image_id for i in task.images]))
    record = {
        "vfms": [vfm.record() for vfm in vfms.values()],
        "skipped": skipped | left_out,
        "classes": {task.name: task.classes for task in tasks},
    }
    return Result({"scores": pd.DataFrame(rows), "per_image": pd.concat(each, ignore_index=True)}, record=record)


# --- reading --------------------------------------------------------------------------------------


def _read(
    config: Config,
    context: Context,
    layers: list[int],
    images: Sequence[Sample],
    vfms: Mapping[str, VFM],
    chunk: Chunk[Sample],
) -> Part:
    """The chosen tokens of a chunk of `images` at every layer, the tower and the VFMs; every image has the same prompt,
    so that none can tell its answer."""
    mllm, tokens, skipped = context.mllm, Tokens(), ""
    first_thing = np.cumsum([0, *(len(sample.objects) for sample in images)])
    for start, part in chunk.batches():
        pictures = [s.image for s in part]
        batch = mllm.encode(pictures, [QUESTION] * len(part))
        places = mllm.visual_tokens(batch)
        try:
            encoder_rows(mllm, places)
        except ModelError as error:
            skipped = str(error)
        found = read(mllm, batch, layers=layers, encoder=not skipped)
        patches = {name: patches_under(vfm, pictures, places) for name, vfm in vfms.items()}
        for row, (number, own) in enumerate(enumerate(found, start=start)):
            chosen = _choose(config, tokens, images, number, places[row], int(first_thing[number]))
            for layer, values in zip(layers, own.values.numpy(), strict=True):
                tokens.keep(str(layer), values, chosen, image=True)
            if own.encoder_features is not None:
                tokens.keep(TOWER, own.encoder_features.numpy(), chosen, image=True)
            for name in vfms:
                tokens.keep(name, np.concatenate([raster.numpy() for raster in patches[name][row]]), chosen, image=True)
    return tokens.part(skipped)


def _choose(
    config: Config, tokens: Tokens, images: Sequence[Sample], number: int, parts: list[VisualTokens], first_thing: int
) -> Int[np.ndarray, " row"]:
    """Random cells of an image, and random ones on its objects; the same for every model with the same raster."""
    rng = np.random.default_rng([config.seed, number])
    own, place = object_per_token(images[number].objects, parts, share=config.cover), token_centers(parts)
    inside = rng.permutation((own != OUTSIDE).nonzero()[0])[: config.tokens_per_image]
    on_objects = rng.permutation((own >= 0).nonzero()[0])[: config.tokens_per_image]
    others = (number + 1 + rng.integers(len(images) - 1, size=config.controls)) % len(images)
    elsewhere = np.stack(
        [object_per_token(images[other].objects, parts, share=config.cover) for other in others], axis=1
    )
    cells = [(raster, *(part.grid or ()), cell) for raster, part in enumerate(parts) for cell in range(len(part.index))]
    chosen = np.concatenate([inside, on_objects])
    tokens.image += [number] * len(chosen)
    tokens.thing += [int(own[i]) + first_thing if own[i] >= 0 else int(own[i]) for i in chosen]
    tokens.elsewhere += list(elsewhere[chosen])
    tokens.place += list(place[chosen])
    tokens.cell += [cells[i] for i in chosen]
    tokens.spread += [True] * len(inside) + [False] * len(on_objects)
    return chosen


# --- what is asked --------------------------------------------------------------------------------


def _tasks(config: Config, data: str, images: Sequence[Sample], tokens: Tokens) -> tuple[list[Task], dict[str, str]]:
    """The targets that the data has, and why others are left out; one that was asked for by name is not left out but
    refused.

    Raises:
        DataError: a target that was asked for cannot be had, or none can.
    """
    tasks: list[Task] = []
    left_out: dict[str, str] = {}
    for name in config.targets or TARGETS:
        try:
            tasks.append(_task(config, name, data, images, tokens))
        except DataError as error:
            if config.targets:
                raise
            left_out[name] = str(error)
            log.warning("%s is left out: %s", name, error)
    if not tasks:
        raise DataError(f"nothing can be predicted on '{data}' ({'; '.join(left_out.values())})")
    return tasks, left_out


def _task(config: Config, name: Target, data: str, images: Sequence[Sample], tokens: Tokens) -> Task:
    rng = np.random.default_rng([config.seed, TARGETS.index(name)])
    image, thing, spread, place = (
        np.array(tokens.image),
        np.array(tokens.thing),
        np.array(tokens.spread),
        np.array(tokens.place),
    )
    if name not in ("x", "y") and not any(sample.objects for sample in images):
        raise DataError(
            f"data set '{data}' knows no objects: expected one that does, such as shapes:val, for the target {name}"
        )
    if name in ("x", "y"):
        rows = spread.nonzero()[0]
        truth = place[rows, ("x", "y").index(name)]
        control = [_moved_cells(tokens, rows, truth, rng) for _ in range(config.controls)]
        return _checked(config, name, rows, np.stack([truth, *control], axis=1), image[rows])
    if name == "count":
        counts = np.array([float(len(sample.objects)) for sample in images])
        return _checked(
            config,
            name,
            None,
            np.stack([counts, *(rng.permutation(counts) for _ in range(config.controls))], axis=1),
            np.arange(len(images)),
        )
    if name == "foreground":
        elsewhere = np.array(tokens.elsewhere)
        rows = (spread & ((thing >= 0) | (thing == BACKGROUND))).nonzero()[0]
        labels = np.concatenate([thing[rows, None], elsewhere[rows]], axis=1) >= 0
        return _checked(config, name, rows, labels.astype(int), image[rows], ("background", "object"))
    parts = [class_and_color(item.name)[name == "colour"] for sample in images for item in sample.objects]
    seen = Counter(
        parts[i] for own, i in {(own, i) for own, i in zip(image[~spread], thing[~spread], strict=True)} if parts[i]
    )
    within = {
        label: len({own for own, i in zip(image[~spread], thing[~spread], strict=True) if parts[i] == label})
        for label in seen
    }
    classes = tuple(sorted(label for label in seen if within[label] >= config.folds))
    if len(classes) < 2:
        raise DataError(
            f"{len(classes)} values of {name} lie on cells covered to {config.cover:g} in at least {config.folds}"
            " images each: expected at least 2"
        )
    code = np.array([classes.index(label) if label in classes else -1 for label in parts])
    rows = (~spread & (thing >= 0)).nonzero()[0]
    rows = rows[code[thing[rows]] >= 0]
    used = np.unique(thing[rows])
    columns = [code]
    for _ in range(config.controls):
        shuffled = code.copy()
        shuffled[used] = rng.permutation(code[used])
        columns.append(shuffled)
    return _checked(config, name, rows, np.stack(columns, axis=1)[thing[rows]], image[rows], classes)


def _moved_cells(tokens: Tokens, rows: np.ndarray, truth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The coordinate of each row after the cells of each raster have changed places, once for all images."""
    cells = [tokens.cell[row] for row in rows]
    known = {cell: value for cell, value in zip(cells, truth, strict=True)}
    moved: dict[tuple[int, ...], float] = {}
    for raster in dict.fromkeys(cell[:-1] for cell in cells):
        own = sorted(cell for cell in known if cell[:-1] == raster)
        moved |= dict(zip(own, rng.permutation([known[cell] for cell in own]), strict=True))
    return np.array([moved[cell] for cell in cells])


def _checked(
    config: Config,
    name: Target,
    rows: np.ndarray | None,
    labels: np.ndarray,
    image: np.ndarray,
    classes: tuple[str, ...] = (),
) -> Task:
    """A task with enough images, and with something to tell apart in its labels.

    Raises:
        DataError: too few images or one value only.
    """
    images, groups = np.unique(image, return_inverse=True)
    if len(images) < config.folds:
        raise DataError(
            f"{len(images)} images have tokens for {name}, for {config.folds} folds: expected at least as many images"
            " as folds"
        )
    if len(np.unique(labels[:, 0])) < 2:
        raise DataError(f"{name} is the same for all {len(labels)} rows: expected at least 2 values to tell apart")
    return Task(name, rows, labels, groups, images, classes)


# --- probes ---------------------------------------------------------------------------------------


def _probed(config: Config, task: Task, x: Float[np.ndarray, "row d"]) -> tuple[dict[str, Any], pd.DataFrame]:
    """Score, mean control and selectivity of one target on one representation; and the same by image."""
    folds = folds_of(task.groups, config.folds, config.seed)
    if task.name in REGRESSED:
        predicted, score = regress(x, task.labels, folds, l2=config.l2), r_squared
    else:
        predicted, score = classify(x, task.labels, folds, l2=config.l2), balanced_accuracy
    own, *controls = (score(truth, guess, task.groups) for truth, guess in zip(task.labels.T, predicted.T, strict=True))
    control = np.mean(controls, axis=0)
    row: dict[str, Any] = {}
    meant = own - (control if control.mean() > task.chance else task.chance)
    for name, values in (("score", own), ("control", control), ("selectivity", meant)):
        # an accuracy without a miss has no spread to judge by: the interval is then that of so many right images
        interval = mean_interval(
            values, kind="proportion" if task.name not in REGRESSED and np.isin(values, (0, 1)).all() else "real"
        )
        row |= {name: interval.estimate} | {
            f"{name}_{edge}" if name != "score" else edge: getattr(interval, edge) for edge in ("low", "high")
        }
    row |= {
        "chance": task.chance,
        "measure": "R2" if task.name in REGRESSED else "balanced accuracy",
        "n_images": len(own),
        "n": len(x),
        "d": x.shape[1],
    }
    row |= {
        "classes": len(task.classes),
        "folds": config.folds,
        "l2": config.l2,
        "controls": len(controls),
        "seed": config.seed,
    }
    return row, pd.DataFrame({"value": own, "control": control})


# --- tables and figures ---------------------------------------------------------------------------


def _table(found: Mapping[str, Run], name: str = "scores") -> pd.DataFrame:
    return pd.concat([run.tables[name].assign(model=label) for label, run in found.items()], ignore_index=True)


def summary(found: Mapping[str, Run]) -> pd.DataFrame:
    """One row per model, target and layer, tower or VFM (layer -1)."""
    columns = [
        "model",
        "source",
        "layer",
        "target",
        "score",
        "low",
        "high",
        "control",
        "selectivity",
        "selectivity_low",
        "selectivity_high",
        "chance",
    ]
    return _table(found)[[*columns, "n_images", "n", "measure"]].sort_values(["model", "target"], kind="stable")


def differences(found: Mapping[str, Run]) -> pd.DataFrame:
    """Every model minus the first by target and layer, paired over images, Holm-corrected over the layers of a
    target."""
    tables = {label: run.tables["per_image"].query("source == 'model'") for label, run in found.items()}
    return paired_differences(
        tables, by=("target", "layer"), within=("target",), seed=int(next(iter(found.values())).record["seed"])
    )


def figures(found: Mapping[str, Run]) -> dict[str, go.Figure]:
    """Each target by layer beside its control, the tower and the VFMs; then the difference between models."""
    table, changes, drawn = _table(found), differences(found), {}
    for target in dict.fromkeys(table["target"]):
        own = table[table["target"] == target]
        layers = own[own["source"].isin(["model", TOWER])]
        title = f"{target}: {own['measure'].iloc[0]}"
        control = layers.assign(
            labels="control",
            **{name: layers[f"control{end}"] for name, end in (("score", ""), ("low", "_low"), ("high", "_high"))},
        )
        curves = fig.layer_curves(
            pd.concat([layers.assign(labels="true labels"), control]), y=str(own["measure"].iloc[0]), kind="labels"
        )
        ceilings = own[~own["source"].isin(["model", TOWER])].drop_duplicates("source")
        drawn[title] = fig.with_ceilings(curves, ceilings, name="source")
        change = changes[changes["target"] == target]
        if len(change):
            drawn[f"{title}, difference"] = fig.difference_curves(
                change, y=f"{own['measure'].iloc[0]}, minus {change['against'].iloc[0]}"
            )
    return drawn


def uses(config: Config) -> dict[str, str]:
    """The identity of every VFM: another copy of its weights is another question."""
    return {f"vfm {name}": find_vfm(name).identity() for name in config.vfm}


# 2: intervals that cover what they say
ANALYSIS = Analysis(
    "linear_probe",
    "What a linear probe reads off the visual tokens of each layer",
    Config,
    run,
    figures,
    summary,
    PAGE,
    version=2,
    uses=uses,
)

if __name__ == "__main__":
    main(ANALYSIS)
