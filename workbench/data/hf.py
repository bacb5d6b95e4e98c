"""Data sets of Hugging Face `datasets`: a local file or folder of parquet, JSON lines or CSV, or a hub id.

`hf:PATH?split=train&images=DIR`. A file is of the split whose name stands in its own or in its folder's; without
`split` it is train, or, where no name says of which split a file is, all there is. Columns: `image` or `images`
(pictures, or paths below `images`), and either `conversations` / `messages` (LLaVA's `from` and `value`, or `role` and
`content`), or `question` and `answer`, with `options` (or `choices`) and `category` where there are any.

Cells of CSV (and TSV) are the texts that stand there, and so are those of JSON. An answer is one of its options, by its
text, its index from 0 or its letter; where that can mean two of them, `answer=text`, `answer=index` or `answer=letter`
says which (`choices.py`). `broken=skip` leaves out the rows that cannot be read, `drop=17,42` those of these numbers,
and each says how many.
"""

from __future__ import annotations

import csv
import json
import logging
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm import tqdm

from workbench.data.base import DATASETS, Conversation, ConversationDataset, Sample, content_hash
from workbench.data.choices import LETTERED, OPTION_KEYS, READINGS, Options, answer_of, options_of
from workbench.data.image_files import below, embedded_image, image_files, missing, stored_images, walk
from workbench.data.images import LFS, StoredImage, embedded, shown
from workbench.data.llava_json import check_broken, check_dropped, content_fingerprint, row_numbers
from workbench.data.selection import choose
from workbench.data.specs import path_of, spec_options
from workbench.data.turns import Notes, check_media, image_key, is_empty, message_text, turns_of
from workbench.errors import DataError, UnknownNameError
from workbench.files import cache_folder
from workbench.weights.fetch import sha256

SPLITS = ("train", "validation", "valid", "val", "dev", "test")
FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv"}
CHATS = ("conversations", "messages")


@DATASETS.register("hf")
def hf(
    spec: str, *, limit: int | None = None, seed: int = 0, draw: int | None = None, decode: bool | None = None
) -> ConversationDataset:
    """Load one split; `limit` keeps the rows of a random subset of the images drawn with `seed`.

    Args:
        decode: look at the pixels of each image, by which it is then known; see `load_data`.

    Raises:
        DataError: the package `datasets` is not installed, nothing loadable there, columns missing, or a broken row
            (its number, from 1, and why).
    """
    path, options = spec_options(spec, {"split": "", "images": "", "answer": "auto", "broken": "error", "drop": ""})
    for name, known in (("answer", READINGS), ("broken", ("error", "skip"))):
        if options[name] not in known:
            raise UnknownNameError(name, options[name], known)
    table = _table(path, options["split"])
    columns = list(table.column_names)
    chat = next((name for name in CHATS if name in columns), None)
    if chat is None and not {"question", "answer"} <= set(columns):
        raise DataError(
            f"{shown(path)} has columns {shown(', '.join(sorted(columns)))}: expected conversations, messages, or"
            " question and answer"
        )
    root = path_of(options["images"]) if options["images"] else Path(path) if Path(path).is_dir() else Path(path).parent
    try:
        pictures = image_key(
            name
            for name in columns
            if not isinstance(table, _Table) or any(not is_empty(row.get(name)) for row in table)
        )
    except DataError as error:
        raise DataError(f"{shown(path)} {error}") from error
    dropped = row_numbers(options["drop"])
    check_dropped(path, dropped - set(range(1, len(table) + 1)))
    written = [
        () if index in dropped else own for index, own in enumerate(_written(table, pictures, path, root), start=1)
    ]
    files = image_files(root, {own for row in written for own in row if isinstance(own, str)})
    if lost := [own for row in written for own in row if isinstance(own, str) and own not in files]:
        raise DataError(f"{missing(Path(path).name, root, lost)}: expected all of them")
    rows, notes = _rows(
        table, written, pictures, chat, options["answer"], Path(path).name, dropped, skip=options["broken"] == "skip"
    )
    there = stored_images(root, files)
    images = [tuple(there[own] if isinstance(own, str) else own for own in written[row.index]) for row in rows]
    chosen = choose(images, limit, seed if draw is None else draw, decode, path)
    conversations, samples = [], []
    for number, loads in chosen:
        row = rows[number]
        conversation = Conversation(f"{row.index + 1}", row.turns, loads, tuple(image.image_id for image in loads))
        conversations.append(conversation)
        if len(loads) == 1 and chat is None:
            samples.append(
                Sample(conversation.id, loads[0].image_id, loads[0], *conversation.turns[0], row.options, row.category)
            )
    notes.warn(f"hf:{path}")

    def fingerprint() -> str:
        return content_fingerprint("hf", conversations, files, path, [(s.id, s.options, s.category) for s in samples])

    return ConversationDataset(
        f"hf:{spec}", conversations, fingerprint, samples if chat is None else None, left_out=notes.sentences()
    )


@dataclass(frozen=True)
class _Row:
    """A row as it is used; `index` is its place in the table."""

    index: int
    turns: tuple[tuple[str, str], ...]
    options: tuple[str, ...]
    category: str


def _rows(
    table: Any,
    images: Sequence[Sequence[object]],
    pictures: str | None,
    chat: str | None,
    reading: str,
    name: str,
    dropped: set[int],
    *,
    skip: bool,
) -> tuple[list[_Row], Notes]:
    """The rows that can be used, and what is to be said of the others.

    Raises:
        DataError: some cannot be, and `skip` does not leave them out.
    """
    texts, notes = table.remove_columns(pictures) if pictures else table, Notes()
    rows: list[_Row] = []
    broken: list[str] = []
    for index, own in enumerate(images):
        if index + 1 in dropped:
            notes.add("left out by drop", f"row {index + 1}")
            continue
        try:
            rows.append(_row(f"row {index + 1}", index, texts[index], len(own), pictures, chat, reading, notes))
        except DataError as error:
            broken.append(str(error))
    check_broken(name, broken, len(rows), notes, skip=skip)
    return rows, notes


def _row(
    where: str,
    index: int,
    row: Mapping[str, Any],
    images: int,
    pictures: str | None,
    chat: str | None,
    reading: str,
    notes: Notes,
) -> _Row:
    """A row of the table, read as the module says.

    Raises:
        DataError: names the row and why it cannot be used.
    """
    read = {"id", "question_id", "category", *([chat] if chat else ["question", "answer", *OPTION_KEYS])}
    check_media(where, {name: value for name, value in row.items() if name not in read}, pictures if images else None)
    options = Options() if chat else options_of(where, row)
    for name in row.keys() - read - (set(LETTERED) if options.texts else set()):
        if not is_empty(row[name]):
            notes.add(f"column `{name}` is not read", where)
    category = row.get("category")
    return _Row(
        index,
        _turns(where, row, chat, images, options, reading, notes),
        options.texts,
        "question" if is_empty(category) else str(category),
    )


class _Table(list[dict[str, Any]]):
    """Rows of text files, with the interface of a table of `datasets`."""

    @property
    def column_names(self) -> list[str]:
        return list(dict.fromkeys(name for row in self for name in row))

    def select_columns(self, names: Sequence[str]) -> _Table:
        return _Table({name: row.get(name) for name in names} for row in self)

    def remove_columns(self, name: str) -> _Table:
        return _Table({key: value for key, value in row.items() if key != name} for row in self)


def _table(path: str, split: str) -> Any:
    """The rows, images not decoded.

    Raises:
        DataError: nothing loadable there, or `datasets` is needed (for all but JSON and CSV) and not installed.
    """
    place, saved = Path(path), _saved(Path(path)) if Path(path).is_dir() else []
    files = (
        []
        if saved
        else (
            sorted(f for _, f in walk(place) if f.suffix in FORMATS)
            if place.is_dir()
            else [place]
            if place.is_file()
            else []
        )
    )
    kinds = {FORMATS.get(file.suffix, "") for file in files}
    if files and (len(kinds) > 1 or "" in kinds):
        endings = ", ".join(sorted({f.suffix for f in files}))
        raise DataError(f"{shown(path)} holds files ending in {shown(endings)}: expected one of {', '.join(FORMATS)}")
    files = _of_split(place, files, split) if files else []
    _check_pointers(files)
    if files and "parquet" not in kinds:
        return _Table(row for file in files for row in (_csv_rows(file) if kinds == {"csv"} else _json_rows(file)))
    if find_spec("datasets") is None:
        raise DataError("data set hf: expected the package datasets, which pip install 'viral-workbench[data]' brings")
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what is wrong is in the error, which is one sentence
    try:
        if saved:
            table = datasets.load_from_disk(str(_saved_split(place, saved, split)))
        elif files:
            # by content: the package's own cache goes by the time of the file
            own = cache_folder(f"datasets/{content_hash(*map(sha256, files))}")
            table = datasets.load_dataset(
                "parquet", data_files=[str(file) for file in files], split="train", cache_dir=str(own)
            )
        else:
            table = datasets.load_dataset(path, split=split or "train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"data set '{shown(path)}' could not be loaded ({shown(error.__cause__ or error)})") from error
    for name, feature in table.features.items():  # an image is decoded when it is asked for
        if isinstance(feature, datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            table = table.cast_column(name, datasets.List(datasets.Image(decode=False)))
        elif isinstance(feature, datasets.Video | datasets.Audio):
            table = table.cast_column(name, type(feature)(decode=False))
    return table


def _csv_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a CSV or TSV file, each cell the text that stands there.

    Raises:
        DataError: no header, a column twice, or a row with another number of cells.
    """
    csv.field_size_limit(2**31 - 1)  # an image in base64 is longer than the default
    rows: list[dict[str, Any]] = []
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            cells = csv.reader(text, delimiter="\t" if file.suffix == ".tsv" else ",", strict=True)
            header = next(cells, [])
            if not header or len(set(header)) < len(header):
                raise DataError(
                    f"{file} has the columns {', '.join(header)[:80] or 'none'}: expected a first line with the name of"
                    " each, none of them twice"
                )
            for own in cells:
                if own and len(own) != len(header):
                    raise DataError(
                        f"{file} row {len(rows) + 1} has {len(own)} cells: expected {len(header)}, as in the first line"
                    )
                if own:
                    rows.append(dict(zip(header, own, strict=True)))
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{file} is not valid CSV ({' '.join(str(error).split())[:120]})") from error
    return rows


def _json_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of JSON lines, or of a JSON list.

    Raises:
        DataError: no JSON, or a row that is no mapping.
    """
    try:
        with file.open(encoding="utf-8-sig") as text:
            first = next((character for line in text for character in line if not character.isspace()), "")
            text.seek(0)
            rows = json.load(text) if first == "[" else [json.loads(line) for line in text if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} is not valid JSON ({' '.join(str(error).split())[:120]})") from error
    if other := next((number for number, row in enumerate(rows, start=1) if not isinstance(row, dict)), None):
        raise DataError(f"{file} row {other} is {type(rows[other - 1]).__name__}: expected columns by name")
    return rows  # type: ignore[no-any-return]


def _saved(place: Path) -> list[str]:
    """The splits of a folder that `save_to_disk` wrote, "" for a table without; none for any other folder."""
    if (place / "state.json").is_file() and (place / "dataset_info.json").is_file():
        return [""]
    return (
        sorted(file.parent.name for file in place.glob("*/state.json"))
        if (place / "dataset_dict.json").is_file()
        else []
    )


def _saved_split(place: Path, saved: Sequence[str], split: str) -> Path:
    if saved == [""]:
        if split:
            raise DataError(
                f"{shown(place)} is one table that save_to_disk wrote: expected no split, which is {shown(split, 40)}"
            )
        return place
    if (split or "train") not in saved:
        raise DataError(
            f"{shown(place)} has no split {shown(split or 'train', 40)}: expected"
            f" {' or '.join(f'split={name}' for name in saved)}"
        )
    return place / (split or "train")


def _check_pointers(files: Sequence[Path]) -> None:
    for file in files:
        with file.open("rb") as opened:
            if opened.read(len(LFS)) == LFS:
                raise DataError(f"{shown(file)} is a git-lfs pointer: run git lfs pull")


def _of_split(place: Path, files: list[Path], split: str) -> list[Path]:
    """The files of one split, by their names below `place`."""
    if not split and len(files) == 1:
        return files
    words = {
        file: set(re.split(r"[^a-z0-9]+", str(file.relative_to(place) if place.is_dir() else file.name).lower()))
        for file in files
    }
    if named := [file for file in files if (split or "train") in words[file]]:
        return named
    known = [name for name in SPLITS if any(name in own for own in words.values())]
    if split or known:
        raise DataError(
            f"{place} has no file whose name says split {split or 'train'}: expected"
            f" {' or '.join(f'split={name}' for name in known) or 'none'}"
        )
    return files


def _written(table: Any, column: str | None, path: str, root: Path) -> list[tuple[str | StoredImage, ...]]:
    """The images of each row: the path below `root` that it writes, or what the table itself holds, which is read
    through once."""
    if column is None:
        return [()] * len(table)
    own = table.select_columns([column])
    found: list[tuple[str | StoredImage, ...]] = []
    for index in tqdm(
        range(len(own)),
        desc=f"images of {shown(path, 40)}",
        unit="row",
        file=sys.stderr,
        mininterval=2,
        delay=2,
        leave=False,
    ):
        where = f"{shown(path)} row {index + 1}"
        row: list[str | StoredImage] = []
        for number, value in enumerate(_cells(own, index, column)):
            content = _content(value, where)
            fetch: Callable[[], bytes] = partial(_bytes, own, index, column, number)
            row.append(
                below(root, content, where)
                if isinstance(content, str)
                else embedded_image(content, f"{number + 1} of {where}", fetch)
            )
        found.append(tuple(row))
    return found


def _cells(table: Any, index: int, column: str) -> list[Any]:
    value = table[index][column]
    cells = value if isinstance(value, list) else [value]
    # 0 bytes are an image that has been lost, not none
    lost = any((cell.get("bytes") if isinstance(cell, Mapping) else cell) == b"" for cell in cells)
    return [] if is_empty(value) and not lost else cells


def _content(value: Any, where: str) -> str | bytes:
    """The path that a cell writes, or the bytes of the image that it holds."""
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
    if (
        not isinstance(messages, Sequence)
        or not messages
        or not all(isinstance(message, Mapping) for message in messages)
    ):
        raise DataError(f"{where} has no list of messages")
    if "from" in messages[0]:
        return turns_of(where, messages, images, speaker="from", text="value", notes=notes)
    plain = [message_text(where, message, n, images) for n, message in enumerate(messages)]
    return turns_of(where, plain, images, speaker="role", text="content", notes=notes)
