"""Data sets of Hugging Face `datasets`: a local file or folder of parquet, JSON lines or CSV, or a hub id.

`hf:PATH?split=train&images=DIR`. A file is of the split whose name stands in its own or in its folder's; without `split` it is train, or, where no name says
of which split a file is, all there is. Columns: `image` or `images` (pictures, or paths below `images`), and either `conversations` / `messages` (LLaVA's
`from` and `value`, or `role` and `content`), or `question` and `answer`, with `options` (or `choices`) and `category` where there are any.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from workbench.data.base import DATASETS, Conversation, ConversationDataset, Sample, content_hash, spec_options, subset, upright_rgb
from workbench.data.folder import file_sizes, missing, read_image
from workbench.data.llava_json import turns_of
from workbench.errors import DataError
from workbench.weights import sha256

SPLITS = ("train", "validation", "valid", "val", "dev", "test")
FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}


@DATASETS.register("hf")
def hf(spec: str, *, limit: int | None = None, seed: int = 0) -> ConversationDataset:
    """Load one split; `limit` keeps a random subset of rows drawn with `seed`.

    Raises:
        DataError: the package `datasets` is not installed, nothing loadable there, columns missing, or a broken row (its number, from 1, and why).
    """
    path, options = spec_options(spec, {"split": "", "images": ""})
    if find_spec("datasets") is None:
        raise DataError("data set hf: expected the package datasets, which pip install 'viral-workbench[data]' brings")
    table, identity = _table(path, options["split"])
    columns = set(table.column_names)
    chat = next((name for name in ("conversations", "messages") if name in columns), None)
    if chat is None and not {"question", "answer"} <= columns:
        raise DataError(f"{path} has columns {', '.join(sorted(columns))}: expected conversations, messages, or question and answer")
    root = Path(options["images"]) if options["images"] else Path(path) if Path(path).is_dir() else Path(path).parent
    pictures = next((name for name in ("images", "image") if name in columns), None)
    rows = subset(len(table), limit, seed)
    names = {index: _names(f"{path} row {index + 1}", _cell(table, index, pictures)) for index in rows}
    written = [name for own in names.values() for name in own if name is not None]
    sizes = file_sizes(root, set(written))
    if lost := [name for name in written if name not in sizes]:
        raise DataError(f"{missing(Path(path).name, root, lost)}: expected all of them")
    conversations, samples = [], []
    for index in rows:
        row = {name: table[index][name] for name in columns - {pictures}} if pictures else table[index]
        where = f"{path} row {index + 1}"
        paths = [None if name is None else root / name for name in names[index]]
        loads = tuple(partial(_picture, table, index, pictures, n, file) for n, file in enumerate(paths))
        conversation = Conversation(f"{index + 1}", _turns(where, row, chat, len(loads)), loads)
        conversations.append(conversation)
        if len(loads) == 1 and chat is None:
            given = tuple(map(str, row.get("options") or row.get("choices") or ()))
            samples.append(Sample(conversation.id, conversation.id, loads[0], *conversation.turns[0], given, str(row.get("category") or "question")))
    fingerprint = content_hash("hf", identity, options["split"], limit, seed, sorted(sizes.items()))
    return ConversationDataset(f"hf:{spec}", conversations, fingerprint, samples if chat is None else None)


def _table(path: str, split: str) -> tuple[Any, str]:
    """The rows, pictures not decoded, and a hash of what they are."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what is wrong is in the error, which is one sentence
    place = Path(path)
    files = sorted(f for f in place.rglob("*") if f.suffix in FORMATS) if place.is_dir() else [place] if place.is_file() else []
    try:
        if files:
            kinds = {FORMATS.get(file.suffix, "") for file in files}
            if len(kinds) > 1 or "" in kinds:
                raise DataError(f"{path} holds files ending in {', '.join(sorted({f.suffix for f in files}))}: expected one of {', '.join(FORMATS)}")
            files = _of_split(place, files, split)
            table = datasets.load_dataset(kinds.pop(), data_files=[str(file) for file in files], split="train")
            identity = content_hash(*(sha256(file) for file in files))
        else:
            table = datasets.load_dataset(path, split=split or "train")
            identity = content_hash(path, table._fingerprint)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"data set '{path}' could not be loaded ({' '.join(str(error.__cause__ or error).split())[:160]})") from error
    for name, feature in table.features.items():  # a picture is decoded when it is asked for
        if isinstance(feature, datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            table = table.cast_column(name, datasets.List(datasets.Image(decode=False)))
    return table, identity


def _of_split(place: Path, files: list[Path], split: str) -> list[Path]:
    """The files of one split, by their names below `place`."""
    if not split and len(files) == 1:
        return files
    words = {file: set(re.split(r"[^a-z0-9]+", str(file.relative_to(place) if place.is_dir() else file.name).lower())) for file in files}
    if named := [file for file in files if (split or "train") in words[file]]:
        return named
    known = [name for name in SPLITS if any(name in own for own in words.values())]
    if split or known:
        raise DataError(f"{place} has no file whose name says split {split or 'train'}: expected {' or '.join(f'split={name}' for name in known) or 'none'}")
    return files


def _cell(table: Any, index: int, column: str | None) -> list[Any]:
    value = table[index][column] if column else None
    return [] if value is None else value if isinstance(value, list) else [value]


def _names(where: str, cells: Sequence[Any]) -> list[str | None]:
    """The path of each picture of a row as it is written; None for one that the table itself holds."""
    for value in cells:
        if not isinstance(value, str) and not (isinstance(value, Mapping) and (value.get("bytes") or isinstance(value.get("path"), str))):
            raise DataError(f"{where} has image {str(value)[:80]!r}: expected a picture or a path")
    return [value if isinstance(value, str) else None if value.get("bytes") else value["path"] for value in cells]


def _picture(table: Any, index: int, column: str | None, number: int, path: Path | None) -> Image.Image:
    if path is not None:
        return read_image(path)
    try:
        with Image.open(BytesIO(_cell(table, index, column)[number]["bytes"])) as image:
            return upright_rgb(image)
    except OSError as error:
        raise DataError(f"picture {number + 1} of row {index + 1} cannot be read ({error})") from error


def _turns(where: str, row: dict[str, Any], chat: str | None, images: int) -> tuple[tuple[str, str], ...]:
    if chat is None:
        if not isinstance(row["question"], str) or row["answer"] is None:
            raise DataError(f"{where}: expected a question and an answer")
        return ((row["question"].replace("<image>", "").strip(), str(row["answer"]).strip()),)
    messages = row[chat]
    if not isinstance(messages, Sequence) or not messages or not all(isinstance(message, Mapping) for message in messages):
        raise DataError(f"{where} has no list of messages")
    if "from" in messages[0]:
        return turns_of(where, messages, images, speaker="from", text="value")
    return turns_of(where, [_plain(message, n, images) for n, message in enumerate(messages)], images, speaker="role", text="content")


def _plain(message: Mapping[str, Any], number: int, images: int) -> dict[str, Any]:
    """A message whose content may be a list of parts, as text with placeholders; images beside a text without any stand before it."""
    content = message.get("content")
    if isinstance(content, list):
        parts = [part if isinstance(part, Mapping) else {"text": part} for part in content]
        content = "".join("<image>" if part.get("type") == "image" else str(part.get("text") or "") for part in parts)
    if number == 0 and isinstance(content, str) and "<image>" not in content:
        content = "<image>" * images + content
    return {"role": message.get("role"), "content": content}
