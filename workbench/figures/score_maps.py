"""Heat maps of scores: layers against layers of VFMs, and layers against heads."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots


def matrix_maps(table: pd.DataFrame, *, title: str, difference: bool = False) -> go.Figure:
    """Draw scores of layers of models against layers of VFMs as heat maps, a column per model and a row per VFM.

    All maps share one color scale; hovering shows the interval.

    Args:
        table: columns model, vfm, layer, vfm_layer, score, low, high, n_images; also null_mean and null_q95, which are
            shown in the title of a map, or, for a difference, p_holm.
        title: name of the score, shown at the color bar.
        difference: whether the scores are differences; entries with p_holm below .05 whose interval excludes 0 then
            have a dot.
    """
    models, vfms = list(dict.fromkeys(table["model"])), list(dict.fromkeys(table["vfm"]))
    pairs = [(model, vfm) for vfm in vfms for model in models]
    panels = [(model, vfm, table[(table["model"] == model) & (table["vfm"] == vfm)]) for model, vfm in pairs]
    titles = [
        f"{model} · {vfm}" + ("" if difference or part.empty else f"<br>{_chance(part)}") for model, vfm, part in panels
    ]
    lines = max(8, table["layer"].nunique())
    height = (24 * lines + 110) * len(vfms) + 60
    figure = make_subplots(
        len(vfms),
        len(models),
        subplot_titles=titles,
        shared_yaxes=True,
        horizontal_spacing=0.04,
        vertical_spacing=110 / height,
    )
    extra = ["p_holm"] if difference else ["null_mean", "null_q95"]
    hover = "Holm p %{customdata[3]:.3g}" if difference else "null mean %{customdata[3]:.3f}, 95 % %{customdata[4]:.3f}"
    for number, (_, _, part) in enumerate(panels):
        columns = ("score", "low", "high", "n_images", *extra)
        wide = {column: part.pivot(index="layer", columns="vfm_layer", values=column) for column in columns}
        place = {"row": number // len(models) + 1, "col": number % len(models) + 1}
        marks = _marks(wide) if difference else None
        figure.add_heatmap(
            x=[str(layer) for layer in wide["score"].columns],
            y=[str(layer) for layer in wide["score"].index],
            z=wide["score"].to_numpy(),
            coloraxis="coloraxis",
            text=marks,
            texttemplate="%{text}" if difference else None,
            textfont={"color": "black"},
            customdata=np.stack([wide[column].to_numpy(dtype=float) for column in columns[1:]], axis=-1),
            hovertemplate="layer %{y}, VFM layer %{x}: %{z:.3f} [%{customdata[0]:.3f}, %{customdata[1]:.3f}]<br>"
            + hover
            + ", %{customdata[2]} images<extra></extra>",
            **place,
        )
        figure.update_xaxes(title="layer of the VFM", type="category", showgrid=False, **place)
    figure.update_yaxes(type="category", showgrid=False)
    figure.update_yaxes(title="layer", col=1)
    _shared_scale(figure, title, height, difference)
    return figure


def _marks(wide: dict[str, pd.DataFrame]) -> np.ndarray:
    """Return a dot for each difference that is significant, and "" for the others."""
    significant = (wide["p_holm"] < 0.05) & ((wide["low"] > 0) | (wide["high"] < 0))
    return np.where(significant, "●", "")


def _shared_scale(figure: go.Figure, title: str, height: int, difference: bool) -> None:
    """Give the maps of a figure one color scale, around 0 for differences, whose dots are then explained."""
    scale = {"colorscale": "RdBu_r", "cmid": 0} if difference else {"colorscale": "Viridis"}
    bar = {"title": {"text": title, "side": "right"}}
    figure.update_layout(
        template="workbench", height=height, hovermode="closest", coloraxis={**scale, "colorbar": bar}, margin={"t": 70}
    )
    if difference:
        figure.add_annotation(
            text="● interval excludes 0, Holm p < .05 over all entries of a map",
            showarrow=False,
            x=0,
            xref="paper",
            xanchor="left",
        )
        figure.layout.annotations[-1].update(y=1, yref="paper", yanchor="bottom", yshift=38)


def _chance(part: pd.DataFrame) -> str:
    """Return the chance level of a map in words: the range of its null means and its largest 95th percentile."""
    low, high, top = part["null_mean"].min(), part["null_mean"].max(), part["null_q95"].max()
    return f"chance {low:.3f} to {high:.3f}, 95 % below {top:.3f}"


def head_maps(scores: pd.DataFrame, *, title: str, difference: bool = False) -> go.Figure:
    """Draw a heat map of layers and heads for each model; hovering shows interval, chance and n.

    All maps share one color scale.

    Args:
        scores: columns model, layer, head, score, low, high, n_images; also chance and null_mean or, for a difference,
            p_holm.
        title: name of the score, shown at the color bar.
        difference: whether the scores are differences; entries with p_holm below .05 whose interval excludes 0 then
            have a dot.
    """
    models = list(dict.fromkeys(scores["model"]))
    figure = make_subplots(1, len(models), subplot_titles=models, shared_yaxes=True, horizontal_spacing=0.04)
    for number, model in enumerate(models, start=1):
        trace = _head_map(scores[scores["model"] == model], difference=difference)
        figure.add_trace(trace, row=1, col=number)
        figure.update_xaxes(title="head", type="category", row=1, col=number)
    figure.update_yaxes(type="category", showgrid=False)
    figure.update_yaxes(title="layer", col=1)
    _shared_scale(figure, title, 180 + 22 * max(8, scores["layer"].nunique()), difference)
    return figure


def _head_map(scores: pd.DataFrame, *, difference: bool = False) -> go.Heatmap:
    """Return the heat map of one model's heads; arguments as in `head_maps`."""
    columns = ("score", "low", "high", "n_images", *(["p_holm"] if difference else ["chance", "null_mean"]))
    wide = {column: scores.pivot(index="layer", columns="head", values=column) for column in columns}
    return go.Heatmap(
        x=[str(head) for head in wide["score"].columns],
        y=[str(layer) for layer in wide["score"].index],
        z=wide["score"].to_numpy(),
        text=_marks(wide) if difference else None,
        texttemplate="%{text}" if difference else None,
        textfont={"color": "black"},
        customdata=np.stack([wide[column].to_numpy() for column in columns[1:]], axis=-1),
        hovertemplate="layer %{y}, head %{x}: %{z:.3f} [%{customdata[0]:.3f}, %{customdata[1]:.3f}]<br>"
        + ("Holm p %{customdata[3]:.3g}" if difference else "chance %{customdata[3]:.3f}, null %{customdata[4]:.3f}")
        + ", %{customdata[2]} images<extra></extra>",
        coloraxis="coloraxis",
    )


def head_maps_of(scores: Mapping[str, pd.DataFrame]) -> go.Figure:
    """Draw `head_maps` of several scores as one figure with a menu that chooses the score; the first one is shown.

    The title of each map has its model's chance levels; all maps of a score share one color scale.

    Args:
        scores: {title of the score: table as in `head_maps`, which also has null_q95}.
    """
    (first, table), *others = scores.items()
    figure, models = head_maps(table, title=first), list(dict.fromkeys(table["model"]))
    for _, other in others:
        for number, model in enumerate(models, start=1):
            trace = _head_map(other[other["model"] == model])
            figure.add_trace(trace.update(visible=False), row=1, col=number)
    buttons = []
    for number, (title, other) in enumerate(scores.items()):
        shown = [at // len(models) == number for at in range(len(figure.data))]
        layout = {"coloraxis.colorbar.title.text": title}
        layout |= {"coloraxis.cmin": other["score"].min(), "coloraxis.cmax": other["score"].max()}
        for at, model in enumerate(models):
            layout[f"annotations[{at}].text"] = f"{model}<br>{_chance(other[other['model'] == model])}"
        buttons.append({"label": title, "method": "update", "args": [{"visible": shown}, layout]})
        if not number:
            for key, value in layout.items():
                figure.layout[key] = value
    menu = {"buttons": buttons, "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom", "pad": {"b": 52}}
    figure.update_layout(updatemenus=[menu], height=figure.layout.height + 70, margin={"t": 130})
    return figure
