"""What's Up (Kamath et al. 2023, arXiv 2310.19785): spatial relations of objects in photographs; MIT.

whatsup:PATH?subset=coco_one&images=FOLDER&prompts=FILE&options=captions

PATH is the authors' file of the subset, or the folder that it is in. The subsets are `a` (on, under, left, right: 412),
`b` (left, right, front, behind: 408), `coco_one` (2247), `coco_two` (440), `vg_one` (1160) and `vg_two` (291). The
options are the relations of the subset, as AdaptVis asks; with `options=captions` those of a row's captions, as the
authors ask (in COCO and Visual Genome the true and the false one). `prompts` is a file of questions in the order of the
rows, such as AdaptVis's (JSON lines with the keys question and answer); its answers must be ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

from workbench.benchmarks.parsers import parse_relation, question_alone
from workbench.data.base import DATASETS
from workbench.data.benchmark_rows import BenchmarkDataset, Choice, Row, benchmark_dataset, check_choice
from workbench.data.copies import copy_of, label_version
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
PROMPTS = {  # SHA-256 of AdaptVis's files (shiqichen17/AdaptVis, 3b41399)
    "a": "96cc5ecc0ed899b8508596b67bfa95a8976abfaf685269b32d53be1d176bd7fc",
    "b": "f63ed5edd55ad88dc77716fbeccb6521c5ea3b63bfdd9f837e3787d187f93a1f",
    "coco_one": "b48b5686ecfeab2ad62a11b5b167f1ba41e16157e798c1c3d482f33e7cc18d6e",
    "coco_two": "2ed88e73462b2660e4b59a7c8f0beedcf58551cf6574602b6d34e4d3d9bf9ffb",
    "vg_one": "c2adb86edbe1461800268729ddeadf24bac2a7cd251e5262387849bc0d72fab3",
    "vg_two": "9469a37098e5b69fcbc8d5c72ea5b2f60e348794f405d063af46f0bbdea01370",
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
    path, options = spec_options(spec, {"subset": "", "images": "", "prompts": "", "options": "subset"})
    place = path_of(path)
    name = options["subset"].lower() or next((n for n, s in SUBSETS.items() if s.file == place.name), "")
    subset = SUBSETS[check_choice("subset of whatsup", name, list(SUBSETS))]
    file = place / subset.file if place.is_dir() else place
    if not file.is_file():
        raise DataError(f"{shown(file)} does not exist: expected the file of subset {name}")
    images = path_of(options["images"]) if options["images"] else file.parent
    read = _photographs if name in ("a", "b") else _captions
    of_captions = check_choice("options of whatsup", options["options"], ("subset", "captions")) == "captions"
    rows = list(read(file, subset, of_captions))
    version = label_version("the authors' labels", [(file, ())])
    if options["prompts"]:
        prompts = path_of(options["prompts"])
        rows = _with_prompts(rows, prompts)
        version += f", prompts of {prompts.name} ({copy_of([(prompts, (PROMPTS[name],))])})"
    return benchmark_dataset(f"whatsup:{spec}", f"whatsup {name}", version, rows, images, choice)


def _photographs(file: Path, subset: Subset, of_captions: bool) -> Iterator[Row]:
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
        options = _offered(where, row, relation, subset.relations) if of_captions else subset.relations
        side = next((first for first, second in OPPOSITES.items() if relation in (first, second)), relation)
        yield Row(
            where,
            Path(image).stem,
            image.removeprefix("data/"),
            f"Where is the {one} in relation to the {other}?",
            relation,
            options,
            relation,
            pair=f"{one}, {other}: {side} or {OPPOSITES[side]}",
            source=f"{one}, {other}",
        )


def _captions(file: Path, subset: Subset, of_captions: bool) -> Iterator[Row]:
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
        options = subset.relations
        if of_captions:
            offered = (relation, _relation(where, false, true, subset.relations))
            options = tuple(one for one in subset.relations if one in offered)
        yield Row(where, f"{number}", name, question, relation, options, relation)


def _offered(where: str, row: Mapping[str, Any], relation: str, relations: Sequence[str]) -> tuple[str, ...]:
    """Return the relations of the captions of a photograph, in the order of the subset."""
    captions = row.get("caption_options")
    named = {parse_relation(str(text), relations) for text in captions} if isinstance(captions, list) else set()
    if relation not in named or len(named - {None}) < 2:
        raise DataError(f"{where} has the captions {str(captions)[:60]}: expected that of {relation} and another one")
    if None in named or len(named) < len(captions or ()):
        raise DataError(f"{where} has the captions {str(captions)[:60]}: expected another relation in each")
    return tuple(one for one in relations if one in named)


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
    """Return the rows with the questions of a file of prompts; a question ends at its first question mark.

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
        result.append(replace(row, question=question_alone(question) or row.question, prompt=question))
    return result
