"""Options of the attention analysis, and the questions that it asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from annotated_types import Ge

from workbench.analysis.declaration import DataOptions
from workbench.data import Dataset, Object, Sample, asked_object
from workbench.errors import DataError

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
MIN_IMAGES_PER_HALF = 2


@dataclass(frozen=True)
class Config(DataOptions):
    """What to read, and what to compare it with."""

    layers: tuple[int, ...] = ()
    """Blocks of the model to read, counted from 1; all by default."""
    questions: Annotated[int, Ge(1)] = 4
    """Questions to ask about each image, at most; only those that name exactly one object, unless --no-localise."""
    localise: bool = True
    """Compare the maps with objects; --no-localise takes any data and any question, for mass and entropies alone."""
    null: Annotated[int, Ge(10)] = 20
    """Draws for the null of each map: objects of other images, and shuffles of the map."""
    top: Annotated[int, Ge(1)] = 5
    """Heads to choose on one half of the images and to report on the other."""
    examples: Annotated[int, Ge(0)] = 3
    """Images whose attention maps are stored and drawn over them; 0 for none."""
    compare: Annotated[int, Ge(0)] = 50
    """Reported images on which raw attention is compared with rollout and gradient x attention, at most; 0 for none."""


@dataclass(frozen=True)
class Question:
    """A question, and the object that it names (None with --no-localise)."""

    sample: Sample
    target: Object | None


def measures_of(config: Config) -> list[str]:
    """Return the measures that the options ask for, in their order."""
    return list(MEASURES if config.localise else SPREAD_MEASURES)


def questions_of(config: Config, data: Dataset) -> list[Question]:
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


def reported_half(images: Sequence[str], seed: int) -> np.ndarray:
    """Return which samples belong to the half of the images that heads are reported on; bool, (sample,)."""
    image_ids = list(dict.fromkeys(images))
    order = np.random.default_rng(seed).permutation(len(image_ids))
    choosing = {image_ids[i] for i in order[: len(image_ids) // 2]}
    return np.array([image not in choosing for image in images])


def first_samples(images: Sequence[str], reported: np.ndarray, count: int) -> list[int]:
    """Return the number of the first sample of each of the first `count` reported images."""
    first_of_image = {image: number for number, image in reversed(list(enumerate(images))) if reported[number]}
    return sorted(first_of_image.values())[:count]
