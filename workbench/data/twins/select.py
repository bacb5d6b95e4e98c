"""Which questions of the synthetic scenes a twin asks: each text with each of its answers equally often.

A model that does not see the image gives the same answer to the same text, so it is right as often as chance.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import combinations, product

import numpy as np

from workbench.data.base import Sample
from workbench.data.scenes import RELATION_X, RELATION_Y
from workbench.data.shapes import COLORS, SHAPES, scene_samples
from workbench.data.twins.wordings import Wording, worded
from workbench.errors import DataError

NAMES = (*COLORS, *SHAPES)  # words that identify an object
AXES = {"relation_x": 0, "relation_y": 1}
SIDES = {"x": ("left", "right"), "y": ("above", "below")}
OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top", "above": "below", "below": "above"}
KINDS = {"colour": "color", "position_x": "side_x", "position_y": "side_y"}  # as `wordings` calls our question types
MOST = 20_000  # scenes that are looked through
Wanted = Counter[tuple[str, str]]
"""{(question, answer): how often}"""


@dataclass
class Scenes:
    """The scenes of `shapes:test`, and more like them, one after another, without those that are taken.

    Attributes:
        seed: of the scenes.
        objects: objects of a scene, at most.
        apart: least distance between the centers of two objects whose relation is asked for, along its axis, as a share
            of the image.
        taken: numbers of the scenes that a twin already has, so that all its questions are about different images.
    """

    seed: int
    objects: int = 6
    apart: float = 0
    taken: set[int] = field(default_factory=set)

    def __iter__(self) -> Iterator[tuple[int, list[Sample]]]:
        for number in range(MOST):
            if number not in self.taken:
                scene = _scene(self.seed, number)
                if len(scene[0].objects) <= self.objects:
                    yield number, scene
        raise DataError(f"{MOST} scenes do not have all questions of a twin: expected fewer questions")


@lru_cache(maxsize=2000)  # several twins look through the same scenes
def _scene(seed: int, number: int) -> list[Sample]:
    return scene_samples("test", seed, number)


def balanced(scenes: Scenes, wanted: Mapping[tuple[str, str], int]) -> list[Sample]:
    """Take questions of different scenes, each (text, answer) as often as `wanted` says.

    Args:
        scenes: the scenes.
        wanted: {(question, answer): how often}.

    Raises:
        DataError: the scenes do not have them all.
    """
    missing = Counter(wanted)
    chosen: list[Sample] = []
    for number, scene in scenes:
        if not missing.total():
            break
        fitting = [s for s in scene if missing[s.question, s.answer] > 0 and _distance(s) >= scenes.apart]
        if fitting:
            chosen.append(max(fitting, key=lambda s: missing[s.question, s.answer]))
            missing[chosen[-1].question, chosen[-1].answer] -= 1
            scenes.taken.add(number)
    return chosen


def _distance(sample: Sample) -> float:
    """Return the distance of the two objects of a question for a relation along its axis; infinity for others."""
    if sample.category not in AXES:
        return float("inf")
    axis = AXES[sample.category]
    boxes = [next(o.box for o in sample.objects if name in o.name.split()) for name in names_in(sample)]
    first, second = ((box[axis] + box[axis + 2]) / 2 for box in boxes)
    return abs(first - second)


def names_in(sample: Sample) -> list[str]:
    """Return the names of objects in a question, in order."""
    return [word for word in sample.question.split() if word in NAMES]


def asked(benchmark: str, sample: Sample, wording: Wording) -> str:
    """Return the text of a question in a twin of `benchmark`."""
    names = names_in(sample)
    a, b = (" ".join(names), "") if sample.category == "exist" else (names[0], names[-1])
    return worded(f"{benchmark} {KINDS.get(sample.category, sample.category)}", wording, a, b)


def pairs_of(rng: np.random.Generator, names: Sequence[str]) -> list[tuple[str, str]]:
    """Return every two names once, in random order."""
    pairs = [pair if rng.integers(2) else pair[::-1] for pair in combinations(names, 2)]
    return [pairs[number] for number in rng.permutation(len(pairs))]


def relations(pairs: Sequence[tuple[str, str]]) -> Wanted:
    """Return the questions for the relation of every pair along each axis, once with each of the two answers."""
    texts = ((RELATION_X, SIDES["x"]), (RELATION_Y, SIDES["y"]))
    return Counter(
        (text.format(a=a, b=b), answer) for (a, b), (text, answers) in product(pairs, texts) for answer in answers
    )


def rotated(options: Sequence[str], by: int) -> list[str]:
    """Return the options in an order that begins `by` places later."""
    return [*options[by % len(options) :], *options[: by % len(options)]]
