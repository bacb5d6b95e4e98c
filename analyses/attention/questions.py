"""Options of the attention analysis, and the questions that it asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from annotated_types import Ge, Le

from workbench.analysis.declaration import DataOptions
from workbench.data import Dataset, Object, Sample, named_objects
from workbench.errors import DataError
from workbench.options import refuse_unused
from workbench.scoring.questions import check_types

PROMPT, GENERATED = "prompt", "generated"
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
# spatial entropy in its four normalizations; the one that commands print and figures show comes first
ENTROPIES = ("component_entropy", "entropy_components", "entropy_raw", "entropy_shannon")
# of a question about two objects; its OBJECT_MEASURES are about the area that either covers
SINGLE_MEASURES = {
    f"{name}_{number}": f"{title}, {which} object named"
    for number, which in enumerate(("first", "second"), start=1)
    for name, title in OBJECT_MEASURES.items()
}
MIN_IMAGES_PER_HALF = 2


@dataclass(frozen=True)
class Config(DataOptions):
    """What to read, and what to compare it with."""

    ADDED: ClassVar[tuple[str, ...]] = ("positions", "max_new_tokens", "types", "objects")

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
    positions: str = PROMPT
    """Query positions: prompt (its last one), generated (each token of the generated answer), or a WORD."""
    max_new_tokens: Annotated[int, Ge(1)] = 16
    """Longest answer to generate, in tokens; for --positions generated or WORD."""
    types: tuple[str, ...] = ()
    """Question types to ask; all by default."""
    objects: Annotated[int, Ge(1), Le(2)] = 1
    """Objects that a question must name: 1, or 2 for relations, whose maps are compared with both objects."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.localise:
            because = "without localise no question needs to name one"
            refuse_unused(self, "objects", because=because, expected="localise")


@dataclass(frozen=True)
class Question:
    """A question, the objects that it names, and the positions whose attention is read.

    Attributes:
        targets: the objects; () with --no-localise.
        offsets: positions relative to the first one after the prompt: -1 is the last of the prompt, 0 the first token
            of the answer.
        answer: tokens that are appended to the prompt.
        words: the text of the token at each offset; () for the last position of the prompt.
    """

    sample: Sample
    targets: tuple[Object, ...]
    offsets: tuple[int, ...] = (-1,)
    answer: tuple[int, ...] = ()
    words: tuple[str, ...] = ()


def measures_of(config: Config) -> dict[str, str]:
    """Return the measures that the options ask for, in their order, with their titles."""
    if not config.localise:
        return SPREAD_MEASURES
    return MEASURES | (SINGLE_MEASURES if config.objects == 2 else {})


def questions_of(config: Config, data: Dataset) -> list[Question]:
    """Return the first questions about each image; with `localise` only those that name `config.objects` objects.

    Raises:
        DataError: with `localise`, the data set has no objects, or too few images have such a question.
        UnknownNameError: a question type that the data set does not have.
    """
    check_types(config.types, {sample.category for sample in data})
    scenes = [[s for s in scene if not config.types or s.category in config.types] for scene in data.scenes]
    if not config.localise:
        return [Question(sample, ()) for scene in scenes for sample in scene[: config.questions]]
    if not any(sample.objects for sample in data):
        raise DataError(
            f"data set '{data.name}' has no objects to compare attention with: choose one that has, such as shapes:val,"
            " or pass --no-localise for mass and entropies alone"
        )
    questions: list[Question] = []
    for scene in scenes:
        about = [Question(sample, named_objects(sample, config.objects)) for sample in scene]
        questions += [question for question in about if question.targets][: config.questions]
    number = ("one object", "two objects")[config.objects - 1]
    if not questions:
        other = 3 - config.objects
        others = sum(bool(named_objects(sample, other)) for scene in scenes for sample in scene)
        hint = f", --objects {other} ({others} questions name {other})" if others else ""
        raise DataError(
            f"none of the {sum(map(len, scenes))} questions of '{data.name}' names exactly {number} of its image:"
            f" choose other data{hint}, or pass --no-localise for mass and entropies alone"
        )
    check_images(questions, f"have a question about exactly {number}")
    return questions


def check_images(questions: Sequence[Question], have: str) -> None:
    """Raise a DataError if too few images are left to choose heads on one half of them and to report on the other."""
    images = len({question.sample.image_id for question in questions})
    if images < 2 * MIN_IMAGES_PER_HALF:
        raise DataError(
            f"{images} images {have}: expected at least {2 * MIN_IMAGES_PER_HALF},"
            " half to choose heads on and half to report; try a larger --limit"
        )


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
