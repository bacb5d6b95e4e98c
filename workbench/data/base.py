"""What every data set is: an ordered sequence of questions about images."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from PIL import Image

from workbench.data.images import StoredImage
from workbench.data.images import upright_rgb as upright_rgb
from workbench.data.selection import subset as subset
from workbench.errors import DataError, UnknownNameError
from workbench.registry import Registry

IMAGE_MARK = "\ufdd0"  # where an image stands within a question; a noncharacter of Unicode, which no text holds


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
    """An object whose mask is drawn when it is first asked for, so that the masks of thousands of scenes do not fill
    the memory.

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
        id: unique within the data set.
        image_id: shared by all questions of one image: of images on disk the hash of their pixels; in training sets, of
            which none is decoded beforehand, where they lie; in a folder of photographs the file's name, of which each
            shows another image.
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

    @property
    def source(self) -> str:
        """Where the image lies, in messages; what it is known by, where it lies nowhere."""
        return self.load.name if isinstance(self.load, StoredImage) else self.image_id


@dataclass(frozen=True)
class Conversation:
    """Questions and their answers in turn, and the images they are about: what a multimodal model is trained on.

    Attributes:
        id: unique within the data set.
        turns: (question, answer), one after another.
        loads: each returns one of the images, which all stand before the first question, or each at its IMAGE_MARK in
            it; () for text alone.
        image_ids: of the images, as those of samples.
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
        """Characters of all turns, by which conversations of about the same length are found."""
        return sum(len(question) + len(answer) for question, answer in self.turns)


def asked_object(sample: Sample) -> Object | None:
    """The one object of the image that the question names, or None where it names none, several, or one of several
    alike.

    Names are compared word by word: "what shape is red ?" names the only object with "red" in its name, "any red star
    ?" the only one with both words. A question answered "no" or "0" says that the thing is not there. Synonyms and
    plurals are not known.
    """
    if sample.answer.lower() in ("no", "0"):
        return None
    names = [set(_words(thing.name)) for thing in sample.objects]
    named = set(_words(sample.question)) & set().union(*names)
    fitting = [thing for thing, own in zip(sample.objects, names, strict=True) if named and named <= own]
    return fitting[0] if len(fitting) == 1 else None


# Berlin and Kay 1969
COLOUR_TERMS = ("black", "white", "red", "green", "yellow", "blue", "brown", "orange", "pink", "purple", "grey", "gray")


def class_and_colour(name: str) -> tuple[str, str]:
    """Split the name of an object, such as "red circle", into its class and its colour, "" where it names none.

    A colour is a basic colour term before the class; a name that is one word is the class, so that an orange is an
    orange.
    """
    words = _words(name)
    colours = [word for word in words[:-1] if word in COLOUR_TERMS]
    return " ".join(word for n, word in enumerate(words) if n == len(words) - 1 or word not in COLOUR_TERMS), " ".join(
        colours
    )


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


class Dataset:
    """Samples in a fixed order, with a fingerprint of their content.

    Args:
        name: the spec it was loaded from, such as "shapes:val".
        samples: all questions.
        fingerprint: hash of everything that determines the samples, or what finds it when it is first asked for.
        words: every word that can occur, where that is a closed list; by default those that do.
        left_out: sentences about what was there and is not among the samples, or is not read as it stands.
        origin: hash of all that a sample depends on besides what it says of itself, where that does not depend on the
            limit; by default the fingerprint stands for it.
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
        """Hash of everything that determines the samples, the content of their images too."""
        return self._fingerprint if isinstance(self._fingerprint, str) else self._fingerprint()

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


class ConversationDataset(Dataset):
    """A data set that is conversations in the first place.

    As samples it gives the first question of each conversation with one image (later turns need the earlier ones), or
    those that are given.
    """

    def __init__(
        self,
        name: str,
        conversations: Sequence[Conversation],
        fingerprint: str | Callable[[], str],
        samples: Sequence[Sample] | None = None,
        left_out: Sequence[str] = (),
    ) -> None:
        if not conversations:
            raise DataError(f"data set '{name}' has no conversations")
        self._conversations = list(conversations)
        first = [
            Sample(c.id, (c.image_ids or (c.id,))[0], c.loads[0], *c.turns[0])
            for c in conversations
            if len(c.loads) == 1
        ]
        self.name, self.samples, self._fingerprint, self._words = (
            name,
            list(first if samples is None else samples),
            fingerprint,
            (),
        )
        self.left_out, self.origin = tuple(left_out), ""

    @property
    def conversations(self) -> list[Conversation]:  # type: ignore[override]
        return self._conversations


def mixed(parts: Sequence[Dataset], weights: Sequence[float], seed: int = 0) -> ConversationDataset:
    """Conversations of several data sets as one epoch: each comes `weight` times, where 2.5 is all of it twice and a
    random half once more.

    Raises:
        DataError: another number of weights, one that is not above 0, or one so small that it leaves no conversation.
    """
    if len(weights) != len(parts) or not all(weight > 0 for weight in weights):
        raise DataError(
            f"weights are {', '.join(f'{w:g}' for w in weights)}: expected {len(parts)} numbers above 0, one for each"
            " data set"
        )
    chosen: list[Conversation] = []
    for number, (part, weight) in enumerate(zip(parts, weights, strict=True)):
        own, whole = part.conversations, int(weight)
        if not (more := round((weight - whole) * len(own))) and not whole:
            raise DataError(
                f"weight {weight:g} of {part.name} leaves none of its {len(own)} conversations: expected at least"
                f" {1 / len(own):.2g}"
            )
        some = np.random.default_rng([seed, number]).choice(len(own), more, replace=False)
        chosen += [*own * whole, *(own[i] for i in np.sort(some))]

    def fingerprint() -> str:
        return content_hash(
            "mixed", seed, *((part.fingerprint, float(weight)) for part, weight in zip(parts, weights, strict=True))
        )

    left_out = [sentence for part in parts for sentence in part.left_out]
    return ConversationDataset(" + ".join(part.name for part in parts), chosen, fingerprint, left_out=left_out)


Loader = Callable[..., Dataset]
DATASETS: Registry[Loader] = Registry("data set", "data")


def load_data(
    spec: str, *, limit: int | None = None, seed: int = 0, draw: int | None = None, decode: bool | None = None
) -> Dataset:
    """Load a data set by its spec `name:rest`, for example `shapes:val` or `folder:/photos`.

    Args:
        limit: number of images to keep, with all their questions; None keeps all. Generated data sets keep their first
            `limit` scenes, data sets on disk a random subset drawn with `seed`, in the original order. A smaller subset
            lies within every larger one.
        draw: the seed with which a random subset is drawn instead, of generated data sets too (where `seed` names the
            scenes).
        decode: look at the pixels of every image, by which images are then known; with False, for training sets of any
            size, they are known by where they lie. By default they are looked at where there is a limit, or up to
            10,000 images.

    Raises:
        UnknownNameError: no data set or split of that name.
        DataError: nothing usable in it.
    """
    name, _, rest = spec.partition(":")
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}: expected at least 1 image")
    loader = DATASETS.get(name)
    return loader(rest, limit=limit, seed=seed, draw=draw, decode=decode)


def content_hash(*parts: object) -> str:
    """Hash the representation of `parts` to 16 hex digits."""
    return rows_hash(parts)


def rows_hash(parts: Iterable[object]) -> str:
    """`content_hash` of as many parts as there may be, one after another."""
    digest = hashlib.sha256()
    for number, part in enumerate(parts):
        digest.update((f"|{part!r}" if number else repr(part)).encode())
    return digest.hexdigest()[:16]


def check_split(name: str, split: str, known: tuple[str, ...]) -> str:
    """Return `split` if it is known, else raise with the nearest valid name."""
    if split not in known:
        raise UnknownNameError(f"split of {name}", split, known)
    return split
