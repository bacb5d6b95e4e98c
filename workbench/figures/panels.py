"""Images and colored patch grids side by side, in rows, with a slider if there are several sets of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from textwrap import wrap

import numpy as np
import plotly.graph_objects as go
from jaxtyping import UInt8
from plotly.subplots import make_subplots

from workbench.figures.maps import image_axes, png

PAGE_WIDTH = 1050  # pixels of a figure on a page of the usual width
LARGEST = 300  # pixels of a panel's longer side, at most
TITLE_LINE = 17  # pixels


@dataclass(frozen=True)
class Panel:
    """An image, or the colors of a patch grid.

    Attributes:
        title: the text above it, in which `<br>` begins a new line.
        pixels: bytes (height, width, 3); of a patch grid, one pixel for each patch.
        box: left, top, right, bottom of these pixels in units of the image that they show, so that a grid that covers
            another part of an image, or has patches that are not square, is drawn in its true shape.
    """

    title: str
    pixels: UInt8[np.ndarray, "h w 3"]
    box: tuple[float, float, float, float]


Rows = Sequence[Sequence[Panel]]


def wrapped(text: str, width: int) -> str:
    """Return plain text in lines of at most `width` characters, at most three, for the title of a panel."""
    lines = wrap(" ".join(text.split()), max(width, 8))
    shown = lines[:3] if len(lines) <= 3 else [*lines[:2], lines[2][: width - 1] + "…"]
    return "<br>".join(map(escape, shown))


def panels(sets: Mapping[str, Rows], *, images: int) -> go.Figure:
    """Draw sets of panels, one set at a time, chosen by a slider.

    Args:
        sets: {name in the slider: rows of panels}; all sets have rows of the same lengths, and the titles of the first
            one are shown for all.
        images: of how many images the panels of a set are.
    """
    rows = next(iter(sets.values()))
    columns = max(map(len, rows))
    titles = [row[column].title if column < len(row) else "" for row in rows for column in range(columns)]
    side = min(LARGEST, PAGE_WIDTH / columns)
    drawn = [max((_shape(panel) for row in each for panel in row), default=1.0) for each in sets.values()]
    heights = side * max(drawn)
    above = 10 + TITLE_LINE * max(title.count("<br>") + 1 for title in titles)
    height = len(rows) * (heights + above)
    figure = make_subplots(
        len(rows),
        columns,
        subplot_titles=titles,
        horizontal_spacing=min(0.02, 0.2 / columns),
        vertical_spacing=above / height if len(rows) > 1 else 0,
    )
    figure.update_annotations(font_size=12)
    for number, each in enumerate(sets.values()):
        for at, row in enumerate(each, start=1):
            for column, panel in enumerate(row, start=1):
                _draw(figure, panel, number, at, column)
    figure.update_layout(
        template="workbench",
        height=int(height + 24 + (90 if len(sets) > 1 else 0)),
        hovermode=False,
        margin={"t": above + 8, "l": 8, "r": 8, "b": 8},
        meta={"images": images},
    )
    if len(sets) > 1:
        figure.update_layout(sliders=[_slider(figure, list(sets))])
    return figure


def _shape(panel: Panel) -> float:
    left, top, right, bottom = panel.box
    return min(2.0, (bottom - top) / (right - left))


def _draw(figure: go.Figure, panel: Panel, number: int, row: int, column: int) -> None:
    """Draw a panel of set `number`; of the first set only it is visible."""
    left, top, right, bottom = panel.box
    height, width = panel.pixels.shape[:2]
    dx, dy = (right - left) / width, (bottom - top) / height
    figure.add_image(
        source=png(panel.pixels),
        x0=left + dx / 2,
        y0=top + dy / 2,
        dx=dx,
        dy=dy,
        hoverinfo="skip",
        meta=number,
        visible=number == 0,
        row=row,
        col=column,
    )
    if number == 0:
        image_axes(figure, (bottom, right), row, column, start=(top, left))


def _slider(figure: go.Figure, names: Sequence[str]) -> dict[str, object]:
    steps = [
        {"label": name, "method": "restyle", "args": [{"visible": [trace.meta == number for trace in figure.data]}]}
        for number, name in enumerate(names)
    ]
    return {"active": 0, "pad": {"t": 8}, "currentvalue": {"prefix": "image "}, "steps": steps}
