"""easy-VQA (Victor Zhou, 2019): 64 x 64 images of one colored shape each, with questions by its author.

    sample:  <64 x 64 image>  "does the image not contain a gray shape?"  ->  "yes"

Images, questions, answers and the division into train and test are the author's own, word for word. The validation
split is ours: the last 500 of the 4000 training images, which `easy_vqa:train` therefore lacks. The questions are not
balanced given their text: "is there a gray shape?" is mostly answered "no". The chance level of each type is therefore
the accuracy, on the split, of the most frequent answer to the same question in `easy_vqa:train`: .82 for both yes-or-no
types, 1 / number of options for the others. Objects are not known.
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
    """Load `easy_vqa:train`, `easy_vqa:val` or `easy_vqa:test`.

    Args:
        split: train, val or test.
        limit: number of images of a random subset; None for all.
        seed: of the random subset.
        draw: takes the place of `seed` if it is not None.
        decode: has no effect; a digest guarantees that no two images are equal.

    Raises:
        DataError: the package that contains the data cannot be fetched.
    """
    check_split("easy_vqa", split, tuple(SPLITS))
    part, first, end = SPLITS[split]
    folder = source_folder(SOURCE) / part
    images = [first + number for number in subset(end - first, limit, seed if draw is None else draw)]
    questions_of: dict[int, list[tuple[str, str]]] = {image: [] for image in images}
    words: set[str] = set()
    rows = json.loads((folder / "questions.json").read_text())
    text_only = _text_only([row for row in rows if first <= row[2] < end])
    for question, answer, image in rows:
        words.update(f"{question} {answer}".split())
        if image in questions_of:
            questions_of[image].append((question, answer))
    samples = []
    for image, questions in questions_of.items():
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
    return Dataset(f"easy_vqa:{split}", samples, content_hash("easy_vqa", SOURCE.digest, split, *images), sorted(words))


def _text_only(rows: list[tuple[str, str, int]]) -> dict[str, float]:
    """Return the accuracy, by type, of answering each question with its most frequent answer in the training split.

    It is at least 1 / number of options.
    """
    answers_to: dict[str, Counter[str]] = {}
    for question, answer, image in json.loads((source_folder(SOURCE) / "train" / "questions.json").read_text()):
        if image < TRAIN_IMAGES:
            answers_to.setdefault(question, Counter())[answer] += 1
    guess = {question: max(sorted(answers), key=answers.__getitem__) for question, answers in answers_to.items()}
    correct: dict[str, list[bool]] = {category: [] for category in OPTIONS}
    for question, answer, _ in rows:
        correct[category_of(question, answer)].append(guess.get(question) == answer)
    return {category: max(float(np.mean(values)), 1 / len(OPTIONS[category])) for category, values in correct.items()}


def category_of(question: str, answer: str) -> str:
    """Return the question type: what is asked for, and whether a yes-or-no question is negated.

    "is no red shape present?" is negated.

    Raises:
        DataError: an answer that belongs to no type.
    """
    if answer in OPTIONS["yes_no"]:
        return "yes_no_negated" if {"no", "not"} & set(question.split()) else "yes_no"
    for category in ("shape", "colour"):
        if answer in OPTIONS[category]:
            return category
    raise DataError(f"easy_vqa: answer '{answer}' to '{question}' is of no known type: expected {', '.join(OPTIONS)}")
