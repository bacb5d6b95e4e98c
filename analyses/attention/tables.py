"""Tables of scores, the choice of heads, and the comparison of models."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from analyses.attention.measuring import Measurements, nan_mean
from analyses.attention.questions import (
    ENTROPIES,
    MEASURES,
    OBJECT_MEASURES,
    SINGLE_MEASURES,
    Config,
    Question,
)
from workbench.paired import differences_on_shared, values_by_unit
from workbench.runs import Run, comparable
from workbench.stats import Interval, Kind, holm, mean_intervals, paired_test

UNBOUNDED = ("mass_ratio", "entropy_raw")  # measures, or beginnings of their names, that can be above 1


def samples_table(questions: list[Question], reported: np.ndarray, measurements: Measurements) -> pd.DataFrame:
    """Return one row for each sample: its question, the objects it names, its half, and chance where that varies.

    `read` has the tokens whose attention was read, where that is not the last of the prompt.
    """
    chance = np.array(measurements.chance)
    return pd.DataFrame(
        {
            "sample_id": [question.sample.id for question in questions],
            "image_id": [question.sample.image_id for question in questions],
            "question": [question.sample.question for question in questions],
            "asked": [", ".join(target.name for target in question.targets) for question in questions],
            "half": np.where(reported, "report", "choose"),
        }
        | ({"read": ["".join(question.words) for question in questions]} if questions[0].words else {})
        | {
            f"chance_{name}": chance[:, number]
            for number, name in enumerate(measurements.measures)
            if name in ("mass", *OBJECT_MEASURES, *SINGLE_MEASURES)
        }
    )


def scores_by_head(
    measurements: Measurements, values: np.ndarray, images: list[str], layers: list[int], seed: int
) -> pd.DataFrame:
    """Return the mean of every head over samples, with its interval over images."""
    assert measurements.null_sums is not None and measurements.null_counts is not None
    with np.errstate(invalid="ignore"):
        nulls = measurements.null_sums / measurements.null_counts
    intervals = score_intervals(values, measurements.measures, images)
    chance = nan_mean(np.array(measurements.chance), 0)
    rows = []
    for number, layer in enumerate(layers):
        for head in range(values.shape[2]):
            for m, name in enumerate(measurements.measures):
                n = int((~np.isnan(values[:, number, head, m])).sum())
                scores = summarized(next(intervals), chance[m], nulls[:, number, head, m], n, seed)
                rows.append({"layer": layer, "head": head, "measure": name} | scores)
    return pd.DataFrame(rows)


def scores_by_layer(
    measurements: Measurements, values: np.ndarray, images: list[str], layers: list[int], seed: int
) -> pd.DataFrame:
    """Return the mean over the heads of each layer, with its interval over images."""
    means, nulls = nan_mean(values, 2), nan_mean(np.stack(measurements.pairings), 0)
    chance = nan_mean(np.array(measurements.chance), 0)
    intervals = score_intervals(means, measurements.measures, images)
    rows = []
    for number, layer in enumerate(layers):
        for m, name in enumerate(measurements.measures):
            n = int((~np.isnan(means[:, number, m])).sum())
            scores = summarized(next(intervals), chance[m], nulls[:, number, m], n, seed)
            rows.append({"layer": layer, "measure": name} | scores)
    return pd.DataFrame(rows)


def score_intervals(values: np.ndarray, measures: Sequence[str], images: Sequence[str]) -> Iterator[Interval]:
    """Yield the means of `values` (sample, ..., measure) over samples with intervals over images, last axis fastest.

    Pointing is right or wrong, so its interval is that of a proportion. The others end where their measure does: none
    is negative, and only those in UNBOUNDED are above 1.
    """
    kinds: list[Kind] = ["proportion" if measure.startswith("pointing") else "real" for measure in measures]
    by_measure = [
        mean_intervals(values[..., m].reshape(len(values), -1), kind=kind, groups=images)
        for m, kind in enumerate(kinds)
    ]
    for column in zip(*by_measure, strict=True):
        for measure, interval in zip(measures, column, strict=True):
            most = np.inf if measure.startswith(UNBOUNDED) else 1.0
            yield replace(interval, low=max(interval.low, 0.0), high=min(interval.high, most))


def summarized(interval: Interval, chance: float, nulls: np.ndarray, n: int, seed: int) -> dict[str, float]:
    """Return the columns of one score; where `chance` is NaN it is the mean of `nulls` (draw,)."""
    return {
        "score": interval.estimate,
        "low": interval.low,
        "high": interval.high,
        "chance": float(nulls.mean() if np.isnan(chance) else chance),
        "null_mean": float(nulls.mean()),
        "null_q95": float(np.quantile(nulls, 0.95)),
        "n_images": interval.n,
        "n": n,
        "seed": seed,
    }


def chosen_heads(
    config: Config,
    measurements: Measurements,
    values: np.ndarray,
    nulls: np.ndarray,
    images: list[str],
    reported: np.ndarray,
    layers: list[int],
) -> pd.DataFrame:
    """Choose the `top` heads on one half of the images, and report them on the other half.

    Heads are chosen by how much more often they point at the question's object than at objects of other images. `p` is
    a paired test of that gain over the reported images; `p_holm` corrects it for the number of chosen heads. In `gain`,
    its interval and `p` every image counts once, in all other columns every question.
    """
    pointing, mass_ratio, iou = (measurements.measures.index(name) for name in OBJECT_MEASURES)
    gain = nan_mean((values - nulls)[~reported][..., pointing], 0)
    order = np.argsort(-np.nan_to_num(gain, nan=-np.inf), axis=None, kind="stable")[: config.top]
    reported_images = np.array(images)[reported]
    chance = nan_mean(np.array(measurements.chance)[reported], 0)
    rows = []
    for rank, (number, head) in enumerate(zip(*np.unravel_index(order, gain.shape), strict=True), start=1):
        asked, others = values[reported, number, head], nulls[reported, number, head]
        defined = ~np.isnan(asked[:, pointing] - others[:, pointing])
        if not defined.any():
            continue  # this head gives the image no attention at all in this half
        asked, others, groups = asked[defined], others[defined], reported_images[defined]
        interval, ratio_interval, iou_interval = score_intervals(
            asked[:, [pointing, mass_ratio, iou]], list(OBJECT_MEASURES), list(groups)
        )
        by_question = pd.DataFrame({"image": groups, "asked": asked[:, pointing], "others": others[:, pointing]})
        by_image = by_question.groupby("image", sort=False).mean()
        tested = paired_test(by_image["others"], by_image["asked"], seed=config.seed)
        rows.append(
            {
                "rank": rank,
                "layer": layers[number],
                "head": int(head),
                "pointing": interval.estimate,
                "low": interval.low,
                "high": interval.high,
                "chance": chance[pointing],
                "null_mean": float(others[:, pointing].mean()),
                "gain": tested.difference,
                "gain_low": tested.low,
                "gain_high": tested.high,
                "p": tested.p,
                "gain_when_chosen": float(gain[number, head]),
                "mass_ratio": ratio_interval.estimate,
                "mass_ratio_low": ratio_interval.low,
                "mass_ratio_high": ratio_interval.high,
                "iou": iou_interval.estimate,
                "iou_low": iou_interval.low,
                "iou_high": iou_interval.high,
                "iou_chance": chance[iou],
                "n_images": interval.n,
                "n": len(asked),
                "seed": config.seed,
            }
        )
    table = pd.DataFrame(rows)
    if len(table):
        table.insert(table.columns.get_loc("p") + 1, "p_holm", holm(table["p"].to_numpy()))
    return table


def differences(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Subtract the first model from every other, by layer and measure, on the questions that both were asked.

    Which questions are left out can depend on what a model answers (`positions`). Models that were asked about other
    data, or whose attention was read at other positions, are left out. Values are means over heads, paired by image;
    every question counts once, as in the scores. p_holm corrects over all layers and measures. Interval and p are over
    images, for these very models: they say nothing about other training seeds. The table is empty for a single model,
    or for models that share no question.
    """
    seed = int(next(iter(runs.values())).record["seed"])
    alike = comparable(runs, ("positions", "max_new_tokens"))
    return differences_on_shared(alike, _on_shared_questions, by=("measure", "layer"), seed=seed)


def _on_shared_questions(reference: Run, run: Run) -> tuple[pd.DataFrame, pd.DataFrame]:
    shared = set(_questions(reference)) & set(_questions(run))
    return _image_means(reference, shared), _image_means(run, shared)


def _questions(run: Run) -> pd.Series:
    """Return the question of each sample: its id, and its image, since ids of another data set may be equal."""
    samples = run.tables["samples"]
    return samples["image_id"] + " " + samples["sample_id"]


def _image_means(run: Run, shared: Collection[str]) -> pd.DataFrame:
    """Return a value of each image by measure and layer; their mean is that of the heads and shared questions."""
    measures, layers = run.extra["measures"], run.extra["layers"]
    chosen = _questions(run).isin(shared).to_numpy()
    means = nan_mean(run.tensors["values"].double().numpy()[chosen], 2)
    images = run.tables["samples"].loc[chosen, "image_id"]
    by_image = values_by_unit(means.reshape(len(means), len(layers) * len(measures)), images.tolist())
    by_image.columns = pd.MultiIndex.from_product([layers, measures], names=["layer", "measure"])
    by_image = by_image.rename_axis("image_id").stack(["measure", "layer"], future_stack=True)
    return by_image.rename("value").reset_index()


def summary(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Return the chosen heads on the reported half of the images, or the layers' means where a model has none.

    For positions other than the prompt's last, they are one table: how well the chosen heads point, and the spatial
    entropy of each layer in the normalization that figures show first.
    """
    if any("read" in run.tables["samples"] for run in runs.values()):
        return _heads_and_entropy(runs)
    if not all(len(run.tables.get("heads", ())) for run in runs.values()):
        layer_tables = pd.concat([run.tables["layers"].assign(model=label) for label, run in runs.items()])
        return layer_tables[["model", *next(iter(runs.values())).tables["layers"]]]
    columns = ["model", "layer", "head", "pointing", "low", "high", "chance", "null_mean"]
    columns += ["gain", "gain_low", "gain_high", "p_holm", "mass_ratio", "iou", "iou_chance", "n_images", "n"]
    return pd.concat([run.tables["heads"].assign(model=label) for label, run in runs.items()])[columns]


def _heads_and_entropy(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Return the pointing of the chosen heads, then the spatial entropy of each layer; `measure` names both."""
    entropy = ENTROPIES[0]
    tables = []
    for label, run in runs.items():
        if len(heads := run.tables.get("heads", pd.DataFrame())):
            pointing = heads.rename(columns={"pointing": "score"}).assign(head=heads["head"].astype(str))
            tables.append(pointing.assign(model=label, measure=MEASURES["pointing"]))
        by_layer = run.tables["layers"]
        by_layer = by_layer[by_layer["measure"] == entropy]
        tables.append(by_layer.assign(model=label, measure=MEASURES[entropy], head="mean"))
    columns = ["model", "measure", "layer", "head", "score", "low", "high", "chance", "null_mean", "n_images", "n"]
    return pd.concat(tables, ignore_index=True)[columns]
