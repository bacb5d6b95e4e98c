"""A figure for a paper: its look at the width of a column, its points, a LaTeX table, a caption, and a script.

`export` writes all of them side by side; the dashboard offers them one by one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import plotly.graph_objects as go

from workbench.errors import RunError
from workbench.figures import browser
from workbench.figures.caption import Caption
from workbench.figures.latex import latex_table
from workbench.figures.point_table import as_dict, drawn_points, kind_of, needs_json, panel_names, plain_text, sideways
from workbench.figures.redraw import redraw_script
from workbench.files import atomic_file, make_folder

Columns = Literal[1, 2]
WIDTHS: Mapping[int, float] = {1: 3.25, 2: 6.75}  # inches
POINT = browser.PIXELS / 72  # pixels of a point of type
TYPE = round(8 * POINT, 2)
SCREEN_TYPE = 13  # pixels, on screen
SCREEN = 1100  # pixels, width of a figure there
SLIDER = 90  # pixels, height of a slider there
SHRUNK = TYPE / SCREEN_TYPE
FONT = "Helvetica, Arial, Liberation Sans, sans-serif"
LETTER = 0.55 * TYPE  # pixels, mean width of one in a legend
SAMPLE = 46  # pixels, a line in the legend and the space around it
ROW = 1.8 * TYPE  # pixels, height of a row of the legend
FLAT = 0.75  # height of a chart of curves, at most, as a share of its width
FORMS = ("svg", "pdf", "png")  # that a browser makes
MISSING = "SVG, PDF and PNG are not among them, since {}"  # what a command says where there is no browser


def paper_figure(figure: Any, columns: Columns = 1) -> dict[str, Any]:
    """Return a figure as it is printed, as plotly's JSON: on white, in black type of 8 points, as wide as the column.

    Args:
        columns: 1 is 3.25 inches wide, 2 is 6.75.
    """
    printed = go.Figure(figure) if isinstance(figure, Mapping) else go.Figure(figure.to_dict())
    width = round(WIDTHS[columns] * browser.PIXELS)
    height = (printed.layout.height or 320) * SHRUNK
    content = as_dict(printed)
    kinds = {kind_of(trace) for trace in content["data"]}
    over_images = "image" in kinds
    if not sideways(content) and not kinds & {"heatmap", "image"}:  # its height follows from nothing that is drawn
        height = min(height, _height_of_panels(content, width) if panel_names(content) else FLAT * width)
    printed.update_layout(
        width=width,
        height=round(height),
        paper_bgcolor="#ffffff",
        plot_bgcolor="#ffffff",
        font={"family": FONT, "size": TYPE, "color": "#000000"},
        title_font_size=TYPE,
        legend={"font": {"size": TYPE}, "itemwidth": 30, "tracegroupgap": 0},
    )
    if printed.layout.sliders:  # the caption says which step is drawn
        printed.update_layout(height=round(height - SLIDER * SHRUNK), margin_b=8)
    printed.layout.sliders = printed.layout.updatemenus = ()
    margin = {side: printed.layout.margin[side] for side in "lrtb"}
    default = printed.layout.template.layout.margin if printed.layout.template else None
    for side, value in margin.items():
        value = value if value is not None else (default[side] if default is not None else None)
        if value is not None:
            margin[side] = value * SHRUNK
    printed.update_layout(margin={side: value for side, value in margin.items() if value is not None})
    if above := _legend_height(content, width):
        top = printed.layout.margin.t or 0
        printed.update_layout(height=round(height) + max(0, round(above - top)), margin_t=max(top, above))
    axis = {"title_font_size": TYPE, "tickfont_size": TYPE, "gridcolor": "#e4e5e8", "title_standoff": 4}
    printed.update_xaxes(**axis, automargin=True)
    printed.update_yaxes(**axis, automargin=True)
    printed.update_coloraxes(colorbar={"title_font_size": TYPE, "tickfont_size": TYPE, "thickness": 12})
    printed.update_traces(colorbar={"title_font_size": TYPE, "tickfont_size": TYPE}, selector={"type": "heatmap"})
    for note in printed.layout.annotations:
        note.update(font={"size": TYPE, "family": FONT}, xshift=(note.xshift or 0) * SHRUNK)
    drawn: dict[str, Any] = json.loads(printed.to_json())
    for trace in drawn["data"]:
        if over_images and kind_of(trace) == "text" and "size" in trace.get("textfont", {}):
            trace["textfont"]["size"] *= width / SCREEN
        if trace.get("type") == "scattergl":
            trace["type"] = "scatter"  # WebGL would become pixels
        _thinner(trace)
    return drawn


def _height_of_panels(content: Mapping[str, Any], width: float) -> float:
    """Return the height at which the panels of a figure, each below its title, are about as high as wide."""
    across, down = (
        {tuple(axis.get("domain", (0, 1))) for name, axis in content["layout"].items() if name.startswith(letter)}
        for letter in ("xaxis", "yaxis")
    )
    return len(down) * (width / len(across) + 2 * ROW) + 3 * ROW


def _legend_height(content: Mapping[str, Any], width: float) -> float:
    """Return the pixels that a legend above the chart needs, 0 where there is none.

    Its entries stand in columns as wide as the longest one.
    """
    if content["layout"].get("showlegend") is False or content["layout"].get("legend", {}).get("yref") == "container":
        return 0
    names = [
        plain_text(trace.get("name") or "")
        for trace in content["data"]
        if trace.get("showlegend", True) and trace.get("visible", True) is True and kind_of(trace) != "heatmap"
    ]
    names = [name for name in names if name]
    if len(names) < 2:  # plotly shows no legend of a single trace
        return 0
    beside = max(1, int(width // (SAMPLE + LETTER * max(map(len, names)))))
    return ROW * -(-len(names) // beside) + TYPE


def columns_of(figure: Any) -> Columns:
    """Return the width that a figure needs: two columns for words over images, or more than two charts in a row."""
    content = as_dict(figure)
    beside = {
        tuple(axis.get("domain", (0, 1)))
        for name, axis in content["layout"].items()
        if name.startswith("xaxis") and axis.get("anchor", "y") is not None
    }
    kinds = {kind_of(trace) for trace in content["data"]}
    words = {"image", "text"} <= kinds and len(beside) > 1
    return 2 if words or (len(panel_names(content)) > 1 and len(beside) > 2) else 1


def _thinner(trace: dict[str, Any]) -> None:
    """Scale lines and markers down with the type."""
    for path in (("line", "width"), ("marker", "size"), ("error_x", "thickness"), ("error_y", "thickness")):
        part = trace.get(path[0])
        if isinstance(part, dict) and isinstance(part.get(path[1]), int | float):
            part[path[1]] *= SHRUNK


def size_of(printed: Mapping[str, Any]) -> dict[str, float]:
    """Return width, height and font_size of a figure as it is printed, in pixels."""
    return {"width": printed["layout"]["width"], "height": printed["layout"]["height"], "font_size": TYPE}


# --- files ----------------------------------------------------------------------------------------


def file_name(title: str) -> str:
    """Return a title as the name of a file: small letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", plain_text(title).lower()).strip("-")[:80] or "figure"


def text_files(
    figure: Any, name: str, caption: Caption, columns: Columns = 1
) -> dict[str, tuple[str, Callable[[], str]]]:
    """Return {suffix: what it is, and a function that makes it} of the files that need no browser."""
    said = caption.of(figure)
    files: dict[str, tuple[str, Callable[[], str]]] = {
        "csv": ("the drawn points", lambda: drawn_points(figure).to_csv(index=False)),
        "tex": ("LaTeX table (booktabs)", partial(latex_table, figure, said, name, wide=columns == 2)),
        "py": (
            "Python that redraws it from the CSV",
            lambda: redraw_script(figure, name, size_of(paper_figure(figure, columns))),
        ),
        "txt": ("caption", lambda: said + "\n"),
    }
    content = as_dict(figure)
    if needs_json(content, drawn_points(content)):
        files["py"] = ("Python that redraws it from the JSON", files["py"][1])
        files["json"] = ("the whole figure for plotly", lambda: json.dumps(paper_figure(figure, columns)))
    return files


def export(
    folder: Path, figures: Mapping[str, Any], captions: Mapping[str, Caption], columns: Columns | None = None
) -> tuple[list[Path], str]:
    """Write figures for a paper, each in all forms.

    Args:
        folder: made if needed; files of the same name are replaced, others stay.
        figures: {title: figure}.
        captions: {title: caption}.
        columns: for one or for both columns of a page; by default as each figure needs.

    Returns:
        The files, and why there is no SVG, PDF and PNG, "" if there is.
    """
    make_folder(folder)
    names = unique_names(figures)
    widths = {title: columns or columns_of(figure) for title, figure in figures.items()}
    written: list[Path] = []
    for title, figure in figures.items():
        for suffix, (_, make) in text_files(figure, names[title], captions[title], widths[title]).items():
            target = folder / f"{names[title]}.{suffix}"
            with atomic_file(target) as part:
                part.write_text(make(), encoding="utf-8")
            written.append(target)
    if not figures:
        return written, ""
    images: list[Path] = []
    try:
        with browser.Browser() as drawing:
            for title, figure in figures.items():
                printed = paper_figure(figure, widths[title])
                for form in FORMS:
                    target = folder / f"{names[title]}.{form}"
                    with atomic_file(target) as part:
                        part.write_bytes(drawing.draw(printed, form))
                    images.append(target)
    except RunError as error:
        return written + images, str(error)
    return written + images, ""


def unique_names(titles: Iterable[str]) -> dict[str, str]:
    """Return {title: name of its files}; titles that would share a name are numbered."""
    names: dict[str, str] = {}
    for title in titles:
        name, number = file_name(title), 2
        while name in names.values():
            name, number = f"{file_name(title)}-{number}", number + 1
        names[title] = name
    return names
