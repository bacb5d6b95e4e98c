"""MMVP (Tong et al. 2024, arXiv 2401.06209): 150 pairs of images that CLIP takes for alike, with one question each.

mmvp:PATH?labels=corrected&images=FOLDER

PATH is the authors' folder (`Questions.csv` and `MMVP Images/1.jpg` and so on), the CSV file, or a table with the
columns Index, Question, Options, Correct Answer and image (`lmms-lab-eval/MMVP`). The authors' labels of two pairs are
exchanged (issues 14 and 30 of their repository); `labels=original` keeps them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from string import ascii_lowercase
from typing import Any, Unpack

from workbench.data.base import DATASETS
from workbench.data.benchmark_rows import (
    BenchmarkDataset,
    Choice,
    Row,
    benchmark_dataset,
    check_choice,
    images_folder,
    images_of_table,
    lettered,
    text_cell,
)
from workbench.data.copies import VLMEVALKIT, label_version
from workbench.data.images import shown
from workbench.data.specs import spec_options
from workbench.data.vlmevalkit import benchmark_table
from workbench.errors import DataError

LABELS = ("corrected", "original")
CORRECTED = {99: "b", 100: "a", 279: "b", 280: "a"}  # by the column Index, which begins at 1
COLUMNS = {  # their names in the authors' file, and in tables made of it
    "index": ("Index", "lndex", "index"),
    "question": ("Question", "question"),
    "options": ("Options", "options"),
    "answer": ("Correct Answer", "answer"),
}


@DATASETS.register("mmvp")
def mmvp(spec: str, **choice: Unpack[Choice]) -> BenchmarkDataset:
    """Load all questions; see the module's docstring.

    Raises:
        DataError: no such files or columns, or a row that cannot be used; the message names it.
    """
    path, options = spec_options(spec, {"labels": "corrected", "images": ""})
    labels = check_choice("labels of mmvp", options["labels"], LABELS)
    place = Path(path)
    file = place / "Questions.csv" if (place / "Questions.csv").is_file() else place
    table = benchmark_table(str(file), "train")
    columns = {name: _column(file, table, names) for name, names in COLUMNS.items()}
    images = images_folder(path, options["images"])
    if not options["images"] and "image" not in table.column_names:
        images = next((f for f in (images / "MMVP Images", images / "Images") if f.is_dir()), images)
    places = images_of_table(table, "image", path, images) if "image" in table.column_names else None
    texts = table.remove_columns("image") if places else table
    indexes = _indexes(file, texts, columns["index"])
    rows = []
    for number, (row, index) in enumerate(zip(texts, indexes, strict=True), start=1):
        where = f"{shown(file.name)} row {number}"
        image = places[number - 1] if places else f"{index}.jpg"
        choices = _options(where, text_cell(where, row, columns["options"]))
        label = text_cell(where, row, columns["answer"])
        answer = lettered(where, CORRECTED.get(index, label) if labels == "corrected" else label, choices)
        question = text_cell(where, row, columns["question"])
        rows.append(Row(where, f"{index}", image, question, answer, choices, pair=f"{(index - 1) // 2}"))
    version = label_version(f"{labels} labels", [(file, VLMEVALKIT["mmvp"])])
    return benchmark_dataset(f"mmvp:{spec}", "mmvp", version, rows, images, choice)


def _column(file: Path, table: Any, names: tuple[str, ...]) -> str:
    if name := next((name for name in names if name in table.column_names), None):
        return name
    raise DataError(
        f"{shown(file)} has no column {names[0]}: expected it beside {shown(', '.join(table.column_names))}"
    )


def _indexes(file: Path, rows: Iterable[Mapping[str, Any]], column: str) -> list[int]:
    """Return the number of each row as the authors count, from 1: labels are corrected and rows are paired by it.

    Tables of others call it `index`, and count from 0 or from 1.
    """
    least = int(column != "index")
    indexes = [
        _index(f"{shown(file.name)} row {number}", row, column, least) for number, row in enumerate(rows, start=1)
    ]
    first = min(indexes, default=1)
    if not least and first > 1:
        raise DataError(f"{shown(file.name)} has {column} from {first}: expected all rows, with {column} from 0 or 1")
    return indexes if least else [index + 1 - first for index in indexes]


def _index(where: str, row: Mapping[str, Any], column: str, least: int) -> int:
    text = text_cell(where, row, column)
    if not text.isdecimal() or int(text) < least:
        raise DataError(f"{where} has {column} {text[:40]!r}: expected a number from {least}")
    return int(text)


def _options(where: str, text: str) -> tuple[str, ...]:
    """Return the options of a text such as "(a) Open (b) Closed"; a letter out of order, as in "cup(s)", is text."""
    starts: list[tuple[int, int]] = []
    for letter in ascii_lowercase:
        match = re.compile(rf"\({letter}\)", re.IGNORECASE).search(text, starts[-1][1] if starts else 0)
        if match is None:
            break
        starts.append(match.span())
    ends = [*(start for start, _ in starts[1:]), len(text)]
    options = tuple(text[begin:end].strip() for (_, begin), end in zip(starts, ends, strict=False))
    first = text[: starts[0][0]].strip() if starts else text
    if first or len(options) < 2 or not all(options) or any(re.search(r"(^|\s)\([A-Za-z]\)", o) for o in options):
        raise DataError(f"{where} has the options {text[:60]!r}: expected a text such as (a) Open (b) Closed")
    return options
