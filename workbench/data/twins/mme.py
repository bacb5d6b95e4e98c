"""The twin of MME: existence, count, position and color, two questions about each image of `shapes:test`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np

from workbench.data.base import Sample
from workbench.data.scenes import COUNT, COUNTS
from workbench.data.shapes import COLORS, SHAPES
from workbench.data.twins.files import save_image
from workbench.data.twins.select import NAMES, OPPOSITE, Scenes, balanced, names_in, pairs_of, relations
from workbench.data.twins.wordings import Wording, worded


def write_mme(folder: Path, seed: int, wording: Wording) -> None:
    """Write a folder for each category, with images and files of lines `question TAB answer`; one yes, one no."""
    scenes, rng = Scenes(seed), np.random.default_rng([seed, 3])
    parts = {
        "existence": _combinations(scenes, wording, "existence"),
        "color": _combinations(scenes, wording, "color"),
        "count": _counts(scenes, wording),
        "position": _positions(scenes, rng, wording),
    }
    for category, images in parts.items():
        for number, (sample, yes, no) in enumerate(images):
            file = folder / category / f"{number:012d}.jpg"
            save_image(sample.image, file)
            lines = [f"{yes}\tYes", f"{no}\tNo"]
            file.with_suffix(".txt").write_text("\n".join(lines[:: 1 if number % 2 else -1]) + "\n", encoding="utf-8")


def _combinations(scenes: Scenes, wording: Wording, category: str) -> Iterator[tuple[Sample, str, str]]:
    """Ask for each color and shape twice where it is, and twice where it is not.

    In `existence`, neither the color nor the shape of the second question is in the image; in `color`, the shape is,
    once, in another color.
    """
    colors, shapes = list(COLORS), list(SHAPES)
    missing = Counter({pair: 2 for pair in product(colors, shapes)})
    for number, scene in scenes:
        if not missing.total():
            return
        present = [tuple(thing.name.split()) for thing in scene[0].objects]
        if len(present) > 3:
            continue
        for color, shape in present:
            turn = missing[color, shape]
            other = (
                colors[(colors.index(color) + turn) % len(colors)],
                shapes[(shapes.index(shape) + turn) % len(shapes)] if category == "existence" else shape,
            )
            alone = sum(s == shape for _, s in present) == 1
            absent = all(other[0] != c and other[1] != s for c, s in present)
            if turn and (alone if category == "color" else absent):
                missing[color, shape] -= 1
                scenes.taken.add(number)
                yes, no = (worded(f"mme {category}", wording, " ".join(pair)) for pair in ((color, shape), other))
                yield scene[0], yes, no
                break


def _counts(scenes: Scenes, wording: Wording) -> Iterator[tuple[Sample, str, str]]:
    """Ask for each number (1 to 3) of each name twice where it is right, and twice where it is one of the others."""
    wanted = {(COUNT.format(a=name), count): 2 for name, count in product(NAMES, COUNTS[1:])}
    for sample in balanced(scenes, wanted):
        other = str(int(sample.answer) % 3 + 1)
        yes, no = (worded("mme count", wording, names_in(sample)[0], n=number) for number in (sample.answer, other))
        yield sample, yes, no


def _positions(scenes: Scenes, rng: np.random.Generator, wording: Wording) -> Iterator[tuple[Sample, str, str]]:
    """Ask of each pair of colors for both sides, where the one is right and where the other is."""
    for sample in balanced(scenes, relations(pairs_of(rng, list(COLORS)))):
        sides = (sample.answer, OPPOSITE[sample.answer])
        yes, no = (worded(f"mme {side}", wording, *names_in(sample)) for side in sides)
        yield sample, yes, no
