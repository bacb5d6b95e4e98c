"""MMStar (Chen et al. 2024, arXiv 2403.20330): 1500 questions in 6 categories that need the image.

mmstar:PATH?images=FOLDER

PATH is a table with the columns index, question, image, answer (A to D), category and l2_category: parquet, TSV, a
folder, or `Lin-Chen/MMStar`. Options are in columns A to D, or at the end of the question ("Options: A: .., B: ..").
"""

from __future__ import annotations

import re
from pathlib import Path
from string import ascii_uppercase
from typing import Unpack

from workbench.data.base import DATASETS
from workbench.data.benchmark_rows import (
    BenchmarkDataset,
    Choice,
    Row,
    benchmark_dataset,
    check_columns,
    images_folder,
    images_of_table,
    lettered,
    text_cell,
)
from workbench.data.choices import options_of
from workbench.data.copies import VLMEVALKIT, label_version
from workbench.data.images import shown
from workbench.data.specs import spec_options
from workbench.data.vlmevalkit import benchmark_table
from workbench.errors import DataError


@DATASETS.register("mmstar")
def mmstar(spec: str, **choice: Unpack[Choice]) -> BenchmarkDataset:
    """Load all questions; see the module's docstring.

    Raises:
        DataError: no such files or columns, or a row that cannot be used; the message names it.
    """
    path, options = spec_options(spec, {"images": ""})
    table = benchmark_table(path, "val")
    check_columns(path, table, ("index", "question", "image", "answer", "category", "l2_category"))
    images = images_folder(path, options["images"])
    places = images_of_table(table, "image", path, images)
    rows = []
    for number, (row, image) in enumerate(zip(table.remove_columns("image"), places, strict=True), start=1):
        where = f"{shown(path)} row {number}"
        question = text_cell(where, row, "question")
        choices = options_of(where, {name: row.get(name) for name in "ABCD"}).texts
        text, written = _split(question)
        if not (choices := choices or written):
            raise DataError(f"{where} has no options: expected columns A to D, or Options: A: .. in the question")
        if "" in choices:
            raise DataError(f"{where} has an empty option {ascii_uppercase[choices.index('')]}: expected a text")
        rows.append(
            Row(
                where,
                text_cell(where, row, "index"),
                image,
                text,
                lettered(where, text_cell(where, row, "answer"), choices),
                choices,
                text_cell(where, row, "category"),
                source=text_cell(where, row, "l2_category"),
                prompt=question if written else "",
            )
        )
    version = label_version("the authors' labels", [(Path(path), VLMEVALKIT["mmstar"])])
    return benchmark_dataset(f"mmstar:{spec}", "mmstar", version, rows, images, choice)


def _split(question: str) -> tuple[str, tuple[str, ...]]:
    """Return the question and its options, which a text may have at its end; without them, the text and ()."""
    text, marker, end = question.rpartition("Options:")
    mark = ":" if end.lstrip().startswith("A:") else "."  # after every letter; "vitamin C. A" after A: is a text
    parts = re.split(rf"(?:^|,?\s+)([A-J]){re.escape(mark)}\s", f" {end.strip()}")
    letters, options = parts[1::2], tuple(part.strip().rstrip(",").rstrip() for part in parts[2::2])
    if not marker or letters != list(ascii_uppercase[: len(letters)]) or len(options) < 2:
        return question, ()
    return text.strip(), tuple(option.removesuffix(".") for option in options)
