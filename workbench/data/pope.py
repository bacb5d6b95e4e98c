"""POPE (Li et al. 2023, arXiv 2305.10355): is there such an object? Three splits of 3000 questions, 500 COCO images.

pope:PATH?split=random,popular&images=FOLDER&labels=repope

PATH is a folder with the authors' files (`coco_pope_random.json` and so on), one such file, or a table with the columns
question, answer, image and category (`lmms-lab/POPE`). Without `split`, all splits that are there are loaded. The three
splits share their images and the questions with the answer yes. RePOPE's labels are files of the same format;
they are recognized by their names or that of their folder, or named by `labels`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

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
    text_cell,
    yes_or_no,
)
from workbench.data.copies import VLMEVALKIT, label_version
from workbench.data.hf_tables import json_rows
from workbench.data.images import StoredImage, shown
from workbench.data.specs import spec_options
from workbench.data.vlmevalkit import benchmark_table
from workbench.errors import DataError

SPLITS = ("random", "popular", "adversarial")
FILES = {  # SHA-256 of the authors' files (AoiDragon/POPE, 08d957b)
    "random": "ac25245170b975a5bdf9080b23fd431dfe6be458bc038259c1f4f09a6bef7994",
    "popular": "72c1a8ad45d0c13514f5f22598261df41d3b533854d29682e924db50ed8aa753",
    "adversarial": "420b3407db1fa9f1187a805dca41cb7b97fd91504e6c2179706188c107fb8ef8",
}
OPTIONS = ("yes", "no")
LABELS = {"authors": "the authors' labels", "repope": "RePOPE's labels"}


@DATASETS.register("pope")
def pope(spec: str, **choice: Unpack[Choice]) -> BenchmarkDataset:
    """Load one or several splits; see the module's docstring.

    Raises:
        DataError: no such files or columns, or a row that cannot be used; the message names it.
        UnknownNameError: a split that POPE does not have.
    """
    path, options = spec_options(spec, {"split": "", "images": "", "labels": ""})
    splits = [check_choice("split of pope", name, SPLITS) for name in options["split"].split(",") if name]
    files = _files(Path(path), splits)
    rows: list[Row] = []
    for split, file in files.items():
        rows += [
            _row(f"{file.name} row {number}", row, split, text_cell(f"{file.name} row {number}", row, "image"))
            for number, row in enumerate(json_rows(file), start=1)
        ]
    images = images_folder(path, options["images"])
    if not files:
        table = benchmark_table(path, "test")
        check_columns(path, table, ("question", "answer", "image", "category"))
        places = images_of_table(table, "image", path, images)
        for number, (row, image) in enumerate(zip(table.remove_columns("image"), places, strict=True), start=1):
            where = f"{shown(path)} row {number}"
            for name in text_cell(where, row, "category").lower().replace(" ", "").split(","):
                split = check_choice(f"category in {where}", name, SPLITS)
                if not splits or split in splits:
                    rows.append(_row(where, row, split, image))
    read: list[tuple[Path, tuple[str, ...]]] = [(file, (FILES[split],)) for split, file in files.items()] or [
        (Path(path), VLMEVALKIT["pope"])
    ]
    version = label_version(_labels(options["labels"], [file for file, _ in read]), read)
    return benchmark_dataset(f"pope:{spec}", "pope", version, rows, images, choice)


def is_repope(labels: str) -> bool:
    """Return whether labels (`BenchmarkDataset.version`) are RePOPE's."""
    return labels.startswith(LABELS["repope"])


def _labels(named: str, files: Sequence[Path]) -> str:
    """Return whose labels some files have: as they are named, or else as the names of files and folders say."""
    if not named:
        again = any("repope" in name.lower() for file in files for name in (file.name, file.parent.name))
        named = "repope" if again else "authors"
    return LABELS[check_choice("labels of pope", named, list(LABELS))]


def _files(path: Path, splits: Sequence[str]) -> dict[str, Path]:
    """Return the authors' files by split; empty if the path holds a table instead."""
    if path.is_file():
        if path.suffix not in (".json", ".jsonl"):
            return {}
        split = next((name for name in SPLITS if name in path.name.lower()), None)
        if split is None:
            raise DataError(f"{shown(path)} names no split: expected {', '.join(SPLITS)} in the name of the file")
        if splits and splits != [split]:
            raise DataError(f"{shown(path)} is the split {split}: expected split={split}, or a folder with all splits")
        return {split: path}
    if not path.is_dir():
        return {}
    by_split: dict[str, Path] = {}
    for file in sorted(path.glob("[!.]*.json*")):
        split = next((name for name in SPLITS if name in file.name.lower()), None)
        if split is None or file.suffix not in (".json", ".jsonl"):
            continue
        if split in by_split:
            raise DataError(
                f"{shown(path)} has {by_split[split].name} and {file.name}: expected one file of the split {split}"
            )
        by_split[split] = file
    by_split = {split: by_split[split] for split in SPLITS if split in by_split}
    if lost := [split for split in splits if by_split and split not in by_split]:
        raise DataError(f"{shown(path)} has no file of the split {lost[0]}: expected one beside {', '.join(by_split)}")
    return {split: file for split, file in by_split.items() if not splits or split in splits}


def _row(where: str, row: Mapping[str, Any], split: str, image: str | StoredImage) -> Row:
    number = text_cell(where, row, "question_id")
    question = text_cell(where, row, "text" if "text" in row else "question")
    answer = yes_or_no(where, row, "label" if "label" in row else "answer")
    return Row(where, f"{split}-{number}", image, question, answer, OPTIONS, split)
