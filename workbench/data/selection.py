"""Which rows of a data set are taken, and which of them show one image: `limit` counts images, whichever rows and files
they come in."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from workbench.data.images import StoredImage, image_hash, shown

READERS = 8  # threads
DECODED = 10_000  # images that are looked at without being asked for


def shuffled(count: int, seed: int) -> list[int]:
    """`count` indices in a random order."""
    return [int(i) for i in np.random.default_rng(seed).permutation(count)]


def subset(count: int, limit: int | None, seed: int) -> list[int]:
    """All of `count` indices, or a random `limit` of them drawn with `seed`, in order; a smaller subset lies within
    every larger one."""
    return list(range(count)) if limit is None else sorted(shuffled(count, seed)[:limit])


def rows_of_images(
    places: Sequence[Hashable], limit: int | None, seed: int, identify: Callable[[int], Hashable] | None = None
) -> list[int]:
    """The numbers of all rows, or of those that show a random `limit` of the images, in order; nested as `subset` is.

    Args:
        places: what the images of each row are known by before any is decoded; rows with equal places are taken
            together.
        identify: number of a row -> what its images are by their pixels, asked for one row of each place that is taken;
            equal pixels count once.
    """
    if limit is None:
        return list(range(len(places)))
    groups: dict[Hashable, list[int]] = {}
    for row, place in enumerate(places):
        groups.setdefault(place, []).append(row)
    together, taken = list(groups.values()), list[int]()
    images: set[Hashable] = set()
    for number in shuffled(len(together), seed):
        if len(images) >= limit:
            break
        images.add(number if identify is None else identify(together[number][0]))
        taken += together[number]
    return sorted(taken)


def places_of(rows: Sequence[Sequence[StoredImage]]) -> list[Hashable]:
    """What the images of each row are known by before any is decoded; a row without any is alone."""
    return [tuple(image.place for image in row) or number for number, row in enumerate(rows)]


def choose(
    rows: Sequence[Sequence[StoredImage]], limit: int | None, seed: int, decode: bool | None, what: str
) -> list[tuple[int, tuple[StoredImage, ...]]]:
    """The rows that show a random `limit` of the images, or all: number and images, whose pixels are known where they
    were looked at.

    A text alone counts as one image does.

    Args:
        rows: the images of each row.
        decode: look at the pixels of each image; by default where there is a limit, or up to 10,000 images.
        what: the data set, beside the progress bar.
    """
    places = places_of(rows)
    if decode is None:
        decode = limit is not None or len({image.place for row in rows for image in row}) <= DECODED
    known: dict[str, bytes] = {}

    def identify(row: int) -> Hashable:
        known.update((image.place, image_hash(image())) for image in rows[row] if image.place not in known)
        return tuple(known[image.place] for image in rows[row]) or row

    chosen = rows_of_images(places, limit, seed, identify if decode else None)
    if decode:
        unknown = {image.place: image for row in chosen for image in rows[row] if image.place not in known}
        known.update(zip(unknown, hashes_of(list(unknown.values()), len(unknown), what), strict=True))
    return [(row, tuple(image.with_pixels(known.get(image.place)) for image in rows[row])) for row in chosen]


def hashes_of(images: Sequence[StoredImage], expected: int, what: str) -> Iterator[bytes]:
    """Hash of the pixels of one image after another; some are decoded ahead.

    Args:
        expected: how many will be asked for.
        what: the data set, beside the progress bar.
    """
    bar = tqdm(
        total=min(expected, len(images)),
        desc=f"images of {shown(what, 40)}",
        unit="image",
        file=sys.stderr,
        mininterval=2,
        delay=2,
        leave=False,
    )
    with ThreadPoolExecutor(min(READERS, os.cpu_count() or 1)) as readers, bar:
        for start in range(0, len(images), 2 * READERS):
            for pixels in readers.map(lambda image: image_hash(image()), images[start : start + 2 * READERS]):
                bar.update()
                yield pixels


def unique(images: Iterable[StoredImage]) -> dict[str, StoredImage]:
    """One of the images of each place, by place."""
    return {image.place: image for image in images}
