"""CV-Bench (Tong et al. 2024, arXiv 2406.16860): counts, spatial relations, depth and distance; Apache-2.0.

cv_bench:PATH?part=2d&images=FOLDER

PATH is a folder with `test_2d` and `test_3d` as parquet or JSON lines, one such file, or `nyu-visionx/CV-Bench`. `part`
is 2d (1438 questions: Count and Relation), 3d (1200: Depth and Distance) or all, the default.
"""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

from workbench.data.base import DATASETS
from workbench.data.benchmark_rows import (
    BenchmarkDataset,
    Choice,
    Row,
    benchmark_dataset,
    check_choice,
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

TASKS = {"2d": ("Count", "Relation"), "3d": ("Depth", "Distance")}
PARTS = ("2d", "3d", "all")


@DATASETS.register("cv_bench")
def cv_bench(spec: str, **choice: Unpack[Choice]) -> BenchmarkDataset:
    """Load the questions of one or both parts; see the module's docstring.

    Raises:
        DataError: no such files or columns, or a row that cannot be used; the message names it.
    """
    path, options = spec_options(spec, {"part": "all", "images": ""})
    part = check_choice("part of cv_bench", options["part"].lower(), PARTS)
    wanted = [task for name, tasks in TASKS.items() if part in (name, "all") for task in tasks]
    images = images_folder(path, options["images"])
    rows: list[Row] = []
    files = _files(path)
    for file in files:
        table = benchmark_table(file, "test")
        check_columns(file, table, ("idx", "task", "question", "choices", "answer", "prompt", "source"))
        column = "image" if "image" in table.column_names else "filename"
        check_columns(file, table, (column,))
        places = images_of_table(table, column, file, images)
        for number, (row, image) in enumerate(zip(table.remove_columns(column), places, strict=True), start=1):
            where = f"{shown(file)} row {number}"
            task = check_choice(
                f"task in {where}", text_cell(where, row, "task").capitalize(), [t for ts in TASKS.values() for t in ts]
            )
            if task not in wanted:
                continue
            choices = options_of(where, {"choices": row.get("choices")}).texts
            rows.append(
                Row(
                    where,
                    f"{task}-{text_cell(where, row, 'idx')}",
                    image,
                    text_cell(where, row, "question"),
                    lettered(where, text_cell(where, row, "answer"), choices),
                    choices,
                    task,
                    source=text_cell(where, row, "source"),
                    prompt=text_cell(where, row, "prompt"),
                )
            )
    if not rows:
        raise DataError(f"{shown(path)} has no questions of {' or '.join(wanted)}: expected those of part {part}")
    version = label_version("the authors' labels", [(Path(file), VLMEVALKIT["cv_bench"]) for file in files])
    return benchmark_dataset(f"cv_bench:{spec}", "cv_bench", version, rows, images, choice)


def _files(path: str) -> list[str]:
    """Return the parquet files of a folder or, without any, its files of JSON lines; the path itself if it is none."""
    place = Path(path)
    if not place.is_dir():
        return [path]
    for ending in ("parquet", "jsonl"):
        files = sorted(place.glob(f"test*.{ending}"))
        parts = [file for file in files if file.stem.startswith(("test_2d", "test_3d"))]
        if files:
            return [str(file) for file in parts or files]
    raise DataError(f"{shown(place)} has no file test_2d or test_3d: expected parquet or JSON lines (.jsonl)")
