"""Check all conversations before the first step: that each can be encoded, and what `max_length` leaves of it.

A conversation that cannot be trained on is an error that names its row and file, before anything is written: the chat
template refuses its text, the text contains a control token, an image file cannot be read, the processor refuses an
image, or `max_length` cuts into one. Conversations that are cut, or are longer than the model has positions for, are
counted and reported.

No image is decoded. Its header gives its size, and the size gives its number of visual tokens: the processor counts
them on an empty image of that size, or its own arithmetic does, where that agrees with the counts that were checked.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from PIL import Image

from trainer.setups.conversation_data import ConversationSet
from workbench.data.base import Conversation, content_hash
from workbench.data.images import StoredImage, shown
from workbench.errors import DataError, ModelError, WorkbenchError, one_line
from workbench.files import atomic_file, cache_folder
from workbench.mllm import MLLM
from workbench.mllm.conversation import IGNORED, conversation_text, encode_conversations
from workbench.processes import cores
from workbench.progress import progress_bar

log = logging.getLogger(__name__)
VERSION = 2
READERS = 16  # threads that read image headers
TEXTS_AT_ONCE = 256
# The length of a conversation is an estimate that can be off by a few tokens, because tokens of text next to an image
# may merge differently. A conversation whose estimate is within MARGIN tokens of a limit is encoded to be sure.
MARGIN = 8
# The processor is asked about every image whose short side is below MIN_SIDE pixels or whose aspect ratio is above
# MAX_ASPECT, and about SIZES_ASKED of the other sizes.
MIN_SIDE, MAX_ASPECT = 32, 8
SIZES_ASKED = 64

Size = tuple[int, int]


@dataclass
class Problems:
    """Counts of the conversations of a data set that are too long, by the kind of problem, with the first of each.

    The kinds are `cut` (by max_length), `lost` (max_length leaves no answer) and `long` (the model has fewer
    positions).

    Attributes:
        rows: conversations of the data set.
        longest: tokens of the longest of them.
        counts: conversations by kind.
        first: id of the first conversation by kind.
    """

    rows: int = 0
    longest: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, conversation: str) -> None:
        """Count a conversation, named by its id."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.first.setdefault(kind, conversation)

    def sentences(self, name: str, max_length: int | None) -> list[str]:
        """Return a warning for each kind of problem; `name` is the data set's."""
        begin = {
            "cut": f"data.max_length = {max_length} cuts",
            "lost": f"data.max_length = {max_length} leaves no answer in",
            "long": "the model has fewer positions than",
        }
        return [
            f"{begin[kind]} {count} of {self.rows} conversations of {name}, first {self.first[kind]}"
            for kind, count in self.counts.items()
        ]


def look_through(mllm: MLLM, data: ConversationSet, max_length: int | None, *, alone: bool = False) -> list[str]:
    """Check that every conversation can be trained on, and return warnings about those that are too long.

    What is found is cached by the content of data and processor.

    Args:
        mllm: the model.
        data: the conversations.
        max_length: in tokens; None for any length.
        alone: whether each turn is a conversation of its own, as questions with options are.

    Raises:
        DataError, ModelError: names the first conversation that cannot be trained on, and how many there are.
    """
    key = content_hash(
        VERSION, data.data.fingerprint, len(data), _identity(mllm), max_length, mllm.control_tokens_as_words, alone
    )
    file = cache_folder("looked_through") / f"{key}.json"
    if file.exists():
        try:
            return Problems(**json.loads(file.read_text())).sentences(data.data.name, max_length)
        except (ValueError, TypeError) as error:
            log.warning("%s is damaged (%s) and is made again", file, one_line(error, 100))
    problems = _look_through(mllm, data, max_length, alone=alone)
    with atomic_file(file) as partial:
        partial.write_text(json.dumps(asdict(problems)))
    return problems.sentences(data.data.name, max_length)


def _identity(mllm: MLLM) -> str:
    """Return a hash of everything that determines the tokens of texts and images."""
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


def _look_through(mllm: MLLM, data: ConversationSet, max_length: int | None, *, alone: bool) -> Problems:
    """Do the work of `look_through`, without its cache."""
    conversations = data.conversations
    if alone:
        conversations = [replace(c, turns=(turn,)) for c in conversations for turn in c.turns]
    sizes = image_sizes(data)
    tokens = VisualLengths(mllm, set(sizes.values()))
    positions = getattr(mllm.config.get_text_config(), "max_position_embeddings", None)
    problems, errors = Problems(len(conversations)), list[str]()
    with progress_bar(f"texts of {data.data.name[:40]}", total=len(conversations), unit="row", leave=False) as bar:
        for start in range(0, len(conversations), TEXTS_AT_ONCE):
            part = conversations[start : start + TEXTS_AT_ONCE]
            for conversation, length in _lengths(mllm, part, sizes, tokens, errors, data):
                bar.update()
                problems.longest = max(problems.longest, length.whole)
                if positions and min(length.whole, max_length or length.whole) > positions:
                    problems.add("long", conversation.id)
                if max_length is None or length.whole + MARGIN < max_length:
                    continue
                these_sizes = [sizes[_size_key(load)] for load in conversation.loads]
                try:
                    _count_cut(mllm, conversation, these_sizes, length, max_length, problems)
                except WorkbenchError as error:
                    errors.append(f"{data.where(conversation)}{_image_names(conversation)}: {error}")
    if errors:
        more = f" ({len(errors)} such rows in all)" if len(errors) > 1 else ""
        raise DataError(f"{errors[0]}{more}")
    return problems


# --- images ---------------------------------------------------------------------------------------


def image_sizes(data: ConversationSet) -> dict[Any, Size]:
    """Return (width, height) of every image by its `place`, read from its header.

    Images that code draws share the key None and the size of the first of them.

    Raises:
        DataError: names row and file of the first image that cannot be read, and how many there are.
    """
    stored = {load.place: load for c in data.conversations for load in c.loads if isinstance(load, StoredImage)}
    sizes: dict[Any, Size] = {}
    errors: dict[str, str] = {}

    def size(image: StoredImage) -> Size | str:
        try:
            return image.size()
        except WorkbenchError as error:
            return str(error)

    bar = progress_bar(f"image sizes of {data.data.name[:40]}", total=len(stored), unit="image", leave=False)
    with ThreadPoolExecutor(min(READERS, 2 * cores())) as readers, bar:
        for place, value in zip(stored, readers.map(size, stored.values()), strict=True):
            bar.update()
            if isinstance(value, str):
                errors[place] = value
            else:
                sizes[place] = value
    if errors:
        conversation = next(c for c in data.conversations for load in c.loads if _size_key(load) in errors)
        place = next(_size_key(load) for load in conversation.loads if _size_key(load) in errors)
        more = f" ({len(errors)} such images in all)" if len(errors) > 1 else ""
        raise DataError(f"{data.where(conversation)}: {errors[place]}{more}")
    if drawn := next((load for c in data.conversations for load in c.loads if not isinstance(load, StoredImage)), None):
        sizes[None] = drawn().size
    return sizes


def _size_key(load: object) -> Any:
    """Return the key of an image in `image_sizes`."""
    return load.place if isinstance(load, StoredImage) else None


class VisualLengths:
    """The number of tokens that an image adds to a sequence, by its size, as the processor counts them on empty images.

    Args:
        mllm: the model whose processor is asked.
        sizes: all sizes that will be looked up.
    """

    def __init__(self, mllm: MLLM, sizes: set[Size]) -> None:
        self._mllm = mllm
        self._known: dict[Size, tuple[int, int] | str] = {}
        by_area = sorted(sizes, key=lambda size: (size[0] * size[1], size))
        spread = by_area[:: max(1, len(by_area) // SIZES_ASKED)] + by_area[-1:]
        unusual = [size for size in by_area if min(size) < MIN_SIDE or max(size) > MAX_ASPECT * min(size)]
        asked = {*spread, *unusual}
        for size in progress_bar("visual tokens by size", sorted(asked), unit="size", leave=False):
            self._known[size] = self._ask(size)
        offset = self._offset()
        for size in progress_bar("visual tokens by size", sizes - asked, unit="size", leave=False):
            self._known[size] = self._ask(size) if offset is None else (self._arithmetic(size) + offset[0], offset[1])

    def __getitem__(self, size: Size) -> tuple[int, int]:
        """Return how many tokens an image adds to its placeholder, and how many of them follow the last visual token.

        Raises:
            ModelError: the processor refuses images of this size.
        """
        if isinstance(known := self._known[size], str):
            raise ModelError(known)
        return known

    @cached_property
    def add_up(self) -> bool:
        """Whether several images of a row add as many tokens as each alone; LLaVA-OneVision's have no tiles then."""
        known = {size: value[0] for size, value in self._known.items() if not isinstance(value, str)}
        if not known:
            return True
        size = max(known, key=known.__getitem__)
        return isinstance(two := self._ask(size, 2), str) or two[0] == 2 * known[size]

    def _ask(self, size: Size, images: int = 1) -> tuple[int, int] | str:
        """Let the processor encode a row of empty images; return both numbers for all of them, or its error."""
        mllm = self._mllm
        try:
            text = mllm.prompt("?", images)
            row = (Image.new("RGB", size),) * images
            ids = mllm.process((row,), [text], ["?"]).inputs["input_ids"][0].tolist()
        except WorkbenchError as error:
            return str(error)
        plain = mllm.processor.tokenizer(text, add_special_tokens=mllm.adds_special([text]))["input_ids"]
        placeholder = mllm.processor.tokenizer.convert_tokens_to_ids(mllm.image_placeholder)
        after_placeholder = list(reversed(plain)).index(placeholder) if placeholder in plain else 0
        after_image = list(reversed(ids)).index(mllm.config.image_token_id) - after_placeholder
        return len(ids) - len(plain), after_image

    def _arithmetic(self, size: Size) -> int:
        """Return the number of visual tokens as the processor calculates it, without an image."""
        calculated = self._mllm.processor._get_num_multimodal_tokens(image_sizes=[size[::-1]])
        return int(calculated.num_image_tokens[0])

    def _offset(self) -> tuple[int, int] | None:
        """Return the tokens that `_arithmetic` does not count, if they are the same for all sizes asked so far."""
        known = {size: value for size, value in self._known.items() if not isinstance(value, str)}
        try:
            offsets = {(value[0] - self._arithmetic(size), value[1]) for size, value in known.items()}
        except Exception:  # noqa: BLE001  # a private method: processors differ in it, and some have none
            return None
        return offsets.pop() if len(offsets) == 1 else None


# --- texts ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Length:
    """The length of a conversation in tokens.

    Attributes:
        whole: of the whole conversation.
        visual: position of the last visual token, -1 without an image.
        answer: position of the first token of the first answer; `whole` where the tokenizer does not report positions.
    """

    whole: int
    visual: int
    answer: int


def _lengths(
    mllm: MLLM,
    conversations: Sequence[Conversation],
    sizes: dict[Any, Size],
    tokens: VisualLengths,
    errors: list[str],
    data: ConversationSet,
) -> Iterator[tuple[Conversation, Length]]:
    """Yield the estimated length of each conversation that can be encoded, and append the errors of others to `errors`.

    Args:
        mllm: the model.
        conversations: those to measure.
        sizes: of their images, from `image_sizes`.
        tokens: of images by their size.
        errors: gets a sentence for each conversation that cannot be encoded.
        data: where the conversations are from, for these sentences.
    """
    texts: list[tuple[Conversation, str, int, list[tuple[int, int]]]] = []
    for conversation in conversations:
        turns, loads = conversation.turns, conversation.loads
        try:
            added = [tokens[sizes[_size_key(load)]] for load in loads]
            if mllm.processor.chat_template is None:
                prompt = mllm.prompt(turns[0][0], len(loads))
                texts.append((conversation, f"{prompt}{mllm.safe_text('answer', turns[0][1])}", len(prompt), added))
                if len(turns) > 1 or not loads:  # which may be refused without a chat template
                    images = [Image.new("RGB", sizes[_size_key(load)]) for load in loads]
                    encode_conversations(mllm, [images], [turns])
            else:
                text, spans = conversation_text(mllm, turns, len(loads))
                texts.append((conversation, text, spans[0][0], added))
        except WorkbenchError as error:
            errors.append(f"{data.where(conversation)}{_image_names(conversation)}: {error}")
    if not texts:
        return
    special = mllm.adds_special([text for _, text, _, _ in texts])
    placeholder = mllm.processor.tokenizer.convert_tokens_to_ids(mllm.image_placeholder)
    encoded = mllm.processor.tokenizer(
        [text for _, text, _, _ in texts],
        add_special_tokens=special,
        return_offsets_mapping=mllm.processor.tokenizer.is_fast,
    )
    for number, (conversation, _, answer_start, added) in enumerate(texts):
        ids = encoded["input_ids"][number]
        if len(added) > 1 and not tokens.add_up:
            yield conversation, _encoded_length(mllm, conversation, sizes)
            continue
        more = sum(count for count, _ in added)
        last_visual = -1
        if added and placeholder in ids:
            last_visual = len(ids) - 1 - ids[::-1].index(placeholder) + more - added[-1][1]
        offsets = encoded["offset_mapping"][number] if "offset_mapping" in encoded else []
        answer = next((n for n, (_, stop) in enumerate(offsets) if stop > answer_start), len(ids)) + more
        yield conversation, Length(len(ids) + more, last_visual, answer)


def _encoded_length(mllm: MLLM, conversation: Conversation, sizes: dict[Any, Size]) -> Length:
    """Return the length of a conversation that is encoded with empty images."""
    images = [Image.new("RGB", sizes[_size_key(load)]) for load in conversation.loads]
    batch, labels = encode_conversations(mllm, [images], [conversation.turns])
    ids = batch.inputs["input_ids"][0]
    visual = (ids == mllm.config.image_token_id).nonzero().flatten()
    return Length(len(ids), int(visual[-1]), int((labels[0] != IGNORED).long().argmax()))


def _count_cut(
    mllm: MLLM,
    conversation: Conversation,
    sizes: Sequence[Size],
    length: Length,
    max_length: int,
    problems: Problems,
) -> None:
    """Count a conversation that `max_length` cuts or leaves without an answer.

    If its estimated length is near a limit, the conversation itself is encoded, with empty images.

    Raises:
        ModelError: `max_length` cuts into an image.
    """
    cut, lost = length.whole > max_length, length.answer >= max_length
    if (
        length.visual + MARGIN >= max_length
        or abs(length.answer - max_length) <= MARGIN
        or abs(length.whole - max_length) <= MARGIN
    ):
        images, turns = [[Image.new("RGB", size) for size in sizes]], [conversation.turns]
        cut = encode_conversations(mllm, images, turns)[0].inputs["input_ids"].shape[1] > max_length
        lost = not encode_conversations(mllm, images, turns, max_length=max_length)[1].ne(IGNORED).any()
    if cut:
        problems.add("cut", conversation.id)
    if lost:
        problems.add("lost", conversation.id)


def _image_names(conversation: Conversation) -> str:
    """Return the names of the first images of a conversation in parentheses, for messages."""
    names = [load.name for load in conversation.loads if isinstance(load, StoredImage)]
    return f" ({', '.join(shown(name, 60) for name in names[:2])})" if names else ""
