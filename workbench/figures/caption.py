"""The caption of a figure: what it shows, n, seeds, what its intervals are over, and its chance levels."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from workbench.figures.point_table import as_dict, drawn_points, plain_text, sideways, zero_line

INTERVALS = "Intervals are 95 %, over {}"
COUNT = re.compile(r"n=%\{customdata\[(\d+)\]\}|%\{customdata\[(\d+)\]\} images")
IMAGES = re.compile(r"(\d+) images?\b")
CHANCE = re.compile(r"\b(chance|null)\b", re.I)


@dataclass(frozen=True)
class Caption:
    """What the reader of a figure has to know, one part each; every part is required, so that none is forgotten.

    Attributes:
        shows: what is drawn.
        n: how many of what the scores are over, such as "200 images of shapes:val".
        seeds: how many trainings, with which seeds.
        interval: what the intervals are over, if the figure draws any: "images", "seeds".
    """

    shows: str
    n: str
    seeds: str
    interval: str

    def of(self, figure: Any) -> str:
        """Return the caption of a figure, with the chance levels that it draws."""
        has_intervals = "low" in drawn_points(figure)
        drawn = INTERVALS.format(self.interval) if has_intervals else "No interval is drawn"
        over = f"{self.n}; {self.seeds}" if self.n else self.seeds
        begun = over if self.n and self._is_name(over) else _capital(over)
        shows = self.shows if self._is_name(self.shows) else _capital(self.shows)
        parts = (shows, _capital(_step_words(figure)), begun, drawn, _capital(chance_words(figure)))
        return " ".join(f"{part.rstrip('.')}." for part in parts if part)

    def _is_name(self, text: str) -> bool:
        """Return whether a text begins with the name of a model, which stays as it is written."""
        first = text.split(maxsplit=1)[:1]
        return bool(first) and first[0] in re.split(r"[\s(),:;]+", self.seeds)


def _capital(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}"


def images_shown(figure: Any) -> int | None:
    """Return how many different images a figure shows at once, None if it shows none (`layout.meta`)."""
    meta = as_dict(figure)["layout"].get("meta")
    return meta.get("images") if isinstance(meta, Mapping) else None


def data_shown(figure: Any) -> str | None:
    """Return the data sets that a figure is about, "" for none; None if it is that of its runs (`layout.meta`)."""
    meta = as_dict(figure)["layout"].get("meta")
    return meta.get("data") if isinstance(meta, Mapping) else None


def images_counted(figure: Any) -> list[int] | None:
    """Return over how many images the scores of a figure are, in order; None if the figure does not say.

    That is in `layout.meta` or, without it, in the texts for the pointer.
    """
    meta, counts = as_dict(figure)["layout"].get("meta"), set[int]()
    if isinstance(meta, Mapping) and "n_images" in meta:
        return sorted(meta["n_images"])
    for trace in as_dict(figure)["data"]:
        rows = np.asarray([] if trace.get("customdata") is None else trace["customdata"], dtype=object)
        if trace.get("visible", True) is not True or rows.ndim < 2 or not rows.size:
            continue
        rows = rows.reshape(-1, rows.shape[-1])
        if place := COUNT.search(str(trace.get("hovertemplate", ""))):
            numbers = pd.to_numeric(pd.Series(rows[:, int(place[1] or place[2])]), errors="coerce")
            counts |= {int(number) for number in numbers.dropna()}
        else:
            counts |= {int(found[1]) for text in rows.flat if isinstance(text, str) and (found := IMAGES.match(text))}
    return sorted(counts) or None


def _step_words(figure: Any) -> str:
    """Return what the slider of a figure shows, such as "layer 3", "" without one."""
    for slider in as_dict(figure)["layout"].get("sliders", ()):
        if steps := slider.get("steps"):
            prefix = slider.get("currentvalue", {}).get("prefix", "")
            return plain_text(f"{prefix}{steps[slider.get('active', 0)].get('label', '')}")
    return ""


def chance_words(figure: Any) -> str:
    """Return the chance levels that a figure draws, in a sentence; a line at 0 stands for no difference.

    They are curves, with a band from the mean to the 95th percentile of a null where there is one, or parts of titles.
    """
    content = as_dict(figure)
    points = drawn_points(content)
    sentences = []
    for name in dict.fromkeys(points["curve"]):
        if not CHANCE.search(name):
            continue
        level = points[points["curve"] == name].reindex(columns=["x", "y", "low", "high"])
        score = "x" if sideways(content) else "y"
        values = level[["low", "high"]] if level["low"].notna().any() else level[[score]]
        values = values.apply(pd.to_numeric, errors="coerce").to_numpy()
        if np.isfinite(values).any():
            low, high = f"{np.nanmin(values):.3f}", f"{np.nanmax(values):.3f}"
            sentences.append(f"{name}: {low}" + (f" to {high}" if low != high else ""))
    if not sentences:
        titles = [plain_text(note.get("text", "")) for note in content["layout"].get("annotations", ())]
        sentences = [title for title in titles if CHANCE.search(title)]
    if not sentences and zero_line(content["layout"]):
        return "The line at 0 is no difference"
    return "; ".join(sentences) or "No chance level is drawn"


def interval_words(figure: Any, otherwise: str = "images") -> str:
    """Return what the intervals of a figure are over, as far as the texts for its pointer say; else `otherwise`."""
    units = set()
    for trace in as_dict(figure)["data"]:
        rows = trace.get("customdata")
        for row in rows if rows is not None else ():
            units |= {unit for unit in ("images", "seeds") if any(isinstance(v, str) and unit in v for v in row)}
    return " or ".join(sorted(units)) or otherwise


def seed_words(seeds: Mapping[str, int | None]) -> str:
    """Return how many trainings a figure shows, from {model: its seed, None if it is not known}."""
    if not seeds:
        return "no trained model"
    words = [f"{name} seed {'not known' if seed is None else seed}" for name, seed in seeds.items()]
    return f"one training each ({', '.join(words)})" if len(words) > 1 else f"one training ({words[0]})"
