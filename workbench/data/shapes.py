"""The synthetic data set `shapes`: drawn scenes of colored shapes, with questions that only the image answers.

    sample:  <112 x 112 image>  "is red left or right of blue ?"  ->  "left"

Every scene is a function of (split, seed, index) alone. Each question type is balanced given its text (`scenes.py`).
Colors and shapes are drawn independently of each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import product

import numpy as np
from PIL import Image, ImageDraw

from workbench.data.base import DATASETS, Dataset, Object, Sample
from workbench.data.scenes import (
    COUNT,
    COUNTS,
    RELATION_X,
    RELATION_Y,
    SIDE_X,
    SIDE_Y,
    Question,
    SyntheticScenes,
    draw_repeated,
    shuffled_samples,
    template_words,
    unique,
)

SIZE = 112  # pixels; 8 x 8 patches of 14
COLORS = {
    "red": (214, 40, 40),
    "green": (44, 160, 60),
    "blue": (40, 80, 215),
    "yellow": (240, 205, 30),
    "purple": (140, 50, 170),
    "orange": (245, 130, 30),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
CATEGORIES = ("count", "colour", "shape", "exist", "position_x", "position_y", "relation_x", "relation_y")
SCENES = SyntheticScenes(
    name="shapes",
    version=4,
    splits={"train": 4000, "val": 500, "test": 1000},
    size=SIZE,
    objects=(0.25, 0.2, 0.2, 0.15, 0.1, 0.1),  # many simple scenes make the data set quick to learn
    radius=(10, (24, 22, 20, 18, 16, 16)),
)

COLOR = "what colour is {a} ?"
SHAPE = "what shape is {a} ?"
EXIST = "any {a} {b} ?"


@dataclass(frozen=True)
class Placed:
    """An object of a scene, with its center and radius in pixels."""

    shape: str
    color: str
    x: float
    y: float
    radius: float


@DATASETS.register("shapes")
def shapes(
    split: str, *, limit: int | None = None, seed: int = 0, draw: int | None = None, decode: bool | None = None
) -> Dataset:
    """Load `shapes:train`, `shapes:val` or `shapes:test`.

    Args:
        split: train, val or test.
        limit: number of scenes; None for all.
        seed: of the scenes.
        draw: seed of a random selection of scenes; None takes the first ones.
        decode: has no effect; a scene is identified without being drawn.
    """
    return SCENES.dataset(split, seed, limit, draw, scene_samples, vocabulary())


def vocabulary() -> list[str]:
    """Return all words that a question or an answer can contain."""
    return sorted(
        {*COLORS, *SHAPES, *COUNTS, "yes", "no"}
        | template_words((COUNT, COLOR, SHAPE, EXIST, SIDE_X, SIDE_Y, RELATION_X, RELATION_Y))
    )


# --- layout ---------------------------------------------------------------------------------------


def layout(split: str, seed: int, index: int) -> list[Placed]:
    """Return the objects of a scene; one color and one shape occur 0 to 3 times each, so that counts vary."""
    rng = SCENES.generator(split, seed, index, 0)
    number = SCENES.draw_number(rng)
    colors, shapes_ = draw_repeated(rng, list(COLORS), number), draw_repeated(rng, list(SHAPES), number)
    return [Placed(s, c, *p) for s, c, p in zip(shapes_, colors, SCENES.draw_places(rng, number), strict=True)]


# --- image ----------------------------------------------------------------------------------------

_SCALE = 4  # images are drawn larger and then reduced, for smooth edges


def outline(item: Placed, scale: float = 1.0) -> list[tuple[float, float]]:
    """Return the corners of the object's shape, in pixels times `scale`."""
    x, y, r = item.x * scale, item.y * scale, item.radius * scale
    if item.shape == "circle":
        angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        return [(x + r * float(np.cos(a)), y + r * float(np.sin(a))) for a in angles]
    if item.shape == "square":
        h = 0.8 * r
        return [(x - h, y - h), (x + h, y - h), (x + h, y + h), (x - h, y + h)]
    if item.shape == "triangle":
        return [(x, y - r), (x + 0.95 * r, y + 0.75 * r), (x - 0.95 * r, y + 0.75 * r)]
    if item.shape == "star":
        radii = [r if i % 2 == 0 else 0.42 * r for i in range(10)]
        return [
            (x + q * float(np.sin(i * np.pi / 5)), y - q * float(np.cos(i * np.pi / 5))) for i, q in enumerate(radii)
        ]
    w = 0.34 * r  # cross
    return [
        *((x - w, y - r), (x + w, y - r), (x + w, y - w), (x + r, y - w), (x + r, y + w), (x + w, y + w)),
        *((x + w, y + r), (x - w, y + r), (x - w, y + w), (x - r, y + w), (x - r, y - w), (x - w, y - w)),
    ]


def draw_scene(split: str, seed: int, index: int) -> Image.Image:
    """Draw scene `index` of a split as a 112 x 112 RGB image."""
    return draw_items(split, seed, index, layout(split, seed, index))


def draw_items(split: str, seed: int, index: int, items: Sequence[Placed]) -> Image.Image:
    """Draw objects on the background of a scene, and with its shades and noise."""
    rng = SCENES.generator(split, seed, index, 1)
    image = _background(rng).resize((SIZE * _SCALE, SIZE * _SCALE), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for item in items:
        shade = rng.integers(-18, 19, size=3)
        fill = tuple(int(v) for v in np.clip(np.array(COLORS[item.color]) + shade, 0, 255))
        draw.polygon(outline(item, _SCALE), fill=fill)
    pixels = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX), dtype=np.int16)
    noise = rng.integers(-8, 9, size=pixels.shape, dtype=np.int16)
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


def _background(rng: np.random.Generator) -> Image.Image:
    """Return a pale or dark, nearly gray background: plain, a gradient, stripes, or blotches."""
    base = rng.integers(60, 200) + rng.integers(-12, 13, size=3)
    other = base + rng.integers(-40, 41) + rng.integers(-8, 9, size=3)
    kind = int(rng.integers(4))
    row, column = np.mgrid[0:SIZE, 0:SIZE] / (SIZE - 1)
    if kind == 0:
        weight = np.zeros((SIZE, SIZE))
    elif kind == 1:
        weight = [row, column, 1 - row, 1 - column][int(rng.integers(4))]
    elif kind == 2:
        period = rng.integers(8, 24)
        weight = (((row if rng.integers(2) else column) * SIZE) // period % 2).astype(float)
    else:
        coarse = Image.fromarray(rng.integers(0, 256, size=(6, 6), dtype=np.uint8)).resize(
            (SIZE, SIZE), Image.Resampling.BICUBIC
        )
        weight = np.asarray(coarse) / 255
    pixels = base + weight[..., None] * (other - base)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def scene_objects(items: list[Placed]) -> tuple[Object, ...]:
    """Return name, box in 0..1 and pixel mask of every object.

    Where corners of large objects overlap, the mask is the visible part.
    """
    objects: list[Object] = []
    covered = np.zeros((SIZE, SIZE), dtype=bool)
    for item in reversed(items):  # the last one drawn lies on top
        image = Image.new("1", (SIZE, SIZE))
        ImageDraw.Draw(image).polygon(outline(item), fill=1)
        mask = np.asarray(image) & ~covered
        covered |= mask
        x, y = zip(*outline(item, 1 / SIZE), strict=True)
        objects.append(Object(f"{item.color} {item.shape}", (min(x), min(y), max(x), max(y)), mask))
    return tuple(reversed(objects))


# --- questions ------------------------------------------------------------------------------------


def scene_samples(split: str, seed: int, index: int) -> list[Sample]:
    """Return all questions about scene `index`, in random order; the image is drawn only when it is used."""
    items = layout(split, seed, index)
    rng = SCENES.generator(split, seed, index, 2)
    questions = [*_count(rng, items), *_look_up(items), *_exist(rng, items)]
    questions += SCENES.position_questions(_named(rng, items))
    questions += SCENES.relation_questions(rng, _named(rng, items))
    load = cache(partial(draw_scene, split, seed, index))  # all questions about the scene share one image
    return shuffled_samples(rng, f"{split}-{seed}-{index:05d}", load, questions, scene_objects(items))


def _count(rng: np.random.Generator, items: list[Placed]) -> list[Question]:
    by_color = SCENES.count_questions(rng, [item.color for item in items], tuple(COLORS))
    return by_color + SCENES.count_questions(rng, [item.shape for item in items], SHAPES)


def _look_up(items: list[Placed]) -> list[Question]:
    by_shape = [Question(COLOR.format(a=i.shape), i.color, tuple(COLORS), "colour") for i in _unique(items, "shape")]
    by_color = [Question(SHAPE.format(a=i.color), i.shape, SHAPES, "shape") for i in _unique(items, "color")]
    return by_shape + by_color


def _exist(rng: np.random.Generator, items: list[Placed]) -> list[Question]:
    present = sorted({(i.color, i.shape) for i in items})
    absent = [pair for pair in product(COLORS, SHAPES) if pair not in set(present)]
    asked = [(present[int(rng.integers(len(present)))], "yes"), (absent[int(rng.integers(len(absent)))], "no")]
    return [Question(EXIST.format(a=c, b=s), answer, ("yes", "no"), "exist") for (c, s), answer in asked]


def _unique(items: list[Placed], by: str) -> list[Placed]:
    return unique(items, lambda item: getattr(item, by))


def _named(rng: np.random.Generator, items: list[Placed]) -> list[tuple[str, Placed]]:
    """Return the objects that one word identifies: color or shape, whichever is unique, a random one if both are."""
    by_color, by_shape = _unique(items, "color"), _unique(items, "shape")
    named = []
    for item in items:
        words = [item.color] * (item in by_color) + [item.shape] * (item in by_shape)
        if words:
            named.append((words[int(rng.integers(len(words)))], item))
    return named
