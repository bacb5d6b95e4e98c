"""The points of a figure as a table: exactly what is drawn, for a file beside the figure."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from html import unescape
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

COLUMNS = ["panel", "curve", "kind", "x", "y", "low", "high", "value", "label"]
BOUNDS = "[%{customdata[0]"  # how a heat map's text for the pointer begins where it has intervals
MARKUP = re.compile(r"<[^>]*>")


def drawn_points(figure: Any) -> pd.DataFrame:
    """Return what a figure draws, one row per point; what is hidden behind a slider or in the legend is left out.

    Args:
        figure: a plotly figure, or its JSON as a dict.

    Returns:
        Columns panel (title of the subplot, or its number), curve, kind (lines, lines+markers, markers, text, bar or
        heatmap), x, y, low and high (the interval, where bars or a band show one), value (of a cell of a heat map),
        label (the words of an axis that writes words at numbers, those of the point itself, or the color of a colored
        patch). Columns without any value are left out. Lines at a constant, such as 0, and photographs have no rows.
        Where curves are drawn beside one another, x is the value (`meta.x` of the trace), not where it is drawn.
    """
    content = as_dict(figure)
    traces = [trace for trace in content["data"] if trace.get("visible", True) is True]
    bands = [trace for trace in traces if trace.get("fill") == "toself"]
    panels = panel_names(content)
    parts = []
    for trace in traces:
        kind = kind_of(trace)
        if trace.get("fill") == "toself" or (kind == "image" and trace.get("z") is None):
            continue
        if kind == "image":
            part = _colors(trace)
        elif kind == "heatmap":
            part = _cells(trace)
        else:
            part = _with_labels(_series(trace, bands), trace, content["layout"])
        parts.append(part.assign(panel=panels.get(trace.get("xaxis", "x"), ""), curve=name_of(trace), kind=kind))
    if not parts:
        return pd.DataFrame(columns=COLUMNS[:5])
    table = pd.concat(parts, ignore_index=True).reindex(columns=COLUMNS)
    empty = [name for name in COLUMNS if name not in ("curve", "kind", "x", "y") and _is_empty(table[name])]
    return table.drop(columns=empty)


def as_dict(figure: Any) -> dict[str, Any]:
    """Return a figure as a dict with keys data and layout, its numbers as arrays."""
    content = figure if isinstance(figure, Mapping) else figure.to_plotly_json()
    decoded: dict[str, Any] = _decoded(content)
    return {"data": list(decoded.get("data", ())), "layout": decoded.get("layout", {})}


def _decoded(value: Any) -> Any:
    if isinstance(value, Mapping):
        if "bdata" in value:
            array = np.frombuffer(base64.b64decode(value["bdata"]), np.dtype(value["dtype"]))
            shape = value.get("shape")
            return array if shape is None else array.reshape([int(size) for size in str(shape).split(",")])
        return {key: _decoded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_decoded(each) for each in value]
    return value


def kind_of(trace: Mapping[str, Any]) -> str:
    """Return how a trace is drawn: its mode, if it has one, else its type."""
    kind = str(trace.get("type", "scatter"))
    return str(trace.get("mode") or "lines+markers") if kind in ("scatter", "scattergl") else kind


def name_of(trace: Mapping[str, Any]) -> str:
    """Return the name of a trace without markup."""
    return plain_text(trace.get("name") or "")


def plain_text(text: object) -> str:
    """Return a text of a figure without markup, and with the characters that were escaped in it."""
    return unescape(MARKUP.sub("", str(text).replace("<br>", " "))).strip()


def panel_names(content: Mapping[str, Any]) -> dict[str, str]:
    """Return {x axis: title of its subplot}; {} for a figure with a single one.

    `make_subplots` writes titles as annotations, in the order of the subplots; where they are missing, a number stands
    for the subplot.
    """
    layout = content["layout"]
    pairs = dict.fromkeys(
        (trace.get("xaxis", "x"), trace.get("yaxis", "y")) for trace in content["data"] if "type" in trace or trace
    )
    if len(pairs) < 2:
        return {}
    names = {}
    for number, (x, y) in enumerate(pairs, start=1):
        left, right = _domain(layout, x)
        _, top = _domain(layout, y)
        over = [
            note
            for note in layout.get("annotations", ())
            if note.get("xref") == note.get("yref") == "paper"
            and abs(float(note.get("x", -1)) - (left + right) / 2) < 0.02
            and abs(float(note.get("y", -1)) - top) < 0.02
        ]
        names[x] = plain_text(over[0]["text"]) if over else f"panel {number}"
    return names


def _domain(layout: Mapping[str, Any], axis: str) -> tuple[float, float]:
    """Return from where to where an axis goes, as shares of the figure."""
    low, high = layout.get(f"{axis[0]}axis{axis[1:]}", {}).get("domain", (0.0, 1.0))
    return float(low), float(high)


def _series(trace: Mapping[str, Any], bands: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return the points of a trace with their intervals."""
    meta = trace.get("meta")
    x = _values(meta["x"] if isinstance(meta, Mapping) and "x" in meta else trace.get("x"))
    y = _values(trace.get("y"))
    count = max(len(x), len(y))
    x, y = (values or list(range(count)) for values in (x, y))
    part = pd.DataFrame({"x": x, "y": y})
    texts = trace.get("text")
    if "text" in kind_of(trace) and texts is not None and not isinstance(texts, str):
        part["label"] = [plain_text(text) for text in texts]
    for axis in ("y", "x"):
        bar = trace.get(f"error_{axis}")
        if bar and bar.get("array") is not None and bar.get("visible", True):
            middle = pd.to_numeric(part[axis])
            above = np.asarray(bar["array"], float)
            below = above if bar.get("arrayminus") is None else np.asarray(bar["arrayminus"], float)
            return part.assign(low=middle - below, high=middle + above)
    group = trace.get("legendgroup") or trace.get("name")
    for band in bands:
        same = band.get("legendgroup") == group and all(
            band.get(axis) == trace.get(axis) for axis in ("xaxis", "yaxis")
        )
        half = len(_values(band["x"])) // 2
        if same and _values(band["x"])[:half] == part["x"].tolist():
            edge = np.asarray(band["y"], float)
            return part.assign(low=edge[half:][::-1], high=edge[:half])
    return part


def _values(values: Any) -> list[Any]:
    """Return the values along an axis; those of an axis with two levels as "outer, inner"."""
    if values is None:
        return []
    values = list(values)
    if len(values) == 2 and all(isinstance(level, list | np.ndarray) for level in values):
        return [", ".join(plain_text(level) for level in levels) for levels in zip(*values, strict=True)]
    return [plain_text(value) if isinstance(value, str) else _plain(value) for value in values]


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _with_labels(part: pd.DataFrame, trace: Mapping[str, Any], layout: Mapping[str, Any]) -> pd.DataFrame:
    """Add the words that an axis writes at numbers."""
    axis = trace.get("xaxis", "x")
    settings = layout.get(f"xaxis{axis[1:]}", {})
    ticks, words = settings.get("tickvals"), settings.get("ticktext")
    if "label" in part or ticks is None or words is None or not pd.api.types.is_numeric_dtype(part["x"]):
        return part
    if all(plain_text(word) == f"{tick:g}" for tick, word in zip(ticks, words, strict=True)):
        return part
    nearest = [int(np.argmin(np.abs(np.asarray(ticks, float) - x))) for x in part["x"]]
    names = [
        plain_text(words[n]) if abs(float(ticks[n]) - x) < 0.5 else "" for n, x in zip(nearest, part["x"], strict=True)
    ]
    return part.assign(label=names)


def _cells(trace: Mapping[str, Any]) -> pd.DataFrame:
    """Return the cells of a heat map, row by row; with their intervals where the pointer shows them."""
    z = pd.DataFrame(trace["z"]).to_numpy(float)
    y, x = (_centers(_values(trace.get(axis)), size) for axis, size in zip("yx", z.shape, strict=True))
    part = pd.DataFrame({"x": x * len(y), "y": np.repeat(np.array(y, dtype=object), len(x)), "value": z.ravel()})
    custom = trace.get("customdata")
    if custom is not None and BOUNDS in str(trace.get("hovertemplate", "")):
        bounds = np.asarray(custom, object).reshape(len(part), -1)[:, :2].astype(float)
        part = part.assign(low=bounds[:, 0], high=bounds[:, 1])
    return part.dropna(subset="value", ignore_index=True)


def _colors(trace: Mapping[str, Any]) -> pd.DataFrame:
    """Return the colors of the patches of an image that is drawn from numbers, row by row."""
    z = np.asarray(trace["z"])
    rows, columns = z.shape[:2]
    x, y = (trace.get(f"{axis}0") or 0 for axis in "xy")
    dx, dy = (trace.get(f"d{axis}") or 1 for axis in "xy")
    return pd.DataFrame(
        {
            "x": [x + dx * n for n in range(columns)] * rows,
            "y": np.repeat([y + dy * n for n in range(rows)], columns),
            "label": ["#" + "".join(f"{int(part):02x}" for part in color[:3]) for color in z.reshape(-1, z.shape[2])],
        }
    )


def _centers(places: list[Any], size: int) -> list[Any]:
    """Return the places of the cells along an axis, for which plotly also takes their numbers or their edges."""
    if len(places) == size + 1:
        return [(low + high) / 2 for low, high in pairwise(places)]
    return places or list(range(size))


def _is_empty(column: pd.Series) -> bool:
    return bool((column.isna() | (column.astype(str) == "")).all())


def zero_line(layout: Mapping[str, Any]) -> bool:
    """Return whether a figure has a line at 0, which stands for no difference."""
    return any(
        shape.get("type") == "line"
        and (shape.get("y0") == shape.get("y1") == 0 or shape.get("x0") == shape.get("x1") == 0)
        for shape in layout.get("shapes", ())
    )


def sideways(figure: Any) -> bool:
    """Return whether the scores of a figure are along x, with a row of names along y."""
    traces = as_dict(figure)["data"]
    return any(trace.get("error_x", {}).get("array") is not None for trace in traces)


def axis_titles(figure: Any) -> dict[str, str]:
    """Return {x or y: title of the axis}, the first one where there are several."""
    layout = as_dict(figure)["layout"]
    titles = {}
    for side in ("x", "y"):
        axes = [axis for name, axis in layout.items() if re.fullmatch(rf"{side}axis\d*", name)]
        texts = [plain_text(axis.get("title", {}).get("text") or "") for axis in axes]
        titles[side] = next((title for title in texts if title), "")
    return titles


def needs_json(content: Mapping[str, Any], points: pd.DataFrame) -> bool:
    """Return whether the points of a figure do not suffice to draw it again: it has images, or no points."""
    return points.empty or any(kind_of(trace) == "image" for trace in content["data"])
