"""The twin of MMStar: a mix of questions about scenes of `shapes:test`, in four of its six categories."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from string import ascii_uppercase

import numpy as np

from workbench.data.scenes import COUNT, COUNTS, SIDE_X, SIDE_Y
from workbench.data.shapes import COLOR, COLORS, EXIST, SHAPE, SHAPES
from workbench.data.twins.files import encoded, write_parquet
from workbench.data.twins.select import NAMES, Scenes, Wanted, asked, balanced, pairs_of, relations, rotated
from workbench.data.twins.wordings import Wording

CATEGORIES = {  # category and subcategory of our question types
    "count": ("math", "numeric commonsense and calculation"),
    "colour": ("fine-grained perception", "recognition"),
    "shape": ("fine-grained perception", "recognition"),
    "position_x": ("fine-grained perception", "localization"),
    "position_y": ("fine-grained perception", "localization"),
    "exist": ("coarse perception", "image scene and topic"),
    "relation_x": ("instance reasoning", "cross-instance relation reasoning"),
    "relation_y": ("instance reasoning", "cross-instance relation reasoning"),
}


def write_mmstar(folder: Path, seed: int, wording: Wording) -> None:
    """Write `mmstar.parquet`, with the options at the end of each question."""
    scenes, rng = Scenes(seed), np.random.default_rng([seed, 2])
    groups = list(_mmstar_questions(rng))
    wanted = sum((Counter(keys) for _, keys in groups), Wanted())
    found = defaultdict(list)
    for sample in balanced(scenes, wanted):
        found[sample.question, sample.answer].append(sample)
    chosen = [
        (found[key].pop(), rotated(options, number)) for number, (options, keys) in enumerate(groups) for key in keys
    ]
    rows = []
    for index, place in enumerate(rng.permutation(len(chosen))):
        sample, options = chosen[place]
        category, subcategory = CATEGORIES[sample.category]
        written = ", ".join(f"{letter}: {option}" for letter, option in zip(ascii_uppercase, options, strict=False))
        rows.append(
            {
                "index": index,
                "question": f"{asked('mmstar', sample, wording)}\nOptions: {written}",
                "image": encoded(sample.image, f"images/{index}.png"),
                "answer": ascii_uppercase[options.index(sample.answer)],
                "category": category,
                "l2_category": subcategory,
                "meta_info": {
                    "id": sample.id,
                    "source": "shapes",
                    "split": "test",
                    "image_path": f"images/{index}.png",
                },
            }
        )
    write_parquet(rows, folder / "mmstar.parquet")


def _mmstar_questions(rng: np.random.Generator) -> Iterator[tuple[list[str], list[tuple[str, str]]]]:
    """Yield the options of a question, and the question with each of them as its answer.

    Of more than four options, a question has some four, which differ.
    """
    colors, shapes = list(COLORS), list(SHAPES)
    for text, names, choices in (
        (COLOR, shapes, [rotated(colors, start)[:4] for start in (0, 2, 4)]),
        (SHAPE, colors, [rotated(shapes, start)[:4] for start in (0, 2)]),
        (COUNT, list(NAMES), [list(COUNTS)]),
        (SIDE_X, list(NAMES), [["left", "right"]]),
        (SIDE_Y, list(NAMES), [["top", "bottom"]]),
    ):
        for name, options in product(names, choices):
            yield options, [(text.format(a=name), option) for option in options]
    for color, shape in product(colors, shapes):
        yield ["yes", "no"], [(EXIST.format(a=color, b=shape), option) for option in ("yes", "no")]
    texts = sorted({text for text, _ in relations(pairs_of(rng, NAMES))})
    for number in rng.permutation(len(texts))[:30]:
        options = ["left", "right"] if " left " in texts[number] else ["above", "below"]
        yield options, [(texts[number], option) for option in options]
