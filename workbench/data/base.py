"""Data sets, questions, conversations and objects; `load_data` loads a data set by its spec."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image

from workbench.data.images import StoredImage
from workbench.data.images import upright_rgb as upright_rgb
from workbench.data.selection import subset as subset
from workbench.errors import DataError, UnknownNameError, one_line
from workbench.registry import Registry

IMAGE_MARK = "\ufdd0"  # where an image stands within a question; a Unicode noncharacter, so it occurs in no text


@dataclass(frozen=True)
class Object:
    """An object in an image.

    Attributes:
        name: what it is, such as "red circle".
        box: left, top, right, bottom as fractions of the image, 0..1.
        mask: (height, width) bool array in image pixels, or None where unknown.
    """

    name: str
    box: tuple[float, float, float, float]
    mask: np.ndarray | None = field(default=None, compare=False, repr=False)


class DrawnObject(Object):
    """An object whose mask is drawn on first use, so that the masks of thousands of scenes do not fill the memory.

    Args:
        name: what it is, such as "red circle".
        box: left, top, right, bottom as fractions of the image, 0..1.
        draw: returns the mask.
    """

    def __init__(self, name: str, box: tuple[float, float, float, float], draw: Callable[[], np.ndarray]) -> None:
        for attribute, value in (("name", name), ("box", box), ("_draw", draw)):
            object.__setattr__(self, attribute, value)  # as the frozen parent class does

    @cached_property
    def mask(self) -> np.ndarray:  # type: ignore[override]
        return self._draw()  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Sample:
    """One question about one image.

    Attributes:
        id: unique within the data set.
        image_id: identifies the image, for all questions about it. For images on disk it is the hash of their pixels;
            in training sets whose images are not decoded beforehand, their place (file or bytes); in a folder of
            photographs, the file's name.
        load: returns the image; a data set on disk reads it again each time, so that photographs do not fill the
            memory.
        question: the question.
        answer: the right answer, "" where there is none (a folder of photographs).
        options: all answers that the question allows, () for an open question.
        category: the question type, by which accuracy is reported.
        objects: the objects in the image, where known.
        text_only: accuracy of the best guess from the text alone, where a data set is not balanced over its options.
        pair: identifies the questions that some scores count as one, right only if all of them are (MMVP, MME).
        source: where the image comes from, if accuracy is reported by that (CV-Bench).
        asked: those of `objects` that the question names, in its order, where the source states them.
    """

    id: str
    image_id: str
    load: Callable[[], Image.Image] = field(repr=False, compare=False)
    question: str = ""
    answer: str = ""
    options: tuple[str, ...] = ()
    category: str = ""
    objects: tuple[Object, ...] = ()
    text_only: float | None = None
    pair: str = ""
    source: str = ""
    asked: tuple[Object, ...] = field(default=(), repr=False)

    @property
    def chance(self) -> float:
        """The accuracy (0..1) of answers without the image: 1 / number of options, or `text_only`."""
        return 1 / max(1, len(self.options)) if self.text_only is None else self.text_only

    @property
    def image(self) -> Image.Image:
        """The image in RGB, upright."""
        return self.load()

    @property
    def image_name(self) -> str:
        """What messages call the image: its file, or its `image_id` if it is not stored."""
        return self.load.name if isinstance(self.load, StoredImage) else self.image_id


@dataclass(frozen=True)
class Conversation:
    """Questions with their answers and the images they are about, as multimodal models are trained on them.

    Attributes:
        id: unique within the data set.
        turns: (question, answer), one after another.
        loads: functions that each return one of the images; () for text alone. All images stand before the first
            question, or each at its IMAGE_MARK in that question.
        image_ids: identifies each image, as `Sample.image_id`.
    """

    id: str
    turns: tuple[tuple[str, str], ...]
    loads: tuple[Callable[[], Image.Image], ...] = field(default=(), repr=False, compare=False)
    image_ids: tuple[str, ...] = ()

    @property
    def images(self) -> tuple[Image.Image, ...]:
        """The images in RGB, upright."""
        return tuple(load() for load in self.loads)

    @property
    def length(self) -> int:
        """Number of characters of all turns, for grouping conversations of similar length."""
        return sum(len(question) + len(answer) for question, answer in self.turns)


def asked_object(sample: Sample) -> Object | None:
    """Return the one object of the image that the question names, or None if it does not name exactly one.

    Names are compared word by word: "what shape is red ?" names the only object with "red" in its name, "any red star
    ?" the only one with both words. A question answered "no" or "0" is about an object that is not there. Synonyms and
    plurals are not recognized.
    """
    if sample.answer.lower() in ("no", "0"):
        return None
    names = [set(_words(obj.name)) for obj in sample.objects]
    named = set(_words(sample.question)) & set().union(*names)
    matches = [obj for obj, words in zip(sample.objects, names, strict=True) if named and named <= words]
    return matches[0] if len(matches) == 1 else None


def named_objects(sample: Sample, count: int) -> tuple[Object, ...]:
    """Return the `count` objects of the image that the question names, in its order, or () if it names others.

    They are `sample.asked` where the source states them. Else one object is `asked_object`, and of several each is
    named by a phrase, words of object names that follow one another: "is red left or right of square ?" names two,
    if one object is red and one, another, is a square.
    """
    if sample.asked:
        return sample.asked if len(sample.asked) == count else ()
    if count == 1:
        return () if (only := asked_object(sample)) is None else (only,)
    names = [set(_words(obj.name)) for obj in sample.objects]
    known: set[str] = set().union(*names)
    phrases = [set(words) for named, words in groupby(_words(sample.question), known.__contains__) if named]
    matches = [[number for number, name in enumerate(names) if phrase <= name] for phrase in phrases]
    numbers = [match[0] for match in matches if len(match) == 1]
    unambiguous = len(matches) == len(numbers) == len(set(numbers)) == count
    return tuple(sample.objects[number] for number in numbers) if unambiguous else ()


# the basic color terms of Berlin and Kay 1969
COLOR_TERMS = ("black", "white", "red", "green", "yellow", "blue", "brown", "orange", "pink", "purple", "grey", "gray")


def class_and_color(name: str) -> tuple[str, str]:
    """Split the name of an object, such as "red circle", into its class and its color ("" if it names none).

    A color is a basic color term before the last word. A name of one word is a class, so that "orange" is the fruit.
    """
    *first, last = _words(name) or [""]
    colors = [word for word in first if word in COLOR_TERMS]
    rest = [word for word in first if word not in COLOR_TERMS]
    return " ".join([*rest, last]), " ".join(colors)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


class Dataset:
    """Samples in a fixed order, with a fingerprint of their content.

    Args:
        name: the spec it was loaded from, such as "shapes:val".
        samples: all questions.
        fingerprint: hash of everything that determines the samples, or a function that computes it on first use.
        words: all words that can occur, if that is a closed list; by default the words that do occur.
        left_out: sentences about what the source contains and the samples do not, or not in the form it is written.
        origin: hash of everything that determines a sample besides its own fields, if it does not depend on the limit;
            by default the fingerprint takes its place.
    """

    def __init__(
        self,
        name: str,
        samples: list[Sample],
        fingerprint: str | Callable[[], str],
        words: Iterable[str] = (),
        left_out: Sequence[str] = (),
        origin: str = "",
    ) -> None:
        if not samples:
            raise DataError(f"data set '{name}' has no samples")
        self.name, self.samples, self._fingerprint, self.left_out = name, samples, fingerprint, tuple(left_out)
        self._words, self.origin = tuple(words), origin

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that determines the samples, including the content of their images."""
        return self._fingerprint if isinstance(self._fingerprint, str) else self._fingerprint()

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def only(self, ids: Collection[str], limit: int | None = None) -> Dataset:
        """Return the questions with these ids, in the order of the data set, about at most `limit` images.

        Raises:
            DataError: it has no question with one of the ids.
        """
        wanted = set(ids)
        samples = [sample for sample in self.samples if sample.id in wanted]
        if unknown := sorted(wanted - {sample.id for sample in samples}):
            raise DataError(
                f"{len(unknown)} of {len(wanted)} ids are not in data set '{self.name}', first {unknown[0]!r}: expected"
                " ids of its questions"
            )
        images = set(list(dict.fromkeys(sample.image_id for sample in samples))[:limit])
        chosen = copy(self)
        for name in ("fingerprint", "vocabulary", "conversations", "scenes"):
            chosen.__dict__.pop(name, None)
        chosen.samples = [sample for sample in samples if sample.image_id in images]
        chosen._fingerprint = lambda: content_hash("ids", self.fingerprint, *(sample.id for sample in chosen.samples))
        chosen.name, chosen.origin = f"{self.name}, {len(chosen.samples)} chosen questions", self.origin
        return chosen

    @cached_property
    def vocabulary(self) -> set[str]:
        """All words of the questions and answers."""
        return set(self._words) or {word for s in self.samples for word in f"{s.question} {s.answer}".split()}

    @cached_property
    def conversations(self) -> list[Conversation]:
        """One conversation for each image, with all its questions as turns.

        Raises:
            DataError: questions without an answer, such as those of a folder of photographs.
        """
        if unanswered := next((s for s in self.samples if not s.answer), None):
            raise DataError(
                f"data set '{self.name}' has questions without an answer, first {unanswered.id}: expected answers to"
                " train on"
            )
        return [
            Conversation(
                scene[0].image_id, tuple((s.question, s.answer) for s in scene), (scene[0].load,), (scene[0].image_id,)
            )
            for scene in self.scenes
        ]

    @cached_property
    def scenes(self) -> list[list[Sample]]:
        """The samples grouped by image, in order."""
        groups: dict[str, list[Sample]] = {}
        for sample in self.samples:
            groups.setdefault(sample.image_id, []).append(sample)
        return list(groups.values())


Loader = Callable[..., Dataset]
DATASETS: Registry[Loader] = Registry("data set", "data")


def load_data(
    spec: str, *, limit: int | None = None, seed: int = 0, draw: int | None = None, decode: bool | None = None
) -> Dataset:
    """Load a data set by its spec `name:rest`, for example `shapes:val` or `folder:/photos`.

    Args:
        spec: the data set's name and what it takes after the colon.
        limit: number of images to keep, with all their questions; None keeps all. Synthetic data sets keep their first
            `limit` scenes; data sets on disk keep a random subset drawn with `seed`, in the original order. A smaller
            subset is part of every larger one.
        seed: of the random subset; for synthetic data sets, of the scenes.
        draw: seed of the random subset instead of `seed`; with it, a subset of a synthetic data set is random too.
        decode: whether to decode all images beforehand and identify them by their pixels; if False, which suits
            training sets of any size, they are identified by their place. By default they are decoded if there is a
            limit, or if there are at most 10,000 images.

    Raises:
        UnknownNameError: no data set or split of that name.
        DataError: nothing usable in it.
    """
    name, _, rest = spec.partition(":")
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}: expected at least 1 image")
    loader = DATASETS.get(name)
    return loader(rest, limit=limit, seed=seed, draw=draw, decode=decode)


def read_ids(file: Path) -> list[str]:
    """Read ids of questions, one a line; empty lines are skipped.

    Raises:
        DataError: the file cannot be read, or has no ids.
    """
    try:
        ids = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(
            f"{file} cannot be read ({one_line(error, 100)}): expected ids of questions, one a line"
        ) from error
    if not ids:
        raise DataError(f"{file} has no ids: expected ids of questions, one a line")
    return ids


def content_hash(*parts: object) -> str:
    """Hash the representation of `parts` to 16 hex digits."""
    return rows_hash(parts)


def rows_hash(parts: Iterable[object]) -> str:
    """Compute `content_hash` of parts that come one after another, however many they are."""
    digest = hashlib.sha256()
    for number, part in enumerate(parts):
        digest.update((f"|{part!r}" if number else repr(part)).encode())
    return digest.hexdigest()[:16]


def check_split(name: str, split: str, known: tuple[str, ...]) -> str:
    """Return `split` if it is among `known`.

    Raises:
        UnknownNameError: otherwise; it names the nearest valid split.
    """
    if split not in known:
        raise UnknownNameError(f"split of {name}", split, known)
    return split
