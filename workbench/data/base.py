"""What every data set is: an ordered sequence of questions about images."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from PIL import Image, ImageOps

from workbench.errors import DataError, UnknownNameError
from workbench.registry import Registry

Image.MAX_IMAGE_PIXELS = 120_000_000  # a larger picture is refused, not decoded


@dataclass(frozen=True)
class Object:
    """A thing in an image.

    Attributes:
        name: what it is, such as "red circle".
        box: left, top, right, bottom as fractions of the image, 0..1.
        mask: (height, width) bool array in image pixels, or None where unknown.
    """

    name: str
    box: tuple[float, float, float, float]
    mask: np.ndarray | None = field(default=None, compare=False, repr=False)


class DrawnObject(Object):
    """An object whose mask is drawn when it is first asked for, so that the masks of thousands of scenes do not fill the memory.

    Args:
        draw: returns the mask.
    """

    def __init__(self, name: str, box: tuple[float, float, float, float], draw: Callable[[], np.ndarray]) -> None:
        for attribute, value in (("name", name), ("box", box), ("_draw", draw)):
            object.__setattr__(self, attribute, value)  # as the frozen parent does it

    @cached_property
    def mask(self) -> np.ndarray:  # type: ignore[override]
        return self._draw()  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Sample:
    """One question about one image.

    Attributes:
        id: unique within the data set; `image_id` is shared by all questions of one image.
        load: returns the image; a data set on disk reads it anew each time, so that photographs do not fill the memory.
        answer: the right answer, "" where there is none (a folder of photographs).
        options: every answer that the question allows, () where it is open.
        category: question type, the unit in which accuracy is reported.
        objects: what is in the image, where known.
        text_only: accuracy of a guess from the text alone, where a data set is not balanced over its options.
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

    @property
    def chance(self) -> float:
        """What an answer that ignores the image can expect: one over the options, or what the text gives away."""
        return 1 / max(1, len(self.options)) if self.text_only is None else self.text_only

    @property
    def image(self) -> Image.Image:
        """The image in RGB, upright."""
        return self.load()


@dataclass(frozen=True)
class Conversation:
    """Questions and their answers in turn, after the images they are about: what a multimodal model is trained on.

    Attributes:
        id: unique within the data set.
        turns: (question, answer), one after another.
        loads: each returns one of the images, which all stand before the first question; () for text alone.
    """

    id: str
    turns: tuple[tuple[str, str], ...]
    loads: tuple[Callable[[], Image.Image], ...] = field(default=(), repr=False, compare=False)

    @property
    def images(self) -> tuple[Image.Image, ...]:
        """The images in RGB, upright."""
        return tuple(load() for load in self.loads)

    @property
    def length(self) -> int:
        """Characters of all turns, by which conversations of about the same length are found."""
        return sum(len(question) + len(answer) for question, answer in self.turns)


def asked_object(sample: Sample) -> Object | None:
    """The one object of the image that the question names, or None where it names none, several, or one of several alike.

    Names are compared word by word: "what shape is red ?" names the only object with "red" in its name, "any red star ?" the only one with both words.
    A question answered "no" or "0" says that the thing is not there. Synonyms and plurals are not known.
    """
    if sample.answer.lower() in ("no", "0"):
        return None
    names = [set(_words(thing.name)) for thing in sample.objects]
    named = set(_words(sample.question)) & set().union(*names)
    fitting = [thing for thing, own in zip(sample.objects, names, strict=True) if named and named <= own]
    return fitting[0] if len(fitting) == 1 else None


COLOUR_TERMS = ("black", "white", "red", "green", "yellow", "blue", "brown", "orange", "pink", "purple", "grey", "gray")  # Berlin and Kay 1969


def class_and_colour(name: str) -> tuple[str, str]:
    """Split the name of an object, such as "red circle", into its class and its colour, "" where it names none.

    A colour is a basic colour term before the class; a name that is one word is the class, so that an orange is an orange.
    """
    words = _words(name)
    colours = [word for word in words[:-1] if word in COLOUR_TERMS]
    return " ".join(word for n, word in enumerate(words) if n == len(words) - 1 or word not in COLOUR_TERMS), " ".join(colours)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


class Dataset:
    """Samples in a fixed order, with a fingerprint of their content.

    Args:
        name: the spec it was loaded from, such as "shapes:val".
        samples: all questions, those of one image next to each other.
        fingerprint: hash of everything that determines the samples.
        words: every word that can occur, where that is a closed list; by default those that do.
    """

    def __init__(self, name: str, samples: list[Sample], fingerprint: str, words: Iterable[str] = ()) -> None:
        if not samples:
            raise DataError(f"data set '{name}' has no samples")
        self.name, self.samples, self.fingerprint = name, samples, fingerprint
        self._words = tuple(words)

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    @cached_property
    def vocabulary(self) -> set[str]:
        """The words of all questions and answers."""
        return set(self._words) or {word for s in self.samples for word in f"{s.question} {s.answer}".split()}

    @cached_property
    def conversations(self) -> list[Conversation]:
        """One for each image: all its questions in turn.

        Raises:
            DataError: questions without an answer, such as those of a folder of photographs.
        """
        if unanswered := next((s for s in self.samples if not s.answer), None):
            raise DataError(f"data set '{self.name}' has questions without an answer, first {unanswered.id}: expected answers to train on")
        return [Conversation(scene[0].image_id, tuple((s.question, s.answer) for s in scene), (scene[0].load,)) for scene in self.scenes]

    @cached_property
    def scenes(self) -> list[list[Sample]]:
        """The samples grouped by image, in order."""
        groups: dict[str, list[Sample]] = {}
        for sample in self.samples:
            groups.setdefault(sample.image_id, []).append(sample)
        return list(groups.values())


class ConversationDataset(Dataset):
    """A data set that is conversations in the first place.

    As samples it gives the first question of each conversation with one image (later turns need the earlier ones), or those that are given.
    """

    def __init__(self, name: str, conversations: Sequence[Conversation], fingerprint: str, samples: Sequence[Sample] | None = None) -> None:
        if not conversations:
            raise DataError(f"data set '{name}' has no conversations")
        self._conversations = list(conversations)
        first = [Sample(c.id, c.id, c.loads[0], *c.turns[0]) for c in conversations if len(c.loads) == 1]
        self.name, self.samples, self.fingerprint, self._words = name, list(first if samples is None else samples), fingerprint, ()

    @property
    def conversations(self) -> list[Conversation]:  # type: ignore[override]
        return self._conversations


def mixed(parts: Sequence[Dataset], weights: Sequence[float], seed: int = 0) -> ConversationDataset:
    """Conversations of several data sets as one epoch: each comes `weight` times, where 2.5 is all of it twice and a random half once more.

    Raises:
        DataError: another number of weights, one that is not above 0, or one so small that it leaves no conversation.
    """
    if len(weights) != len(parts) or not all(weight > 0 for weight in weights):
        raise DataError(f"weights are {', '.join(f'{w:g}' for w in weights)}: expected {len(parts)} numbers above 0, one for each data set")
    chosen: list[Conversation] = []
    for number, (part, weight) in enumerate(zip(parts, weights, strict=True)):
        own, whole = part.conversations, int(weight)
        if not (more := round((weight - whole) * len(own))) and not whole:
            raise DataError(f"weight {weight:g} of {part.name} leaves none of its {len(own)} conversations: expected at least {1 / len(own):.2g}")
        some = np.random.default_rng([seed, number]).choice(len(own), more, replace=False)
        chosen += [*own * whole, *(own[i] for i in np.sort(some))]
    fingerprint = content_hash("mixed", seed, *((part.fingerprint, float(weight)) for part, weight in zip(parts, weights, strict=True)))
    return ConversationDataset(" + ".join(part.name for part in parts), chosen, fingerprint)


def spec_options(spec: str, known: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """Split `PATH?option=value&...` into the path and its options, with the defaults of `known`.

    Raises:
        UnknownNameError: an option that is not among them.
    """
    path, _, rest = spec.partition("?")
    given = dict(pair.partition("=")[::2] for pair in rest.split("&") if pair)
    for name in given:
        if name not in known:
            raise UnknownNameError(f"option of {path}", name, known)
    return path, {**known, **given}


def subset(count: int, limit: int | None, seed: int) -> list[int]:
    """All of `count` indices, or a random `limit` of them drawn with `seed`, in order."""
    if limit is None or limit >= count:
        return list(range(count))
    return [int(i) for i in np.sort(np.random.default_rng(seed).choice(count, limit, replace=False))]


Loader = Callable[..., Dataset]
DATASETS: Registry[Loader] = Registry("data set")


def load_data(spec: str, *, limit: int | None = None, seed: int = 0) -> Dataset:
    """Load a data set by its spec `name:rest`, for example `shapes:val` or `folder:/photos`.

    Args:
        limit: number of images to keep; None keeps all. Generated worlds keep their first `limit` scenes, data sets
            on disk a random subset drawn with `seed`, in the original order.

    Raises:
        UnknownNameError: no data set or split of that name.
        DataError: nothing usable in it.
    """
    name, _, rest = spec.partition(":")
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}: expected at least 1 image")
    loader = DATASETS.get(name)
    return loader(rest, limit=limit, seed=seed)


def content_hash(*parts: object) -> str:
    """Hash the representation of `parts` to 16 hex digits."""
    return hashlib.sha256("|".join(map(repr, parts)).encode()).hexdigest()[:16]


def upright_rgb(image: Image.Image) -> Image.Image:
    """The first frame as RGB, turned as its EXIF tag says, with transparency on white: the same pixels for every model that looks at it.

    Grey levels of 16 bits are divided by 257.

    Raises:
        DataError: levels that are no 8 or 16 bits, whose white is unknown.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":
        levels = np.asarray(image)
        if image.mode == "F" or levels.min() < 0 or levels.max() > 65535:
            raise DataError(f"a picture of mode {image.mode} with levels {levels.min():g} to {levels.max():g}: expected 8 or 16 bits")
        deep = image.mode != "I" or levels.max() > 255
        return Image.fromarray((levels / (257 if deep else 1)).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def check_split(name: str, split: str, known: tuple[str, ...]) -> str:
    """Return `split` if it is known, else raise with the nearest valid name."""
    if split not in known:
        raise UnknownNameError(f"split of {name}", split, known)
    return split
