"""What synthetic data sets share: the layout of scenes, and questions whose text alone does not give the answer away.

Each question type is balanced *given its text*, by symmetry and not by rejection afterwards: counts are drawn uniformly
before the objects, names are assigned independently of places, places are exchangeable and mirror-symmetric, and
questions ask for as many absent as present objects. A model that sees only the text is therefore at chance on every
type.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import comb
from typing import Protocol, TypeVar

import numpy as np
from PIL import Image

from workbench.data.base import Dataset, Object, Sample, check_split, content_hash, subset

COUNTS = ("0", "1", "2", "3")
CENTER_MARGIN = 0.08  # no question asks for the side of an object closer to the middle line (share of the image)
RELATION_MARGIN = 0.12  # nor for the relation of two objects whose centers differ by less

COUNT = "how many {a} ?"
SIDE_X = "is {a} left or right ?"
SIDE_Y = "is {a} top or bottom ?"
RELATION_X = "is {a} left or right of {b} ?"
RELATION_Y = "is {a} above or below {b} ?"
FURTHEST = {
    "left": "what is furthest left ?",
    "right": "what is furthest right ?",
    "up": "what is furthest up ?",
    "down": "what is furthest down ?",
}
NEIGHBOR = {
    "left": "what is left of {a} ?",
    "right": "what is right of {a} ?",
    "above": "what is above {a} ?",
    "below": "what is below {a} ?",
}


@dataclass(frozen=True)
class Question:
    """A question about a scene, not yet tied to an image; the attributes are those of `Sample`."""

    text: str
    answer: str
    options: tuple[str, ...]
    category: str


class Placed(Protocol):
    """An object with its center in pixels."""

    @property
    def x(self) -> float: ...

    @property
    def y(self) -> float: ...


T = TypeVar("T")
P = TypeVar("P", bound=Placed)
Named = Sequence[tuple[str, P]]
"""Objects that one word identifies, with that word."""


@dataclass(frozen=True)
class SyntheticScenes:
    """A synthetic data set, in which every scene is a function of (split, seed, index) alone.

    Attributes:
        name: name of the data set.
        version: part of every random stream and of the fingerprint; raise it when any scene or question changes.
        splits: number of scenes of each split.
        size: width and height of an image in pixels.
        objects: probabilities of 1, 2, ... objects.
        radius: radius in pixels of the disc in which an object lies: the smallest, and the largest for 1, 2, ...
            objects.
    """

    name: str
    version: int
    splits: Mapping[str, int]
    size: int
    objects: tuple[float, ...]
    radius: tuple[float, tuple[float, ...]]

    def generator(self, split: str, seed: int, index: int, purpose: int) -> np.random.Generator:
        """Return the random stream of one purpose (0 layout, 1 image, 2 questions) of one scene."""
        return np.random.default_rng([self.version, seed, list(self.splits).index(split), index, purpose])

    def dataset(
        self,
        split: str,
        seed: int,
        limit: int | None,
        draw: int | None,
        scene: Callable[[str, int, int], list[Sample]],
        words: Iterable[str],
        *content: object,
        spec: str = "",
    ) -> Dataset:
        """Return the first `limit` scenes of a split, or a random `limit` of them, as a data set.

        Args:
            split: the split.
            seed: of the scenes.
            limit: number of scenes; None for all.
            draw: seed of a random selection; None takes the first scenes.
            scene: maps (split, seed, index) to the samples of a scene.
            words: the closed vocabulary.
            content: what determines the scenes besides the version.
            spec: the spec after the colon, if it is more than the split.
        """
        check_split(self.name, split, tuple(self.splits))
        count = min(self.splits[split], limit or self.splits[split])
        indices = range(count) if draw is None else subset(self.splits[split], count, draw)
        samples = [sample for index in indices for sample in scene(split, seed, index)]
        selection = () if len(indices) == self.splits[split] or draw is None else (draw,)
        origin = (self.name, self.version, *content, split, seed)
        return Dataset(
            f"{self.name}:{spec or split}",
            samples,
            content_hash(*origin, count, *selection),
            words,
            origin=content_hash(*origin),
        )

    def draw_number(self, rng: np.random.Generator) -> int:
        """Draw the number of objects of a scene."""
        return 1 + int(rng.choice(len(self.objects), p=self.objects))

    def draw_places(self, rng: np.random.Generator, number: int) -> list[tuple[float, float, float]]:
        """Draw `number` discs (x, y, radius), in pixels, that do not touch and lie inside the image."""
        smallest, largest = self.radius
        while True:
            placed: list[tuple[float, float, float]] = []
            for _ in range(40 * number):
                radius = rng.uniform(smallest, largest[number - 1])
                x, y = rng.uniform(radius + 2, self.size - radius - 2, size=2)
                if all((x - a) ** 2 + (y - b) ** 2 > (radius + r + 3) ** 2 for a, b, r in placed):
                    placed.append((float(x), float(y), float(radius)))
                if len(placed) == number:
                    return placed

    def count_questions(self, rng: np.random.Generator, present: Iterable[str], names: Sequence[str]) -> list[Question]:
        """Ask how many objects of each name there are, so that each count (0 to 3) is equally often the answer.

        Questions about the more frequent counts are left out at random.

        Args:
            rng: the scene's random stream.
            present: names in the scene, as `draw_repeated` drew them.
            names: all names.
        """
        times, accepted, questions = Counter(present), acceptance(len(names), self.objects), []
        for name in names:
            draw, count = rng.random(), times[name]
            if count < len(COUNTS) and draw < accepted[count]:
                questions.append(Question(COUNT.format(a=name), COUNTS[count], COUNTS, "count"))
        return questions

    def position_questions(self, named: Named[P]) -> list[Question]:
        """Ask on which side of the image each object is."""
        questions = []
        for name, item in named:
            x, y = item.x / self.size - 0.5, item.y / self.size - 0.5
            if abs(x) > CENTER_MARGIN:
                questions.append(
                    Question(SIDE_X.format(a=name), "left" if x < 0 else "right", ("left", "right"), "position_x")
                )
            if abs(y) > CENTER_MARGIN:
                questions.append(
                    Question(SIDE_Y.format(a=name), "top" if y < 0 else "bottom", ("top", "bottom"), "position_y")
                )
        return questions

    def relation_questions(self, rng: np.random.Generator, named: Named[P], most: int = 4) -> list[Question]:
        """Ask on which side of one another two objects are, for at most `most` pairs per axis."""
        pairs = [(a, b) for a in named for b in named if a[1] is not b[1]]
        by_axis: dict[str, list[Question]] = {"x": [], "y": []}
        for i in rng.permutation(len(pairs)):
            (name, item), (other_name, other) = pairs[i]
            dx, dy = (item.x - other.x) / self.size, (item.y - other.y) / self.size
            if abs(dx) > RELATION_MARGIN:
                text = RELATION_X.format(a=name, b=other_name)
                by_axis["x"].append(Question(text, "left" if dx < 0 else "right", ("left", "right"), "relation_x"))
            if abs(dy) > RELATION_MARGIN:
                text = RELATION_Y.format(a=name, b=other_name)
                by_axis["y"].append(Question(text, "above" if dy < 0 else "below", ("above", "below"), "relation_y"))
        return by_axis["x"][:most] + by_axis["y"][:most]

    def furthest_questions(self, items: Sequence[tuple[str, P]], names: Sequence[str]) -> list[Question]:
        """Ask which object is furthest to each side of the image, if no other object comes close.

        A single object is furthest to every side.

        Args:
            items: all objects of the scene, with their names.
            names: all names, which are the options.
        """
        questions = []
        for axis, sides in (("x", ("left", "right")), ("y", ("up", "down"))):
            ordered = sorted(items, key=lambda named: float(getattr(named[1], axis)))
            places = [getattr(item, axis) / self.size for _, item in ordered]
            for side, first, second in ((sides[0], 0, 1), (sides[1], -1, -2)):
                if len(places) == 1 or abs(places[first] - places[second]) > RELATION_MARGIN:
                    questions.append(Question(FURTHEST[side], ordered[first][0], tuple(names), f"furthest_{axis}"))
        return questions

    def neighbor_questions(
        self, named: Named[P], items: Sequence[tuple[str, P]], names: Sequence[str]
    ) -> list[Question]:
        """Ask which object is on one side of another one.

        A question is asked only if exactly one object is on that side, at least one is on the opposite side, and none
        is close to the dividing line. Without an object on the opposite side the direction would not matter: the answer
        would be "the other one".

        Args:
            named: the objects to ask about.
            items: all objects of the scene, with their names.
            names: all names; the options are those that the question does not contain.
        """
        questions = []
        for name, item in named:
            others = [(other_name, other) for other_name, other in items if other is not item]
            for axis, (low, high) in (("x", ("left", "right")), ("y", ("above", "below"))):
                gaps = [
                    ((getattr(other, axis) - getattr(item, axis)) / self.size, other_name)
                    for other_name, other in others
                ]
                if any(abs(gap) <= RELATION_MARGIN for gap, _ in gaps):
                    continue
                sides = {low: [n for gap, n in gaps if gap < 0], high: [n for gap, n in gaps if gap > 0]}
                for side, opposite in ((low, high), (high, low)):
                    if len(sides[side]) == 1 and sides[opposite]:
                        options = tuple(option for option in names if option != name)
                        text = NEIGHBOR[side].format(a=name)
                        questions.append(Question(text, sides[side][0], options, f"neighbour_{axis}"))
        return questions


def draw_repeated(rng: np.random.Generator, names: list[str], number: int) -> list[str]:
    """Draw `number` names in random order; a random name occurs 0..min(3, number) times, uniformly."""
    chosen = str(rng.choice(names))
    count = int(rng.integers(0, min(len(COUNTS) - 1, number) + 1))
    others = rng.choice([name for name in names if name != chosen], size=number - count)
    drawn = [chosen] * count + [str(name) for name in others]
    return [drawn[i] for i in rng.permutation(number)]


@cache
def acceptance(names: int, objects: tuple[float, ...]) -> tuple[float, ...]:
    """Return the probabilities of asking for a count of 0, 1, 2, 3 that make the asked counts uniform.

    Each is the probability of the rarest count, divided by that of the count itself, under `draw_repeated` for a fixed
    one of `names` names.
    """
    most = len(COUNTS) - 1
    probability = np.zeros(len(COUNTS))
    for number, weight in enumerate(objects, start=1):
        for count in range(min(most, number) + 1):
            share = weight / (min(most, number) + 1)
            probability[count] += share / names
            probability += share * (1 - 1 / names) * _binomial(number - count, 1 / (names - 1))
    return tuple(probability.min() / probability)


def _binomial(n: int, p: float) -> np.ndarray:
    """Return the probabilities of each of COUNTS among `n` independent objects; scipy.stats would cost 50 MB."""
    return np.array([comb(n, k) * p**k * (1 - p) ** max(0, n - k) for k in range(len(COUNTS))])


def unique(items: Sequence[T], key: Callable[[T], Hashable]) -> list[T]:
    """Return the items whose key no other item has."""
    times = Counter(map(key, items))
    return [item for item in items if times[key(item)] == 1]


def shuffled_samples(
    rng: np.random.Generator,
    image_id: str,
    load: Callable[[], Image.Image],
    questions: Sequence[Question],
    objects: tuple[Object, ...],
) -> list[Sample]:
    """Return all questions about a scene as samples, in random order."""
    ordered = [questions[i] for i in rng.permutation(len(questions))]
    return [
        Sample(f"{image_id}-{n:02d}", image_id, load, q.text, q.answer, q.options, q.category, objects)
        for n, q in enumerate(ordered)
    ]


def template_words(templates: Iterable[str]) -> set[str]:
    """Return the words of question templates, without their variable parts."""
    return {word for text in templates for word in text.format(a="", b="").split()}
