"""Data sets of Hugging Face `datasets`: a local file or folder of parquet, JSON lines or CSV, or a hub id.

`hf:PATH?split=train&images=DIR`. A file belongs to a split if its name, or that of its folder, contains the split's
name; if there is none, one that contains it with a number (`train2014`), or as training or testing. Without `split`,
the split is train, or all files if no name contains a split. The columns are `image` or `images` (images, or paths
below DIR), and either `conversations` or `messages` (LLaVA's `from` and `value`, or `role` and
`content`), or `question` and `answer`, with optional `options` (or `choices`), `category` and `id` (or `question_id`).
The id of a question is that of its row if no two rows share one, else the number of the row, as for conversations.

Cells of CSV, TSV and JSON are taken as written. An answer is one of its options, given by its text, its index from 0 or
its letter; if that can mean two options, `answer=text`, `answer=index` or `answer=letter` decides (`choices.py`).
`broken=skip` leaves out rows that cannot be read, `drop=17,42` the rows with these numbers; a warning counts them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from workbench.data.base import DATASETS, Conversation, Sample
from workbench.data.choices import LETTER_COLUMNS, OPTION_KEYS, READINGS, Options, answer_of, options_of
from workbench.data.conversations import ConversationDataset
from workbench.data.hf_tables import TextTable, read_table
from workbench.data.image_files import below, embedded_image, image_files, missing, stored_images
from workbench.data.images import StoredImage, embedded, shown
from workbench.data.llava_json import check_broken, check_dropped, content_fingerprint, row_numbers
from workbench.data.selection import choose
from workbench.data.specs import path_of, spec_options
from workbench.data.turns import Notes, check_characters, check_media, image_key, is_empty, message_text, turns_of
from workbench.errors import DataError, UnknownNameError
from workbench.progress import progress_bar

CHAT_COLUMNS = ("conversations", "messages")
ID_COLUMNS = ("id", "question_id")


@DATASETS.register("hf")
def hf(
    spec: str, *, limit: int | None = None, seed: int = 0, draw: int | None = None, decode: bool | None = None
) -> ConversationDataset:
    """Load one split.

    Args:
        spec: path or hub id, with options.
        limit: number of images of a random subset, whose rows are kept; None for all.
        seed: of the random subset.
        draw: takes the place of `seed` if it is not None.
        decode: whether to decode all images and identify them by their pixels; see `load_data`.

    Raises:
        DataError: the package `datasets` is not installed, nothing can be loaded, columns are missing, or a row is
            broken (with its number, from 1, and why).
    """
    path, options = spec_options(spec, {"split": "", "images": "", "answer": "auto", "broken": "error", "drop": ""})
    for name, known in (("answer", READINGS), ("broken", ("error", "skip"))):
        if options[name] not in known:
            raise UnknownNameError(name, options[name], known)
    table = read_table(path, options["split"])
    columns = list(table.column_names)
    chat = next((name for name in CHAT_COLUMNS if name in columns), None)
    if chat is None and not {"question", "answer"} <= set(columns):
        raise DataError(
            f"{shown(path)} has columns {shown(', '.join(sorted(columns)))}: expected conversations, messages, or"
            " question and answer"
        )
    root = path_of(options["images"]) if options["images"] else Path(path) if Path(path).is_dir() else Path(path).parent
    try:
        image_column = image_key(
            name
            for name in columns
            if not isinstance(table, TextTable) or any(not is_empty(row.get(name)) for row in table)
        )
    except DataError as error:
        raise DataError(f"{shown(path)} {error}") from error
    dropped = row_numbers(options["drop"])
    check_dropped(path, dropped - set(range(1, len(table) + 1)))
    # of each row, the paths or the embedded images
    sources = image_sources(table, image_column, path, root)
    files = image_files(root, {source for row in sources for source in row if isinstance(source, str)})
    needed = [s for number, row in enumerate(sources, 1) if number not in dropped for s in row if isinstance(s, str)]
    if lost := [source for source in needed if source not in files]:
        raise DataError(f"{missing(Path(path).name, root, lost)}: expected all of them")
    ids, table = ([], table) if chat else _ids(table)
    rows, notes = _rows(
        table,
        sources,
        image_column,
        chat,
        options["answer"],
        Path(path).name,
        dropped,
        skip=options["broken"] == "skip",
    )
    stored = stored_images(root, files)
    images = [
        tuple(
            stored[source] if isinstance(source, str) else source
            for source in sources[row.index]
            if source in stored or isinstance(source, StoredImage)  # those of a row that is left out may be gone
        )
        for row in rows
    ]
    without = {number for number, row in enumerate(rows) if row.index + 1 in dropped}
    chosen = choose(images, limit, seed if draw is None else draw, decode, path, without)
    conversations, samples = [], []
    for number, loads in chosen:
        row = rows[number]
        conversation = Conversation(f"{row.index + 1}", row.turns, loads, tuple(image.image_id for image in loads))
        conversations.append(conversation)
        if len(loads) == 1 and chat is None:
            samples.append(
                Sample(ids[row.index], loads[0].image_id, loads[0], *conversation.turns[0], row.options, row.category)
            )
    notes.warn(f"hf:{path}")

    def fingerprint() -> str:
        return content_fingerprint("hf", conversations, files, path, [(s.id, s.options, s.category) for s in samples])

    return ConversationDataset(
        f"hf:{spec}", conversations, fingerprint, samples if chat is None else None, left_out=notes.sentences()
    )


def _ids(table: Any) -> tuple[list[str], Any]:
    """Return the id of each row's question, and the table without the column that they come from.

    It is the first of ID_COLUMNS that has another text or number in every row, or else the numbers of the rows.

    Raises:
        DataError: an id that is no valid Unicode.
    """
    for name in ID_COLUMNS:
        values = [row[name] for row in table.select_columns([name])] if name in table.column_names else []
        ids = [str(value) for value in values if isinstance(value, str | int) and value != ""]
        if len(set(ids)) == len(table):
            for number, each in enumerate(ids, start=1):
                check_characters(f"row {number}: its {name}", each)
            return ids, table.remove_columns(name)
    return [f"{number}" for number in range(1, len(table) + 1)], table


@dataclass(frozen=True)
class _Row:
    """A usable row; `index` is its position in the table."""

    index: int
    turns: tuple[tuple[str, str], ...]
    options: tuple[str, ...]
    category: str


def _rows(
    table: Any,
    images: Sequence[Sequence[object]],
    image_column: str | None,
    chat: str | None,
    reading: str,
    name: str,
    dropped: set[int],
    *,
    skip: bool,
) -> tuple[list[_Row], Notes]:
    """Return the usable rows, those to be left out among them, and notes on the others.

    Args:
        table: the table.
        images: the images of each row.
        image_column: the column that they come from.
        chat: the column of conversations, if there is one.
        reading: how answers are read, one of READINGS.
        name: the file's name, in messages.
        dropped: numbers of the rows to leave out, from 1.
        skip: whether to leave out rows that cannot be used.

    Raises:
        DataError: some rows cannot be used, and `skip` is false.
    """
    texts, notes = table.remove_columns(image_column) if image_column else table, Notes()
    rows: list[_Row] = []
    broken: list[str] = []
    for index, row_images in enumerate(images):
        where, count, is_dropped = f"row {index + 1}", len(row_images), index + 1 in dropped
        if is_dropped:
            notes.add("left out by drop", where)
        unread = Notes() if is_dropped else notes
        try:
            rows.append(_row(where, index, texts[index], count, image_column, chat, reading, unread))
        except DataError as error:
            if not is_dropped:
                broken.append(str(error))
    check_broken(name, broken, sum(row.index + 1 not in dropped for row in rows), notes, skip=skip)
    return rows, notes


def _row(
    where: str,
    index: int,
    row: Mapping[str, Any],
    images: int,
    image_column: str | None,
    chat: str | None,
    reading: str,
    notes: Notes,
) -> _Row:
    """Read a row of the table as the module's docstring says; the arguments are those of `_rows`.

    Raises:
        DataError: the row cannot be used; the error says which row and why.
    """
    read = {"category", *([chat, *ID_COLUMNS] if chat else ["question", "answer", *OPTION_KEYS])}
    unread = {name: value for name, value in row.items() if name not in read}
    check_media(where, unread, image_column if images else None)
    options = Options() if chat else options_of(where, row)
    for name in row.keys() - read - (set(LETTER_COLUMNS) if options.texts else set()):
        if not is_empty(row[name]):
            notes.add(f"column `{name}` is not read", where)
    category, answer, question = row.get("category"), row.get("answer"), row.get("question")
    if chat is None and isinstance(answer, float) and answer.is_integer():
        notes.add("the answer is written with .0, as whole numbers are in a column that lacks some", where)
    if chat is None and isinstance(question, str) and not question.strip():
        notes.add("the question is empty", where)
    check_characters(f"{where}: its category", str(category))
    return _Row(
        index,
        _turns(where, row, chat, images, options, reading, notes),
        options.texts,
        "question" if is_empty(category) else str(category),
    )


def image_sources(table: Any, column: str | None, path: str, root: Path) -> list[tuple[str | StoredImage, ...]]:
    """Return the images of each row: paths below `root`, or images that the table itself contains.

    Embedded images are read once, for a hash of their bytes.
    """
    if column is None:
        return [()] * len(table)
    images = table.select_columns([column])
    sources: list[tuple[str | StoredImage, ...]] = []
    for index in progress_bar(f"images of {shown(path, 40)}", range(len(images)), unit="row", leave=False):
        where = f"{shown(path)} row {index + 1}"
        row: list[str | StoredImage] = []
        for number, value in enumerate(_cells(images, index, column)):
            content = _content(value, where)
            if isinstance(content, str):
                row.append(below(root, content, where))
            else:
                fetch: Callable[[], bytes] = partial(_bytes, images, index, column, number)
                row.append(embedded_image(content, f"{number + 1} of {where}", fetch))
        sources.append(tuple(row))
    return sources


def _cells(table: Any, index: int, column: str) -> list[Any]:
    """Return the values of the images of a row."""
    value = table[index][column]
    cells = value if isinstance(value, list) else [value]
    # an image of 0 bytes has been lost; it is not a row without an image
    lost = any((cell.get("bytes") if isinstance(cell, Mapping) else cell) == b"" for cell in cells)
    return [] if is_empty(value) and not lost else cells


def _content(value: Any, where: str) -> str | bytes:
    """Return the path in a cell, or the bytes of the image in it."""
    if isinstance(value, Mapping):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise DataError(
            f"{where} has image {shown(repr(value), 60)}: expected an image, its path, or its bytes as base64 text"
        )
    return value if (data := embedded(value)) is None else data


def _bytes(table: Any, index: int, column: str, number: int) -> bytes:
    """Return the bytes of image `number` of a row."""
    content = _content(_cells(table, index, column)[number], "")
    assert isinstance(content, bytes)
    return content


def _turns(
    where: str, row: Mapping[str, Any], chat: str | None, images: int, options: Options, reading: str, notes: Notes
) -> tuple[tuple[str, str], ...]:
    if chat is None:
        if not isinstance(row.get("question"), str):
            raise DataError(f"{where} has the question {str(row.get('question'))[:40]!r}: expected a text")
        messages: Any = [
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": answer_of(where, row.get("answer"), options, reading)},
        ]
    else:
        messages = row.get(chat)
    is_list = isinstance(messages, Sequence) and bool(messages)
    if not is_list or not all(isinstance(message, Mapping) for message in messages):
        raise DataError(f"{where} has no list of messages")
    if "from" in messages[0]:
        return turns_of(where, messages, images, speaker="from", text="value", notes=notes)
    plain = [message_text(where, message, n, images) for n, message in enumerate(messages)]
    return turns_of(where, plain, images, speaker="role", text="content", notes=notes)
