"""A script of a few lines that draws the points of a figure again, from the CSV beside it."""

from __future__ import annotations

import json
import pprint
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from workbench.figures.point_table import (
    as_dict,
    drawn_points,
    kind_of,
    name_of,
    needs_json,
    panel_names,
    plain_text,
    sideways,
    zero_line,
)

AXIS = ("title", "type", "range", "autorange", "tickvals", "ticktext", "dtick", "categoryorder", "categoryarray")


def redraw_script(figure: Any, name: str, size: Mapping[str, float]) -> str:
    """Return lines of Python that draw the points of `NAME.csv` again; they need pandas and plotly alone.

    A figure with images has no such points; its script reads `NAME.json`, the whole figure.

    Args:
        size: width, height and font_size, in pixels.
    """
    content = as_dict(figure)
    points = drawn_points(content)
    if needs_json(content, points):
        return (
            f'"""Draw {name}.json."""\n\nimport plotly.io as pio\n\nfigure = pio.read_json("{name}.json")\n'
            f"figure.update_layout(**{dict(size)!r})\n"
            f"figure.write_html('{name}.html')\n"
        )
    panels = "panel" in points
    text = [f'"""Draw the points of {name}.csv."""', "", "import pandas as pd", "import plotly.graph_objects as go"]
    text += ["from plotly.subplots import make_subplots"] * panels
    keep = "keep_default_na=False, na_values=['']"
    text += ["", f'points = pd.read_csv("{name}.csv", {keep}).fillna({{"curve": ""}})']
    if any("<" in str(value) for value in points.select_dtypes(["object", "string"]).to_numpy().ravel()):
        text += ['points = points.replace("<", "&lt;", regex=True)  # plotly would read markup']
    if panels:
        grid = _grid(content)
        text += [
            f"panels = {_literal(grid.places)}",
            f"figure = make_subplots({grid.rows}, {grid.columns}, subplot_titles={_literal(grid.titles)})",
        ]
    else:
        text += ["figure = go.Figure()"]
    text += [f"looks = {_literal(_looks(content))}"]
    keys = "['panel', 'curve', 'kind']" if panels else "['curve', 'kind']"
    text += [
        f"for {'panel, ' if panels else ''}curve, kind in points[{keys}].drop_duplicates().itertuples(index=False):"
    ]
    same = "(points['curve'] == curve) & (points['kind'] == kind)" + " & (points['panel'] == panel)" * panels
    text += [f"    part = points[{same}]"]
    if panels:
        text += ["    row, col = panels[panel]"]
    at = ", row=row, col=col" if panels else ""
    kinds = set(points["kind"])
    if "heatmap" in kinds:
        text += [
            "    if kind == 'heatmap':",
            "        cells = part.pivot(index='y', columns='x', values='value')",
            "        cells = cells.reindex(index=part['y'].unique(), columns=part['x'].unique())",
            "        x, y = cells.columns.tolist(), cells.index.tolist()",
            f"        figure.add_heatmap(x=x, y=y, z=cells, coloraxis='coloraxis'{at})",
            "        continue",
        ]
    if kinds - {"heatmap"}:
        text += ["    drawn = dict(x=part['x'], y=part['y'], name=curve)"]
        if "low" in points:
            side = "x" if sideways(content) else "y"
            text += [
                "    if part['low'].notna().any():",
                f"        spread = dict(array=part['high'] - part['{side}'], arrayminus=part['{side}'] - part['low'])",
                f"        drawn |= dict(error_{side}=spread)",
            ]
        if "label" in points:
            text += ["    drawn |= dict(text=part['label'])"]
        if "bar" in kinds:
            text += [
                "    if kind == 'bar':",
                f"        figure.add_bar(**drawn, marker_color=looks[curve]['color']{at})",
                "        continue",
            ]
        text += [
            "    look = looks[curve]",
            "    colors = dict(line=dict(color=look['color'], dash=look['dash']), marker_color=look['color'])",
            f"    figure.add_scatter(**drawn, **colors, mode=kind{at})",
        ]
    text += [
        f"figure.update_layout(template='simple_white', **{dict(size)!r})",
    ]
    if "heatmap" in kinds:
        text += [f"figure.update_layout(coloraxis_colorscale={_literal(_scale(content))})"]
    for axis, settings in _axes(content).items():
        text += [f"figure.update_layout({axis}={_literal(settings)})"]
    if zero_line(content["layout"]):
        text += [f"figure.add_{'vline(x' if sideways(content) else 'hline(y'}=0, line_dash='dot')"]
    return "\n".join([*text, f"figure.write_html('{name}.html')"]) + "\n"


def _literal(value: object) -> str:
    return pprint.pformat(_escaped(value), width=100, compact=True, sort_dicts=False)


def _escaped(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace("<", "&lt;")
    if isinstance(value, dict):
        return {_escaped(key): _escaped(each) for key, each in value.items()}
    return [_escaped(each) for each in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class _Grid:
    rows: int
    columns: int
    places: dict[str, tuple[int, int]]
    titles: list[str]


def _grid(content: Mapping[str, Any]) -> _Grid:
    """Return where the subplots of a figure are, from the domains of their axes."""
    layout, names = content["layout"], panel_names(content)
    corners = {}
    for trace in content["data"]:
        x, y = trace.get("xaxis", "x"), trace.get("yaxis", "y")
        left = layout.get(f"xaxis{x[1:]}", {}).get("domain", (0, 1))[0]
        top = layout.get(f"yaxis{y[1:]}", {}).get("domain", (0, 1))[1]
        corners[names[x]] = (round(float(left), 3), -round(float(top), 3))
    lefts, tops = (sorted({corner[side] for corner in corners.values()}) for side in (0, 1))
    places = {name: (tops.index(top) + 1, lefts.index(left) + 1) for name, (left, top) in corners.items()}
    by_place = {place: name for name, place in places.items()}
    titles = [by_place.get((row, column), "") for row in range(1, len(tops) + 1) for column in range(1, len(lefts) + 1)]
    return _Grid(len(tops), len(lefts), places, titles)


def _looks(content: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return {curve: its color and dash}."""
    looks: dict[str, dict[str, str]] = {}
    for trace in content["data"]:
        if trace.get("fill") == "toself" or kind_of(trace) == "heatmap":
            continue
        marker, line = trace.get("marker") or {}, trace.get("line") or {}
        color = line.get("color") or marker.get("color")
        plain = color if isinstance(color, str) else "#000000"
        looks.setdefault(name_of(trace), {"color": plain, "dash": line.get("dash") or "solid"})
    return looks


def _scale(content: Mapping[str, Any]) -> Any:
    scales = [trace.get("colorscale") for trace in content["data"] if kind_of(trace) == "heatmap"]
    scale = content["layout"].get("coloraxis", {}).get("colorscale") or next(filter(None, scales), "Viridis")
    return scale if isinstance(scale, str) else [list(step) for step in scale]


def _axes(content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return {axis of the layout: its settings that a reader sees}."""
    axes = {}
    for name, axis in content["layout"].items():
        if re.fullmatch(r"[xy]axis\d*", name):
            settings = {key: axis[key] for key in AXIS if axis.get(key) is not None}
            if "title" in settings:
                settings["title"] = plain_text(settings["title"].get("text") or "")
            axes[name] = json.loads(json.dumps(settings, default=lambda values: np.asarray(values).tolist()))
    return {name: settings for name, settings in axes.items() if settings}
