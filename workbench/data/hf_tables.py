"""Tables of a Hugging Face data set: on the hub, saved by `datasets`, or files in a folder."""

from __future__ import annotations

import csv
import json
import logging
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from workbench.data.base import content_hash
from workbench.data.image_files import walk
from workbench.data.images import LFS, shown
from workbench.errors import DataError
from workbench.files import cache_folder, sha256

SPLITS = ("train", "validation", "valid", "val", "dev", "test")
OTHER_WORDS = {"training": "train", "testing": "test"}
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv"}


class TextTable(list[dict[str, Any]]):
    """Rows of text files, with the interface of a table of `datasets`."""

    @property
    def column_names(self) -> list[str]:
        return list(dict.fromkeys(name for row in self for name in row))

    def select_columns(self, names: Sequence[str]) -> TextTable:
        return TextTable({name: row.get(name) for name in names} for row in self)

    def remove_columns(self, name: str) -> TextTable:
        return TextTable({key: value for key, value in row.items() if key != name} for row in self)


def read_table(path: str, split: str, usual: str = "train") -> Any:
    """Return the table of a split, with images not decoded.

    Args:
        path: a file, a folder or a hub id.
        split: the split; "" is `usual`, or all files of a folder if no name contains a split.
        usual: the split that is meant where none is named.

    Raises:
        DataError: nothing can be loaded, or `datasets` is needed (for all but JSON and CSV) and not installed.
    """
    place, saved = Path(path), _saved_splits(Path(path)) if Path(path).is_dir() else []
    files: list[Path] = []
    if place.is_file():
        files = [place]
    elif place.is_dir() and not saved:
        files = sorted(file for _, file in walk(place) if file.suffix in FORMATS)
    kinds = {FORMATS.get(file.suffix, "") for file in files}
    if files and (len(kinds) > 1 or "" in kinds):
        endings = ", ".join(sorted({f.suffix for f in files}))
        raise DataError(
            f"{shown(path)} contains files ending in {shown(endings)}: expected one of {', '.join(FORMATS)}"
        )
    files = _of_split(place, files, split, usual) if files else []
    _check_git_lfs(files)
    if not place.exists() and (place.suffix in FORMATS or not HUB_ID.fullmatch(path)):
        raise DataError(f"{shown(path)} does not exist: expected a file, a folder, or the id of a data set of the hub")
    if files and "parquet" not in kinds:
        return TextTable(row for file in files for row in (_csv_rows(file) if kinds == {"csv"} else json_rows(file)))
    if find_spec("datasets") is None:
        raise DataError(
            "data set hf: expected the package datasets; install it with pip install 'viral-workbench[data]'"
        )
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # our error says what is wrong, in one sentence
    try:
        if saved:
            table = datasets.load_from_disk(str(_saved_split(place, saved, split, usual)))
        elif files:
            # a cache by content, since that of `datasets` goes by the files' times
            cache = cache_folder(f"datasets/{content_hash(*map(sha256, files))}")
            table = datasets.load_dataset(
                "parquet", data_files=[str(file) for file in files], split="train", cache_dir=str(cache)
            )
        else:
            table = datasets.load_dataset(path, split=split or usual)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        why = shown(error.__cause__ or error)
        if "BatchSize" in why:  # what pyarrow says about a file without rows
            raise DataError(f"{shown(path)} has no rows: expected some") from error
        raise DataError(f"data set '{shown(path)}' could not be loaded ({why})") from error
    for name, feature in table.features.items():  # images are decoded later, by our own code
        if isinstance(feature, datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            table = table.cast_column(name, datasets.List(datasets.Image(decode=False)))
        elif isinstance(feature, datasets.Video | datasets.Audio):
            table = table.cast_column(name, type(feature)(decode=False))
    return table


def _csv_rows(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a CSV or TSV file, with each cell as the text that is written there.

    Raises:
        DataError: no header, a column that occurs twice, or a row with another number of cells.
    """
    csv.field_size_limit(2**31 - 1)  # an image in base64 is longer than the default
    rows: list[dict[str, Any]] = []
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            cells = csv.reader(text, delimiter="\t" if file.suffix == ".tsv" else ",", strict=True)
            header = next(cells, [])
            if not header or len(set(header)) < len(header):
                raise DataError(
                    f"{file} has the columns {', '.join(header)[:80] or 'none'}: expected a first line with the names"
                    " of the columns, none of them twice"
                )
            for row in cells:
                if row and len(row) != len(header):
                    raise DataError(
                        f"{file} row {len(rows) + 1} has {len(row)} cells: expected {len(header)}, as in the first line"
                    )
                if row:
                    rows.append(dict(zip(header, row, strict=True)))
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{file} is not valid CSV ({' '.join(str(error).split())[:120]})") from error
    return rows


def json_list(file: Path) -> list[Any]:
    """Return the values of a file of JSON lines, or of a JSON list.

    Raises:
        DataError: the file is not valid JSON.
    """
    try:
        with file.open(encoding="utf-8-sig") as text:
            first = next((character for line in text for character in line if not character.isspace()), "")
            text.seek(0)
            values: list[Any]
            values = json.load(text) if first == "[" else [json.loads(line) for line in text if line.strip()]
            return values
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} is not valid JSON ({' '.join(str(error).split())[:120]})") from error


def json_rows(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a file of JSON lines, or of a JSON list.

    Raises:
        DataError: the file is not valid JSON, or a row is no mapping.
    """
    rows = json_list(file)
    if other := next((number for number, row in enumerate(rows, start=1) if not isinstance(row, dict)), None):
        raise DataError(f"{file} row {other} is {type(rows[other - 1]).__name__}: expected columns by name")
    return rows


def _saved_splits(place: Path) -> list[str]:
    """Return the splits of a folder written by `save_to_disk`; [""] for one table without splits, [] if it is none."""
    if (place / "state.json").is_file() and (place / "dataset_info.json").is_file():
        return [""]
    if not (place / "dataset_dict.json").is_file():
        return []
    return sorted(file.parent.name for file in place.glob("*/state.json"))


def _saved_split(place: Path, saved: Sequence[str], split: str, usual: str) -> Path:
    if saved == [""]:
        if split:
            raise DataError(
                f"{shown(place)} is one table that save_to_disk wrote, without splits: remove split={shown(split, 40)}"
            )
        return place
    if (split or usual) not in saved:
        raise DataError(
            f"{shown(place)} has no split {shown(split or usual, 40)}: expected"
            f" {' or '.join(f'split={name}' for name in saved)}"
        )
    return place / (split or usual)


def _check_git_lfs(files: Sequence[Path]) -> None:
    """Raise where a file is only a pointer of git-lfs."""
    for file in files:
        with file.open("rb") as opened:
            if opened.read(len(LFS)) == LFS:
                raise DataError(f"{shown(file)} is a git-lfs pointer: run git lfs pull")


def _of_split(place: Path, files: list[Path], split: str, usual: str) -> list[Path]:
    """Return the files of one split, by the words of their names below `place`."""
    if not split and len(files) == 1:
        return files
    words = {file: _words(str(file.relative_to(place) if place.is_dir() else file.name)) for file in files}
    for plain in (False, True):
        if named := [file for file in files if (split or usual) in words[file][plain]]:
            return named
    known = [name for name in SPLITS if any(name in plain for _, plain in words.values())]
    if split or known:
        raise DataError(
            f"{place} has no file whose name says split {split or usual}: expected"
            f" {' or '.join(f'split={name}' for name in known) or 'none'}"
        )
    return files


def _words(name: str) -> tuple[set[str], set[str]]:
    """Return the words of a name as they are, such as train2014 and training, and as splits are called: train."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    plain = (word.rstrip("0123456789") for word in words)
    return set(words), {OTHER_WORDS.get(word, word) for word in plain}
