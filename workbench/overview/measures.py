"""What stored analyses measure in each layer, in one form for all of them, and the five questions that they answer.

Each measure names its analysis, the rows of its table that it is in, and the values of single images, by which two
models are compared. `scores` and `by_image` return the same columns for every measure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import pandas as pd

from workbench.overview.measure_rows import (
    attention_units,
    cknna,
    cknna_units,
    drop,
    drop_units,
    heads,
    heads_units,
    lens,
    questions_asked,
    questions_read,
    rows_of,
    shape,
    shape_units,
    tokens_and_vfms,
    words_of,
)
from workbench.overview.stored import Stored, StoredRun

Asked = Literal["like", "readable", "used", "looked", "shaped"]
QUESTIONS: dict[Asked, str] = {
    "like": "Like a VFM?",
    "readable": "Readable?",
    "used": "Used?",
    "looked": "Looked at?",
    "shaped": "Shaped how?",
}
LONG: dict[Asked, str] = {
    "like": "In which layers do the visual tokens resemble the features of a vision foundation model?",
    "readable": "What can be read from the visual tokens of each layer?",
    "used": "In which layers does the answer depend on the visual tokens?",
    "looked": "In which layers does the answer look at the image, and at the object asked about?",
    "shaped": "How are the visual tokens of an image distributed in each layer?",
}
ENCODER_LAYER = -1  # where a table has the vision encoder beside the layers
SCORES = ["layer", "score", "low", "high", "chance", "null_q95", "n_images", "n"]


@dataclass(frozen=True)
class Measure:
    """One number for each layer.

    Attributes:
        key: its name in links.
        asked: the question that it helps to answer.
        analysis: the analysis that stores it.
        title: what it is called in charts; `{series}` is replaced where there are several.
        explained: what a higher value means.
        select: stored run -> its scores: the columns SCORES, and `series` where one table has several curves.
        units: stored run -> columns layer, image_id, value (and `series`): the mean over images is the score.
        neutral: the value that stands for no effect, drawn as a line where there is no other chance level.
        share: whether it is between 0 and 1.
        alike: stored run -> what two runs must have in common besides their question for their difference to mean
            something, such as the number of visual tokens where the chance level depends on it; () if not known.
    """

    key: str
    asked: Asked
    analysis: str
    title: str
    explained: str
    select: Callable[[StoredRun], pd.DataFrame] = field(repr=False)
    units: Callable[[StoredRun], pd.DataFrame] = field(repr=False)
    neutral: float | None = None
    share: bool = False
    alike: Callable[[StoredRun], tuple[object, ...]] = field(default=lambda run: (), repr=False)


MEASURES: dict[str, Measure] = {
    measure.key: measure
    for measure in (
        Measure(
            "cknna",
            "like",
            "cknna",
            "CKNNA with {series}",
            "1 where visual tokens have the same neighborhoods as the VFM's patches",
            cknna,
            cknna_units,
            share=True,
            alike=tokens_and_vfms,
        ),
        Measure(
            "heads",
            "like",
            "heads",
            "attention heads: mutual kNN with {series}",
            "1 where the outputs of all attention heads have the nearest neighbors that the VFM's patches have",
            heads,
            heads_units,
            share=True,
            alike=tokens_and_vfms,
        ),
        *(
            Measure(
                f"probe_{target}",
                "readable",
                "linear_probe",
                f"linear probe: {name}",
                "how well a linear map reads it from a token",
                rows_of("scores", target=target, source="model"),
                rows_of("per_image", target=target, source="model"),
                share=target not in ("x", "y", "count"),
            )
            for target, name in (
                ("class", "class of the object"),
                ("colour", "color of the object"),
                ("foreground", "object or background"),
                ("x", "column of the patch"),
                ("y", "row of the patch"),
                ("count", "number of objects"),
            )
        ),
        *(
            Measure(
                f"lens_{kind}",
                "readable",
                "logit_lens",
                f"logit lens: {name} comes first",
                "how often the right word is the most likely one of its kind",
                lens(kind, "first"),
                rows_of("per_image", kind=kind, measure="first", cells="object"),
                share=True,
                alike=words_of,
            )
            for kind, name in (("class", "class"), ("colour", "color"))
        ),
        Measure(
            "permute",
            "used",
            "permutation",
            "accuracy drop, permuted",
            "how much accuracy is lost when the visual tokens change places at this layer",
            drop("permute", part="whole"),
            drop_units("permute", part="whole"),
            neutral=0.0,
            alike=questions_asked,
        ),
        Measure(
            "mean_token",
            "used",
            "permutation",
            "accuracy drop, mean token",
            "how much accuracy is lost when every visual token is replaced by their mean",
            drop("mean token"),
            drop_units("mean token"),
            neutral=0.0,
            alike=questions_asked,
        ),
        Measure(
            "knockout",
            "used",
            "knockout",
            "accuracy drop, knockout",
            "how much accuracy is lost when the text cannot look at the image in this block",
            drop("knockout"),
            drop_units("knockout"),
            neutral=0.0,
            alike=questions_asked,
        ),
        Measure(
            "patching",
            "used",
            "patching",
            "accuracy drop, patching",
            "how much accuracy is lost with the source model's visual tokens at this layer",
            drop("patched"),
            drop_units("patched"),
            neutral=0.0,
            alike=questions_asked,
        ),
        *(
            Measure(
                f"attention_{measure}",
                "looked",
                "attention",
                name,
                explained,
                rows_of("layers", measure=measure),
                attention_units(measure),
                share=measure != "mass_ratio",
                alike=questions_read,
            )
            for measure, name, explained in (
                ("mass", "attention on the image", "the share of the answer's attention that the image gets"),
                ("pointing", "attention points at the object", "how often the maximum lies in the object asked about"),
                (
                    "mass_ratio",
                    "attention in object / area",
                    "1 if the object gets what its area would by chance",
                ),
                ("iou", "attention and object (IoU)", "overlap at the best threshold"),
                ("entropy_shannon", "entropy of attention", "1 if all patches get the same"),
            )
        ),
        *(
            Measure(
                f"tokens_{measure}",
                "shaped",
                "tokens",
                name,
                explained,
                shape(measure),
                shape_units(measure),
                share=measure in ("sinks", "rank_share"),
            )
            for measure, name, explained in (
                ("cosine", "cosine of two tokens", "1 where all tokens of an image point the same way"),
                ("rank_share", "effective rank (share)", "1 where tokens use all directions alike"),
                ("norm", "median token norm", "the length of a typical token"),
                ("sinks", "share of sink tokens", "tokens of a much larger norm than the others"),
            )
        ),
    )
}


# --- in one form ----------------------------------------------------------------------------------


def scores(measure: Measure, runs: Sequence[StoredRun]) -> pd.DataFrame:
    """Return a measure of several runs.

    Returns:
        Columns model, series ("" where there is one), and SCORES; chance and null_q95 are NaN where there is none.
    """
    parts = [_scores_of(measure, run) for run in runs]
    if not parts:
        return pd.DataFrame(columns=["model", "series", *SCORES]).astype(dict.fromkeys(SCORES, float))
    return pd.concat(parts, ignore_index=True)


def measured(stored: Stored, models: Sequence[str]) -> dict[str, tuple[Sequence[StoredRun], pd.DataFrame]]:
    """Return {key of a measure: (the first runs that have it, its scores)}, without measures that no run has.

    An analysis may be stored without rows of a measure, such as that of single blocks where windows were knocked out.
    """
    found: dict[str, tuple[Sequence[StoredRun], pd.DataFrame]] = {}
    for key, measure in MEASURES.items():
        tables = ((runs, scores(measure, runs)) for runs in stored.of(measure.analysis, models))
        if first := next((each for each in tables if len(each[1])), None):
            found[key] = first
    return found


@lru_cache(maxsize=8192)  # a few rows each; a page asks for them in the strip and in the chart
def _scores_of(measure: Measure, run: StoredRun) -> pd.DataFrame:
    table = measure.select(run).reindex(columns=["series", *SCORES])
    series = [
        "" if missing else str(name) for name, missing in zip(table["series"], table["series"].isna(), strict=True)
    ]
    numbers = {name: table[name].to_numpy(float) for name in SCORES[1:]}
    return pd.DataFrame({"model": run.model, "series": series, "layer": table["layer"].to_numpy(int), **numbers})


def by_image(measure: Measure, run: StoredRun) -> pd.DataFrame:
    """Return the values of single images, of which the score is the mean: columns series, layer, image_id, value."""
    table = measure.units(run).reindex(columns=["series", "layer", "image_id", "value"])
    return table.assign(
        series=table["series"].fillna("").astype(str),
        layer=table["layer"].astype(int),
        value=table["value"].astype(float),
    )


def images_words(counts: pd.Series) -> str:
    """Return how many images scores are over: "40 images", or "13 to 40 images" where they differ."""
    known = counts.dropna()
    if known.empty:
        return "an unknown number of images"
    low, high = int(known.min()), int(known.max())
    return f"{low} images" if low == high else f"{low} to {high} images"


def measures_of(runs: Mapping[str, object]) -> dict[str, Measure]:
    """Return the measures whose analysis is among `runs` (by name of the analysis)."""
    return {key: measure for key, measure in MEASURES.items() if measure.analysis in runs}
