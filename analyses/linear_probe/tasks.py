"""The targets of the probes: their rows, their labels, and those of the control tasks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from analyses.linear_probe.options import REGRESSED, TARGETS, Config, Target
from analyses.linear_probe.sampling import Tokens
from workbench.data.base import Sample, class_and_color
from workbench.errors import DataError
from workbench.spatial.grids import BACKGROUND

log = logging.getLogger(__name__)


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


def tasks_of(config: Config, data: str, images: Sequence[Sample], tokens: Tokens) -> tuple[list[Task], dict[str, str]]:
    """Return the targets for which the data has labels, and why others are left out.

    Raises:
        DataError: a target in `config.targets` has no labels, or no target has.
    """
    tasks: list[Task] = []
    left_out: dict[str, str] = {}
    for name in dict.fromkeys(config.targets or TARGETS):
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
