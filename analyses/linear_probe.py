"""What a linear probe can predict from the visual tokens of each layer: class, color, foreground, position and count.

    python -m analyses.linear_probe --model runs/baseline runs/viral --vfm dinov2-small --data shapes:val --limit 200
    --output_dir runs

Probes are scikit-learn's logistic regression (class, colour, foreground) and ridge regression (x, y, count). They are
fitted on some images and scored on others (GroupKFold over images, the same folds for every layer, target and model),
with features standardized on the fitted images and a fixed penalty `l2`. They are fitted to the layers 0 to L, to the
vision encoder's features that the projector receives (called "tower" in the tables) and, as ceilings, to the features
of frozen VFMs on the same pixels.

    class, colour   of the object that covers at least `cover` of a token's patch; balanced accuracy, chance 1 / classes
    foreground      such a patch against one that no object touches; balanced accuracy, chance 1 / 2
    x, y            center of the token's patch, in fractions of the image; R2, chance 0
    count           number of objects in the image, from the mean of all its visual tokens; R2, chance 0

Control tasks (Hewitt and Liang 2019, arXiv 1909.03368) have the same inputs, probe and folds, but meaningless labels.
Selectivity is score - control, or score - chance where the control is below chance: ridge regression on meaningless
labels has a negative R2, for which the score should get no credit.

    class, colour   labels are permuted between the objects of all images; all tokens of an object share one label
    foreground      the objects of another image: how much the position alone tells
    x, y            coordinates are permuted between the patches of the grid, once for all images: a probe that only
                    knows which patch it is in has a high score here
    count           labels are permuted between images

What the numbers are: whether a linear readout exists and generalizes to other images. What they are not: whether the
model uses it. Intervals and paired differences resample images and keep the out-of-fold predictions fixed, so they
contain neither the variation from fitting the probes to other images nor that of training seeds.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Literal, get_args

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from annotated_types import Ge, Gt, Le
from jaxtyping import Float, Int

from workbench import figures as fig
from workbench.analysis.chunks import Chunk, Part
from workbench.analysis.command import main
from workbench.analysis.declaration import Analysis, Context, DataOptions, Result, vfm_inputs
from workbench.capture.hidden_states import check_layers, encoder_rows, read
from workbench.data.base import Sample, class_and_color
from workbench.data.folder import QUESTION
from workbench.errors import DataError, ModelError
from workbench.metrics.probing import balanced_accuracy, classify, folds_of, r_squared, regress
from workbench.mllm.family import VisualTokens
from workbench.runs import Run
from workbench.spatial.grids import BACKGROUND, OUTSIDE, object_per_token, token_centers
from workbench.spatial.vfm_patches import patches_under
from workbench.stats import mean_interval, paired_differences
from workbench.vfm import VFM, load_vfm

log = logging.getLogger(__name__)

PAGE = "Linear probe"
Target = Literal["class", "colour", "foreground", "x", "y", "count"]
TARGETS: tuple[Target, ...] = get_args(Target)
REGRESSED = ("x", "y", "count")
ENCODER = "tower"  # the vision encoder in stored tables


@dataclass(frozen=True)
class Config(DataOptions):
    """Options of the linear probes."""

    vfm: tuple[str, ...] = ("dinov2-small",)
    """Frozen vision foundation models (VFMs) that are probed as ceilings."""
    layers: tuple[int, ...] = ()
    """Layers of the model, 0 to L; all by default."""
    targets: tuple[Target, ...] = ()
    """What to predict; by default everything for which the data has labels."""
    tokens_per_image: Annotated[int, Ge(1)] = 16
    """Maximum number of random tokens per image for foreground, x and y; as many on objects for class and colour."""
    cover: Annotated[float, Gt(0), Le(1)] = 0.5
    """Share of a token's patch that an object must cover."""
    folds: Annotated[int, Ge(2)] = 5
    """Folds of the cross-validation over images."""
    l2: Annotated[float, Gt(0)] = 10.0
    """Penalty of the probes: l2 / 2 |w|^2 is added to the summed log-loss, l2 |w|^2 to the squared errors."""
    controls: Annotated[int, Ge(1)] = 3
    """Random labelings over which the control score is averaged."""


@dataclass
class Tokens:
    """The sampled tokens, one row for each, and the mean token of each image.

    Attributes:
        images: number of the token's image.
        objects: number of the object under the token, counted over all images; where there is none, a negative number
            as in `object_per_token` (BACKGROUND, BETWEEN, OUTSIDE).
        other_objects: for each control task, the object of another image at the same position, or a negative number.
        positions: x and y of the patch's center, in fractions of the image.
        patches: (number of the grid, its rows, its columns, number of the patch in it).
        uniform: True for a token sampled from all tokens, False for one sampled from those on objects.
        features, means: {layer number, "tower" or VFM: features of the sampled tokens, and the mean of each image}.
    """

    images: list[int] = field(default_factory=list)
    objects: list[int] = field(default_factory=list)
    other_objects: list[np.ndarray] = field(default_factory=list)
    positions: list[np.ndarray] = field(default_factory=list)
    patches: list[tuple[int, ...]] = field(default_factory=list)
    uniform: list[bool] = field(default_factory=list)
    features: dict[str, list[np.ndarray]] = field(default_factory=dict)
    means: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def part(self, skipped: str) -> Part:
        """Return the tokens as a part to be stored.

        Args:
            skipped: why the vision encoder has no features; empty if it has.
        """
        tensors = {
            f"{kind}.{name}": torch.from_numpy(np.concatenate(arrays))
            for kind in ("features", "means")
            for name, arrays in getattr(self, kind).items()
        }
        if self.images:
            tensors["elsewhere"] = torch.from_numpy(np.stack(self.other_objects))
            tensors["place"] = torch.from_numpy(np.stack(self.positions))
        record = {"image": self.images, "thing": self.objects, "cell": self.patches, "spread": self.uniform}
        return Part(tensors=tensors, record=record | {"skipped": skipped})

    def take(self, part: Part, without: set[str]) -> None:
        """Append the tokens of a stored part, except the features named in `without`; parts come in image order."""
        self.images += part.record["image"]
        self.objects += part.record["thing"]
        self.uniform += part.record["spread"]
        self.patches += [tuple(patch) for patch in part.record["cell"]]
        if "place" in part.tensors:
            self.other_objects += list(part.tensors["elsewhere"].numpy())
            self.positions += list(part.tensors["place"].numpy())
        for key, values in part.tensors.items():
            kind, _, name = key.partition(".")
            if kind in ("features", "means") and name not in without:
                getattr(self, kind).setdefault(name, []).append(values.numpy())

    def add_features(
        self, name: str, values: Float[np.ndarray, "token d"], sampled: Int[np.ndarray, " sampled"]
    ) -> None:
        """Add the features of an image's sampled tokens, and the mean over all its tokens."""
        self.features.setdefault(name, []).append(values[sampled])
        self.means.setdefault(name, []).append(values.mean(0, keepdims=True))


@dataclass(frozen=True)
class Task:
    """One target: its rows and their labels.

    Attributes:
        rows: rows of `Tokens` that have a label; None if images, not tokens, are labeled.
        labels: (row, 1 + control): true labels, then those of each control task; class numbers, or values to regress.
        groups: index into `images` of each row's image.
        images: numbers of the images that have rows.
        classes: names of the classes; empty for a regression.
    """

    name: Target
    rows: Int[np.ndarray, " row"] | None
    labels: np.ndarray
    groups: Int[np.ndarray, " row"]
    images: Int[np.ndarray, " group"]
    classes: tuple[str, ...] = ()

    @property
    def chance(self) -> float:
        """Chance level of R2 or of balanced accuracy."""
        return 0.0 if self.name in REGRESSED else 1 / len(self.classes)


def run(config: Config, context: Context) -> Result:
    """Read tokens of every layer, the vision encoder and the VFMs, and fit every probe with its controls."""
    layers = check_layers(context.mllm, config.layers)
    images = [scene[0] for scene in context.data.scenes]
    if len(images) < config.folds:
        raise DataError(f"{len(images)} images for {config.folds} folds: expected at least as many images as folds")
    vfms = {name: load_vfm(name) for name in config.vfm}
    fn = partial(_read, config, context, layers, images, vfms)
    parts = context.map("tokens to probe", images, fn, depends=context.data.fingerprint, keep=False)
    skipped = next(({ENCODER: part.record["skipped"]} for part in parts if part.record["skipped"]), {})
    if skipped:
        log.warning("%s: the vision encoder is left out: %s", context.mllm.name, skipped[ENCODER])
    tokens = Tokens()
    for part in parts:
        tokens.take(part, without=set(skipped))
    tasks, left_out = _tasks(config, context.data.name, images, tokens)
    rows, values_by_image = [], []
    order = [name for name in (*map(str, layers), ENCODER, *vfms) if name in tokens.features]
    for name in context.progress(order, "fitting probes", len(order)):
        x, means = np.concatenate(tokens.features[name]), np.concatenate(tokens.means[name])
        for task in tasks:
            row, per_image = _fit_probe(config, task, x[task.rows] if task.rows is not None else means[task.images])
            names = {
                "layer": int(name) if name.isdigit() else -1,
                "source": "model" if name.isdigit() else name,
                "target": task.name,
            }
            rows.append(names | row)
            values_by_image.append(per_image.assign(**names, image_id=[images[i].image_id for i in task.images]))
    record = {
        "vfms": [vfm.record() for vfm in vfms.values()],
        "skipped": skipped | left_out,
        "classes": {task.name: task.classes for task in tasks},
    }
    tables = {"scores": pd.DataFrame(rows), "per_image": pd.concat(values_by_image, ignore_index=True)}
    return Result(tables, record=record)


# --- reading --------------------------------------------------------------------------------------


def _read(
    config: Config,
    context: Context,
    layers: list[int],
    images: Sequence[Sample],
    vfms: Mapping[str, VFM],
    chunk: Chunk[Sample],
) -> Part:
    """Read the sampled tokens of a chunk of `images` at every layer, the vision encoder and the VFMs.

    Every image has the same prompt, so that no question can give the answer away.
    """
    mllm, tokens, skipped = context.mllm, Tokens(), ""
    first_objects = np.cumsum([0, *(len(sample.objects) for sample in images)])
    for start, samples in chunk.batches():
        batch_images = [s.image for s in samples]
        batch = mllm.encode(batch_images, [QUESTION] * len(samples))
        visual_tokens = mllm.visual_tokens(batch)
        try:
            encoder_rows(mllm, visual_tokens)
        except ModelError as error:
            skipped = str(error)
        activations = read(mllm, batch, layers=layers, encoder=not skipped)
        vfm_features = {name: patches_under(vfm, batch_images, visual_tokens) for name, vfm in vfms.items()}
        for row, hidden in enumerate(activations):
            number = start + row
            sampled = _sample_tokens(config, tokens, images, number, visual_tokens[row], int(first_objects[number]))
            for layer, values in zip(layers, hidden.values.numpy(), strict=True):
                tokens.add_features(str(layer), values, sampled)
            if hidden.encoder_features is not None:
                tokens.add_features(ENCODER, hidden.encoder_features.numpy(), sampled)
            for name in vfms:
                features = np.concatenate([grid.numpy() for grid in vfm_features[name][row]])
                tokens.add_features(name, features, sampled)
    return tokens.part(skipped)


def _sample_tokens(
    config: Config, tokens: Tokens, images: Sequence[Sample], number: int, parts: list[VisualTokens], first_object: int
) -> Int[np.ndarray, " row"]:
    """Sample tokens of an image, add them to `tokens`, and return their numbers.

    The sample is the same for every model with the same patch grid.

    Args:
        number: number of the image.
        parts: its visual tokens, one part for each tile.
        first_object: number of its first object, counted over all images.
    """
    rng = np.random.default_rng([config.seed, number])
    positions = token_centers(parts)
    object_of_token = object_per_token(images[number].objects, parts, share=config.cover)
    uniform = rng.permutation((object_of_token != OUTSIDE).nonzero()[0])[: config.tokens_per_image]
    on_objects = rng.permutation((object_of_token >= 0).nonzero()[0])[: config.tokens_per_image]
    others = (number + 1 + rng.integers(len(images) - 1, size=config.controls)) % len(images)
    of_others = [object_per_token(images[other].objects, parts, share=config.cover) for other in others]
    other_objects = np.stack(of_others, axis=1)
    patches = [(grid, *(part.grid or ()), patch) for grid, part in enumerate(parts) for patch in range(len(part.index))]
    sampled = np.concatenate([uniform, on_objects])
    tokens.images += [number] * len(sampled)
    tokens.objects += [int(n) + first_object if n >= 0 else int(n) for n in object_of_token[sampled]]
    tokens.other_objects += list(other_objects[sampled])
    tokens.positions += list(positions[sampled])
    tokens.patches += [patches[i] for i in sampled]
    tokens.uniform += [True] * len(uniform) + [False] * len(on_objects)
    return sampled


# --- targets and labels ---------------------------------------------------------------------------


def _tasks(config: Config, data: str, images: Sequence[Sample], tokens: Tokens) -> tuple[list[Task], dict[str, str]]:
    """Return the targets for which the data has labels, and why others are left out.

    Raises:
        DataError: a target in `config.targets` has no labels, or no target has.
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
        raise DataError(
            f"no target can be predicted on '{data}' ({'; '.join(left_out.values())}): expected labels for at least one"
        )
    return tasks, left_out


def _task(config: Config, name: Target, data: str, images: Sequence[Sample], tokens: Tokens) -> Task:
    """Return the task of a target: its rows, true labels and control labels.

    Raises:
        DataError: the data has no labels for it, or too few.
    """
    rng = np.random.default_rng([config.seed, TARGETS.index(name)])
    image, object_of_token = np.array(tokens.images), np.array(tokens.objects)
    uniform, positions = np.array(tokens.uniform), np.array(tokens.positions)
    if name in ("x", "y"):
        rows = uniform.nonzero()[0]
        truth = positions[rows, ("x", "y").index(name)]
        control = [_permute_patches(tokens, rows, truth, rng) for _ in range(config.controls)]
        return _make_task(config, name, rows, np.stack([truth, *control], axis=1), image[rows])
    if not any(sample.objects for sample in images):
        raise DataError(
            f"data set '{data}' has no objects: expected one with objects, such as shapes:val, for the target {name}"
        )
    if name == "count":
        counts = np.array([float(len(sample.objects)) for sample in images])
        labels = np.stack([counts, *(rng.permutation(counts) for _ in range(config.controls))], axis=1)
        return _make_task(config, name, None, labels, np.arange(len(images)))
    if name == "foreground":
        rows = (uniform & ((object_of_token >= 0) | (object_of_token == BACKGROUND))).nonzero()[0]
        labels = np.concatenate([object_of_token[rows, None], np.array(tokens.other_objects)[rows]], axis=1) >= 0
        return _make_task(config, name, rows, labels.astype(int), image[rows], ("background", "object"))
    names = [class_and_color(item.name)[name == "colour"] for sample in images for item in sample.objects]
    images_by_name: dict[str, set[int]] = {}
    for image_number, object_number in zip(image[~uniform], object_of_token[~uniform], strict=True):
        if names[object_number]:
            images_by_name.setdefault(names[object_number], set()).add(image_number)
    classes = tuple(sorted(label for label in images_by_name if len(images_by_name[label]) >= config.folds))
    if len(classes) < 2:
        raise DataError(
            f"{len(classes)} values of {name} are on patches covered to {config.cover:g} in at least {config.folds}"
            " images each: expected at least 2"
        )
    code = np.array([classes.index(label) if label in classes else -1 for label in names])  # class of each object
    rows = (~uniform & (object_of_token >= 0)).nonzero()[0]
    rows = rows[code[object_of_token[rows]] >= 0]
    used = np.unique(object_of_token[rows])
    columns = [code]
    for _ in range(config.controls):
        shuffled = code.copy()
        shuffled[used] = rng.permutation(code[used])
        columns.append(shuffled)
    return _make_task(config, name, rows, np.stack(columns, axis=1)[object_of_token[rows]], image[rows], classes)


def _permute_patches(tokens: Tokens, rows: np.ndarray, truth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the coordinate of each row after the patches of each grid were permuted, once for all images.

    Args:
        truth: the true coordinate of each row.
    """
    patches = [tokens.patches[row] for row in rows]
    true_of = {patch: value for patch, value in zip(patches, truth, strict=True)}
    permuted_of: dict[tuple[int, ...], float] = {}
    for grid in dict.fromkeys(patch[:-1] for patch in patches):
        of_grid = sorted(patch for patch in true_of if patch[:-1] == grid)
        permuted_of |= dict(zip(of_grid, rng.permutation([true_of[patch] for patch in of_grid]), strict=True))
    return np.array([permuted_of[patch] for patch in patches])


def _make_task(
    config: Config,
    name: Target,
    rows: np.ndarray | None,
    labels: np.ndarray,
    image: np.ndarray,
    classes: tuple[str, ...] = (),
) -> Task:
    """Return a task after checking that it has enough images and more than one label.

    Raises:
        DataError: fewer images than folds, or only one label.
    """
    images, groups = np.unique(image, return_inverse=True)
    if len(images) < config.folds:
        raise DataError(
            f"{len(images)} images have tokens for {name}, for {config.folds} folds: expected at least as many images"
            " as folds"
        )
    if len(np.unique(labels[:, 0])) < 2:
        raise DataError(f"{name} is the same for all {len(labels)} rows: expected at least 2 values to distinguish")
    return Task(name, rows, labels, groups, images, classes)


# --- probes ---------------------------------------------------------------------------------------


def _fit_probe(config: Config, task: Task, x: Float[np.ndarray, "row d"]) -> tuple[dict[str, Any], pd.DataFrame]:
    """Fit and score the probes of one target on one representation.

    Returns:
        Score, mean control score and selectivity with their intervals; and a table with the value and control of each
        image.
    """
    is_regression = task.name in REGRESSED
    folds = folds_of(task.groups, config.folds, config.seed)
    if is_regression:
        predicted, score = regress(x, task.labels, folds, l2=config.l2), r_squared
    else:
        predicted, score = classify(x, task.labels, folds, l2=config.l2), balanced_accuracy
    values, *controls = (
        score(labels, predictions, task.groups) for labels, predictions in zip(task.labels.T, predicted.T, strict=True)
    )
    control = np.mean(controls, axis=0)
    selectivity = values - (control if control.mean() > task.chance else task.chance)
    row: dict[str, Any] = {}
    for name, by_image in (("score", values), ("control", control), ("selectivity", selectivity)):
        # without a miss all values are 1 and show no spread: take the interval of a proportion instead
        is_proportion = not is_regression and np.isin(by_image, (0, 1)).all()
        interval = mean_interval(by_image, kind="proportion" if is_proportion else "real")
        prefix = "" if name == "score" else f"{name}_"
        row |= {name: interval.estimate, f"{prefix}low": interval.low, f"{prefix}high": interval.high}
    row |= {
        "chance": task.chance,
        "measure": "R2" if is_regression else "balanced accuracy",
        "n_images": len(values),
        "n": len(x),
        "d": x.shape[1],
        "classes": len(task.classes),
        "folds": config.folds,
        "l2": config.l2,
        "controls": len(controls),
        "seed": config.seed,
    }
    return row, pd.DataFrame({"value": values, "control": control})


# --- tables and figures ---------------------------------------------------------------------------


def _table(runs: Mapping[str, Run], name: str = "scores") -> pd.DataFrame:
    """Return a table of all runs, with the label of the run in the column model."""
    return pd.concat([run.tables[name].assign(model=label) for label, run in runs.items()], ignore_index=True)


def summary(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Return one row for each model, target and layer; the vision encoder and the VFMs have layer -1."""
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
    return _table(runs)[[*columns, "n_images", "n", "measure"]].sort_values(["model", "target"], kind="stable")


def differences(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Return every model minus the first one by target and layer, paired over images.

    p-values are Holm-corrected over the layers of a target.
    """
    tables = {label: run.tables["per_image"].query("source == 'model'") for label, run in runs.items()}
    seed = int(next(iter(runs.values())).record["seed"])
    return paired_differences(tables, by=("target", "layer"), within=("target",), seed=seed)


def figures(runs: Mapping[str, Run]) -> dict[str, go.Figure]:
    """Draw each target by layer with its control, the vision encoder and the VFMs, and differences between models."""
    table, changes, drawn = _table(runs), differences(runs), {}
    for target in dict.fromkeys(table["target"]):
        rows = table[table["target"] == target]
        layers = rows[rows["source"].isin(["model", ENCODER])]
        measure = str(rows["measure"].iloc[0])
        control = layers.assign(
            labels="control",
            score=layers["control"],
            low=layers["control_low"],
            high=layers["control_high"],
        )
        curves = fig.layer_curves(pd.concat([layers.assign(labels="true labels"), control]), y=measure, kind="labels")
        ceilings = rows[~rows["source"].isin(["model", ENCODER])].drop_duplicates("source")
        drawn[f"{target}: {measure}"] = fig.with_ceilings(curves, ceilings, name="source")
        change = changes[changes["target"] == target]
        if len(change):
            drawn[f"{target}: {measure}, difference"] = fig.difference_curves(
                change, y=f"{measure}, minus {change['against'].iloc[0]}"
            )
    return drawn


# version 2: intervals that reach their nominal coverage
ANALYSIS = Analysis(
    "linear_probe",
    "What a linear probe predicts from the visual tokens of each layer",
    Config,
    run,
    figures,
    summary,
    PAGE,
    version=2,
    uses=vfm_inputs,
)

if __name__ == "__main__":
    main(ANALYSIS)
