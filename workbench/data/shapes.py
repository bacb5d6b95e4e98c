"""The laptop world: drawn scenes of coloured shapes, with questions that only the image can answer.

    sample:  <112 x 112 image>  "is red left or right of blue ?"  ->  "left"

Every scene is a function of (split, seed, index) alone. Each question type is balanced *given its text*, by symmetry and not by
rejection afterwards: counts are drawn uniformly before the objects, colours and shapes are assigned independently of each other and of
positions, positions are exchangeable and mirror-symmetric, and as many absent as present combinations are asked for. A model that sees only
the text is therefore at chance on every type.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache, partial
from itertools import product

import numpy as np
from PIL import Image, ImageDraw
from scipy.stats import binom

from workbench.data.base import DATASETS, Dataset, Object, Sample, check_split, content_hash

SIZE = 112  # pixels; 8 x 8 patches of 14
SPLITS = {"train": 4000, "val": 500, "test": 1000}
COLOURS = {
    "red": (214, 40, 40),
    "green": (44, 160, 60),
    "blue": (40, 80, 215),
    "yellow": (240, 205, 30),
    "purple": (140, 50, 170),
    "orange": (245, 130, 30),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
COUNTS = ("0", "1", "2", "3")
CATEGORIES = ("count", "colour", "shape", "exist", "position_x", "position_y", "relation_x", "relation_y")
OBJECTS = (0.25, 0.2, 0.2, 0.15, 0.1, 0.1)  # probability of 1, 2, ... 6 objects; many simple scenes make the world quick to learn
MIN_RADIUS = 10  # pixels
MAX_RADIUS = (24, 22, 20, 18, 16, 16)  # for 1, 2, ... 6 objects
CENTRE_MARGIN = 0.08  # an object nearer to the middle line than this is not asked for its side
RELATION_MARGIN = 0.12  # nor are two objects whose centres differ by less
VERSION = 4  # part of the fingerprint: raise it when any scene or question changes


@dataclass(frozen=True)
class Placed:
    """An object of a scene: centre and radius in pixels."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float


@DATASETS.register("shapes")
def shapes(split: str, *, limit: int | None = None, seed: int = 0) -> Dataset:
    """Load `shapes:train`, `shapes:val` or `shapes:test`; `limit` counts scenes, `seed` names the world."""
    check_split("shapes", split, tuple(SPLITS))
    count = min(SPLITS[split], limit or SPLITS[split])
    samples = [sample for index in range(count) for sample in scene_samples(split, seed, index)]
    return Dataset(f"shapes:{split}", samples, content_hash("shapes", VERSION, split, seed, count), vocabulary())


def vocabulary() -> list[str]:
    """Every word that a question or an answer of this world can contain."""
    words: set[str] = {*COLOURS, *SHAPES, *COUNTS}
    for text in (_COUNT, _COLOUR, _SHAPE, _EXIST, _SIDE_X, _SIDE_Y, _RELATION_X, _RELATION_Y):
        words.update(text.format(a="", b="").split())
    return sorted(words | {"yes", "no"})


def _generator(split: str, seed: int, index: int, purpose: int) -> np.random.Generator:
    return np.random.default_rng([VERSION, seed, list(SPLITS).index(split), index, purpose])


# --- layout --------------------------------------------------------------------------------------------------------------------------


def layout(split: str, seed: int, index: int) -> list[Placed]:
    """Return the objects of a scene; one colour and one shape are repeated 0 to 3 times, so that counts vary."""
    rng = _generator(split, seed, index, 0)
    number = 1 + int(rng.choice(len(OBJECTS), p=OBJECTS))
    colours, shapes_ = _draw_repeated(rng, list(COLOURS), number), _draw_repeated(rng, list(SHAPES), number)
    return [Placed(s, c, *p) for s, c, p in zip(shapes_, colours, _places(rng, number), strict=True)]


def _draw_repeated(rng: np.random.Generator, names: list[str], number: int) -> list[str]:
    """Draw `number` names, of which a random one stands there a uniform 0..min(3, number) times, in random order."""
    chosen = str(rng.choice(names))
    count = int(rng.integers(0, min(len(COUNTS) - 1, number) + 1))
    drawn = [chosen] * count + [str(name) for name in rng.choice([name for name in names if name != chosen], size=number - count)]
    return [drawn[i] for i in rng.permutation(number)]


@cache
def _acceptance(names: int) -> tuple[float, ...]:
    """Probability of asking for a count of 0, 1, 2, 3 so that the asked counts are uniform: the rarest over each one's probability.

    The probabilities are those of `_draw_repeated` with `names` names, for a name picked in advance.
    """
    most = len(COUNTS) - 1
    probability = np.zeros(len(COUNTS))
    for number, weight in enumerate(OBJECTS, start=1):
        for count in range(min(most, number) + 1):
            share = weight / (min(most, number) + 1)
            probability[count] += share / names
            probability += share * (1 - 1 / names) * binom.pmf(np.arange(len(COUNTS)), number - count, 1 / (names - 1))
    return tuple(probability.min() / probability)


def _places(rng: np.random.Generator, number: int) -> list[tuple[float, float, float]]:
    """Draw `number` discs (x, y, radius) that neither touch nor leave the image."""
    while True:
        placed: list[tuple[float, float, float]] = []
        for _ in range(40 * number):
            radius = rng.uniform(MIN_RADIUS, MAX_RADIUS[number - 1])
            x, y = rng.uniform(radius + 2, SIZE - radius - 2, size=2)
            if all((x - a) ** 2 + (y - b) ** 2 > (radius + r + 3) ** 2 for a, b, r in placed):
                placed.append((float(x), float(y), float(radius)))
            if len(placed) == number:
                return placed


# --- picture -------------------------------------------------------------------------------------------------------------------------

_SCALE = 4  # drawn larger and reduced, for smooth edges


def outline(item: Placed, scale: float = 1.0) -> list[tuple[float, float]]:
    """Corners of the object's shape in pixels times `scale`."""
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
        return [(x + q * float(np.sin(i * np.pi / 5)), y - q * float(np.cos(i * np.pi / 5))) for i, q in enumerate(radii)]
    w = 0.34 * r  # cross
    return [
        *((x - w, y - r), (x + w, y - r), (x + w, y - w), (x + r, y - w), (x + r, y + w), (x + w, y + w)),
        *((x + w, y + r), (x - w, y + r), (x - w, y + w), (x - r, y + w), (x - r, y - w), (x - w, y - w)),
    ]


def draw_scene(split: str, seed: int, index: int) -> Image.Image:
    """Draw scene `index` of a split as a 112 x 112 RGB image."""
    items = layout(split, seed, index)
    rng = _generator(split, seed, index, 1)
    picture = _background(rng).resize((SIZE * _SCALE, SIZE * _SCALE), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    for item in items:
        shade = rng.integers(-18, 19, size=3)
        fill = tuple(int(v) for v in np.clip(np.array(COLOURS[item.colour]) + shade, 0, 255))
        draw.polygon(outline(item, _SCALE), fill=fill)
    pixels = np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BOX), dtype=np.int16)
    noise = rng.integers(-8, 9, size=pixels.shape, dtype=np.int16)
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


def _background(rng: np.random.Generator) -> Image.Image:
    """A pale or dark, nearly grey ground: plain, a gradient, stripes, or blotches."""
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
        coarse = Image.fromarray(rng.integers(0, 256, size=(6, 6), dtype=np.uint8)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        weight = np.asarray(coarse) / 255
    pixels = base + weight[..., None] * (other - base)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def scene_objects(items: list[Placed]) -> tuple[Object, ...]:
    """Name, box in 0..1 and pixel mask of every object; where corners of large objects overlap, the mask is what remains visible."""
    found: list[Object] = []
    covered = np.zeros((SIZE, SIZE), dtype=bool)
    for item in reversed(items):  # the last one drawn lies on top
        picture = Image.new("1", (SIZE, SIZE))
        ImageDraw.Draw(picture).polygon(outline(item), fill=1)
        mask = np.asarray(picture) & ~covered
        covered |= mask
        x, y = zip(*outline(item, 1 / SIZE), strict=True)
        found.append(Object(f"{item.colour} {item.shape}", (min(x), min(y), max(x), max(y)), mask))
    return tuple(reversed(found))


# --- questions -----------------------------------------------------------------------------------------------------------------------

_COUNT = "how many {a} ?"
_COLOUR = "what colour is {a} ?"
_SHAPE = "what shape is {a} ?"
_EXIST = "any {a} {b} ?"
_SIDE_X = "is {a} left or right ?"
_SIDE_Y = "is {a} top or bottom ?"
_RELATION_X = "is {a} left or right of {b} ?"
_RELATION_Y = "is {a} above or below {b} ?"


@dataclass(frozen=True)
class _Question:
    text: str
    answer: str
    options: tuple[str, ...]
    category: str


def scene_samples(split: str, seed: int, index: int) -> list[Sample]:
    """All questions about scene `index`, in random order; the image is drawn only when it is asked for."""
    items = layout(split, seed, index)
    rng = _generator(split, seed, index, 2)
    questions = [*_count(rng, items), *_look_up(items), *_exist(rng, items), *_position(rng, items), *_relation(rng, items)]
    load = cache(partial(draw_scene, split, seed, index))  # one drawing for all questions of the scene
    objects = scene_objects(items)
    image_id = f"{split}-{seed}-{index:05d}"
    order = rng.permutation(len(questions))
    picked = [questions[i] for i in order]
    return [Sample(f"{image_id}-{n:02d}", image_id, load, q.text, q.answer, q.options, q.category, objects) for n, q in enumerate(picked)]


def _count(rng: np.random.Generator, items: list[Placed]) -> list[_Question]:
    questions = []
    for by, names in (("colour", tuple(COLOURS)), ("shape", SHAPES)):
        times = Counter(getattr(item, by) for item in items)
        for name in names:
            draw, count = rng.random(), times[name]
            if count < len(COUNTS) and draw < _acceptance(len(names))[count]:
                questions.append(_Question(_COUNT.format(a=name), COUNTS[count], COUNTS, "count"))
    return questions


def _unique(items: list[Placed], by: str) -> list[Placed]:
    times = Counter(getattr(item, by) for item in items)
    return [item for item in items if times[getattr(item, by)] == 1]


def _look_up(items: list[Placed]) -> list[_Question]:
    by_shape = [_Question(_COLOUR.format(a=i.shape), i.colour, tuple(COLOURS), "colour") for i in _unique(items, "shape")]
    by_colour = [_Question(_SHAPE.format(a=i.colour), i.shape, SHAPES, "shape") for i in _unique(items, "colour")]
    return by_shape + by_colour


def _exist(rng: np.random.Generator, items: list[Placed]) -> list[_Question]:
    present = sorted({(i.colour, i.shape) for i in items})
    absent = [pair for pair in product(COLOURS, SHAPES) if pair not in set(present)]
    asked = [(present[int(rng.integers(len(present)))], "yes"), (absent[int(rng.integers(len(absent)))], "no")]
    return [_Question(_EXIST.format(a=c, b=s), answer, ("yes", "no"), "exist") for (c, s), answer in asked]


def _named(rng: np.random.Generator, items: list[Placed]) -> list[tuple[str, Placed]]:
    """Objects that one word picks out: their colour or their shape, whichever is unique, either if both are."""
    by_colour, by_shape = _unique(items, "colour"), _unique(items, "shape")
    named = []
    for item in items:
        words = [item.colour] * (item in by_colour) + [item.shape] * (item in by_shape)
        if words:
            named.append((words[int(rng.integers(len(words)))], item))
    return named


def _position(rng: np.random.Generator, items: list[Placed]) -> list[_Question]:
    questions = []
    for name, item in _named(rng, items):
        x, y = item.x / SIZE - 0.5, item.y / SIZE - 0.5
        if abs(x) > CENTRE_MARGIN:
            questions.append(_Question(_SIDE_X.format(a=name), "left" if x < 0 else "right", ("left", "right"), "position_x"))
        if abs(y) > CENTRE_MARGIN:
            questions.append(_Question(_SIDE_Y.format(a=name), "top" if y < 0 else "bottom", ("top", "bottom"), "position_y"))
    return questions


def _relation(rng: np.random.Generator, items: list[Placed], most: int = 4) -> list[_Question]:
    named = _named(rng, items)
    pairs = [(a, b) for a in named for b in named if a[1] is not b[1]]
    by_axis: dict[str, list[_Question]] = {"x": [], "y": []}
    for i in rng.permutation(len(pairs)):
        (name, item), (other_name, other) = pairs[i]
        dx, dy = (item.x - other.x) / SIZE, (item.y - other.y) / SIZE
        if abs(dx) > RELATION_MARGIN:
            text = _RELATION_X.format(a=name, b=other_name)
            by_axis["x"].append(_Question(text, "left" if dx < 0 else "right", ("left", "right"), "relation_x"))
        if abs(dy) > RELATION_MARGIN:
            text = _RELATION_Y.format(a=name, b=other_name)
            by_axis["y"].append(_Question(text, "above" if dy < 0 else "below", ("above", "below"), "relation_y"))
    return by_axis["x"][:most] + by_axis["y"][:most]
