"""The rows that a measure has in the tables of its analysis: by layer, and of single images."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

from workbench.errors import RunError, one_line
from workbench.intervals import mean_intervals
from workbench.overview.stored import TENSORS, StoredRun
from workbench.paired import values_by_unit
from workbench.scoring.tables import drop_by_image
from workbench.training_folder import MEAN


def rows_of(table: str, **where: object) -> Callable[[StoredRun], pd.DataFrame]:
    """Return a function that selects the rows of a table in which the columns `where` have these values."""

    def select(run: StoredRun) -> pd.DataFrame:
        rows = run.table(table)
        for column, value in where.items():
            if column in rows:
                rows = rows[rows[column].isin(value if isinstance(value, tuple) else (value,))]
        return rows

    return select


def cknna(run: StoredRun) -> pd.DataFrame:
    """Return CKNNA by layer, one series for each target."""
    table = run.table("scores")
    target = table["target"] if "target" in table else table["vfm"]  # before version 2 there was the output alone
    return table.assign(series=target, chance=table["null_mean"])


def cknna_units(run: StoredRun) -> pd.DataFrame:
    """Return the CKNNA of single images, empty for a pooling that has none."""
    table = run.table("per_image")  # other poolings have no values of single images
    if table.empty:
        return pd.DataFrame(columns=["layer", "series", "image_id", "value"])
    return table.rename(columns={"score": "value"}).assign(
        series=table["target"] if "target" in table else table["vfm"]
    )


def heads_units(run: StoredRun) -> pd.DataFrame:
    """Return each image's mutual kNN with a VFM, the mean over the heads of a layer."""
    table = run.table("per_image").rename(columns={"vfm": "series"})
    return table.groupby(["series", "layer", "image_id"], sort=False)["value"].mean().reset_index()


def heads(run: StoredRun) -> pd.DataFrame:
    """Return the mean over the heads of each layer; the stored intervals are those of single heads."""
    of_layer = ["series", "layer"]
    wide = heads_units(run).pivot(index="image_id", columns=of_layer, values="value")
    intervals = mean_intervals(wide.to_numpy(), kind="real")
    rows = [
        {**dict(zip(of_layer, place, strict=True)), "score": i.estimate, "low": i.low, "high": i.high, "n_images": i.n}
        for place, i in zip(wide.columns, intervals, strict=True)
    ]
    stored = run.table("scores").rename(columns={"vfm": "series"}).groupby(of_layer)[["chance", "n"]].first()
    return pd.DataFrame(rows).merge(stored.reset_index(), on=of_layer)


def tokens_and_vfms(run: StoredRun) -> tuple[object, ...]:
    """Return the number of visual tokens, and the weights of the VFMs that they are compared with."""
    numbers = tuple(run.table("scores").get("n", pd.Series()).unique())
    return (*numbers, str(run.record.get("vfm_fingerprints"))) if numbers else ()


def words_of(run: StoredRun) -> tuple[object, ...]:
    """Return the words that the logit lens chose among: a tokenizer decides which have a token of their own."""
    return tuple(sorted(run.record.get("words", ())))


def questions_read(run: StoredRun) -> tuple[object, ...]:
    """Return the questions whose attention was read, where that depends on what the model answered."""
    asked_alike = run.record["config"].get("positions", "prompt") == "prompt"
    return () if asked_alike else tuple(run.table("samples")["sample_id"])


def lens(kind: str, measure: str) -> Callable[[StoredRun], pd.DataFrame]:
    """Return a function that selects a measure of the logit lens, at the patches of objects."""
    rows = rows_of("scores", kind=kind, measure=measure, cells="object")
    return lambda run: rows(run).assign(chance=lambda t: t["null_mean"])


def drop(kind: str, **where: object) -> Callable[[StoredRun], pd.DataFrame]:
    """Return a function that selects the accuracy drop under an intervention, the mean of question types."""
    rows = rows_of("scores", kind=kind, category=MEAN, **where)

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


def drop_units(kind: str, **where: object) -> Callable[[StoredRun], pd.DataFrame]:
    """Return a function that gives each image's share in the accuracy drop; every question type has the same weight."""
    rows = rows_of("samples", kind=kind, **where)

    def units(run: StoredRun) -> pd.DataFrame:
        return drop_by_image(_with_layer(rows(run)), ["layer"])

    return units


def attention_units(measure: str) -> Callable[[StoredRun], pd.DataFrame]:
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


def shape(measure: str) -> Callable[[StoredRun], pd.DataFrame]:
    """Return a function that selects a measure of the shape of the tokens, by layer."""
    rows = rows_of("scores", measure=measure)
    return lambda run: rows(run).dropna(subset="layer").assign(chance=lambda t: t.get("null_mean", np.nan))


def shape_units(measure: str) -> Callable[[StoredRun], pd.DataFrame]:
    """Return a function that selects the same for single images."""
    rows = rows_of("per_image", measure=measure)
    return lambda run: rows(run).dropna(subset="layer")


def questions_asked(run: StoredRun) -> tuple[object, ...]:
    """Return which questions were left out, such as those whose options have the same tokens in one model alone."""
    return ("left out", *run.record.get("left_out", ()))
