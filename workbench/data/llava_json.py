r"""Conversations about images in the layout of LLaVA's instruction data, such as `llava_v1_5_mix665k.json`.

{"id": "000000033471", "image": "coco/train2017/000000033471.jpg", "conversations":
    [{"from": "human", "value": "<image>\nWhat are the colors of the bus in the image?"}, {"from": "gpt", "value": "The
    bus is white and red."}, ...]}

`llava_json:FILE?images=DIR` reads a JSON list or JSON lines. Paths of images start from DIR, by default the file's own
folder; for the file above, it contains coco/train2017, gqa/images, ocr_vqa/images, textvqa/train_images, vg/VG_100K and
vg/VG_100K_2. A row has its images under `image`, `images` or another of `turns.IMAGE_KEYS`, as a path or a list of
paths. A row without images is text alone; one with a video, with audio, or with images under another key is refused.

Placeholders before or after the first question mean that the images come first; one between its words stands for an
image there. As in LLaVA's own code, an answer before the first question and a question after the last answer are left
out. One warning counts what is left out or not read, with the first row of each kind (`Dataset.left_out`).

All images must exist before training starts. `missing=skip` leaves out the rows whose images do not exist,
`broken=skip` those that cannot be read, and `drop=17,42` the rows with these numbers; a warning counts each. The file
has no validation split: `split=val&held=500` is 500 random images with all their rows, `split=train&held=500` the rest.
Which images these are depends only on the number of images and on `held`. A row of several images counts as one; other
rows that show one of them are in neither split, and counted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from workbench.data.base import DATASETS, Conversation, rows_hash
from workbench.data.conversations import ConversationDataset
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
from workbench.progress import progress_bar

JSON_LINES = ".jsonl"
HELD = "500"  # images of the validation split
READ_KEYS = {"id", "conversations"}  # besides the key of the images


@DATASETS.register("llava_json")
def llava_json(
    spec: str, *, limit: int | None = None, seed: int = 0, draw: int | None = None, decode: bool | None = None
) -> ConversationDataset:
    """Load conversations from a JSON file.

    Args:
        spec: the file, with the options above.
        limit: number of images of a random subset, whose rows are kept; None for all.
        seed: of the random subset.
        draw: takes the place of `seed` if it is not None.
        decode: whether to decode all images and identify them by their pixels; see `load_data`.

    Raises:
        DataError: no such file or folder, a broken row (with its number, from 1, and why), or missing images.
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
            f"held is {options['held']} without a split: expected split=val for these images, or split=train for the"
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
    left_out: set[str] = set()  # rows that `drop` names; they take part in every draw, so that it stays the same
    numbered = _rows(file)
    check_dropped(file, dropped - {number for number, _ in numbered})
    for number, row in progress_bar(f"rows of {file.name}", numbered, unit="row", leave=False):
        is_dropped = number in dropped
        if is_dropped:
            notes.add("left out by drop", f"row {number}")
        try:
            parsed = _parsed(number, row) if isinstance(row, Line) else row
            rows.append(_row(number, parsed, root, Notes() if is_dropped else notes))
        except DataError as error:
            if not is_dropped:
                broken.append(str(error))
        else:
            if is_dropped:
                left_out.add(rows[-1][0])
    check_broken(file, broken, len(rows) - len(left_out), notes, skip=options["broken"] == "skip")
    files = image_files(root, {source for _, sources, _ in rows for source in sources if isinstance(source, str)})
    stored = stored_images(root, files)
    if options["split"] != "all":
        places = {name: image.place for name, image in stored.items()}
        rows = _part(file, rows, places, options["split"], options["held"], notes)
    paths = [s for name, sources, _ in rows if name not in left_out for s in sources if isinstance(s, str)]
    if lost := [path for path in paths if path not in files]:
        report = missing(file.name, root, lost)
        rows = _without_missing(rows, left_out, files, report, notes, skip=options["missing"] == "skip")
    images = [
        tuple(
            stored[s] if isinstance(s, str) else embedded_image(s, f"of row {name}")
            for s in sources
            if s in stored or isinstance(s, bytes)  # the images of a row that is left out may be gone
        )
        for name, sources, _ in rows
    ]
    without = {number for number, (name, _, _) in enumerate(rows) if name in left_out}
    chosen = choose(images, limit, seed if draw is None else draw, decode, file.name, without)
    conversations = [
        Conversation(rows[row][0], rows[row][2], loads, tuple(image.image_id for image in loads))
        for row, loads in chosen
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
    """Return a hash of the rows and of their images: of the pixels of decoded images, else of the files' bytes.

    Args:
        kind: name of the kind of data set.
        conversations: the rows.
        files: the image files by name, which is the place of an image that is not decoded.
        what: the data set's name, for the progress bar.
        more: what else belongs to the rows.
    """
    not_decoded = {
        image.place
        for c in conversations
        for image in c.loads
        if isinstance(image, StoredImage) and image.pixels is None
    }
    bytes_of = file_hashes({name: file for name, file in files.items() if name in not_decoded}, what)

    def content(image: StoredImage) -> tuple[str, bytes]:
        return image.image_id, bytes_of.get(image.place, b"")

    rows = (
        (c.id, c.turns, [content(image) for image in c.loads if isinstance(image, StoredImage)]) for c in conversations
    )
    return rows_hash(chain((kind,), rows, more))


Row = tuple[str, tuple[str | bytes, ...], tuple[tuple[str, str], ...]]
"""id, images (paths below the root, or bytes that the row itself contains), turns"""


class Line(str):
    """A row that is not parsed yet."""


def _part(file: Path, rows: list[Row], places: Mapping[str, str], split: str, held: str, notes: Notes) -> list[Row]:
    """Return the rows of the held-out images (`split` is val), or the rows that show none of these images.

    Text alone counts as one image, and so does a row of several images. `places` are those of the images that exist,
    by name, since two names may be one file.
    """
    shows = [
        tuple(places.get(source, source) if isinstance(source, str) else source for source in row[1]) for row in rows
    ]
    keys = [images or number for number, images in enumerate(shows)]
    count = len(set(keys))
    if not held.isdigit() or not 0 < int(held) < count:
        raise DataError(
            f"held is {shown(held, 20)}: expected 1 to {count - 1}, fewer than the images (and rows of text alone)"
            f" in {shown(file.name)}"
        )
    held_out = set(rows_of_images(keys, int(held), 0))
    if split == "val":
        return [row for number, row in enumerate(rows) if number in held_out]
    images = {image for number in held_out for image in shows[number]}
    remaining = [number for number in range(len(rows)) if number not in held_out]
    train = [rows[number] for number in remaining if images.isdisjoint(shows[number])]
    if not train:
        raise DataError(
            f"every row of {shown(file.name)} shows one of {held} held-out images: expected held to be less"
        )
    if shared := len(remaining) - len(train):
        notes.say(f"{shared} of {len(rows)} rows show images of the validation split beside others: in neither split")
    return train


def _rows(file: Path) -> list[tuple[int, Any]]:
    """Return (number from 1, row) of all rows; rows of JSON lines are still text, with the number of their line.

    The encoding is detected from the first bytes.
    """
    try:
        data = file.read_bytes()
        if data.startswith(LFS):
            raise DataError(f"{shown(file)} is a git-lfs pointer: run git lfs pull")
        text = data.decode(json.detect_encoding(data))
        if file.suffix != JSON_LINES and not _is_lines(text):
            content = json.loads(text)
        else:
            return [(number, Line(line)) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    except (ValueError, OSError, RecursionError) as error:
        raise DataError(f"{shown(file)} is not valid JSON ({shown(error)})") from error
    if not isinstance(content, list):
        raise DataError(f"{shown(file)} holds {type(content).__name__}: expected a list of conversations")
    return list(enumerate(content, start=1))


def _is_lines(text: str) -> bool:
    """Return whether a text is several JSON objects, one per line, whatever its file is called."""
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
    check_media(where, {name: value for name, value in row.items() if name not in READ_KEYS}, key)
    for name in row.keys() - {*READ_KEYS, key}:
        if not is_empty(row[name]):
            notes.add(f"`{name}` is not read", where)
    images = row[key] if key is not None else []
    names = (images,) if isinstance(images, str) else tuple(images) if isinstance(images, list) else (None,)
    if not all(isinstance(name, str) for name in names):
        raise DataError(f"row {number} has `{key}` {shown(repr(images))}: expected a path or a list of paths")
    turns = turns_of(where, row["conversations"], len(names), speaker="from", text="value", notes=notes)
    return f"{number}:{row.get('id', '')}", _image_sources(names, root, where), turns


def _image_sources(names: Sequence[str], root: Path, where: str) -> tuple[str | bytes, ...]:
    """Return the images of a row: paths below the image root, or the bytes that a text contains."""
    return tuple(below(root, name, where) if (data := embedded(name)) is None else data for name in names)


def row_numbers(text: str) -> set[int]:
    """Return the numbers of rows in the option `drop`, such as `17,42`.

    Raises:
        DataError: the text is not of this form.
    """
    if text and not re.fullmatch(r"\d+(,\d+)*", text):
        raise DataError(f"drop is {shown(text)}: expected numbers of rows, such as drop=17,42")
    return {int(number) for number in text.split(",") if number}


def check_dropped(source: Path | str, remaining: set[int]) -> None:
    """Check that every row to be left out exists; `remaining` are the numbers that no row has.

    Raises:
        DataError: there are such numbers.
    """
    if remaining:
        raise DataError(
            f"drop names row {min(remaining)}, which {shown(source)} does not have: expected numbers of its rows"
        )


def check_broken(source: Path | str, broken: list[str], whole: int, notes: Notes, *, skip: bool) -> None:
    """Check that all rows of a file could be read, or note how many are left out.

    Args:
        source: the file, in messages.
        broken: for each row that could not be read, which one it is and why.
        whole: number of rows that could be read.
        notes: takes the note.
        skip: whether broken rows may be left out.

    Raises:
        DataError: there are broken rows, and `skip` is false or no other rows are left.
    """
    if not broken:
        return
    count = f"{len(broken)} broken row{'s' if len(broken) > 1 else ''}"
    if not skip or not whole:
        raise DataError(f"{shown(source)} has {count}: {broken[0]}")
    notes.say(f"{count} of {len(broken) + whole} {'is' if len(broken) == 1 else 'are'} left out, first {broken[0]}")


def _without_missing(
    rows: list[Row], dropped: Container[str], files: Container[str], report: str, notes: Notes, *, skip: bool
) -> list[Row]:
    """Return the rows whose images all exist; the note does not count those that are `dropped` anyway.

    Raises:
        DataError: `skip` is false, or no row is left; `report` says which images are missing.
    """
    complete = [row for row in rows if all(path in files for path in row[1] if isinstance(path, str))]
    before, after = (sum(name not in dropped for name, _, _ in these) for these in (rows, complete))
    if not skip or not after:
        raise DataError(f"{report}: expected all of them, or the option missing=skip to leave their rows out")
    notes.say(f"{report}: {before - after} of {before} rows are left out")
    return complete
