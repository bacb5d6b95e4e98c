"""easy-VQA (Victor Zhou, 2019): images and questions made by others, one coloured shape in each image.

    sample:  <64 x 64 image>  "does the image not contain a gray shape?"  ->  "yes"

Images, questions, answers and the division into train and test are the authors' own, word for word. The validation
split is ours: the last 500 of their 4000 training images, which `easy_vqa:train` then lacks. The questions are not
balanced given their text: "is there a gray shape?" is mostly answered "no". So the chance level of each type is what
the most frequent answer to the same question in `easy_vqa:train` reaches on the split: .82 for both yes-or-no types,
one over the options elsewhere. Objects are not known.
"""

from __future__ import annotations

import json
from collections import Counter

import numpy as np

from workbench.data.base import DATASETS, Dataset, Sample, check_split, content_hash
from workbench.data.images import StoredImage
from workbench.data.selection import subset
from workbench.data.sources import Source, source_folder
from workbench.errors import DataError

SOURCE = Source(
    name="easy-vqa",
    wheel="easy-vqa==1.0",
    root="easy_vqa/data/",
    patterns=("answers.txt", "*/questions.json", "*/images/*.png"),
    digest="cddd207fc33de73277f16d298532879add0b6c44a8de2b11fd102d700a46ed12",
    licence="MIT, Victor Zhou 2019",
)
TRAIN_IMAGES = 3500
SPLITS = {"train": ("train", 0, TRAIN_IMAGES), "val": ("train", TRAIN_IMAGES, 4000), "test": ("test", 0, 1000)}
OPTIONS = {
    "shape": ("circle", "rectangle", "triangle"),
    "colour": ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow"),
    "yes_no": ("yes", "no"),
    "yes_no_negated": ("yes", "no"),
}


@DATASETS.register("easy_vqa")
def easy_vqa(
    split: str, *, limit: int | None = None, seed: int = 0, draw: int | None = None, decode: bool | None = None
) -> Dataset:
    """Load `easy_vqa:train`, `easy_vqa:val` or `easy_vqa:test`; `limit` keeps a random subset of the images, drawn with
    `seed`.

    Args:
        decode: no image is decoded in any case: their bytes are held against a digest, and no two show the same.

    Raises:
        DataError: the package that carries the data cannot be had.
    """
    check_split("easy_vqa", split, tuple(SPLITS))
    part, first, end = SPLITS[split]
    folder = source_folder(SOURCE) / part
    kept = [first + number for number in subset(end - first, limit, seed if draw is None else draw)]
    asked: dict[int, list[tuple[str, str]]] = {image: [] for image in kept}
    words: set[str] = set()
    rows = json.loads((folder / "questions.json").read_text())
    text_only = _text_only([row for row in rows if first <= row[2] < end])
    for question, answer, image in rows:
        words.update(f"{question} {answer}".split())
        if image in asked:
            asked[image].append((question, answer))
    samples = []
    for image, questions in asked.items():
        file = folder / "images" / f"{image}.png"
        load = StoredImage(str(file), file, str(file))
        for number, (question, answer) in enumerate(questions):
            category = category_of(question, answer)
            samples.append(
                Sample(
                    f"{part}-{image:04d}-{number:02d}",
                    f"{part}-{image:04d}",
                    load,
                    question,
                    answer,
                    OPTIONS[category],
                    category,
                    text_only=text_only[category],
                )
            )
    return Dataset(f"easy_vqa:{split}", samples, content_hash("easy_vqa", SOURCE.digest, split, *kept), sorted(words))


def _text_only(rows: list[tuple[str, str, int]]) -> dict[str, float]:
    """Accuracy, by type, of the most frequent answer that each question has in the training split; one over the options
    where that is more."""
    asked: dict[str, Counter[str]] = {}
    for question, answer, image in json.loads((source_folder(SOURCE) / "train" / "questions.json").read_text()):
        if image < TRAIN_IMAGES:
            asked.setdefault(question, Counter())[answer] += 1
    guess = {question: max(sorted(answers), key=answers.__getitem__) for question, answers in asked.items()}
    right: dict[str, list[bool]] = {category: [] for category in OPTIONS}
    for question, answer, _ in rows:
        right[category_of(question, answer)].append(guess.get(question) == answer)
    return {category: max(float(np.mean(own)), 1 / len(OPTIONS[category])) for category, own in right.items()}


def category_of(question: str, answer: str) -> str:
    """The question type: what is asked for, and whether a yes-or-no question is negated ("is no red shape present?").

    Raises:
        DataError: an answer that belongs to no type.
    """
    if answer in OPTIONS["yes_no"]:
        return "yes_no_negated" if {"no", "not"} & set(question.split()) else "yes_no"
    for category in ("shape", "colour"):
        if answer in OPTIONS[category]:
            return category
    raise DataError(f"easy_vqa: answer '{answer}' to '{question}' is of no known type: expected {', '.join(OPTIONS)}")
