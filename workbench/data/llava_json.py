"""Conversations about images in the layout of LLaVA's instruction data, such as `llava_v1_5_mix665k.json`.

{"id": "000000033471", "image": "coco/train2017/000000033471.jpg", "conversations":
    [{"from": "human", "value": "<image>\\nWhat are the colors of the bus in the image?"}, {"from": "gpt", "value": "The bus is white and red."}, ...]}

`llava_json:FILE?images=DIR` reads a JSON list, or JSON lines. Its five image roots (coco/train2017, gqa/images, ocr_vqa/images, textvqa/train_images,
vg/VG_100K and VG_100K_2) lie below DIR, by default the file's own folder. A row without `image` is text alone. As LLaVA's own code does, an answer before
the first question and a question after the last answer are left out. Every image is looked for before anything is trained; `missing=skip` leaves out the
rows whose image is not there, and says how many. The file has no validation split: `split=val&held=500` is 500 random rows, `split=train&held=500` the
others; which rows these are depends on their number and on `held` alone.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from workbench.data.base import DATASETS, Conversation, ConversationDataset, content_hash, spec_options, subset
from workbench.data.folder import file_sizes, missing, read_image
from workbench.errors import DataError, UnknownNameError
from workbench.weights import sha256

log = logging.getLogger(__name__)

PLACE = "<image>"
WORD = "< image>"  # the same in a conversation without images, where it is no placeholder
LINES = ".jsonl"
HELD = "500"
SPEAKERS = {"human": "question", "user": "question", "gpt": "answer", "assistant": "answer"}


@DATASETS.register("llava_json")
def llava_json(spec: str, *, limit: int | None = None, seed: int = 0) -> ConversationDataset:
    """Load `FILE?images=DIR&missing=error|skip`; `limit` keeps a random subset of rows drawn with `seed`.

    Raises:
        DataError: no such file or folder, a broken row (its number, from 1, and why), or images that are not there.
    """
    path, options = spec_options(spec, {"images": "", "missing": "error", "split": "all", "held": HELD})
    if options["missing"] not in ("error", "skip"):
        raise UnknownNameError("missing", options["missing"], ("error", "skip"))
    if options["split"] not in ("all", "train", "val"):
        raise UnknownNameError("split", options["split"], ("all", "train", "val"))
    if options["split"] == "all" and options["held"] != HELD:
        raise DataError(f"held is {options['held']} without a split: expected split=val for these rows, or split=train for the others")
    file = Path(path)
    if not file.is_file():
        raise DataError(f"data file '{path}' does not exist: expected LLaVA conversations (JSON)")
    root = Path(options["images"]) if options["images"] else file.parent
    if not root.is_dir():
        raise DataError(f"image root '{root}' does not exist: expected the folder that the `image` paths in {file.name} start from")
    rows, broken = [], []
    for number, row in tqdm(_rows(file), desc=f"rows of {file.name}", unit="row", file=sys.stderr, mininterval=2, delay=2, leave=False):
        try:
            rows.append(_row(number, _parsed(number, row) if file.suffix == LINES else row))
        except DataError as error:
            broken.append(str(error))
    if broken:
        raise DataError(f"{file} has {len(broken)} broken row{'s' if len(broken) > 1 else ''}: {broken[0]}")
    if options["split"] != "all":
        rows = _part(file, rows, options["split"], options["held"])
    rows = [rows[i] for i in subset(len(rows), limit, seed)]
    sizes = file_sizes(root, {name for _, names, _ in rows for name in names})
    if lost := [own for _, names, _ in rows for own in names if own not in sizes]:
        rows = _without(rows, sizes, missing(file.name, root, lost), skip=options["missing"] == "skip")
    conversations = [Conversation(name, turns, tuple(partial(read_image, root / own) for own in names)) for name, names, turns in rows]
    used = sorted({own for _, names, _ in rows for own in names})
    return ConversationDataset(
        f"llava_json:{spec}",
        conversations,
        content_hash("llava_json", sha256(file), options["split"], options["held"], limit, seed, len(rows), [(own, sizes[own]) for own in used]),
    )


Row = tuple[str, tuple[str, ...], tuple[tuple[str, str], ...]]
"""id, image paths, turns"""


def _part(file: Path, rows: list[Row], split: str, held: str) -> list[Row]:
    """The rows held out, or the others."""
    if not held.isdigit() or not 0 < int(held) < len(rows):
        raise DataError(f"held is {held}: expected 1 to {len(rows) - 1}, fewer than the rows of {file.name}")
    out = set(subset(len(rows), int(held), 0))
    return [row for number, row in enumerate(rows) if (number in out) == (split == "val")]


def _rows(file: Path) -> list[tuple[int, Any]]:
    """Rows by number, from 1; those of JSON lines as text, with the number of their line."""
    try:
        with file.open(encoding="utf-8") as text:
            if file.suffix == LINES:
                return [(number, line) for number, line in enumerate(text, start=1) if line.strip()]
            content = json.load(text)
    except (ValueError, OSError, RecursionError) as error:
        raise DataError(f"{file} is not valid JSON ({error})") from error
    if not isinstance(content, list):
        raise DataError(f"{file} holds {type(content).__name__}: expected a list of conversations")
    return list(enumerate(content, start=1))


def _parsed(number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise DataError(f"row {number} is not valid JSON ({error})") from error


def _row(number: int, row: Any) -> Row:
    if not isinstance(row, Mapping) or "conversations" not in row:
        raise DataError(f"row {number} has no `conversations`")
    images = row.get("image") or []
    names = (images,) if isinstance(images, str) else tuple(images) if isinstance(images, list) else (None,)
    if not all(isinstance(name, str) for name in names):
        raise DataError(f"row {number} has `image` {images!r}: expected a path or a list of paths")
    if away := next((name for name in names if os.path.isabs(name) or ".." in name.split("/")), None):
        raise DataError(f"row {number} has image '{away}': expected a path below the image root")
    turns = turns_of(f"row {number}", row["conversations"], len(names), speaker="from", text="value")
    return f"{number}:{row.get('id', '')}", names, turns


def turns_of(where: str, messages: Any, images: int, *, speaker: str, text: str) -> tuple[tuple[str, str], ...]:
    """Questions and answers of a list of messages, without image placeholders.

    Args:
        where: the row, in messages.
        images: how many images the row has; each has a placeholder in the first question, or none has one.
        speaker, text: keys of a message.

    Raises:
        DataError: says which row and why.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise DataError(f"{where} has no list of messages")
    said: list[tuple[str, str]] = []
    for place, message in enumerate(messages, start=1):
        kind = SPEAKERS.get(str(message.get(speaker))) if isinstance(message, Mapping) else None
        if kind is None or not isinstance(message.get(text), str):
            roles = "human or gpt" if speaker == "from" else "user or assistant"
            found = f"{str(message.get(speaker))[:40]!r} and {type(message.get(text)).__name__}" if isinstance(message, Mapping) else repr(message)[:40]
            raise DataError(f"{where}, message {place}: expected `{speaker}` {roles} and `{text}` a text, found {found}")
        if not _encodes(message[text]):
            raise DataError(f"{where}, message {place} has half a character (a lone surrogate): expected valid Unicode")
        if not said and kind == "answer":
            continue  # an answer to a question that was cut off
        if kind != ("answer" if len(said) % 2 else "question"):
            raise DataError(f"{where}, message {place}: expected {'an answer' if len(said) % 2 else 'a question'}, since they take turns")
        said.append((kind, message[text]))
    turns = [(question, answer) for (_, question), (_, answer) in zip(said[::2], said[1::2], strict=False)]
    if not images and turns[:1] and not turns[0][0].strip().startswith(PLACE) and not turns[0][0].strip().endswith(PLACE):
        # within a text, of XML perhaps; LLaVA's own code too takes it for words. Where a question begins or ends with it, an image has been lost
        turns = [(question.replace(PLACE, WORD), answer.replace(PLACE, WORD)) for question, answer in turns]
    if not turns:
        raise DataError(f"{where} has no question with an answer")
    if late := next((n for n, turn in enumerate(turns, start=1) if PLACE in "".join(turn if n > 1 else turn[1:])), None):
        raise DataError(f"{where} has {PLACE} in turn {late} after the first question: expected all images in the first question")
    if (count := turns[0][0].count(PLACE)) not in {images, 0}:
        raise DataError(f"{where} has {count} times {PLACE} for {images} image{'' if images == 1 else 's'}")
    if images and not count:
        raise DataError(f"{where} has {images} image{'' if images == 1 else 's'} and no {PLACE} in its first question")
    return ((turns[0][0].replace(PLACE, "").strip(), turns[0][1].strip()), *((q.strip(), a.strip()) for q, a in turns[1:]))


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _without(rows: list[Row], sizes: Mapping[str, int], report: str, *, skip: bool) -> list[Row]:
    kept = [row for row in rows if all(own in sizes for own in row[1])]
    if not skip or not kept:
        raise DataError(f"{report}: expected all of them, or the option missing=skip to leave their rows out")
    log.warning("%s: %d of %d rows are left out", report, len(rows) - len(kept), len(rows))
    return kept
