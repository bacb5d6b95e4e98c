"""Conversations about images in the layout of LLaVA's instruction data, such as `llava_v1_5_mix665k.json`.

{"id": "000000033471", "image": "coco/train2017/000000033471.jpg", "conversations":
    [{"from": "human", "value": "<image>\\nWhat are the colors of the bus in the image?"}, {"from": "gpt", "value": "The
    bus is white and red."}, ...]}

`llava_json:FILE?images=DIR` reads a JSON list, or JSON lines. Its five image roots (coco/train2017, gqa/images,
ocr_vqa/images, textvqa/train_images, vg/VG_100K and VG_100K_2) lie below DIR, by default the file's own folder. Images
are under `image`, `images` or one of `turns.IMAGE_KEYS`, a path or a list of them; a row without any is text alone, and
one with a video, with audio or with images under another key is refused. Placeholders before or behind the first
question mean that the images come first; between its words, each stands for an image there. As LLaVA's own code does,
an answer before the first question and a question after the last answer are left out. What is left out or not read is
counted, with the first row of each kind, in one warning (`Dataset.left_out`).

Every image is looked for before anything is trained; `missing=skip` leaves out the rows whose image is not there,
`broken=skip` those that cannot be read, `drop=17,42` the rows of these numbers, and each says how many. The file has no
validation split: `split=val&held=500` is 500 random images with all their rows, `split=train&held=500` the others;
which these are depends on their number and on `held` alone.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Container, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm import tqdm

from workbench.data.base import DATASETS, Conversation, ConversationDataset, rows_hash
from workbench.data.image_files import (
    ImageFile,
    below,
    embedded_image,
    file_hashes,
    image_files,
    missing,
    stored_images,
)
from workbench.data.images import LFS, StoredImage, embedded, shown
from workbench.data.selection import choose, rows_of_images
from workbench.data.specs import path_of, spec_options
from workbench.data.turns import Notes, check_media, image_key, is_empty, turns_of
from workbench.errors import DataError, UnknownNameError

LINES = ".jsonl"
HELD = "500"
READ = {"id", "conversations"}  # keys, besides that of the images


@DATASETS.register("llava_json")
def llava_json(
    spec: str, *, limit: int | None = None, seed: int = 0, draw: int | None = None, decode: bool | None = None
) -> ConversationDataset:
    """Load `FILE?images=DIR&missing=error|skip`; `limit` keeps the rows of a random subset of the images drawn with
    `seed`.

    Args:
        decode: look at the pixels of each image, by which it is then known; see `load_data`.

    Raises:
        DataError: no such file or folder, a broken row (its number, from 1, and why), or images that are not there.
    """
    path, options = spec_options(
        spec, {"images": "", "missing": "error", "broken": "error", "drop": "", "split": "all", "held": HELD}
    )
    for name in ("missing", "broken"):
        if options[name] not in ("error", "skip"):
            raise UnknownNameError(name, options[name], ("error", "skip"))
    if options["split"] not in ("all", "train", "val"):
        raise UnknownNameError("split", options["split"], ("all", "train", "val"))
    if options["split"] == "all" and options["held"] != HELD:
        raise DataError(
            f"held is {options['held']} without a split: expected split=val for these rows, or split=train for the"
            " others"
        )
    file = Path(path)
    if not file.is_file():
        raise DataError(f"data file '{shown(path)}' does not exist: expected LLaVA conversations (JSON)")
    root = path_of(options["images"]) if options["images"] else file.parent
    if not root.is_dir():
        raise DataError(
            f"image root '{shown(root)}' does not exist: expected the folder that the `image` paths in"
            f" {shown(file.name)} start from"
        )
    notes, dropped = Notes(), row_numbers(options["drop"])
    rows: list[Row] = []
    broken: list[str] = []
    for number, row in tqdm(
        _rows(file), desc=f"rows of {file.name}", unit="row", file=sys.stderr, mininterval=2, delay=2, leave=False
    ):
        if number in dropped:
            dropped.discard(number)
            notes.add("left out by drop", f"row {number}")
            continue
        try:
            rows.append(_row(number, _parsed(number, row) if isinstance(row, Line) else row, root, notes))
        except DataError as error:
            broken.append(str(error))
    check_dropped(file, dropped)
    check_broken(file, broken, len(rows), notes, skip=options["broken"] == "skip")
    if options["split"] != "all":
        rows = _part(file, rows, options["split"], options["held"])
    files = image_files(root, {own for _, written, _ in rows for own in written if isinstance(own, str)})
    if lost := [own for _, written, _ in rows for own in written if isinstance(own, str) and own not in files]:
        rows = _without(rows, files, missing(file.name, root, lost), notes, skip=options["missing"] == "skip")
    there = stored_images(root, files)
    images = [
        tuple(there[own] if isinstance(own, str) else embedded_image(own, f"of row {name}") for own in written)
        for name, written, _ in rows
    ]
    chosen = choose(images, limit, seed if draw is None else draw, decode, file.name)
    conversations = [
        Conversation(rows[row][0], rows[row][2], own, tuple(image.image_id for image in own)) for row, own in chosen
    ]

    def fingerprint() -> str:
        return content_fingerprint("llava_json", conversations, files, file.name)

    notes.warn(f"llava_json:{path}")
    return ConversationDataset(f"llava_json:{spec}", conversations, fingerprint, left_out=notes.sentences())


def content_fingerprint(
    kind: str,
    conversations: Sequence[Conversation],
    files: Mapping[str, ImageFile],
    what: str,
    more: Iterable[object] = (),
) -> str:
    """Hash of rows and of what their images hold: of the pixels, where they have been looked at, else of the files'
    bytes.

    Args:
        files: by name, which is an image's place where its pixels have not been looked at.
        what: the data set, beside the progress bar.
        more: what else belongs to the rows.
    """
    unseen = {
        image.place
        for c in conversations
        for image in c.loads
        if isinstance(image, StoredImage) and image.pixels is None
    }
    bytes_of = file_hashes({name: file for name, file in files.items() if name in unseen}, what)

    def content(image: StoredImage) -> tuple[str, bytes]:
        return image.image_id, bytes_of.get(image.place, b"")

    rows = (
        (c.id, c.turns, [content(image) for image in c.loads if isinstance(image, StoredImage)]) for c in conversations
    )
    return rows_hash(chain((kind,), rows, more))


Row = tuple[str, tuple[str | bytes, ...], tuple[tuple[str, str], ...]]
"""id, images (paths below the root, or what the row itself holds), turns"""


class Line(str):
    """A row that is still text."""


def _part(file: Path, rows: list[Row], split: str, held: str) -> list[Row]:
    """The rows that show the images held out, or the others; a text alone counts as one image does."""
    places = [written or number for number, (_, written, _) in enumerate(rows)]
    count = len(set(places))
    if not held.isdigit() or not 0 < int(held) < count:
        raise DataError(
            f"held is {shown(held, 20)}: expected 1 to {count - 1}, fewer than the images (and texts alone) of"
            f" {shown(file.name)}"
        )
    out = set(rows_of_images(places, int(held), 0))
    return [row for number, row in enumerate(rows) if (number in out) == (split == "val")]


def _rows(file: Path) -> list[tuple[int, Any]]:
    """Rows by number, from 1; those of JSON lines as text, with the number of their line. The encoding is what the
    first bytes say."""
    try:
        data = file.read_bytes()
        if data.startswith(LFS):
            raise DataError(f"{shown(file)} is a git-lfs pointer: run git lfs pull")
        text = data.decode(json.detect_encoding(data))
        if file.suffix != LINES and not _is_lines(text):
            content = json.loads(text)
        else:
            return [(number, Line(line)) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    except (ValueError, OSError, RecursionError) as error:
        raise DataError(f"{shown(file)} is not valid JSON ({shown(error)})") from error
    if not isinstance(content, list):
        raise DataError(f"{shown(file)} holds {type(content).__name__}: expected a list of conversations")
    return list(enumerate(content, start=1))


def _is_lines(text: str) -> bool:
    """Whether a text is several JSON objects, one a line, whatever its file is called."""
    first, _, rest = text.lstrip().partition("\n")
    if not first.startswith("{") or not rest.strip():
        return False
    try:
        json.loads(first)
    except ValueError:
        return False
    return True


def _parsed(number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise DataError(f"row {number} is not valid JSON ({error})") from error


def _row(number: int, row: Any, root: Path, notes: Notes) -> Row:
    if not isinstance(row, Mapping) or "conversations" not in row:
        raise DataError(f"row {number} has no `conversations`")
    where = f"row {number}"
    try:
        key = image_key(name for name, value in row.items() if not is_empty(value))
    except DataError as error:
        raise DataError(f"{where} {error}") from error
    check_media(where, {name: value for name, value in row.items() if name not in READ}, key)
    for name in row.keys() - {*READ, key}:
        if not is_empty(row[name]):
            notes.add(f"`{name}` is not read", where)
    images = row[key] if key is not None else []
    names = (images,) if isinstance(images, str) else tuple(images) if isinstance(images, list) else (None,)
    if not all(isinstance(name, str) for name in names):
        raise DataError(f"row {number} has `{key}` {shown(repr(images))}: expected a path or a list of paths")
    turns = turns_of(where, row["conversations"], len(names), speaker="from", text="value", notes=notes)
    return f"{number}:{row.get('id', '')}", written_images(names, root, where), turns


def written_images(names: Sequence[str], root: Path, where: str) -> tuple[str | bytes, ...]:
    """Each image as a row writes it: its path below the image root, or the bytes that the text holds."""
    return tuple(below(root, name, where) if (data := embedded(name)) is None else data for name in names)


def row_numbers(text: str) -> set[int]:
    """The rows that the option `drop` names, such as `17,42`.

    Raises:
        DataError: it names none.
    """
    if text and not re.fullmatch(r"\d+(,\d+)*", text):
        raise DataError(f"drop is {shown(text)}: expected numbers of rows, such as drop=17,42")
    return {int(number) for number in text.split(",") if number}


def check_dropped(source: Path | str, remaining: set[int]) -> None:
    """See that every row that is to be left out was there.

    Raises:
        DataError: one was not.
    """
    if remaining:
        raise DataError(
            f"drop names row {min(remaining)}, which {shown(source)} does not have: expected numbers of its rows"
        )


def check_broken(source: Path | str, broken: list[str], whole: int, notes: Notes, *, skip: bool) -> None:
    """See that all rows of a file could be read, or note how many are left out.

    Args:
        broken: what is wrong, with the row, of each that could not be.
        whole: how many could.

    Raises:
        DataError: some could not, and none or not all of them may be left out.
    """
    if not broken:
        return
    count = f"{len(broken)} broken row{'s' if len(broken) > 1 else ''}"
    if not skip or not whole:
        raise DataError(f"{shown(source)} has {count}: {broken[0]}")
    notes.say(f"{count} of {len(broken) + whole} {'is' if len(broken) == 1 else 'are'} left out, first {broken[0]}")


def _without(rows: list[Row], files: Container[str], report: str, notes: Notes, *, skip: bool) -> list[Row]:
    kept = [row for row in rows if all(own in files for own in row[1] if isinstance(own, str))]
    if not skip or not kept:
        raise DataError(f"{report}: expected all of them, or the option missing=skip to leave their rows out")
    notes.say(f"{report}: {len(rows) - len(kept)} of {len(rows)} rows are left out")
    return kept
