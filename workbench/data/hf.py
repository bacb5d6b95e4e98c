"""Data sets of Hugging Face `datasets`: a local file or folder of parquet, JSON lines or CSV, or a hub id.

`hf:PATH?split=train&images=DIR`. A file is of the split whose name stands in its own or in its folder's; without `split` it is train, or, where no name says
of which split a file is, all there is. Columns: `image` or `images` (pictures, or paths below `images`), and either `conversations` / `messages` (LLaVA's
`from` and `value`, or `role` and `content`), or `question` and `answer`, with `options` (or `choices`) and `category` where there are any.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm import tqdm

from workbench.data.base import DATASETS, Conversation, ConversationDataset, Sample
from workbench.data.image_files import below, embedded_image, image_files, missing, stored_images, walk
from workbench.data.images import LFS, StoredImage, embedded, shown
from workbench.data.llava_json import content_fingerprint, turns_of
from workbench.data.selection import choose
from workbench.data.specs import path_of, spec_options
from workbench.errors import DataError

SPLITS = ("train", "validation", "valid", "val", "dev", "test")
FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}


@DATASETS.register("hf")
def hf(spec: str, *, limit: int | None = None, seed: int = 0, decode: bool | None = None) -> ConversationDataset:
    """Load one split; `limit` keeps the rows of a random subset of the images drawn with `seed`.

    Args:
        decode: look at the pixels of each image, by which it is then known; see `load_data`.

    Raises:
        DataError: the package `datasets` is not installed, nothing loadable there, columns missing, or a broken row (its number, from 1, and why).
    """
    path, options = spec_options(spec, {"split": "", "images": ""})
    if find_spec("datasets") is None:
        raise DataError("data set hf: expected the package datasets, which pip install 'viral-workbench[data]' brings")
    table = _table(path, options["split"])
    columns = set(table.column_names)
    chat = next((name for name in ("conversations", "messages") if name in columns), None)
    if chat is None and not {"question", "answer"} <= columns:
        raise DataError(f"{shown(path)} has columns {shown(', '.join(sorted(columns)))}: expected conversations, messages, or question and answer")
    root = path_of(options["images"]) if options["images"] else Path(path) if Path(path).is_dir() else Path(path).parent
    pictures = next((name for name in ("images", "image") if name in columns), None)
    written = _written(table, pictures, path, root)
    files = image_files(root, {own for row in written for own in row if isinstance(own, str)})
    if lost := [own for row in written for own in row if isinstance(own, str) and own not in files]:
        raise DataError(f"{missing(Path(path).name, root, lost)}: expected all of them")
    there = stored_images(root, files)
    images = [tuple(there[own] if isinstance(own, str) else own for own in row) for row in written]
    chosen = choose(images, limit, seed, decode, path)
    conversations, samples = [], []
    for index, loads in chosen:
        row = {name: table[index][name] for name in columns - {pictures}} if pictures else table[index]
        where = f"{shown(path)} row {index + 1}"
        conversation = Conversation(f"{index + 1}", _turns(where, row, chat, len(loads)), loads, tuple(image.image_id for image in loads))
        conversations.append(conversation)
        if len(loads) == 1 and chat is None:
            given = tuple(map(str, row.get("options") or row.get("choices") or ()))
            category = str(row.get("category") or "question")
            samples.append(Sample(conversation.id, loads[0].image_id, loads[0], *conversation.turns[0], given, category))

    def fingerprint() -> str:
        return content_fingerprint("hf", conversations, files, path, [(s.id, s.options, s.category) for s in samples])

    return ConversationDataset(f"hf:{spec}", conversations, fingerprint, samples if chat is None else None)


def _table(path: str, split: str) -> Any:
    """The rows, images not decoded."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what is wrong is in the error, which is one sentence
    place = Path(path)
    try:
        if place.is_dir() and (saved := _saved(place)):
            table = datasets.load_from_disk(str(_saved_split(place, saved, split)))
        elif files := sorted(f for _, f in walk(place) if f.suffix in FORMATS) if place.is_dir() else [place] if place.is_file() else []:
            kinds = {FORMATS.get(file.suffix, "") for file in files}
            if len(kinds) > 1 or "" in kinds:
                endings = ", ".join(sorted({f.suffix for f in files}))
                raise DataError(f"{shown(path)} holds files ending in {shown(endings)}: expected one of {', '.join(FORMATS)}")
            files = _of_split(place, files, split)
            _check_pointers(files)
            table = datasets.load_dataset(kinds.pop(), data_files=[str(file) for file in files], split="train")
        else:
            table = datasets.load_dataset(path, split=split or "train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"data set '{shown(path)}' could not be loaded ({shown(error.__cause__ or error)})") from error
    for name, feature in table.features.items():  # an image is decoded when it is asked for
        if isinstance(feature, datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            table = table.cast_column(name, datasets.List(datasets.Image(decode=False)))
    return table


def _saved(place: Path) -> list[str]:
    """The splits of a folder that `save_to_disk` wrote, "" for a table without; none for any other folder."""
    if (place / "state.json").is_file() and (place / "dataset_info.json").is_file():
        return [""]
    return sorted(file.parent.name for file in place.glob("*/state.json")) if (place / "dataset_dict.json").is_file() else []


def _saved_split(place: Path, saved: Sequence[str], split: str) -> Path:
    if saved == [""]:
        if split:
            raise DataError(f"{shown(place)} is one table that save_to_disk wrote: expected no split, which is {shown(split, 40)}")
        return place
    if (split or "train") not in saved:
        raise DataError(f"{shown(place)} has no split {shown(split or 'train', 40)}: expected {' or '.join(f'split={name}' for name in saved)}")
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
    words = {file: set(re.split(r"[^a-z0-9]+", str(file.relative_to(place) if place.is_dir() else file.name).lower())) for file in files}
    if named := [file for file in files if (split or "train") in words[file]]:
        return named
    known = [name for name in SPLITS if any(name in own for own in words.values())]
    if split or known:
        raise DataError(f"{place} has no file whose name says split {split or 'train'}: expected {' or '.join(f'split={name}' for name in known) or 'none'}")
    return files


def _written(table: Any, column: str | None, path: str, root: Path) -> list[tuple[str | StoredImage, ...]]:
    """The images of each row: the path below `root` that it writes, or what the table itself holds, which is read through once."""
    if column is None:
        return [()] * len(table)
    own = table.select_columns([column])
    found: list[tuple[str | StoredImage, ...]] = []
    for index in tqdm(range(len(own)), desc=f"images of {shown(path, 40)}", unit="row", file=sys.stderr, mininterval=2, delay=2, leave=False):
        where = f"{shown(path)} row {index + 1}"
        row: list[str | StoredImage] = []
        for number, value in enumerate(_cells(own, index, column)):
            content = _content(value, where)
            fetch: Callable[[], bytes] = partial(_bytes, own, index, column, number)
            row.append(below(root, content, where) if isinstance(content, str) else embedded_image(content, f"{number + 1} of {where}", fetch))
        found.append(tuple(row))
    return found


def _cells(table: Any, index: int, column: str) -> list[Any]:
    value = table[index][column]
    return [] if value is None else value if isinstance(value, list) else [value]


def _content(value: Any, where: str) -> str | bytes:
    """The path that a cell writes, or the bytes of the image that it holds."""
    if isinstance(value, Mapping):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise DataError(f"{where} has image {shown(repr(value), 60)}: expected an image, its path, or its bytes as base64 text")
    return value if (data := embedded(value)) is None else data


def _bytes(table: Any, index: int, column: str, number: int) -> bytes:
    content = _content(_cells(table, index, column)[number], "")
    assert isinstance(content, bytes)
    return content


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
