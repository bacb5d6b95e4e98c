"""What's Up (Kamath et al. 2023, arXiv 2310.19785): spatial relations of objects in photographs; MIT.

whatsup:PATH?subset=coco_one&images=FOLDER&prompts=FILE

PATH is the authors' file of the subset, or the folder that it is in. The subsets are `a` (on, under, left, right: 412),
`b` (left, right, front, behind: 408), `coco_one` (2247), `coco_two` (440), `vg_one` (1160) and `vg_two` (291). The
options are the relations of the subset. `prompts` is a file of questions in the order of the rows, such as AdaptVis's
(JSON lines with the keys question and answer); its answers must be ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

from workbench.benchmarks.parsers import parse_relation
from workbench.data.base import DATASETS
from workbench.data.benchmark_rows import BenchmarkDataset, Choice, Row, benchmark_dataset, check_choice
from workbench.data.hf_tables import json_list, json_rows
from workbench.data.images import shown
from workbench.data.specs import path_of, spec_options
from workbench.errors import DataError

SIDES = ("left", "right", "top", "bottom")
BESIDES = ("left", "right", "above", "below")
COCO = "val2017/{:012d}.jpg"
VISUAL_GENOME = "vg_images/{}.jpg"


@dataclass(frozen=True)
class Subset:
    """A part of the benchmark: the authors' file, its relations, and where its images are."""

    file: str
    relations: tuple[str, ...]
    images: str = ""


SUBSETS = {
    "a": Subset("controlled_images_dataset.json", ("on", "under", "left", "right")),
    "b": Subset("controlled_clevr_dataset.json", ("left", "right", "front", "behind")),
    "coco_one": Subset("coco_qa_one_obj.json", SIDES, COCO),
    "coco_two": Subset("coco_qa_two_obj.json", BESIDES, COCO),
    "vg_one": Subset("vg_qa_one_obj.json", (*SIDES, "front", "behind"), VISUAL_GENOME),
    "vg_two": Subset("vg_qa_two_obj.json", (*BESIDES, "front", "behind"), VISUAL_GENOME),
}
OPPOSITES = {"left": "right", "on": "under", "front": "behind"}
NAME = re.compile(r"(?P<one>.+?)_(?P<relation>on|under|left_of|right_of|in-front_of|behind)_(?P<other>.+)")
WORDS = {"left_of": "left", "right_of": "right", "in-front_of": "front"}


@DATASETS.register("whatsup")
def whatsup(spec: str, **choice: Unpack[Choice]) -> BenchmarkDataset:
    """Load one subset; see the module's docstring.

    Raises:
        DataError: no such file, a row that cannot be used, or prompts that are not those of the rows.
        UnknownNameError: a subset that What's Up does not have.
    """
    path, options = spec_options(spec, {"subset": "", "images": "", "prompts": ""})
    place = path_of(path)
    name = options["subset"].lower() or next((n for n, s in SUBSETS.items() if s.file == place.name), "")
    subset = SUBSETS[check_choice("subset of whatsup", name, list(SUBSETS))]
    file = place / subset.file if place.is_dir() else place
    if not file.is_file():
        raise DataError(f"{shown(file)} does not exist: expected the file of subset {name}")
    images = path_of(options["images"]) if options["images"] else file.parent
    read = _photographs if name in ("a", "b") else _captions
    rows = list(read(file, subset))
    if options["prompts"]:
        rows = _with_prompts(rows, path_of(options["prompts"]))
    return benchmark_dataset(
        f"whatsup:{spec}", f"whatsup {name}", "the authors' labels, unknown copy", rows, images, choice
    )


def _photographs(file: Path, subset: Subset) -> Iterator[Row]:
    """Yield the rows of subsets A and B: four photographs of the same two objects, one in each relation."""
    for number, row in enumerate(json_rows(file), start=1):
        where = f"{file.name} row {number}"
        image = str(row.get("image_path", ""))
        match = NAME.fullmatch(Path(image).stem)
        if match is None:
            raise DataError(f"{where} has the image {image[:60]!r}: expected a name such as mug_left_of_table.jpeg")
        one, other = (match[part].replace("_", " ") for part in ("one", "other"))
        relation = WORDS.get(match["relation"], match["relation"])
        if relation not in subset.relations:
            raise DataError(f"{where} has the relation {relation}: expected {', '.join(subset.relations)}")
        side = next((first for first, second in OPPOSITES.items() if relation in (first, second)), relation)
        yield Row(
            where,
            Path(image).stem,
            image.removeprefix("data/"),
            f"Where is the {one} in relation to the {other}?",
            relation,
            subset.relations,
            relation,
            pair=f"{one}, {other}: {side} or {OPPOSITES[side]}",
            source=f"{one}, {other}",
        )


def _captions(file: Path, subset: Subset) -> Iterator[Row]:
    """Yield the rows of the subsets of COCO and Visual Genome: an image, a true and a false caption."""
    for number, row in enumerate(json_list(file), start=1):
        where = f"{file.name} row {number}"
        if not isinstance(row, list) or len(row) != 3 or not all(isinstance(text, str) for text in row[1:]):
            raise DataError(f"{where} is {str(row)[:60]}: expected [image id, true caption, false caption]")
        image, true, false = row
        relation = _relation(where, true, false, subset.relations)
        one, other = _objects(where, true, relation)
        question = f"Where is the {one} in relation to the {other}?" if other else f"Where in the image is the {one}?"
        try:
            name = subset.images.format(int(image))
        except (TypeError, ValueError) as error:
            raise DataError(f"{where} has the image {str(image)[:40]!r}: expected its number") from error
        yield Row(where, f"{number}", name, question, relation, subset.relations, relation)


def _relation(where: str, true: str, false: str, relations: Sequence[str]) -> str:
    """Return the relation that the true caption has and the false one has not."""
    words = [set(re.findall(r"[a-z]+", text.lower())) for text in (true, false)]
    if len(relation := [name for name in relations if name in words[0] - words[1]]) != 1:
        raise DataError(f"{where} has the captions {true[:50]!r} and {false[:50]!r}: expected one other relation")
    return relation[0]


def _objects(where: str, caption: str, relation: str) -> tuple[str, str]:
    """Return the object of a caption and the one that it is related to, "" if there is none."""
    text = re.sub(r"^a photo of |\.$", "", caption.strip(), flags=re.IGNORECASE)
    link = rf"(?:\s+(?:to|on|at|in))?(?:\s+the)?\s+{relation}(?:\s+of)?(?:\s+|$)"
    parts = re.split(link, text, maxsplit=1)
    article = re.compile(r"^(?:a|an|the)\s+", re.IGNORECASE)
    names = [article.sub("", part.strip()) for part in parts]
    if len(names) != 2 or not names[0]:
        raise DataError(
            f"{where} has the caption {caption[:60]!r}: expected an object, its relation and another object"
        )
    return names[0], names[1]


def _with_prompts(rows: Sequence[Row], file: Path) -> list[Row]:
    """Return the rows with the questions of a file of prompts.

    Raises:
        DataError: another number of prompts, or one whose answer is not that of its row.
    """
    prompts: Sequence[Mapping[str, Any]] = json_rows(file)
    if len(prompts) != len(rows):
        raise DataError(f"{shown(file)} has {len(prompts)} prompts for {len(rows)} rows: expected as many")
    result = []
    for number, (row, prompt) in enumerate(zip(rows, prompts, strict=True), start=1):
        question, answers = prompt.get("question"), prompt.get("answer")
        answer = answers[0] if isinstance(answers, list) and answers else answers
        if not isinstance(question, str) or not isinstance(answer, str):
            raise DataError(f"{shown(file.name)} row {number} has no question and answer: expected both")
        if parse_relation(answer, row.options) != row.answer:
            raise DataError(
                f"{shown(file.name)} row {number} has the answer {answer[:30]!r}, but {row.where} has {row.answer}:"
                " expected the prompts in the order of the rows"
            )
        result.append(replace(row, prompt=question))
    return result
