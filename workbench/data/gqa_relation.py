"""Relations of GQA (Hudson and Manning 2019) as Zhang et al. 2024 (arXiv 2411.18620) chose them, with both boxes.

gqa_relation:FILE?images=FOLDER

FILE is their `GQA_val_correct_question_with_relChooser_ChooseRel.csv` (964 questions about 785 images), FOLDER holds
GQA's images as `{img_id}.jpg`; by default it is that of the file. Only questions are in it that their model answered
correctly, so accuracies on it are no accuracies on GQA. It is probably the data of the paper's attention analysis.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

from workbench.data.base import DATASETS, Object
from workbench.data.benchmark_rows import (
    BenchmarkDataset,
    Choice,
    Row,
    benchmark_dataset,
    check_columns,
    images_folder,
    text_cell,
)
from workbench.data.copies import label_version
from workbench.data.hf_tables import read_table
from workbench.data.images import shown
from workbench.data.specs import spec_options
from workbench.errors import DataError

SHA256 = "0bbc45d9c9b609409f30d7ecf9be6f2957347c4cdcc5480b531ae0b8ef5282c0"  # of the authors' file, c9a1111
BOX = ("x", "y", "w", "h")
OBJECTS = ("object1", "object2")
TEXTS = ("question_id", "img_id", "question", "answer", "true option", "false option")
SIZE = ("image_w", "image_h")


@DATASETS.register("gqa_relation")
def gqa_relation(spec: str, **choice: Unpack[Choice]) -> BenchmarkDataset:
    """Load all questions; see the module's docstring.

    Raises:
        DataError: no such file or columns, or a row that cannot be used; the message names it.
    """
    path, options = spec_options(spec, {"images": ""})
    if not Path(path).is_file():
        raise DataError(f"{shown(path)} is no file: expected the CSV file of the questions")
    table = read_table(path, "")
    named = [f"{name} {part}" for name in OBJECTS for part in ("name", *BOX)]
    check_columns(path, table, (*TEXTS, *SIZE, *named))
    rows = []
    for number, row in enumerate(table, start=1):
        where = f"{shown(Path(path).name)} row {number}"
        texts = {name: text_cell(where, row, name) for name in TEXTS}
        options_of_row = tuple(sorted({texts["true option"], texts["false option"]}))
        if texts["answer"] not in options_of_row:
            raise DataError(f"{where} has the answer {texts['answer'][:30]!r}: expected one of its two options")
        size = [_number(where, row, name) for name in SIZE]
        objects = tuple(_object(where, row, name, size) for name in OBJECTS)
        image = f"{texts['img_id']}.jpg"
        rows.append(
            Row(
                where,
                texts["question_id"],
                image,
                texts["question"],
                texts["answer"],
                options_of_row,
                texts["answer"],
                objects=objects,
                asked=objects,
            )
        )
    version = label_version("the authors' choice", [(Path(path), (SHA256,))])
    images = images_folder(path, options["images"])
    return benchmark_dataset(f"gqa_relation:{spec}", "gqa_relation", version, rows, images, choice)


def _object(where: str, row: Mapping[str, Any], name: str, size: list[float]) -> Object:
    """Return an object with its box, whose corners are in pixels in the table."""
    x, y, w, h = (_number(where, row, f"{name} {part}") for part in BOX)
    width, height = size
    if not (w > 0 and h > 0 and 0 <= x < width and 0 <= y < height):
        raise DataError(f"{where} has the box {x:g}, {y:g}, {w:g}, {h:g} in an image of {width:g} x {height:g} pixels")
    right, bottom = min(x + w, width), min(y + h, height)
    return Object(text_cell(where, row, f"{name} name"), (x / width, y / height, right / width, bottom / height))


def _number(where: str, row: Mapping[str, Any], column: str) -> float:
    text = text_cell(where, row, column)
    try:
        return float(text)
    except ValueError as error:
        raise DataError(f"{where} has {column} {text[:30]!r}: expected a number of pixels") from error
