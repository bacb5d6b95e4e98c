"""Pairs of scenes of `shapes` that differ in one attribute of one object, or in the places of two."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from PIL import Image

from workbench.data.scenes import CENTER_MARGIN, RELATION_MARGIN
from workbench.data.shapes import COLORS, SHAPES, SIZE, Placed, draw_items, layout
from workbench.data.twins.select import MOST
from workbench.errors import DataError

Axis = Literal["x", "y"]
Changed = tuple[tuple[str, str], list[Placed]]
"""The answers before and after a change, and the objects after it."""


@dataclass(frozen=True)
class Edited:
    """A scene, the same with one attribute changed, and a question about both.

    Attributes:
        kind: the question, a key of EDITS.
        a: the object that is asked about.
        b: the object that it is related to, or "".
        answers: to the question, of both images.
        images: the scene as it is, and changed.
    """

    kind: str
    a: str
    b: str
    answers: tuple[str, str]
    images: tuple[Image.Image, Image.Image]


def edited(
    seed: int,
    kind: str,
    wanted: Counter[tuple[str, str]],
    taken: set[int],
    objects: int = 3,
    apart: float = RELATION_MARGIN,
) -> Iterator[Edited]:
    """Yield one edit of a scene of `shapes:test` for each time that the names (a, b) are wanted.

    Args:
        seed: of the scenes.
        kind: a key of EDITS.
        wanted: {(a, b): how often}; b is "" if the question names one object.
        taken: numbers of the scenes that are not used, to which those that are used are added.
        objects: objects of a scene, at most.
        apart: least distance of a and b along the axis of a relation, as a share of the image.

    Raises:
        DataError: the scenes do not have them all.
    """
    missing = Counter(wanted)
    for index in range(MOST):
        if not missing.total():
            return
        items = layout("test", seed, index)
        if index in taken or len(items) > objects:
            continue
        for a, b in [pair for pair, count in missing.items() if count]:
            change = EDITS[kind](items, a, b, apart)
            if change is not None:
                answers, changed = change
                missing[a, b] -= 1
                taken.add(index)
                first, second = (draw_items("test", seed, index, scene) for scene in (items, changed))
                yield Edited(kind, a, b, answers, (first, second))
                break
    raise DataError(f"{MOST} scenes do not have all pairs of a twin: expected fewer pairs")


def _named(items: Sequence[Placed], name: str) -> int | None:
    """Return the place of the only object that a name fits, such as "red" or "red circle"; None if there is none."""
    words = set(name.split())
    fitting = [place for place, item in enumerate(items) if words <= {item.color, item.shape}]
    return fitting[0] if len(fitting) == 1 else None


def _with(items: Sequence[Placed], changes: dict[int, Placed]) -> list[Placed]:
    return [changes.get(place, item) for place, item in enumerate(items)]


def _moved(items: Sequence[Placed], a: str, axis: Axis, sides: tuple[str, str]) -> Changed | None:
    """Move an object to the opposite side of the image, if it touches no other one there."""
    if (place := _named(items, a)) is None:
        return None
    item = items[place]
    at = getattr(item, axis)
    there = replace(item, x=SIZE - item.x) if axis == "x" else replace(item, y=SIZE - item.y)
    others = [other for other in items if other is not item]
    free = all(np.hypot(o.x - there.x, o.y - there.y) > o.radius + there.radius for o in others)
    if abs(at / SIZE - 0.5) <= CENTER_MARGIN or not free:
        return None
    return sides if at < SIZE / 2 else (sides[1], sides[0]), _with(items, {place: there})


def _exchanged(
    items: Sequence[Placed], a: str, b: str, axis: Axis, sides: tuple[str, str], apart: float
) -> Changed | None:
    """Exchange the places and sizes of two objects that are more than a share of the image apart."""
    one, two = _named(items, a), _named(items, b)
    if one is None or two is None or one == two:
        return None
    first, second = items[one], items[two]
    gap = getattr(first, axis) - getattr(second, axis)
    if abs(gap) <= apart * SIZE:
        return None
    changes = {
        one: replace(first, x=second.x, y=second.y, radius=second.radius),
        two: replace(second, x=first.x, y=first.y, radius=first.radius),
    }
    return sides if gap < 0 else (sides[1], sides[0]), _with(items, changes)


def _replaced(items: Sequence[Placed], a: str) -> Changed | None:
    """Change color and shape of an object, so that it is none of its kind any more."""
    if (place := _named(items, a)) is None:
        return None
    other = replace(items[place], color=_next(COLORS, items[place].color), shape=_next(SHAPES, items[place].shape))
    return ("yes", "no"), _with(items, {place: other})


def _recolored(items: Sequence[Placed], a: str) -> Changed | None:
    """Change the color of the only object of a shape."""
    if (place := _named(items, a)) is None:
        return None
    color = _next(COLORS, items[place].color)
    return (items[place].color, color), _with(items, {place: replace(items[place], color=color)})


def _next(values: Sequence[str] | dict[str, tuple[int, int, int]], value: str) -> str:
    names = list(values)
    return names[(names.index(value) + 1) % len(names)]


EDITS: dict[str, Callable[[Sequence[Placed], str, str, float], Changed | None]] = {
    "side_x": lambda items, a, b, apart: _moved(items, a, "x", ("left", "right")),
    "side_y": lambda items, a, b, apart: _moved(items, a, "y", ("top", "bottom")),
    "relation_x": lambda items, a, b, apart: _exchanged(items, a, b, "x", ("left", "right"), apart),
    "relation_y": lambda items, a, b, apart: _exchanged(items, a, b, "y", ("above", "below"), apart),
    "exist": lambda items, a, b, apart: _replaced(items, a),
    "color": lambda items, a, b, apart: _recolored(items, a),
}
