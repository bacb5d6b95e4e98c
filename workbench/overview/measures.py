"""What stored analyses measure in each layer, in one form for all of them, and the five questions that they answer.

Each measure names its analysis, the rows of its table that it is in, and the values of single images, by which two
models are compared. `scores` and `by_image` return the same columns for every measure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import numpy as np
import pandas as pd

from workbench.errors import RunError, one_line
from workbench.intervals import mean_intervals
from workbench.overview.stored import TENSORS, StoredRun
from workbench.paired import values_by_unit
from workbench.scoring.tables import drop_by_image
from workbench.training_folder import MEAN

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


# --- rows of the analyses' tables -----------------------------------------------------------------


def _rows(table: str, **where: object) -> Callable[[StoredRun], pd.DataFrame]:
    """Return a function that selects the rows of a table in which the columns `where` have these values."""

    def select(run: StoredRun) -> pd.DataFrame:
        rows = run.table(table)
        for column, value in where.items():
            if column in rows:
                rows = rows[rows[column].isin(value if isinstance(value, tuple) else (value,))]
        return rows

    return select


def _cknna(run: StoredRun) -> pd.DataFrame:
    table = run.table("scores")
    target = table["target"] if "target" in table else table["vfm"]  # before version 2 there was the output alone
    return table.assign(series=target, chance=table["null_mean"])


def _cknna_units(run: StoredRun) -> pd.DataFrame:
    table = run.table("per_image")  # other poolings have no values of single images
    if table.empty:
        return pd.DataFrame(columns=["layer", "series", "image_id", "value"])
    return table.rename(columns={"score": "value"}).assign(
        series=table["target"] if "target" in table else table["vfm"]
    )


def _heads_units(run: StoredRun) -> pd.DataFrame:
    """Return each image's mutual kNN with a VFM, the mean over the heads of a layer."""
    table = run.table("per_image").rename(columns={"vfm": "series"})
    return table.groupby(["series", "layer", "image_id"], sort=False)["value"].mean().reset_index()


def _heads(run: StoredRun) -> pd.DataFrame:
    """Return the mean over the heads of each layer; the stored intervals are those of single heads."""
    of_layer = ["series", "layer"]
    wide = _heads_units(run).pivot(index="image_id", columns=of_layer, values="value")
    intervals = mean_intervals(wide.to_numpy(), kind="real")
    rows = [
        {**dict(zip(of_layer, place, strict=True)), "score": i.estimate, "low": i.low, "high": i.high, "n_images": i.n}
        for place, i in zip(wide.columns, intervals, strict=True)
    ]
    stored = run.table("scores").rename(columns={"vfm": "series"}).groupby(of_layer)[["chance", "n"]].first()
    return pd.DataFrame(rows).merge(stored.reset_index(), on=of_layer)


def _tokens_and_vfms(run: StoredRun) -> tuple[object, ...]:
    """Return the number of visual tokens, and the weights of the VFMs that they are compared with."""
    numbers = tuple(run.table("scores").get("n", pd.Series()).unique())
    return (*numbers, str(run.record.get("vfm_fingerprints"))) if numbers else ()


def _words_of(run: StoredRun) -> tuple[object, ...]:
    """Return the words that the logit lens chose among: a tokenizer decides which have a token of their own."""
    return tuple(sorted(run.record.get("words", ())))


def _questions_read(run: StoredRun) -> tuple[object, ...]:
    """Return the questions whose attention was read, where that depends on what the model answered."""
    asked_alike = run.record["config"].get("positions", "prompt") == "prompt"
    return () if asked_alike else tuple(run.table("samples")["sample_id"])


def _probe(target: str) -> Callable[[StoredRun], pd.DataFrame]:
    return _rows("scores", target=target, source="model")


def _lens(kind: str, measure: str) -> Callable[[StoredRun], pd.DataFrame]:
    rows = _rows("scores", kind=kind, measure=measure, cells="object")
    return lambda run: rows(run).assign(chance=lambda t: t["null_mean"])


def _drop(kind: str, **where: object) -> Callable[[StoredRun], pd.DataFrame]:
    """Return a function that selects the accuracy drop under an intervention, the mean of question types."""
    rows = _rows("scores", kind=kind, category=MEAN, **where)

    def select(run: StoredRun) -> pd.DataFrame:
        table = _with_layer(rows(run))
        return table.assign(score=table["accuracy_drop"], null_q95=np.nan, chance=np.nan)

    return select


def _with_layer(table: pd.DataFrame) -> pd.DataFrame:
    """Return rows of an intervention with their layer; of knockout those of a single block."""
    if "first" in table:
        return table[table["first"] == table["last"]].assign(layer=lambda t: t["first"])
    site = table["site"].astype(str)
    return table[site.str.isdigit()].assign(layer=site[site.str.isdigit()].astype(int))


def _drop_units(kind: str, **where: object) -> Callable[[StoredRun], pd.DataFrame]:
    """Return a function that gives each image's share in the accuracy drop; every question type has the same weight."""
    rows = _rows("samples", kind=kind, **where)

    def units(run: StoredRun) -> pd.DataFrame:
        return drop_by_image(_with_layer(rows(run)), ["layer"])

    return units


def _attention_units(measure: str) -> Callable[[StoredRun], pd.DataFrame]:
    """Return a function that gives an image's value of an attention measure; every question has the same weight."""

    def units(run: StoredRun) -> pd.DataFrame:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        file = run.folder / TENSORS
        try:
            values = load_file(file)["values"].astype(float)  # (sample, layer, head, measure)
            of_measure = values[..., run.record["measures"].index(measure)]
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise RunError(f"{file} cannot be read ({one_line(error)}): expected the values of every head") from error
        counts = (~np.isnan(of_measure)).sum(2)
        means = np.where(counts > 0, np.nansum(of_measure, 2) / np.maximum(counts, 1), np.nan)
        images = run.table("samples")["image_id"].to_numpy()
        table = values_by_unit(means, images).set_axis(run.record["layers"], axis=1).rename_axis("image_id")
        return table.reset_index().melt("image_id", var_name="layer", value_name="value")

    return units


def _shape(measure: str) -> Callable[[StoredRun], pd.DataFrame]:
    rows = _rows("scores", measure=measure)
    return lambda run: rows(run).dropna(subset="layer").assign(chance=lambda t: t.get("null_mean", np.nan))


def _shape_units(measure: str) -> Callable[[StoredRun], pd.DataFrame]:
    rows = _rows("per_image", measure=measure)
    return lambda run: rows(run).dropna(subset="layer")


MEASURES: dict[str, Measure] = {
    measure.key: measure
    for measure in (
        Measure(
            "cknna",
            "like",
            "cknna",
            "CKNNA with {series}",
            "1 where visual tokens have the same neighborhoods as the VFM's patches",
            _cknna,
            _cknna_units,
            share=True,
            alike=_tokens_and_vfms,
        ),
        Measure(
            "heads",
            "like",
            "heads",
            "attention heads: mutual kNN with {series}",
            "1 where the outputs of all attention heads have the nearest neighbors that the VFM's patches have",
            _heads,
            _heads_units,
            share=True,
            alike=_tokens_and_vfms,
        ),
        *(
            Measure(
                f"probe_{target}",
                "readable",
                "linear_probe",
                f"linear probe: {name}",
                "how well a linear map reads it from a token",
                _probe(target),
                _rows("per_image", target=target, source="model"),
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
                _lens(kind, "first"),
                _rows("per_image", kind=kind, measure="first", cells="object"),
                share=True,
                alike=_words_of,
            )
            for kind, name in (("class", "class"), ("colour", "color"))
        ),
        Measure(
            "permute",
            "used",
            "permutation",
            "accuracy drop, permuted",
            "how much accuracy is lost when the visual tokens change places at this layer",
            _drop("permute", part="whole"),
            _drop_units("permute", part="whole"),
            neutral=0.0,
        ),
        Measure(
            "mean_token",
            "used",
            "permutation",
            "accuracy drop, mean token",
            "how much accuracy is lost when every visual token is replaced by their mean",
            _drop("mean token"),
            _drop_units("mean token"),
            neutral=0.0,
        ),
        Measure(
            "knockout",
            "used",
            "knockout",
            "accuracy drop, knockout",
            "how much accuracy is lost when the text cannot look at the image in this block",
            _drop("knockout"),
            _drop_units("knockout"),
            neutral=0.0,
        ),
        Measure(
            "patching",
            "used",
            "patching",
            "accuracy drop, patching",
            "how much accuracy is lost with the source model's visual tokens at this layer",
            _drop("patched"),
            _drop_units("patched"),
            neutral=0.0,
        ),
        *(
            Measure(
                f"attention_{measure}",
                "looked",
                "attention",
                name,
                explained,
                _rows("layers", measure=measure),
                _attention_units(measure),
                share=measure != "mass_ratio",
                alike=_questions_read,
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
                _shape(measure),
                _shape_units(measure),
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
