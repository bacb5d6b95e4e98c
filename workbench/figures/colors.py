"""One color per model: a hue for each variant, a lightness for each of its seeds."""

from __future__ import annotations

import colorsys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from workbench.figures.template import COLORS

# Okabe and Ito's, as in COLORS, then hues between them
HUES = (*COLORS, "#7b61c4", "#a0522d", "#6f7f00", "#c2185b", "#00838f", "#5c6bc0")
LIGHTNESS = (0.0, 0.12, -0.1, 0.2, -0.16, 0.26)  # of the seeds of a variant, in turn; the first has the hue itself

_chosen: ContextVar[Mapping[str, str]] = ContextVar("colors of models", default={})  # noqa: B039  (never changed)


def model_colors(variants: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Return {key or variant: #rrggbb}: the colors of all models of a runs folder and of their variants.

    They depend on the folder alone, not on what is chosen, so that a model looks the same on every page.

    Args:
        variants: {variant: keys of its models}, in a fixed order.
    """
    colors: dict[str, str] = {}
    for number, (variant, keys) in enumerate(variants.items()):
        hue = HUES[number % len(HUES)]
        colors |= {key: _lighter(hue, LIGHTNESS[seed % len(LIGHTNESS)]) for seed, key in enumerate(keys)}
        colors.setdefault(variant, hue)
    return colors


def _lighter(color: str, by: float) -> str:
    """Return a color with its lightness (0 to 1) changed by `by`, kept where it is visible on white and on black."""
    red, green, blue = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    hue, lightness, saturation = colorsys.rgb_to_hls(red, green, blue)
    parts = colorsys.hls_to_rgb(hue, min(0.78, max(0.17, lightness + by)) if by else lightness, saturation)
    return "#" + "".join(f"{round(255 * part):02x}" for part in parts)


@contextmanager
def colored(colors: Mapping[str, str]) -> Iterator[None]:
    """Let every figure that is drawn inside give the models that it names these colors."""
    token = _chosen.set(colors)
    try:
        yield
    finally:
        _chosen.reset(token)


def color_of(model: object, number: int) -> str:
    """Return the color of a model: the chosen one (see `colored`), else that of its place in the figure."""
    return _chosen.get().get(str(model), COLORS[number % len(COLORS)])
