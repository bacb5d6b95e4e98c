"""A folder of the user's own photographs: no questions, no answers, just images.

sample:  photos/cat.jpg

Each image counts once: of files with the same pixels one is taken. Such copies are left out, as are hidden files and
photographs in a format that the installed PIL does not read (HEIC needs a package, camera raw files an export). The
data set counts and names what is left out.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from workbench.data.base import DATASETS, Dataset, Sample, content_hash
from workbench.data.image_files import walk
from workbench.data.images import FORMATS, StoredImage, readable, shown
from workbench.data.images import read_image as read_image
from workbench.data.selection import hashes_of, shuffled
from workbench.data.specs import path_of
from workbench.errors import DataError

log = logging.getLogger(__name__)
QUESTION = "what is this ?"
NAMED = 3  # of the files that are left out, in a message


@DATASETS.register("folder")
def folder(
    path: str, *, limit: int | None = None, seed: int = 0, draw: int | None = None, decode: bool | None = None
) -> Dataset:
    """Load every image below `path`, sorted by name.

    Args:
        path: the folder.
        limit: number of images of a random subset; None for all.
        seed: of the random subset.
        draw: takes the place of `seed` if it is not None.
        decode: has no effect; images are always decoded, since copies count once.

    Raises:
        DataError: no such folder, no images in it, or one that cannot be read.
    """
    root = path_of(path)
    if not root.is_dir():
        raise DataError(f"folder '{shown(path)}' does not exist")
    files, left_out = photographs(root)
    if not files:
        raise DataError(
            f"folder '{shown(path)}' contains no images that can be read: expected files ending in"
            f" {', '.join(_endings())}{_but(left_out)}"
        )
    # of several copies the first in this order is taken, whatever the limit
    order = shuffled(len(files), seed if draw is None else draw)
    first: dict[bytes, int] = {}  # by pixels
    copies: list[tuple[int, int]] = []
    for number, pixels in zip(order, hashes_of([files[n] for n in order], limit or len(files), path), strict=False):
        if (original := first.setdefault(pixels, number)) != number:
            copies.append((number, original))
        if len(first) == limit:
            break
    if copies:
        named = [
            f"{shown(files[copy].place, 60)} is {shown(files[original].place, 60)}"
            for copy, original in sorted(copies)[:NAMED]
        ]
        left_out.append(
            f"{_files(len(copies))} with the pixels of another, which count once ({_some(named, len(copies))})"
        )
    for sentence in left_out:
        log.warning("folder %s: left out %s", shown(path), sentence)
    chosen = sorted((number, pixels) for pixels, number in first.items())
    images = [files[n].with_pixels(pixels) for n, pixels in chosen]
    samples = [Sample(image.place, image.place, image, question=QUESTION) for image in images]
    return Dataset(
        f"folder:{path}",
        samples,
        content_hash("folder", *((image.place, image.pixels) for image in images)),
        left_out=left_out,
        origin="folder",
    )


def photographs(root: Path) -> tuple[list[StoredImage], list[str]]:
    """Return the images below `root` that PIL reads, and sentences about those that are left out."""
    files: list[StoredImage] = []
    hidden: list[str] = []
    unreadable: list[str] = []
    for name, path in walk(root):
        suffix, place = path.suffix.lower(), _text(name)
        if suffix not in FORMATS:
            continue
        if path.name.startswith("."):
            hidden.append(place)
        elif readable(suffix):
            files.append(StoredImage(str(path), path, place))
        else:
            unreadable.append(place)
    left_out = []
    if hidden:
        left_out.append(f"{_files(len(hidden))} whose name begins with a dot ({_some(hidden, len(hidden))})")
    if unreadable:
        endings = ", ".join(sorted({Path(name).suffix.lower() for name in unreadable}))
        left_out.append(
            f"{_files(len(unreadable))} in a format that this PIL does not read, {endings}"
            f" ({_some(unreadable, len(unreadable))})"
        )
    return files, left_out


def _files(count: int) -> str:
    return f"{count} file{'' if count == 1 else 's'}"


def _some(names: Sequence[str], count: int) -> str:
    return ", ".join(shown(name) for name in names[:NAMED]) + (", ..." if count > NAMED else "")


def _but(left_out: Sequence[str]) -> str:
    return f"; left out: {shown('; '.join(left_out))}" if left_out else ""


def _endings() -> list[str]:
    return [
        suffix
        for suffix in (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".avif", ".heic")
        if readable(suffix)
    ]


def _text(name: str) -> str:
    """Return a file's name as valid text, whatever its bytes are."""
    return os.fsencode(name).decode(errors="backslashreplace")
