"""Random subsets of data sets: `limit` counts images, whatever the number of rows and files that they come in.

An image is identified by its pixels once it has been decoded, and before that by its place: its file, or a hash of its
stored bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from workbench.data.images import StoredImage, image_hash, shown
from workbench.errors import DataError
from workbench.processes import cores
from workbench.progress import progress_bar

READERS = 8  # threads
DECODED = 10_000  # images, at most, that are decoded beforehand by default


def shuffled(count: int, seed: int) -> list[int]:
    """Return `count` indices in random order."""
    return [int(i) for i in np.random.default_rng(seed).permutation(count)]


def subset(count: int, limit: int | None, seed: int) -> list[int]:
    """Return `limit` of `count` indices, drawn with `seed` and sorted; all of them without a limit.

    A smaller subset is part of every larger one.
    """
    return list(range(count)) if limit is None else sorted(shuffled(count, seed)[:limit])


def rows_of_images(
    places: Sequence[Hashable], limit: int | None, seed: int, identify: Callable[[int], Hashable] | None = None
) -> list[int]:
    """Return the sorted numbers of the rows that show a random `limit` of the images; all rows without a limit.

    A smaller selection is part of every larger one.

    Args:
        places: the place of each row's images; rows with equal places are selected together.
        limit: number of images.
        seed: of the random selection.
        identify: maps the number of a row to an identity of its images by their pixels, so that equal images at several
            places count once. It is called for one row of each selected place.
    """
    if limit is None:
        return list(range(len(places)))
    groups: dict[Hashable, list[int]] = {}
    for row, place in enumerate(places):
        groups.setdefault(place, []).append(row)
    rows_by_place, selected = list(groups.values()), list[int]()
    images: set[Hashable] = set()
    for number in shuffled(len(rows_by_place), seed):
        if len(images) >= limit:
            break
        images.add(number if identify is None else identify(rows_by_place[number][0]))
        selected += rows_by_place[number]
    return sorted(selected)


def places_of(rows: Sequence[Sequence[StoredImage]]) -> list[Hashable]:
    """Return the places of each row's images; a row without images has a place of its own."""
    return [tuple(image.place for image in row) or number for number, row in enumerate(rows)]


def choose(
    rows: Sequence[Sequence[StoredImage]],
    limit: int | None,
    seed: int,
    decode: bool | None,
    what: str,
    without: Container[int] = (),
) -> list[tuple[int, tuple[StoredImage, ...]]]:
    """Return the rows that show a random `limit` of the images, or all rows: (number, images).

    A row of text alone counts as one image.

    Args:
        rows: the images of each row.
        limit: number of images; None for all.
        seed: of the random selection.
        decode: whether to decode the images and identify them by their pixels; by default if there is a limit, or if
            there are at most 10,000 images.
        what: the data set's name, for the progress bar.
        without: numbers of rows that are drawn like the others and then left out, so that the others are the same as
            without this argument. Their images need not be readable.
    """
    places = places_of(rows)
    if decode is None:
        decode = limit is not None or len({image.place for row in rows for image in row}) <= DECODED
    known: dict[str, bytes] = {}

    def identify(row: int) -> Hashable:
        try:
            known.update((image.place, image_hash(image())) for image in rows[row] if image.place not in known)
        except DataError:
            if row in without:
                return row
            raise
        return tuple(known[image.place] for image in rows[row]) or row

    chosen = [row for row in rows_of_images(places, limit, seed, identify if decode else None) if row not in without]
    if decode:
        unknown = {image.place: image for row in chosen for image in rows[row] if image.place not in known}
        known.update(zip(unknown, hashes_of(list(unknown.values()), len(unknown), what), strict=True))
    return [(row, tuple(image.with_pixels(known.get(image.place)) for image in rows[row])) for row in chosen]


def hashes_of(images: Sequence[StoredImage], expected: int, what: str) -> Iterator[bytes]:
    """Yield the hash of the pixels of one image after another; some are decoded ahead.

    Args:
        images: the images.
        expected: how many of them will probably be used.
        what: the data set's name, for the progress bar.
    """
    bar = progress_bar(f"images of {shown(what, 40)}", total=min(expected, len(images)), unit="image", leave=False)
    with ThreadPoolExecutor(min(READERS, cores())) as readers, bar:
        for start in range(0, len(images), 2 * READERS):
            for pixels in readers.map(lambda image: image_hash(image()), images[start : start + 2 * READERS]):
                bar.update()
                yield pixels


def unique(images: Iterable[StoredImage]) -> dict[str, StoredImage]:
    """Return one image of each place, by place."""
    return {image.place: image for image in images}
