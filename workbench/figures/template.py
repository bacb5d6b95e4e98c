"""The one plotly template, its colours, how an interval looks, and figures as HTML."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
from plotly.offline import get_plotlyjs

# A colour-blind-safe order (Okabe and Ito), darkened where needed to read on white and on black.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b8860b", "#cc79a7", "#56a0d3")
DASHES = ("solid", "dash", "dot", "dashdot")
GREY = "#8a8f98"
EXPORT = {"showSendToCloud": False, "displaylogo": False, "toImageButtonOptions": {"format": "svg"}}

pio.templates["workbench"] = go.layout.Template(
    layout={
        "colorway": COLOURS,
        "font": {"family": "Inter, system-ui, sans-serif", "size": 13, "color": GREY},
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
    """An empty figure in the workbench's template."""
    return go.Figure(layout={"template": "workbench", **layout})


def translucent(colour: str, alpha: float) -> str:
    """`#rrggbb` with an alpha of 0..1, for bands."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def error_bars(part: pd.DataFrame) -> dict[str, object]:
    """Intervals as error bars, in a grey that reads on white, on black and on the bars themselves."""
    return {
        "type": "data",
        "array": part["high"] - part["score"],
        "arrayminus": part["score"] - part["low"],
        "width": 3,
        "thickness": 1.5,
        "color": GREY,
    }


def band(figure: go.Figure, x: pd.Series, low: pd.Series, high: pd.Series, fill: str, group: str, **at: int) -> None:
    """Draw an interval along a curve as a band that comes and goes with the curve in the legend."""
    figure.add_scatter(
        x=pd.concat([x, x[::-1]]),
        y=pd.concat([high, low[::-1]]),
        mode="lines",  # plotly adds markers to short lines by itself
        fill="toself",
        fillcolor=fill,
        line={"width": 0},
        legendgroup=group,
        showlegend=False,
        hoverinfo="skip",
        **at,
    )


def javascript() -> str:
    """The source of plotly.js, for a page that needs no network."""
    return get_plotlyjs()


def html_figure(figure: go.Figure, name: str) -> str:
    """A figure as a piece of a page that holds `javascript` already; nothing in it can be uploaded."""
    return str(
        figure.to_html(full_html=False, include_plotlyjs=False, config=EXPORT | {"responsive": True}, div_id=name)
    )
