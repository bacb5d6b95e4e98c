"""The twin of CV-Bench's two-dimensional half, Count and Relation, made of scenes of `shapes:test`."""

from __future__ import annotations

from collections import Counter
from itertools import product
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np

from workbench.data.base import Sample
from workbench.data.scenes import COUNT, COUNTS
from workbench.data.shapes import SIZE
from workbench.data.twins.files import encoded, save_image, write_lines, write_parquet
from workbench.data.twins.select import NAMES, Scenes, Wanted, asked, balanced, names_in, pairs_of, relations, rotated
from workbench.data.twins.wordings import Wording


def write_cv_bench(folder: Path, seed: int, wording: Wording) -> None:
    """Write `test_2d.parquet`, `test_2d.jsonl` and the images of the latter.

    `source` is ADE20K or COCO, so that the authors' average over sources can be computed; neither is meant.
    """
    scenes, rng = Scenes(seed), np.random.default_rng([seed, 1])
    counts = balanced(scenes, {(COUNT.format(a=name), count): 4 for name, count in product(NAMES, COUNTS)})
    related = balanced(scenes, relations(pairs_of(rng, NAMES)))
    rows: list[dict[str, Any]] = []
    times: Wanted = Counter()
    texts = {text: number for number, text in enumerate(sorted({sample.question for sample in related}))}
    for task, sample in [*(("Count", s) for s in counts), *(("Relation", s) for s in related)]:
        turn = times[sample.question, sample.answer] if task == "Count" else texts[sample.question]
        times[sample.question, sample.answer] += 1
        choices = rotated(sample.options, turn if task == "Count" else turn // 2)
        rows.append(_cv_bench_row(len(rows), task, sample, choices, ("ADE20K", "COCO")[turn % 2], wording))
        save_image(sample.image, folder / rows[-1]["filename"])
    samples = [*counts, *related]
    with_images = [
        row | {"image": encoded(sample.image, row["filename"])} for row, sample in zip(rows, samples, strict=True)
    ]
    write_parquet(with_images, folder / "test_2d.parquet")
    write_lines(rows, folder / "test_2d.jsonl")


def _cv_bench_row(
    index: int, task: str, sample: Sample, choices: list[str], source: str, wording: Wording
) -> dict[str, Any]:
    question = asked("cv_bench", sample, wording)
    lettered = "\n".join(f"({letter}) {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False))
    names = set(names_in(sample))
    boxes = [list(thing.box) for thing in sample.objects if names & set(thing.name.split())]
    return {
        "idx": index,
        "type": "2D",
        "task": task,
        "question": question,
        "choices": choices,
        "answer": f"({ascii_uppercase[choices.index(sample.answer)]})",
        "prompt": f"{question} Select from the following choices.\n{lettered}",
        "filename": f"img/2D/{task.lower()}/{source.lower()}_{index}.png",
        "source": source,
        "source_dataset": "shapes:test",
        "source_filename": sample.image_id,
        "target_class": ", ".join(names_in(sample)),
        "target_size": None,
        "bbox": [[round(SIZE * value, 1) for value in box] for box in boxes],
    }
