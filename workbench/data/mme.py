"""MME (Fu et al. 2023, arXiv 2306.13394): 14 categories of yes-or-no questions, two about each image.

mme:PATH

PATH is the authors' folder, with a folder for each category (image files and texts of lines `question TAB answer` with
the same name, in the folder itself or in `images` and `questions_answers_YN`; names that begin with a dot are not
read, and such a folder with another name is refused), or a table with the columns question_id, image, question, answer
and category (`lmms-lab/MME`). The data are distributed by their authors on request.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    text_cell,
    yes_or_no,
)
from workbench.data.copies import VLMEVALKIT, label_version
from workbench.data.images import FORMATS, shown
from workbench.data.specs import spec_options
from workbench.data.vlmevalkit import benchmark_table
from workbench.errors import DataError, UnknownNameError

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
CATEGORIES = (*PERCEPTION, *COGNITION)


@DATASETS.register("mme")
def mme(spec: str, **choice: Unpack[Choice]) -> BenchmarkDataset:
    """Load all categories that are there; see the module's docstring.

    Raises:
        DataError: no such files or columns, a row that cannot be used, or an image without two questions; the message
            names it.
        UnknownNameError: a category that MME does not have.
    """
    path, options = spec_options(spec, {"images": ""})
    images = images_folder(path, options["images"])
    rows = list(_folders(Path(path))) if Path(path).is_dir() else []
    if not rows:
        rows = list(_table(path, images))
    counts: dict[str, list[Row]] = {}
    for row in rows:
        counts.setdefault(row.pair, []).append(row)
    if odd := next((pair for pair, questions in counts.items() if len(questions) != 2), None):
        raise DataError(f"image {odd} of {shown(path)} has {len(counts[odd])} questions: expected 2")
    version = label_version("the authors' labels", [(Path(path), VLMEVALKIT["mme"])])
    return benchmark_dataset(f"mme:{spec}", "mme", version, rows, images, choice)


def _table(path: str, images: Path) -> Iterator[Row]:
    table = benchmark_table(path, "test")
    check_columns(path, table, ("question_id", "image", "question", "answer", "category"))
    places = images_of_table(table, "image", path, images)
    asked: dict[str, int] = {}
    for number, (row, image) in enumerate(zip(table.remove_columns("image"), places, strict=True), start=1):
        where = f"{shown(path)} row {number}"
        category = check_choice(f"category in {where}", text_cell(where, row, "category"), CATEGORIES)
        image_column = "image_path" if row.get("image_path") else "question_id"  # VLMEvalKit numbers the questions
        pair = f"{category}/{Path(text_cell(where, row, image_column)).name}"
        asked[pair] = asked.get(pair, 0) + 1
        question, answer = text_cell(where, row, "question"), yes_or_no(where, row, "answer")
        yield Row(where, f"{pair}#{asked[pair]}", image, question, answer, ("yes", "no"), category, pair)


def _folders(root: Path) -> Iterator[Row]:
    for folder in sorted(root.glob("[!.]*/")):
        stems = {file.stem for file in (*folder.glob("*.txt"), *folder.glob("questions_answers_YN/*.txt"))}
        images = {file.stem for file in (*folder.glob("*"), *folder.glob("images/*")) if file.suffix.lower() in FORMATS}
        if folder.name not in CATEGORIES and stems & images:
            raise UnknownNameError(f"folder in {shown(root)}", folder.name, CATEGORIES)
    for category in CATEGORIES:
        folder = root / category
        texts = folder / "questions_answers_YN" if (folder / "questions_answers_YN").is_dir() else folder
        image_folder = folder / "images" if (folder / "images").is_dir() else folder
        unasked = {p.name for p in image_folder.glob("[!.]*") if p.suffix.lower() in FORMATS}
        for file in sorted(texts.glob("[!.]*.txt")):
            image = next((p for p in sorted(image_folder.glob(f"{file.stem}.*")) if p.suffix.lower() in FORMATS), None)
            if image is None:
                raise DataError(
                    f"{shown(file)} has no image: expected {file.stem}.jpg or .png in {shown(image_folder)}"
                )
            try:
                lines = file.read_text(encoding="utf-8-sig").splitlines()
            except UnicodeDecodeError as error:
                raise DataError(f"{shown(file)} is not UTF-8 ({error.reason}): expected a text file") from error
            for number, line in enumerate(filter(str.strip, lines), start=1):
                where = f"{category}/{file.name} line {number}"
                question, tab, answer = line.partition("\t")
                if not tab:
                    raise DataError(f"{where} is {line[:40]!r}: expected a question and its answer with a tab between")
                pair = f"{category}/{image.name}"
                unasked.discard(image.name)
                yield Row(
                    where,
                    f"{pair}#{number}",
                    image.relative_to(root).as_posix(),
                    question.strip(),
                    yes_or_no(where, {"answer": answer}, "answer"),
                    ("yes", "no"),
                    category,
                    pair,
                )
        if unasked:
            raise DataError(f"image {category}/{min(unasked)} of {shown(root)} has 0 questions: expected 2")
