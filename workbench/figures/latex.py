"""The drawn points of a figure as a LaTeX table (package booktabs)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from workbench.figures.point_table import axis_titles, drawn_points, sideways


def points_csv(figure: Any) -> str:
    """Return the drawn points as CSV; numbers have all their digits."""
    return drawn_points(figure).to_csv(index=False)


def latex_table(figure: Any, caption: str, label: str, wide: bool = False) -> str:
    """Return the drawn points as a LaTeX table (package booktabs): a row for each place, a column for each curve.

    A cell has the score and, where one is drawn, its interval.

    Args:
        wide: whether the table goes over both columns of a page.
    """
    points = drawn_points(figure)
    if points.empty:
        return f"% {label}: this figure draws no points\n"
    kinds = set(points["kind"])
    places = next((kind for kind in ("image", "heatmap") if kind in kinds), "")
    if "text" in kinds <= {"text", "heatmap"}:
        places = "text"
    if places:  # a table like the map
        points = points[points["kind"] == places]
    heat, flat = bool(places), sideways(figure)
    row, column, value = ("y", "x", "value") if heat else ("y", "curve", "x") if flat else ("x", "curve", "y")
    if places in ("text", "image"):
        value = "label"
    if "label" in points and not flat and not heat:
        points = points.assign(x=points["label"].where(points["label"].fillna("").ne(""), points["x"]))
    titles = axis_titles(figure)
    rows = [*(["panel"] if "panel" in points else []), row]
    cells = points.assign(cell=[_cell(each, value) for each in points.to_dict("records")])
    cells[column] = cells[column].map(lambda name: _short(name) or titles["x" if flat else "y"] or "value")
    table = cells.pivot_table(index=rows, columns=column, values="cell", aggfunc=" / ".join, sort=False).fillna("--")
    table = table.reset_index().rename(columns={row: titles[row] or row, "panel": "part"})
    table.columns = [_latex(name) for name in table.columns]
    body = [" & ".join(_latex(_short(value)) for value in values) for values in table.itertuples(index=False)]
    star = "*" if wide else ""
    return "\n".join(
        [
            f"\\begin{{table{star}}}",
            "\\centering\\small",
            f"\\begin{{tabular}}{{{'l' * len(rows)}{'r' * (len(table.columns) - len(rows))}}}",
            "\\toprule",
            f"{' & '.join(table.columns)} \\\\",
            "\\midrule",
            *(f"{line} \\\\" for line in body),
            "\\bottomrule",
            "\\end{tabular}",
            f"\\caption{{{_latex(caption)}}}",
            f"\\label{{tab:{re.sub(r'[^A-Za-z0-9:-]+', '-', label)}}}",
            f"\\end{{table{star}}}\n",
        ]
    )


def _cell(row: Mapping[str, Any], value: str) -> str:
    number = row[value]
    if not isinstance(number, int | float) or pd.isna(number):
        return "--" if pd.isna(number) else str(number)
    text = f"{number:.3f}"
    if pd.notna(row.get("low", np.nan)) and pd.notna(row.get("high", np.nan)):
        text += f" [{row['low']:.3f}, {row['high']:.3f}]"
    return text


def _short(value: object) -> str:
    """Return a place on an axis as text, a whole number without a point."""
    return f"{value:.10g}" if isinstance(value, float) else str(value)


LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\N{MINUS SIGN}": "$-$",
    "→": r"$\to$",
}
LATEX |= {letter: f"\\{letter}" for letter in "&%$#_{}"} | {"λ": r"$\lambda$", "·": r"$\cdot$", "<": "$<$", ">": "$>$"}


def _latex(text: object) -> str:
    """Return a text that LaTeX prints as it is."""
    return "".join(LATEX.get(letter, letter) for letter in str(text))
