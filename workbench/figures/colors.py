"""One color per model: a hue for each variant, a lightness for each of its seeds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from workbench.figures.template import COLORS

# Okabe and Ito's, as in COLORS, then hues between them
HUES = (*COLORS, "#7b61c4", "#a0522d", "#6f7f00", "#c2185b", "#00838f", "#5c6bc0")
BRIGHTNESS = (1.0, 0.0, 0.66, 0.33, 0.83, 0.16)  # of the further seeds of a variant, in turn; the first has the hue
DARKEST, BRIGHTEST = 0.125, 0.295  # relative luminance with at least 3 : 1 on the dark and on the white background

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
        colors |= {
            key: _of_brightness(hue, BRIGHTNESS[(seed - 1) % len(BRIGHTNESS)]) if seed else hue
            for seed, key in enumerate(keys)
        }
        colors.setdefault(variant, hue)
    return colors


def _of_brightness(color: str, share: float) -> str:
    """Return a color with another brightness: `share` of the way from DARKEST to BRIGHTEST.

    It is mixed with black or with white in linear light, so that it has exactly that relative luminance (WCAG).
    """
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    is_now = sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    wanted = DARKEST + share * (BRIGHTEST - DARKEST)
    if wanted < is_now:
        linear = [part * wanted / is_now for part in linear]
    else:
        linear = [part + (1 - part) * (wanted - is_now) / (1 - is_now) for part in linear]
    parts = [12.92 * part if part <= 0.0031308 else 1.055 * part ** (1 / 2.4) - 0.055 for part in linear]
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
