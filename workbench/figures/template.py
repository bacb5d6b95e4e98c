"""The plotly template of all figures, its colors, the look of intervals, and figures as HTML."""

from __future__ import annotations

import re

import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
from plotly.offline import get_plotlyjs

# color-blind-safe colors (Okabe and Ito), darkened where necessary to be readable on white and on black
COLORS = ("#0072b2", "#d55e00", "#009e73", "#b8860b", "#cc79a7", "#4898cf")
DASHES = ("solid", "dash", "dot", "dashdot")
GRAY = "#8a8f98"
LABEL = 20  # letters of a row's label in one line
EXPORT = {"showSendToCloud": False, "displaylogo": False, "toImageButtonOptions": {"format": "svg"}}

pio.templates["workbench"] = go.layout.Template(
    layout={
        "colorway": COLORS,
        "font": {"family": "Inter, system-ui, sans-serif", "size": 13, "color": GRAY},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 60, "r": 16, "t": 36, "b": 48},
        "hovermode": "x unified",
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "xaxis": {
            "gridcolor": "rgba(138,143,152,0.18)",
            "zeroline": False,
            "ticks": "outside",
            "tickcolor": "rgba(138,143,152,0.5)",
        },
        "yaxis": {"gridcolor": "rgba(138,143,152,0.18)", "zeroline": False},
    }
)

Figure = go.Figure


def new_figure(**layout: object) -> go.Figure:
    """Return an empty figure with the workbench's template."""
    return go.Figure(layout={"template": "workbench", **layout})


def plain_name(name: str) -> str:
    """Return a name in which plotly sees no markup."""
    return name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def two_lines(name: str) -> str:
    """Return a name as the label of a row: a long one in two lines, so that rows have room on a phone."""
    ends = [match.end() for match in re.finditer(r"[\s_/:-]+", name) if match.end() < len(name)]
    if len(name) <= LABEL or not ends:
        return plain_name(name)
    end = min(ends, key=lambda end: abs(end - len(name) / 2))
    return f"{plain_name(name[:end].rstrip())}<br>{plain_name(name[end:])}"


def translucent(color: str, alpha: float) -> str:
    """Return the color `#rrggbb` with an alpha from 0 to 1, for bands."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def error_bars(part: pd.DataFrame) -> dict[str, object]:
    """Return plotly's error bars for intervals, in a gray that is visible on white, on black and on colored bars."""
    return {
        "type": "data",
        "array": part["high"] - part["score"],
        "arrayminus": part["score"] - part["low"],
        "width": 3,
        "thickness": 1.5,
        "color": GRAY,
    }


def band(figure: go.Figure, x: pd.Series, low: pd.Series, high: pd.Series, fill: str, group: str, **at: int) -> None:
    """Draw an interval along a curve as a band, which a click in the legend shows or hides together with the curve."""
    figure.add_scatter(
        x=pd.concat([x, x[::-1]]),
        y=pd.concat([high, low[::-1]]),
        mode="lines",  # without it, plotly adds markers to short lines
        fill="toself",
        fillcolor=fill,
        line={"width": 0},
        legendgroup=group,
        showlegend=False,
        hoverinfo="skip",
        **at,
    )


def javascript() -> str:
    """Return the source of plotly.js, for a page that needs no network."""
    return get_plotlyjs()
