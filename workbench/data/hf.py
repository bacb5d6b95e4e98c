"""Data sets of Hugging Face `datasets`: a local file or folder of parquet, JSON lines or CSV, or a hub id.

`hf:PATH?split=train&images=DIR`. Columns: `image` or `images` (pictures, or paths below `images`), and either `conversations` / `messages` (LLaVA's
`from` and `value`, or `role` and `content`), or `question` and `answer`, with `options` (or `choices`) and `category` where there are any.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from workbench.data.base import DATASETS, Conversation, ConversationDataset, Sample, content_hash, spec_options, subset, upright_rgb
from workbench.data.folder import read_image
from workbench.data.llava_json import turns_of
from workbench.errors import DataError
from workbench.weights import sha256

FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}


@DATASETS.register("hf")
def hf(spec: str, *, limit: int | None = None, seed: int = 0) -> ConversationDataset:
    """Load one split; `limit` keeps a random subset of rows drawn with `seed`.

    Raises:
        DataError: the package `datasets` is not installed, nothing loadable there, columns missing, or a broken row (its number, from 1, and why).
    """
    path, options = spec_options(spec, {"split": "train", "images": ""})
    if find_spec("datasets") is None:
        raise DataError("data set hf: expected the package datasets, which pip install 'viral-workbench[data]' brings")
    table, identity = _table(path, options["split"])
    columns = set(table.column_names)
    chat = next((name for name in ("conversations", "messages") if name in columns), None)
    if chat is None and not {"question", "answer"} <= columns:
        raise DataError(f"{path} has columns {', '.join(sorted(columns))}: expected conversations, messages, or question and answer")
    root = Path(options["images"]) if options["images"] else Path(path) if Path(path).is_dir() else Path(path).parent
    pictures = next((name for name in ("images", "image") if name in columns), None)
    conversations, samples = [], []
    for index in subset(len(table), limit, seed):
        row = {name: table[index][name] for name in columns - {pictures}} if pictures else table[index]
        where = f"{path} row {index + 1}"
        count, paths = _pictures(where, table, index, pictures, root)
        loads = tuple(partial(_picture, table, index, pictures, n, paths[n]) for n in range(count))
        conversation = Conversation(f"{index + 1}", _turns(where, row, chat, count), loads)
        conversations.append(conversation)
        if count == 1 and chat is None:
            given = tuple(map(str, row.get("options") or row.get("choices") or ()))
            samples.append(Sample(conversation.id, conversation.id, loads[0], *conversation.turns[0], given, str(row.get("category") or "question")))
    fingerprint = content_hash("hf", identity, options["split"], limit, seed)
    return ConversationDataset(f"hf:{spec}", conversations, fingerprint, samples if chat is None else None)


def _table(path: str, split: str) -> tuple[Any, str]:
    """The rows, pictures not decoded, and a hash of what they are."""
    import datasets

    datasets.disable_progress_bars()
    place = Path(path)
    files = sorted(f for f in place.rglob("*") if f.suffix in FORMATS) if place.is_dir() else [place] if place.is_file() else []
    try:
        if files:
            kinds = {FORMATS.get(file.suffix, "") for file in files}
            if len(kinds) > 1 or "" in kinds:
                raise DataError(f"{path} holds files ending in {', '.join(sorted({f.suffix for f in files}))}: expected one of {', '.join(FORMATS)}")
            named = [file for file in files if split in file.stem.split("-")] if len(files) > 1 else files
            table = datasets.load_dataset(kinds.pop(), data_files=[str(file) for file in named or files], split="train")
            identity = content_hash(*(sha256(file) for file in named or files))
        else:
            table = datasets.load_dataset(path, split=split)
            identity = content_hash(path, table._fingerprint)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"data set '{path}' could not be loaded ({' '.join(str(error).split())[:160]})") from error
    for name, feature in table.features.items():  # a picture is decoded when it is asked for
        if isinstance(feature, datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            table = table.cast_column(name, datasets.List(datasets.Image(decode=False)))
    return table, identity


def _cell(table: Any, index: int, column: str | None) -> list[Any]:
    value = table[index][column] if column else None
    return [] if value is None else value if isinstance(value, list) else [value]


def _pictures(where: str, table: Any, index: int, column: str | None, root: Path) -> tuple[int, list[Path | None]]:
    """How many pictures a row has, and the path of those that are files."""
    paths: list[Path | None] = []
    for value in _cell(table, index, column):
        name = value if isinstance(value, str) else None if value.get("bytes") else value.get("path")
        if name is not None and not (root / name).is_file():
            raise DataError(f"{where}: image {root / name} does not exist")
        paths.append(None if name is None else root / name)
    return len(paths), paths


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
    if not isinstance(messages, Sequence) or not messages:
        raise DataError(f"{where} has no list of messages")
    if "from" in messages[0]:
        return turns_of(where, messages, images, speaker="from", text="value")
    return turns_of(where, [_plain(message, n, images) for n, message in enumerate(messages)], images, speaker="role", text="content")


def _plain(message: dict[str, Any], number: int, images: int) -> dict[str, Any]:
    """A message whose content may be a list of parts, as text with placeholders; images beside a text without any stand before it."""
    content = message.get("content")
    if isinstance(content, list):
        content = "".join("<image>" if part.get("type") == "image" else str(part.get("text") or "") for part in content)
    if number == 0 and isinstance(content, str) and "<image>" not in content:
        content = "<image>" * images + content
    return {"role": message.get("role"), "content": content}
