"""What a row of conversations says: its turns, where its images stand in them, under which key they are, and what of
the row is not read."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from workbench.data.base import IMAGE_MARK
from workbench.errors import DataError

log = logging.getLogger(__name__)

PLACE = "<image>"
WORD = "< image>"  # the same in a conversation without images, where it is no placeholder
MARK = re.compile(r"<(image|video|audio)(?:[ _]?(\d+))?>", re.IGNORECASE)
SPEAKERS = {"human": "question", "user": "question", "gpt": "answer", "assistant": "answer"}
PARTS = {"image": PLACE, "image_url": PLACE}  # types of the parts of a message, besides text

IMAGE_KEYS = (
    "images",
    "image",
    "image_path",
    "image_paths",
    "image_file",
    "image_files",
    "img",
    "imgs",
    "img_path",
    "image_name",
    "image_filename",
)
"""Keys under which a row's images are read, the first one that holds any; capitals, `_` and `-` do not matter."""
IMAGE_WORDS = frozenset(
    {
        "image",
        "images",
        "img",
        "imgs",
        "photo",
        "photos",
        "picture",
        "pictures",
        "pic",
        "pics",
        "frame",
        "frames",
        "screenshot",
    }
)
OTHER_MEDIA = {
    "video": "a video",
    "videos": "videos",
    "audio": "audio",
    "audios": "audio",
    "sound": "audio",
    "speech": "audio",
}
FILE_WORDS = frozenset(
    {"path", "paths", "file", "files", "filename", "filenames", "name", "url", "urls", "uri", "bytes", "base64", "data"}
)


class Notes:
    """What of a data set is left out, or read otherwise than it stands: how many rows, and the first of them."""

    def __init__(self) -> None:
        self._rows: dict[str, tuple[int, str]] = {}
        self._sentences: list[str] = []

    def add(self, what: str, where: str) -> None:
        """Count the row `where` among those of which `what` is to be said."""
        count, first = self._rows.get(what, (0, where))
        self._rows[what] = (count + 1, first)

    def say(self, sentence: str) -> None:
        """Keep a sentence as it is."""
        self._sentences.append(sentence)

    def warn(self, source: str) -> None:
        """Say all of it once, if there is any."""
        if self.sentences():
            log.warning("%s: %s", source, "; ".join(self.sentences()))

    def sentences(self) -> tuple[str, ...]:
        """Each kind with its count and its first row."""
        counted = (
            f"{what}: {count} row{'' if count == 1 else 's'}, first {first}"
            for what, (count, first) in sorted(self._rows.items())
        )
        return (*self._sentences, *counted)


def turns_of(
    where: str, messages: Any, images: int, *, speaker: str, text: str, notes: Notes | None = None
) -> tuple[tuple[str, str], ...]:
    """Questions and answers of a list of messages, with the images where their placeholders stand in the first
    question: see `placed`.

    Args:
        where: the row, in messages.
        images: how many images the row has; each has a placeholder in the first question, or none has one.
        speaker, text: keys of a message.
        notes: takes what is left out: an answer before the first question, a question after the last answer.

    Raises:
        DataError: says which row and why.
    """
    notes = notes or Notes()
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise DataError(f"{where} has no list of messages")
    said: list[str] = []
    for place, message in enumerate(messages, start=1):
        kind = SPEAKERS.get(str(message.get(speaker))) if isinstance(message, Mapping) else None
        if kind is None or not isinstance(message.get(text), str):
            roles = "human or gpt" if speaker == "from" else "user or assistant"
            found = (
                f"{str(message.get(speaker))[:40]!r} and {type(message.get(text)).__name__}"
                if isinstance(message, Mapping)
                else repr(message)[:40]
            )
            raise DataError(
                f"{where}, message {place}: expected `{speaker}` {roles} and `{text}` a text, found {found}"
            )
        check_characters(f"{where}, message {place}", message[text])
        if not said and kind == "answer":
            notes.add("an answer before the first question is left out", where)
            continue
        if kind != ("answer" if len(said) % 2 else "question"):
            raise DataError(
                f"{where}, message {place}: expected {'an answer' if len(said) % 2 else 'a question'}, since they take"
                " turns"
            )
        if kind == "answer" and not message[text].strip():
            raise DataError(f"{where}, message {place} is an empty answer: expected words to learn")
        said.append(message[text])
    if len(said) % 2 and len(said) > 1:
        notes.add("a question after the last answer is left out", where)
    turns = list(zip(said[::2], said[1::2], strict=False))
    if not turns:
        raise DataError(f"{where} has no question with an answer")
    if not images:
        turns = _words(where, turns, notes)
    later = (
        (n, MARK.search(" ".join(turn if n > 1 else turn[1:])))
        for n, turn in enumerate(turns if images else [], start=1)
    )
    if late := next(((n, mark[0]) for n, mark in later if mark and mark[1].lower() == "image"), None):
        raise DataError(
            f"{where} has {late[1]} in turn {late[0]} after the first question: expected all images in the first"
            " question"
        )
    if images and not MARK.search(turns[0][0]):
        raise DataError(f"{where} has {images} image{'' if images == 1 else 's'} and no {PLACE} in its first question")
    first = placed(where, turns[0][0], images)
    if not images and not all(question.strip() for question, _ in turns):
        raise DataError(f"{where} has an empty question and no image: expected words to answer")
    return ((first, turns[0][1].strip()), *((q.strip(), a.strip()) for q, a in turns[1:]))


def placed(where: str, question: str, images: int) -> str:
    """A question with its images: without placeholders where all of them stand before the words or all behind (images
    come first then, as LLaVA's own code has them), else with an IMAGE_MARK for each, where it stands between the words.

    Placeholders may be numbered, as in `<image 1>`; then the images are named in their order.

    Raises:
        DataError: another number of placeholders than images (or none), numbers that are not 1, 2, ... in order, or a
            placeholder of a video.
    """
    marks = [mark for mark in MARK.finditer(question) if images or mark[0] == PLACE]
    if other := next((mark[0] for mark in marks if mark[1].lower() != "image"), None):
        raise DataError(
            f"{where} has {other} in its question: expected images only, since {OTHER_MEDIA[other[1:6].lower()]} is not"
            " read"
        )
    if len(marks) not in {images, 0}:
        raise DataError(f"{where} has {len(marks)} times {marks[0][0]} for {images} image{'' if images == 1 else 's'}")
    numbers = [int(mark[2]) for mark in marks if mark[2]]
    if numbers and numbers != list(range(1, images + 1)):
        raise DataError(
            f"{where} has {', '.join(mark[0] for mark in marks)}: expected <image 1> to <image {images}> in this order"
        )
    words = [part.strip() for part in re.split("|".join(re.escape(mark[0]) for mark in marks) or "$^", question)]
    if not any(words[1:]) or not any(words[:-1]):
        return "".join(words)
    return MARK.sub(IMAGE_MARK, question).strip()


def _words(where: str, turns: Sequence[tuple[str, str]], notes: Notes) -> list[tuple[str, str]]:
    """The turns of a row without media, whose marks are words, of XML perhaps; LLaVA's own code too takes them for
    words.

    Raises:
        DataError: the first question begins or ends with a mark, so that an image, or a video, has been lost.
    """
    first = turns[0][0].strip()
    if lost := next((mark[0] for mark in MARK.finditer(first) if mark.start() == 0 or mark.end() == len(first)), None):
        if lost == PLACE:
            raise DataError(f"{where} has {first.count(PLACE)} times {PLACE} for 0 images")
        raise DataError(
            f"{where} has {lost} in its question and nothing that it stands for: expected images under `image`, or"
            " words alone"
        )
    for mark in dict.fromkeys(mark[0] for turn in turns for text in turn for mark in MARK.finditer(text)):
        notes.add(f"{mark} is a word where there is no image", where)
    return [(question.replace(PLACE, WORD), answer.replace(PLACE, WORD)) for question, answer in turns]


def message_text(where: str, message: Mapping[str, Any], number: int, images: int) -> dict[str, Any]:
    """A message whose content may be a list of parts, as text with placeholders; images beside a text without any stand
    before it.

    Raises:
        DataError: a part that is neither text nor an image.
    """
    content = message.get("content")
    if isinstance(content, list):
        parts = [part if isinstance(part, Mapping) else {"text": part} for part in content]
        if other := next((str(part["type"]) for part in parts if part.get("type") not in (None, "text", *PARTS)), None):
            raise DataError(f"{where}, message {number + 1} has a part of type {other[:40]!r}: expected text or image")
        content = "".join(PARTS.get(str(part.get("type"))) or str(part.get("text") or "") for part in parts)
    if number == 0 and isinstance(content, str) and not MARK.search(content):
        content = PLACE * images + content
    return {"role": message.get("role"), "content": content}


def check_characters(where: str, text: str) -> None:
    """See that a text is valid Unicode without the mark that stands for an image here.

    Raises:
        DataError: it is not.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where} has half a character (a lone surrogate): expected valid Unicode") from error
    if IMAGE_MARK in text:
        raise DataError(
            f"{where} has the character U+{ord(IMAGE_MARK):04X}, which no text holds: expected valid Unicode"
        )


# --- keys -----------------------------------------------------------------------------------------


def image_key(keys: Iterable[str]) -> str | None:
    """The key under which images are read, of those that hold something: the first of IMAGE_KEYS.

    Raises:
        DataError: several that come after `images` and `image`, of which none is the obvious one.
    """
    own = {_plain(key): key for key in keys}
    fitting = [own[_plain(name)] for name in IMAGE_KEYS if _plain(name) in own]
    if len(fitting) > 1 and _plain(fitting[0]) not in ("images", "image"):
        raise DataError(f"has images under {' and '.join(f'`{key}`' for key in fitting)}: expected one of them")
    return fitting[0] if fitting else None


def check_media(where: str, row: Mapping[str, Any], key: str | None) -> None:
    """See that no key of a row holds images, videos or audio that are not read.

    Args:
        key: of the images that are read; None where the row has none.

    Raises:
        DataError: names the row and the key.
    """
    for name, value in row.items():
        if name == key or is_empty(value) or value == 0:
            continue
        words = set(re.findall(r"[a-z]+|\d+", re.sub(r"([a-z])([A-Z])", r"\1 \2", name).lower()))
        media, numbers = words & OTHER_MEDIA.keys(), {word for word in words if word.isdigit()}
        if media and (key is None or words <= {*OTHER_MEDIA, *FILE_WORDS, *numbers}):
            raise DataError(
                f"{where} has {OTHER_MEDIA[min(media)]} under `{name}`, which is not read: expected images only"
            )
        if words & IMAGE_WORDS and (key is None or (numbers and words <= IMAGE_WORDS | numbers)):
            beside = f"beside `{key}`" if key else "and no image"
            raise DataError(
                f"{where} has `{name}` {str(value)[:40]!r} {beside}: expected its images under `image` or `images`"
            )


def is_empty(value: Any) -> bool:
    """Whether a cell holds nothing: None, an empty text, list or mapping, a number that is none, or lists and mappings
    of such."""
    if isinstance(value, Mapping):
        return all(map(is_empty, value.values()))
    if isinstance(value, list | tuple):
        return all(map(is_empty, value))
    return value is None or value == "" or value == b"" or value != value


def _plain(key: str) -> str:
    return re.sub(r"[\W_]", "", key).lower()
