"""All conversations looked through before the first step: every text in the model's format, every image's size, and
what `max_length` leaves of them.

What cannot be trained on is an error that names its row and file, before anything is written: a text that the chat
template cannot take, a control token in it, an image that is none or that the processor refuses, one that `max_length`
cuts. What is cut off or too long for the model is counted. No image is decoded: from its header comes its size, and
from its size how many visual tokens it has, by the processor itself on an empty image, or by its arithmetic where the
two agree.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from tqdm import tqdm

from trainer.setups.conversation_data import ConversationSet
from workbench.data.base import Conversation, content_hash
from workbench.data.images import StoredImage, shown
from workbench.errors import DataError, ModelError, WorkbenchError
from workbench.files import atomic_file, cache_folder
from workbench.mllm import MLLM
from workbench.mllm.conversation import IGNORED, conversation_text, encode_conversations

VERSION = 1
READERS = 16  # threads
AT_ONCE = 256  # texts
# tokens: where the text around an image is merged otherwise, an estimate is off by a few; nearer ones are encoded
MARGIN = 8
ODD = 32, 8  # pixels of a short side below which, and aspect above which, the processor itself is asked
ASKED = 64  # sizes for which the processor is asked in any case

Size = tuple[int, int]


@dataclass
class Seen:
    """What was found in one data set: rows that are cut, that keep no answer, that are longer than the model knows
    positions, with the first of each."""

    rows: int = 0
    longest: int = 0
    cut: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def note(self, what: str, conversation: str) -> None:
        """Count a conversation."""
        self.cut[what] += 1
        self.first.setdefault(what, conversation)

    def sentences(self, name: str, max_length: int | None) -> list[str]:
        """What is to be said of it."""
        said = {
            "cut": f"data.max_length = {max_length} cuts",
            "lost": f"data.max_length = {max_length} leaves no answer in",
            "long": "the model has fewer positions than",
        }
        return [
            f"{said[what]} {count} of {self.rows} conversations of {name}, first {self.first[what]}"
            for what, count in self.cut.items()
        ]


def look_through(mllm: MLLM, data: ConversationSet, max_length: int | None) -> list[str]:
    """See that every conversation can be trained on, and return what is to be said of those that are cut; remembered by
    the content of data and processor.

    Raises:
        DataError, ModelError: names the first row that cannot be, and how many there are.
    """
    key = content_hash(
        VERSION, data.data.fingerprint, len(data), _identity(mllm), max_length, mllm.control_tokens_as_words
    )
    file = cache_folder("looked_through") / f"{key}.json"
    if file.exists():
        try:
            return [str(sentence) for sentence in json.loads(file.read_text())]
        except ValueError:
            pass
    said = _look_through(mllm, data, max_length).sentences(data.data.name, max_length)
    with atomic_file(file) as partial:
        partial.write_text(json.dumps(said))
    return said


def _identity(mllm: MLLM) -> str:
    """Of all that makes tokens of texts and images."""
    processor = mllm.processor
    settings = {
        name: value for name, value in vars(processor).items() if isinstance(value, str | int | float | bool | None)
    }
    backend = getattr(processor.tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else sorted(processor.tokenizer.get_vocab().items())
    positions = getattr(mllm.config.get_text_config(), "max_position_embeddings", None)
    return content_hash(
        mllm.family.name,
        settings,
        processor.image_processor.to_dict(),
        text,
        processor.chat_template,
        positions,
        mllm.control_tokens,
    )


def _look_through(mllm: MLLM, data: ConversationSet, max_length: int | None) -> Seen:
    conversations = data.conversations
    sizes = image_sizes(data)
    tokens = VisualLengths(mllm, set(sizes.values()))
    positions = getattr(mllm.config.get_text_config(), "max_position_embeddings", None)
    seen, broken = Seen(len(conversations)), list[str]()
    bar = tqdm(
        total=len(conversations),
        desc=f"texts of {data.data.name[:40]}",
        unit="row",
        file=sys.stderr,
        mininterval=2,
        delay=2,
        leave=False,
    )
    with bar:
        for start in range(0, len(conversations), AT_ONCE):
            part = conversations[start : start + AT_ONCE]
            for own, length in _lengths(mllm, part, sizes, tokens, broken, data):
                bar.update()
                seen.longest = max(seen.longest, length.whole)
                if positions and min(length.whole, max_length or length.whole) > positions:
                    seen.note("long", own.id)
                if max_length is None or length.whole + MARGIN < max_length:
                    continue
                try:
                    _cut(mllm, own, [sizes[_place(load)] for load in own.loads], length, max_length, seen)
                except WorkbenchError as error:
                    broken.append(f"{data.where(own)}{_images(own)}: {error}")
    if broken:
        more = f" ({len(broken)} such rows in all)" if len(broken) > 1 else ""
        raise DataError(f"{broken[0]}{more}")
    return seen


# --- images ---------------------------------------------------------------------------------------


def image_sizes(data: ConversationSet) -> dict[Any, Size]:
    """Width and height of every image by its place, from its header; one that is drawn has the size of the first such.

    Raises:
        DataError: names the row and the file of the first that cannot be read, and how many there are.
    """
    stored = {load.place: load for c in data.conversations for load in c.loads if isinstance(load, StoredImage)}
    sizes: dict[Any, Size] = {}
    broken: dict[str, str] = {}

    def size(image: StoredImage) -> Size | str:
        try:
            return image.size()
        except WorkbenchError as error:
            return str(error)

    bar = tqdm(
        total=len(stored),
        desc=f"image sizes of {data.data.name[:40]}",
        unit="image",
        file=sys.stderr,
        mininterval=2,
        delay=2,
        leave=False,
    )
    with ThreadPoolExecutor(min(READERS, 2 * (os.cpu_count() or 1))) as readers, bar:
        for place, value in zip(stored, readers.map(size, stored.values()), strict=True):
            bar.update()
            if isinstance(value, str):
                broken[place] = value
            else:
                sizes[place] = value
    if broken:
        own = next(c for c in data.conversations for load in c.loads if _place(load) in broken)
        place = next(_place(load) for load in own.loads if _place(load) in broken)
        more = f" ({len(broken)} such images in all)" if len(broken) > 1 else ""
        raise DataError(f"{data.where(own)}: {broken[place]}{more}")
    if drawn := next((load for c in data.conversations for load in c.loads if not isinstance(load, StoredImage)), None):
        sizes[None] = drawn().size
    return sizes


def _place(load: object) -> Any:
    return load.place if isinstance(load, StoredImage) else None


class VisualLengths:
    """What an image adds to a sequence by its size, found out with empty images.

    Args:
        sizes: that will be asked for.
    """

    def __init__(self, mllm: MLLM, sizes: set[Size]) -> None:
        self._mllm = mllm
        self._known: dict[Size, tuple[int, int] | str] = {}
        ordered = sorted(sizes, key=lambda size: (size[0] * size[1], size))
        apart = ordered[:: max(1, len(ordered) // ASKED)] + ordered[-1:]
        asked = {*apart, *(size for size in ordered if min(size) < ODD[0] or max(size) > ODD[1] * min(size))}
        for size in tqdm(
            sorted(asked),
            desc="visual tokens by size",
            unit="size",
            file=sys.stderr,
            mininterval=2,
            delay=2,
            leave=False,
        ):
            self._known[size] = self._ask(size)
        shift = self._shift()
        for size in tqdm(
            sizes - asked,
            desc="visual tokens by size",
            unit="size",
            file=sys.stderr,
            mininterval=2,
            delay=2,
            leave=False,
        ):
            self._known[size] = self._ask(size) if shift is None else (self._arithmetic(size) + shift[0], shift[1])

    def __getitem__(self, size: Size) -> tuple[int, int]:
        """How many tokens an image adds to its placeholder, and how many of them come after the last visual one.

        Raises:
            ModelError: the processor refuses such an image.
        """
        if isinstance(known := self._known[size], str):
            raise ModelError(known)
        return known

    def _ask(self, size: Size) -> tuple[int, int] | str:
        mllm = self._mllm
        try:
            text = mllm.prompt("?", 1)
            ids = mllm.process(((Image.new("RGB", size),),), [text], ["?"]).inputs["input_ids"][0].tolist()
        except WorkbenchError as error:
            return str(error)
        plain = mllm.processor.tokenizer(text, add_special_tokens=mllm.adds_special([text]))["input_ids"]
        place, visual = (
            mllm.processor.tokenizer.convert_tokens_to_ids(mllm.image_placeholder),
            mllm.config.image_token_id,
        )
        behind = list(reversed(ids)).index(visual) - (list(reversed(plain)).index(place) if place in plain else 0)
        return len(ids) - len(plain), behind

    def _arithmetic(self, size: Size) -> int:
        found = self._mllm.processor._get_num_multimodal_tokens(image_sizes=[size[::-1]])
        return int(found.num_image_tokens[0])

    def _shift(self) -> tuple[int, int] | None:
        """What the processor's arithmetic leaves out, where that is the same for all sizes that it was asked for."""
        known = {size: value for size, value in self._known.items() if not isinstance(value, str)}
        try:
            shifts = {(value[0] - self._arithmetic(size), value[1]) for size, value in known.items()}
        except Exception:  # each processor has its own, or none
            return None
        return shifts.pop() if len(shifts) == 1 else None


# --- texts ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Length:
    """Of one conversation in tokens: all of it, up to its last visual token, and up to its first answer."""

    whole: int
    visual: int
    answer: int


def _lengths(
    mllm: MLLM,
    conversations: Sequence[Conversation],
    sizes: dict[Any, Size],
    tokens: VisualLengths,
    broken: list[str],
    data: ConversationSet,
) -> Iterator[tuple[Conversation, Length]]:
    """The lengths of those conversations that the model can be given; what is wrong with the others goes to
    `broken`."""
    texts: list[tuple[Conversation, str, int, list[tuple[int, int]]]] = []
    for own in conversations:
        try:
            added = [tokens[sizes[_place(load)]] for load in own.loads]
            if mllm.processor.chat_template is None:
                prompt = mllm.prompt(own.turns[0][0], len(own.loads))
                texts.append((own, f"{prompt}{mllm.safe_text('answer', own.turns[0][1])}", len(prompt), added))
                if len(own.turns) > 1 or not own.loads:
                    encode_conversations(
                        mllm, [[Image.new("RGB", sizes[_place(load)]) for load in own.loads]], [own.turns]
                    )
            else:
                text, spans = conversation_text(mllm, own.turns, len(own.loads))
                texts.append((own, text, spans[0][0], added))
        except WorkbenchError as error:
            broken.append(f"{data.where(own)}{_images(own)}: {error}")
    if not texts:
        return
    special = mllm.adds_special([text for _, text, _, _ in texts])
    place = mllm.processor.tokenizer.convert_tokens_to_ids(mllm.image_placeholder)
    encoded = mllm.processor.tokenizer(
        [text for _, text, _, _ in texts],
        add_special_tokens=special,
        return_offsets_mapping=mllm.processor.tokenizer.is_fast,
    )
    for number, (own, _, start, added) in enumerate(texts):
        ids = encoded["input_ids"][number]
        more = sum(tokens for tokens, _ in added)
        last = len(ids) - 1 - ids[::-1].index(place) + more - added[-1][1] if added and place in ids else -1
        offsets = encoded["offset_mapping"][number] if "offset_mapping" in encoded else []
        answer = next((n for n, (_, stop) in enumerate(offsets) if stop > start), len(ids)) + more
        yield own, Length(len(ids) + more, last, answer)


def _cut(mllm: MLLM, own: Conversation, sizes: Sequence[Size], length: Length, max_length: int, seen: Seen) -> None:
    """Count what `max_length` leaves of a conversation; near it, the conversation itself is encoded, with empty images.

    Raises:
        ModelError: it cuts an image.
    """
    whole, lost = length.whole > max_length, length.answer >= max_length
    if (
        length.visual + MARGIN >= max_length
        or abs(length.answer - max_length) <= MARGIN
        or abs(length.whole - max_length) <= MARGIN
    ):
        images = [[Image.new("RGB", size) for size in sizes]]
        whole = encode_conversations(mllm, images, [own.turns])[0].inputs["input_ids"].shape[1] > max_length
        lost = not encode_conversations(mllm, images, [own.turns], max_length=max_length)[1].ne(IGNORED).any()
    if whole:
        seen.note("cut", own.id)
    if lost:
        seen.note("lost", own.id)


def _images(own: Conversation) -> str:
    """The images of a conversation, in messages."""
    names = [load.name for load in own.loads if isinstance(load, StoredImage)]
    return f" ({', '.join(shown(name, 60) for name in names[:2])})" if names else ""
