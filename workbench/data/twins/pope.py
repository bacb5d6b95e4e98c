"""The twin of POPE: scenes of `photos:test` with two objects, asked as POPE's authors ask (their `utils.py`).

Two questions about objects that are there alternate with two about objects that are not: in `random` any of them,
in `popular` the most frequent of all images, in `adversarial` the one that most often occurs with the object of the
question before. As in POPE, the splits share images and the questions with the answer yes.

In `popular`, the answer to a question about a frequent object is more often no than yes, as in POPE. Over the three
splits together, it is yes exactly as often as no for each object, so that the text alone tells nothing: images are
exchanged until the random split can make up for the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from workbench.data.base import Sample
from workbench.data.photos import Material, default_material, layout, scene_samples
from workbench.data.twins.files import save_image, write_lines
from workbench.data.twins.wordings import Wording, worded
from workbench.errors import DataError

IMAGES = 80
OBJECTS = 2  # of an image, and questions of each answer about it
CANDIDATES = 2000  # scenes that are looked through
TRIES = 5000  # exchanges of one image for another
FREQUENT, FACTOR = 4, 4.0  # so many objects are so many times as likely as the others
ANIMALS = frozenset(("duck", "elephant", "flamingo", "frog", "owl", "tiger", "zebra"))
ALIKE = 2.0  # a scene of animals alone, or without any, is so many times as likely as others
Negatives = list[list[str]]


@dataclass(frozen=True)
class Annotated:
    """A scene and the names of its objects."""

    index: int
    objects: tuple[str, ...]


def write_pope(folder: Path, seed: int, wording: Wording) -> None:
    """Write `coco_pope_random.json` and so on, and the images."""
    material = default_material()
    images, splits = choose_images(_candidates(material, seed), material.names, seed)
    names = {}
    for image in images:
        names[image.index] = f"COCO_val2014_{image.index:012d}.jpg"
        save_image(_first(material, seed, image.index).image, folder / names[image.index])
    for split, negatives in splits.items():
        rows: list[dict[str, object]] = []
        for image, absent in zip(images, negatives, strict=True):
            for pair in zip(image.objects, absent, strict=True):
                for name, label in zip(pair, ("yes", "no"), strict=True):
                    text = worded("pope exist", wording, name)
                    file = names[image.index]
                    rows.append({"question_id": len(rows) + 1, "image": file, "text": text, "label": label})
        write_lines(rows, folder / f"coco_pope_{split}.json")


def _first(material: Material, seed: int, index: int) -> Sample:
    return scene_samples(material, "test", seed, index)[0]


def _candidates(material: Material, seed: int) -> list[Annotated]:
    """Return the scenes with exactly two objects, of different names."""
    scenes = []
    for index in range(CANDIDATES):
        names = tuple(item.name for item in layout(material, "test", seed, index))
        if len(names) == len(set(names)) == OBJECTS:
            scenes.append(Annotated(index, names))
    return scenes


def choose_images(
    candidates: Sequence[Annotated], names: Sequence[str], seed: int
) -> tuple[list[Annotated], dict[str, Negatives]]:
    """Return images and, by split, the absent objects that each is asked about.

    Args:
        candidates: the scenes to choose from.
        names: names of all objects.
        seed: of the choice.

    Raises:
        DataError: no choice is balanced.
    """
    rng = np.random.default_rng([seed, 4])
    frequent = set(rng.permutation(names)[:FREQUENT])
    weights = np.array([_weight(scene.objects, frequent) for scene in candidates])
    drawn = {int(i) for i in rng.choice(len(candidates), IMAGES, replace=False, p=weights / weights.sum())}
    best = _Asked(candidates, drawn)
    for _ in range(TRIES):
        if not best.lack and (random := _random(rng, best.images, names, best.balance)) is not None:
            return best.images, {"random": random, "popular": best.popular, "adversarial": best.adversarial}
        out, into = (int(rng.choice(sorted(places))) for places in (drawn, set(range(len(candidates))) - drawn))
        other = _Asked(candidates, drawn - {out} | {into})
        if other.lack <= best.lack:
            best, drawn = other, drawn - {out} | {into}
    raise DataError(f"no {IMAGES} of {len(candidates)} scenes are balanced: expected another seed")


class _Asked:
    """Images with their popular and adversarial questions.

    Attributes:
        balance: {object: how often the random split has to ask for it, so that no and yes are equally frequent}.
        lack: how many questions there are too many of, which no random split can make up for; 0 is balanced.
    """

    def __init__(self, candidates: Sequence[Annotated], drawn: set[int]) -> None:
        self.images = [candidates[i] for i in sorted(drawn)]
        self.popular, self.adversarial = _popular(self.images), _adversarial(self.images)
        self.balance = Counter({name: 3 * count for name, count in _frequency(self.images).items()})
        self.balance.subtract(Counter(name for absent in (*self.popular, *self.adversarial) for name in absent))
        missing = 2 * OBJECTS * len(self.images) - sum(map(len, (*self.popular, *self.adversarial)))
        self.lack = missing * len(self.images) - sum(count for count in self.balance.values() if count < 0)


def _weight(objects: Sequence[str], frequent: set[str]) -> float:
    alike = len({name in ANIMALS for name in objects}) == 1
    return FACTOR ** sum(name in frequent for name in objects) * (ALIKE if alike else 1)


def _frequency(images: Sequence[Annotated]) -> Counter[str]:
    return Counter(name for image in images for name in image.objects)


def _popular(images: Sequence[Annotated]) -> Negatives:
    """Return the most frequent objects that each image does not have."""
    order = [name for name, _ in _frequency(images).most_common()]
    return [[name for name in order if name not in image.objects][:OBJECTS] for image in images]


def _adversarial(images: Sequence[Annotated]) -> Negatives:
    """Return for each object its most frequent companion that the image does not have, if there is one."""
    together: dict[str, Counter[str]] = {}
    for image in images:
        for name in image.objects:
            together.setdefault(name, Counter()).update(other for other in image.objects if other != name)
    negatives: Negatives = []
    for image in images:
        absent: list[str] = []
        for name in image.objects:
            companions = (other for other, _ in together[name].most_common())
            other = next((o for o in companions if o not in image.objects and o not in absent), None)
            absent += [other] if other else []
        negatives.append(absent)
    return negatives


def _random(
    rng: np.random.Generator, images: Sequence[Annotated], names: Sequence[str], times: Mapping[str, int]
) -> Negatives | None:
    """Return random absent objects of each image, each as often as `times` says; None if that was not possible."""
    missing = Counter({name: times.get(name, 0) for name in names})
    if min(missing.values()) < 0:
        return None
    negatives: dict[int, list[str]] = {}
    for place in rng.permutation(len(images)):
        absent = [names[i] for i in rng.permutation(len(names)) if names[i] not in images[place].objects]
        # those that most images still have to be asked about come first, so that none remains in the end
        negatives[place] = sorted(absent, key=lambda name: -missing[name])[:OBJECTS]
        missing.subtract(negatives[place])
    return [negatives[place] for place in range(len(images))] if not any(missing.values()) else None
