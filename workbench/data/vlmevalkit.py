"""Tables of VLMEvalKit (`POPE.tsv` and so on): read with the columns that the benchmarks' own tables have.

A table has `index`, `image` (base64, or the index of the row that has the same image), `question`, `answer` and, for
letters, the columns A, B, ...
"""

from __future__ import annotations

from collections.abc import Mapping
from string import ascii_uppercase
from typing import Any

from workbench.data.hf_tables import TextTable, read_table
from workbench.data.images import shown
from workbench.data.turns import is_empty
from workbench.errors import DataError

REFERENCE = 64  # characters of an image's cell, at most, that names another row


def benchmark_table(path: str, split: str) -> Any:
    """Return the table of a benchmark, as `read_table`; one of VLMEvalKit has more columns.

    Args:
        path: a file, a folder or a hub id.
        split: the split that the benchmark is, on the hub and in the names of the files of a folder.

    Raises:
        DataError: see `read_table`; or an image that is no image and no index of a row with one.
    """
    table = read_table(path, "", split)
    if not isinstance(table, TextTable) or not {"index", "image", "question", "answer"} <= set(table.column_names):
        return table
    images = {str(row["index"]): row.get("image") for row in table if "index" in row}
    return TextTable(_row(f"{shown(path)} row {number}", row, images) for number, row in enumerate(table, start=1))


def _row(where: str, row: Mapping[str, Any], images: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with the columns that it lacks.

    Args:
        where: the row, in messages.
        row: the row.
        images: the cell `image` of each row, by index.
    """
    image, index = row.get("image"), str(row.get("index", ""))
    if isinstance(image, str) and len(image) <= REFERENCE and image.isdecimal():
        image = images.get(image) or ""
        if len(image) <= REFERENCE:
            raise DataError(f"{where} has the image {row['image']}: expected the index of a row that has an image")
    letters = [letter for letter in ascii_uppercase if not is_empty(row.get(letter))]
    if letters != list(ascii_uppercase[: len(letters)]):
        raise DataError(f"{where} has the options {', '.join(letters)}: expected letters from A without a gap")
    texts = [str(row[letter]) for letter in letters]
    more: dict[str, Any] = {"question_id": index, "idx": index}
    if texts:
        more |= {
            "choices": texts,
            "Options": " ".join(
                f"({letter}) {text}" for letter, text in zip(ascii_uppercase.lower(), texts, strict=False)
            ),
            "Correct Answer": row["answer"],
        }
    return {**more, **row, "image": image}
