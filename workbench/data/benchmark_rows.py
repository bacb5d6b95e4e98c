"""What the loaders of benchmarks share: rows that were read, and the data set that is made of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any, TypedDict

from workbench.data.base import Dataset, Object, Sample, rows_hash
from workbench.data.hf import image_sources
from workbench.data.image_files import below, file_hashes, image_files, missing, stored_images
from workbench.data.images import StoredImage, shown
from workbench.data.selection import choose
from workbench.data.specs import path_of
from workbench.data.turns import check_characters, is_empty
from workbench.errors import DataError, UnknownNameError


class Choice(TypedDict, total=False):
    """Arguments of `load_data` that choose the images."""

    limit: int | None
    seed: int
    draw: int | None
    decode: bool | None


@dataclass(frozen=True)
class Row:
    """A question of a benchmark.

    Attributes:
        where: the row, in messages.
        id: unique within the data set.
        image: its path below the images' folder, or the image itself.
        answer: one of the options.
        prompt: the question with its options as the benchmark itself writes them, "" if it has no such text.
        asked: see `Sample`.
    """

    where: str
    id: str
    image: str | StoredImage
    question: str
    answer: str
    options: tuple[str, ...]
    category: str = ""
    pair: str = ""
    source: str = ""
    objects: tuple[Object, ...] = ()
    prompt: str = ""
    asked: tuple[Object, ...] = ()


class BenchmarkDataset(Dataset):
    """The questions of a benchmark.

    Attributes:
        benchmark: its name.
        version: which labels and files these are, such as "corrected labels, verified copy".
        prompts: the benchmark's own text of each question, by id; empty if it has none.
    """

    def __init__(
        self,
        name: str,
        samples: list[Sample],
        fingerprint: Callable[[], str],
        *,
        benchmark: str,
        version: str,
        prompts: Mapping[str, str],
    ) -> None:
        super().__init__(name, samples, fingerprint)
        self.benchmark, self.version, self.prompts = benchmark, version, dict(prompts)

    @property
    def counts(self) -> dict[str, int]:
        """Number of questions of each category, in order of appearance."""
        return dict(Counter(sample.category for sample in self.samples))

    @property
    def about(self) -> str:
        """One line: name, version, and how many questions and images there are."""
        parts = ", ".join(f"{category} {count}" for category, count in self.counts.items() if category)
        images = len({sample.image_id for sample in self.samples})
        return f"{self.benchmark} ({self.version}): {len(self)} questions about {images} images" + (
            f" ({parts})" if parts else ""
        )


def benchmark_dataset(
    spec: str, benchmark: str, version: str, rows: Sequence[Row], images: Path, choice: Choice
) -> BenchmarkDataset:
    """Return the data set of some rows.

    Args:
        spec: the spec that was loaded, with the benchmark's name.
        benchmark: the benchmark's name.
        version: see `BenchmarkDataset`.
        rows: all rows.
        images: the folder that the rows' image paths are relative to.
        choice: limit, seed, draw and decode, as in `load_data`.

    Raises:
        DataError: no rows, two rows with the same id, or an image that does not exist; the message names the row.
    """
    if not rows:
        raise DataError(f"{shown(spec)} has no questions: expected those of {benchmark}")
    ids = Counter(row.id for row in rows)
    if twice := next((row for row in rows if ids[row.id] > 1), None):
        raise DataError(f"{twice.where} has the id {twice.id}, which {ids[twice.id]} rows have: expected it once")
    names = {row.image: below(images, row.image, row.where) for row in rows if isinstance(row.image, str)}
    files = image_files(images, names.values())
    if lost := [row for row in rows if isinstance(row.image, str) and names[row.image] not in files]:
        several = "" if len(lost) == 1 else f" (and {len(lost) - 1} more rows)"
        raise DataError(
            f"{lost[0].where}{several}: {missing(benchmark, images, [names[str(row.image)] for row in lost])}: expected"
            " all of them; images=FOLDER in the spec says where they are"
        )
    stored = stored_images(images, files)
    loads = [(stored[names[row.image]] if isinstance(row.image, str) else row.image,) for row in rows]
    draw = choice.get("draw")
    seed = choice.get("seed", 0) if draw is None else draw
    subset = choose(loads, choice.get("limit"), seed, choice.get("decode"), spec)
    chosen = [(rows[number], load) for number, (load,) in subset]
    samples = [
        Sample(
            row.id,
            load.image_id,
            load,
            row.question,
            row.answer,
            row.options,
            row.category,
            row.objects,
            pair=row.pair,
            source=row.source,
            asked=row.asked,
        )
        for row, load in chosen
    ]

    def fingerprint() -> str:
        not_decoded = {load.place for _, load in chosen if load.pixels is None}
        bytes_of = file_hashes({name: file for name, file in files.items() if name in not_decoded}, spec)
        contents = (
            (sample, bytes_of.get(load.place, b""), row.prompt)
            for sample, (row, load) in zip(samples, chosen, strict=True)
        )
        return rows_hash((benchmark, version, *contents))

    prompts = {row.id: row.prompt for row, _ in chosen if row.prompt}
    return BenchmarkDataset(spec, samples, fingerprint, benchmark=benchmark, version=version, prompts=prompts)


# --- tables ---------------------------------------------------------------------------------------


def images_of_table(table: Any, column: str, path: str, images: Path) -> list[str | StoredImage]:
    """Return the one image of each row: its path below `images`, or the image that the table contains.

    Raises:
        DataError: a row has no image, or several; the message names it.
    """
    images_by_row = image_sources(table, column, path, images)
    if wrong := next((number for number, row in enumerate(images_by_row, start=1) if len(row) != 1), None):
        raise DataError(
            f"{shown(path)} row {wrong} has {len(images_by_row[wrong - 1])} images in `{column}`: expected one"
        )
    return [row[0] for row in images_by_row]


def check_columns(path: str, table: Any, needed: Iterable[str]) -> None:
    """Check that a table has the columns of its benchmark.

    Raises:
        DataError: a column is missing; the message names it and those that there are.
    """
    known = list(table.column_names)
    if lost := [name for name in needed if name not in known]:
        raise DataError(f"{shown(path)} has no column {lost[0]}: expected it beside {shown(', '.join(known))}")


def text_cell(where: str, row: Mapping[str, Any], column: str) -> str:
    """Return the text of a cell, with surrounding space removed.

    Raises:
        DataError: the cell is empty, no text or no valid Unicode.
    """
    value = row.get(column)
    if is_empty(value) or not isinstance(value, str | int) or isinstance(value, bool) or not str(value).strip():
        raise DataError(f"{where} has {column} {str(value)[:40]!r}: expected a text")
    text = str(value).strip()
    check_characters(f"{where}: its {column}", text)
    return text


def yes_or_no(where: str, row: Mapping[str, Any], column: str) -> str:
    """Return "yes" or "no" from a cell, in any case and with or without a full stop.

    Raises:
        DataError: the cell has another text.
    """
    text = text_cell(where, row, column)
    word = text.lower().removesuffix(".")
    if word not in ("yes", "no"):
        raise DataError(f"{where} has {column} {text[:40]!r}: expected yes or no")
    return word


def lettered(where: str, letter: str, options: Sequence[str]) -> str:
    """Return the option that a letter names, such as "B", "(b)" or "B.".

    Raises:
        DataError: it names none of them, or there are none.
    """
    if not options:
        raise DataError(f"{where} has no options: expected some")
    name = letter.strip().strip("().").upper()
    if len(name) != 1 or name not in ascii_uppercase[: len(options)]:
        raise DataError(
            f"{where} has the answer {letter[:40]!r}: expected a letter from A to {ascii_uppercase[len(options) - 1]}"
        )
    return options[ascii_uppercase.index(name)]


def images_folder(path: str, option: str) -> Path:
    """Return the folder of the images: that of the option `images`, or the one that the path is or lies in."""
    if option:
        return path_of(option)
    place = Path(path)
    return place if place.is_dir() else place.parent


def check_choice(option: str, value: str, known: Sequence[str]) -> str:
    """Return the value of an option if it is known.

    Raises:
        UnknownNameError: it is not; the message names the nearest one.
    """
    if value not in known:
        raise UnknownNameError(option, value, known)
    return value
