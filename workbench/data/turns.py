"""Reading a row of conversations: its turns, the places of its images in them, and the key of its images.

Notes collect what of a data set is left out or not read.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from workbench.data.base import IMAGE_MARK
from workbench.data.images import shown
from workbench.errors import DataError

log = logging.getLogger(__name__)

PLACEHOLDER = "<image>"
LITERAL = "< image>"  # replaces it in a conversation without images, where it is an ordinary word
MARK = re.compile(r"<(image|video|audio)(?:[ _]?(\d+))?>", re.IGNORECASE)
SPEAKERS = {"human": "question", "user": "question", "gpt": "answer", "assistant": "answer"}
PARTS = {"image": PLACEHOLDER, "image_url": PLACEHOLDER}  # types of the parts of a message, besides text

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
"""Keys of a row's images; the first one with a value is read. Case, `_` and `-` do not matter."""
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
    """Collects what of a data set is left out, or not read as it is written: how many rows, and the first of them."""

    def __init__(self) -> None:
        self._rows: dict[str, tuple[int, str]] = {}
        self._sentences: list[str] = []

    def add(self, what: str, where: str) -> None:
        """Count the row `where` for the note `what`."""
        count, first = self._rows.get(what, (0, where))
        self._rows[what] = (count + 1, first)

    def say(self, sentence: str) -> None:
        """Add a sentence as it is."""
        self._sentences.append(sentence)

    def warn(self, source: str) -> None:
        """Log one warning with all notes, if there are any."""
        if self.sentences():
            log.warning("%s: %s", source, "; ".join(self.sentences()))

    def sentences(self) -> tuple[str, ...]:
        """Return the sentences, and each note with its count and its first row."""
        counted = (
            f"{what}: {count} row{'' if count == 1 else 's'}, first {first}"
            for what, (count, first) in sorted(self._rows.items())
        )
        return (*self._sentences, *counted)


def turns_of(
    where: str, messages: Any, images: int, *, speaker: str, text: str, notes: Notes | None = None
) -> tuple[tuple[str, str], ...]:
    """Return the (question, answer) turns of a list of messages, with images placed in the first question.

    See `place_images`.

    Args:
        where: the row, in messages.
        messages: the list of messages.
        images: number of images of the row; the first question has a placeholder for each of them.
        speaker: key of a message's speaker.
        text: key of a message's text.
        notes: takes what is left out: an answer before the first question, a question after the last answer.

    Raises:
        DataError: the messages cannot be read; the error says which row and why.
    """
    notes = notes or Notes()
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise DataError(f"{where} has no list of messages")
    texts: list[str] = []
    unread: set[str] = set()
    for number, message in enumerate(messages, start=1):
        kind = SPEAKERS.get(str(message.get(speaker))) if isinstance(message, Mapping) else None
        if kind is None or not isinstance(message.get(text), str):
            roles = "human or gpt" if speaker == "from" else "user or assistant"
            actual = repr(message)[:40]
            if isinstance(message, Mapping):
                actual = f"{str(message.get(speaker))[:40]!r} and {type(message.get(text)).__name__}"
            raise DataError(
                f"{where}, message {number}: expected `{speaker}` {roles} and `{text}` a text, found {actual}"
            )
        check_characters(f"{where}, message {number}", message[text])
        unread |= {name for name in message.keys() - {speaker, text} if not is_empty(message[name])}
        if not texts and kind == "answer":
            notes.add("an answer before the first question is left out", where)
            continue
        if kind != ("answer" if len(texts) % 2 else "question"):
            raise DataError(
                f"{where}, message {number}: expected {'an answer' if len(texts) % 2 else 'a question'}, since they"
                " alternate"
            )
        if kind == "answer" and not message[text].strip():
            raise DataError(f"{where}, message {number} is an empty answer: expected words to learn")
        texts.append(message[text])
    for name in unread:
        notes.add(f"`{shown(name, 40)}` of a message is not read", where)
    if len(texts) % 2 and len(texts) > 1:
        notes.add("a question after the last answer is left out", where)
    turns = list(zip(texts[::2], texts[1::2], strict=False))
    if not turns:
        raise DataError(f"{where} has no question with an answer")
    if not images:
        turns = _literal_marks(where, turns, notes)
    later_marks = (
        (n, MARK.search(" ".join(turn if n > 1 else turn[1:])))
        for n, turn in enumerate(turns if images else [], start=1)
    )
    if late := next(((n, mark[0]) for n, mark in later_marks if mark and mark[1].lower() == "image"), None):
        raise DataError(
            f"{where} has {late[1]} in turn {late[0]} after the first question: expected all images in the first"
            " question"
        )
    if images and not MARK.search(turns[0][0]):
        plural = "" if images == 1 else "s"
        raise DataError(f"{where} has {images} image{plural} and no {PLACEHOLDER} in its first question")
    first = place_images(where, turns[0][0], images)
    if not images and not all(question.strip() for question, _ in turns):
        raise DataError(f"{where} has an empty question and no image: expected words to answer")
    return ((first, turns[0][1].strip()), *((q.strip(), a.strip()) for q, a in turns[1:]))


def place_images(where: str, question: str, images: int) -> str:
    """Return the question with an IMAGE_MARK for each placeholder, or without any where images come first.

    Images come first if all placeholders are before the words or all after them, as in LLaVA's own code. Placeholders
    may be numbered, as in `<image 1>`, if the numbers are in order.

    Args:
        where: the row, in messages.
        question: the first question of a conversation.
        images: number of images of the row.

    Raises:
        DataError: placeholders for another number of images (unless there are none), numbers that are not 1, 2, ... in
            this order, or a placeholder of a video or audio.
    """
    marks = [mark for mark in MARK.finditer(question) if images or mark[0] == PLACEHOLDER]
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


def _literal_marks(where: str, turns: Sequence[tuple[str, str]], notes: Notes) -> list[tuple[str, str]]:
    """Return the turns of a row without media, in which marks such as `<image>` are ordinary words, perhaps of XML.

    LLaVA's own code takes them for words too.

    Raises:
        DataError: the first question begins or ends with a mark, so that an image or a video must have been lost.
    """
    first = turns[0][0].strip()
    if lost := next((mark[0] for mark in MARK.finditer(first) if mark.start() == 0 or mark.end() == len(first)), None):
        if lost == PLACEHOLDER:
            raise DataError(f"{where} has {first.count(PLACEHOLDER)} times {PLACEHOLDER} for 0 images")
        raise DataError(
            f"{where} has {lost} in its question and nothing that it stands for: expected images under `image`, or"
            " words alone"
        )
    for mark in dict.fromkeys(mark[0] for turn in turns for text in turn for mark in MARK.finditer(text)):
        notes.add(f"{mark} is a word where there is no image", where)
    return [
        (question.replace(PLACEHOLDER, LITERAL), answer.replace(PLACEHOLDER, LITERAL)) for question, answer in turns
    ]


def message_text(where: str, message: Mapping[str, Any], number: int, images: int) -> dict[str, Any]:
    """Return a message as text with placeholders; its content may be a list of parts.

    If the first message is a text without placeholders, those of all images are put before it.

    Args:
        where: the row, in messages.
        message: the message, with `role` and `content`.
        number: number of the message, from 0.
        images: number of images of the row.

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
        content = PLACEHOLDER * images + content
    return {"role": message.get("role"), "content": content}


def check_characters(where: str, text: str) -> None:
    """Check that a text is valid Unicode and does not contain IMAGE_MARK.

    Raises:
        DataError: it is not, or does.
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
    """Return the key under which images are read: the first of IMAGE_KEYS among `keys`, which have values.

    Raises:
        DataError: several of IMAGE_KEYS have values, but neither `images` nor `image`, so that the choice is not clear.
    """
    by_name = {_normalized(key): key for key in keys}
    matches = [by_name[_normalized(name)] for name in IMAGE_KEYS if _normalized(name) in by_name]
    if len(matches) > 1 and _normalized(matches[0]) not in ("images", "image"):
        raise DataError(f"has images under {' and '.join(f'`{key}`' for key in matches)}: expected one of them")
    return matches[0] if matches else None


def check_media(where: str, row: Mapping[str, Any], key: str | None) -> None:
    """Check that no key of a row has images, videos or audio that are not read.

    Args:
        where: the row, in messages.
        row: {key: value}.
        key: the key of the images that are read; None if the row has none.

    Raises:
        DataError: there is such a key.
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
    """Return whether a cell is empty: None, NaN, an empty text, list or mapping, or one that holds only such values."""
    if isinstance(value, Mapping):
        return all(map(is_empty, value.values()))
    if isinstance(value, list | tuple):
        return all(map(is_empty, value))
    return value is None or value == "" or value == b"" or value != value


def _normalized(key: str) -> str:
    return re.sub(r"[\W_]", "", key).lower()
