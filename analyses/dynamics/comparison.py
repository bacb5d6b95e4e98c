"""Several runs side by side: seeds of a model, differences, and steps to another model's final score."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import permutations
from typing import Any

import numpy as np
import pandas as pd

from analyses.dynamics.options import ACCURACY, BENCHMARK, DROP
from workbench.runs import Run
from workbench.stats import first_reached, t_interval


def groups(runs: Mapping[str, Run]) -> dict[str, dict[str, Run]]:
    """Group runs by model and seed: NAME-s0, NAME-s1, ... are seeds of NAME if their options and data are equal.

    Returns:
        {model: {seed: run}}; a model that is not one of several seeds has the seed "".
    """
    matches = {label: re.fullmatch(r"(.+)-s(\d+)", label) for label in runs}
    questions: dict[str, set[object]] = {}
    for label, match in matches.items():
        questions.setdefault(match[1] if match else label, set()).add(question_of(runs[label]))
    grouped: dict[str, dict[str, Run]] = {}
    for label, match in matches.items():
        is_seed = match is not None and match[1] not in runs and len(questions[match[1]]) == 1
        name, seed = (match[1], match[2]) if match is not None and is_seed else (label, "")
        grouped.setdefault(name, {})[seed] = runs[label]
    return grouped


def curves(runs: Mapping[str, Run], table: str = "scores") -> pd.DataFrame:
    """Return every score by step: of one run with its interval over images, or the mean over a model's seeds.

    Means over seeds have Student's t interval and are given at the steps that all seeds have.

    Returns:
        Columns model, measure, of, step, score, low, high, null_mean, null_q95, n, n_images, over ("200 images" or "3
        seeds").
    """
    keys = ["model", "measure", "of", "step"]
    parts = []
    for name, seeds in groups(runs).items():
        scores = pd.concat([run.tables[table].assign(model=name) for run in seeds.values()], ignore_index=True)
        if len(seeds) == 1:
            parts.append(scores.assign(over=scores["n_images"].map("{:.0f} images".format)))
            continue
        for key, rows in scores.groupby(keys, sort=False):
            if len(rows) == len(seeds):
                values, trials = rows["score"].to_numpy(), int(rows["n"].iloc[0])
                bounded = key[1] in (ACCURACY, BENCHMARK)
                interval = t_interval(values, bounds=(0, 1), trials=trials) if bounded else t_interval(values)
                row = {
                    **dict(zip(keys, key, strict=True)),
                    "score": interval.estimate,
                    "low": interval.low,
                    "high": interval.high,
                    "n": rows["n"].iloc[0],
                    "n_images": rows["n_images"].iloc[0],
                    "over": f"{len(seeds)} seeds",
                    **rows[["null_mean", "null_q95"]].mean().to_dict(),
                }
                parts.append(pd.DataFrame([row]))
    return pd.concat(parts, ignore_index=True)


def losses(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Return the training losses by step, with Student's t interval over seeds, or none for a single run.

    Returns:
        Columns model, of (which loss), step, score, over, low, high.
    """
    rows = []
    for name, seeds in groups(runs).items():
        logs = pd.concat([run.tables["log"] for run in seeds.values()])
        logs = logs.melt("step", var_name="of", value_name="score").dropna()
        for (of, step), values in logs.groupby(["of", "step"], sort=False):
            interval = t_interval(values["score"].to_numpy())
            if len(values) == len(seeds):
                several = len(seeds) > 1
                row: dict[str, Any] = {
                    "model": name,
                    "of": str(of).removesuffix("_loss").replace("lm", "language model"),
                    "step": step,
                    "score": interval.estimate,
                    "over": f"{len(seeds)} seeds" if several else "1 run, no interval",
                    "low": interval.low if several else interval.estimate,
                    "high": interval.high if several else interval.estimate,
                }
                rows.append(row)
    return pd.DataFrame(rows)


def differences(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Return every score minus that of the first model, by step, paired by seed with Student's t interval.

    A model that shares fewer than two seeds with the first one is left out.

    Returns:
        Columns model (naming both), measure, of, step, score (the difference), low, high, null_mean, null_q95, over.
    """
    (first, reference), *others = groups(runs).items()
    rows = []
    for name, seeds in others:
        shared = [
            seed for seed in seeds if seed in reference and question_of(seeds[seed]) == question_of(reference[seed])
        ]
        if len(shared) < 2:
            continue
        keys = ["measure", "of", "step"]
        pairs = [
            [run.tables["scores"].set_index(keys)["score"] for run in (seeds[seed], reference[seed])] for seed in shared
        ]
        table = pd.concat([scores - reference_scores for scores, reference_scores in pairs], axis=1).dropna()
        for key, values in zip(table.index, table.to_numpy(), strict=True):
            interval = t_interval(values)
            row: dict[str, Any] = {
                "model": f"{name} - {first}",
                **dict(zip(keys, key, strict=True)),
                "over": f"{len(shared)} seeds, paired",
                "score": interval.estimate,
                "low": interval.low,
                "high": interval.high,
                "null_mean": 0.0,
                "null_q95": 0.0,
            }
            rows.append(row)
    return pd.DataFrame(
        rows, columns=["model", "measure", "of", "step", "score", "low", "high", "null_mean", "null_q95", "over"]
    )


def to_reach(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Return the steps that each model takes to reach each other model's final score, seed by seed.

    Returns:
        Columns model, other, measure, of, seed, target (the other model's final score), step and other_step (when the
        model and the other one first reached it; NaN if never or not known), reached and other_reached (the same in
        words).
    """
    rows = []
    for (name, seeds), (other, others) in permutations(groups(runs).items(), 2):
        for seed in sorted(seeds.keys() & others.keys()):
            if question_of(seeds[seed]) == question_of(others[seed]):
                rows += [
                    {"model": name, "other": other, "seed": seed} | row
                    for row in _first_steps(seeds[seed], others[seed])
                ]
    columns = ["model", "other", "measure", "of", "seed", "target", "step", "other_step", "reached", "other_reached"]
    return pd.DataFrame(rows, columns=columns)


def question_of(run: Run) -> tuple[object, ...]:
    """Return what must be equal for two runs to be compared: data, options, and how benchmarks were asked."""
    return run.record["data_fingerprint"], str(run.record["config"]), str(run.record.get("benchmarks", []))


def _first_steps(run: Run, other: Run) -> Iterator[dict[str, Any]]:
    """For each score of both runs, yield when they first reached the other run's final score."""
    curves_of_run, curves_of_other = (
        dict(list(each.tables["scores"].sort_values("step").groupby(["measure", "of"], sort=False)))
        for each in (run, other)
    )
    for key in [key for key in curves_of_run if key in curves_of_other and key[0] != DROP]:  # a larger drop is no goal
        target = float(curves_of_other[key]["score"].iloc[-1])
        of_run, of_other = (
            first_reached(curve["step"].to_numpy(), curve["score"].to_numpy(), target)
            for curve in (curves_of_run[key], curves_of_other[key])
        )
        yield {
            "measure": key[0],
            "of": key[1],
            "target": target,
            "reached": of_run.text,
            "other_reached": of_other.text,
            "step": np.nan if of_run.step is None else of_run.step,
            "other_step": np.nan if of_other.step is None else of_other.step,
        }


def compared(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Return `to_reach` averaged over seeds, and the difference in steps paired by seed.

    Returns:
        Columns model, other, measure, of, seeds, target, step, other_step, difference (with Student's t interval: low,
        high), reached. The steps and their difference are NaN unless every seed reaches the score.
    """
    rows = []
    for key, by_seed in to_reach(runs).groupby(["model", "other", "measure", "of"], sort=False):
        names: dict[str, Any] = dict(zip(("model", "other", "measure", "of"), key, strict=True))
        known = by_seed["step"].notna() & by_seed["other_step"].notna()
        values: dict[str, Any] = dict.fromkeys(("step", "other_step", "difference", "low", "high"), np.nan)
        n = len(by_seed)
        if known.all():
            interval = t_interval((by_seed["step"] - by_seed["other_step"]).to_numpy())
            values = {
                "step": by_seed["step"].mean(),
                "other_step": by_seed["other_step"].mean(),
                "difference": interval.estimate,
                "low": interval.low,
                "high": interval.high,
            }
            reached = by_seed["reached"].iloc[0] if n == 1 else f"step {by_seed['step'].mean():.0f}, mean of {n} seeds"
        else:
            unknown = by_seed[~known]
            reasons = [
                (row.seed, row.reached if np.isnan(row.step) else f"the other {row.other_reached}")
                for row in unknown.itertuples()
            ]
            reached = "; ".join(f"seed {seed}: {text}" if seed else text for seed, text in reasons)
            if len(unknown) == n > 1 and len({text for _, text in reasons}) == 1:
                reached = f"{reasons[0][1]}, all {n} seeds"
        rows.append(names | {"seeds": n, "target": by_seed["target"].mean(), **values, "reached": reached})
    columns = [
        "model",
        "other",
        "measure",
        "of",
        "seeds",
        "target",
        "step",
        "other_step",
        "difference",
        "low",
        "high",
        "reached",
    ]
    return pd.DataFrame(rows, columns=columns)
