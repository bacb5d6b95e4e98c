"""Finished runs compared: accuracies, their means over seeds with intervals, paired differences, and the page with the
figure.

Intervals are over seeds: Student's, for accuracies in the shape of Wilson's, which stays below 1. A difference is
paired by seed, at the same point of the grid; its p is that of all sign flips, which with S seeds is at least 2 / 2^S,
and p_holm is corrected for all rows of a question type.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from trainer.sweep.results import Answers, Result
from trainer.sweep.spec import Job, Sweep, last
from workbench.errors import RunError
from workbench.files import atomic_file, make_folder
from workbench.stats import holm, sign_flip, t_interval
from workbench.training_folder import BEST_ROW, MEAN

Runs = Sequence[tuple[Job, Result]]

SAME = 1e-9  # accuracies are shares of at most some million questions: what differs by less is equal
OF_A_VARIANT = ["accuracy", "low", "high", "few", "min", "seeds", "n", "chance"]
OF_A_DIFFERENCE = ["against", "pairs", "difference", "d_low", "d_high", "p", "p_holm"]


def accuracies(sweep: Sweep, runs: Runs) -> pd.DataFrame:
    """Accuracy of each run, and of its best checkpoint where the sweep asks for it, by question type and their mean.

    Returns:
        Columns variant, one for each key of a grid over all variants, seed, category, accuracy, n, chance.

    Raises:
        RunError: two runs were not asked the same, or what they name alike has other content; a best checkpoint is not
            there.
    """
    check_comparable(runs)
    rows = []
    for job, result in runs:
        of_run = {last(key): _value(value) for key, value in job.setting.point} | {"seed": job.seed}
        rows += [{"variant": job.setting.variant} | of_run | score for score in _scores(result.last)]
        if job.setting.variant in sweep.best:
            if result.best is None:
                raise RunError(f"{job} has no best checkpoint: expected a run with keep_best")
            rows += [{"variant": f"{job.setting.variant}{BEST_ROW}"} | of_run | score for score in _scores(result.best)]
    return pd.DataFrame(rows)


def _scores(answers: Answers) -> list[dict[str, object]]:
    kinds = [
        {"category": kind, "accuracy": own.right / own.n, "n": own.n, "chance": own.chance}
        for kind, own in answers.types.items()
    ]
    table = pd.DataFrame(kinds)
    return [
        *kinds,
        {
            "category": MEAN,
            "accuracy": table["accuracy"].mean(),
            "n": int(table["n"].sum()),
            "chance": table["chance"].mean(),
        },
    ]


def _value(text: str) -> float | str:
    """A number where it is one; lists and names stay words."""
    try:
        return int(text) if text.lstrip("-").isdigit() else float(text)
    except ValueError:
        return text


def check_comparable(runs: Runs) -> None:
    """See that all runs answered the same questions, and that what they name alike had the same content."""
    asked: dict[str, str] = {}
    alike: dict[tuple[str, str], tuple[Job, str]] = {}
    for job, result in runs:
        for answers in filter(None, (result.last, result.best)):
            asked.setdefault(answers.asked, str(job))
        if len(asked) > 1:
            raise RunError(
                f"{' and '.join(asked.values())} were asked other questions: expected the same data.val, data.test,"
                " limits and questions in all runs"
            )
        for key, content in _contents(result).items():
            before, known = alike.setdefault(key, (job, content))
            if content != known:
                raise RunError(
                    f"{before} and {job} name the same {key[0]}, whose content was {known} and {content}: expected the"
                    " same in all runs"
                )


def _contents(result: Result) -> dict[tuple[str, str], str]:
    """Fingerprints by what a run names: its training data, what it starts from, its VFMs and its pretrained parts."""
    recipe = result.recipe
    model, data = recipe.get("model", {}), recipe.get("data")
    names = {
        "data": [data, result.seed],
        "start": [recipe.get("start"), result.seed],
        "model": [model, result.seed],
        "vfm": result.vfm,
    }
    names |= {"tower": model.get("vision_encoder"), "language": model.get("language"), "processor": [data, model]}
    names["vfm_settings"] = [result.vfm, recipe.get("alignment", {}).get("teacher_norm")]
    # which the questions are hashed with
    prints = {key: content for key, content in result.fingerprints.items() if key not in ("val", "test")}
    return {
        (key, json.dumps(names.get(key, [data, model]), sort_keys=True)): content for key, content in prints.items()
    }


def report(sweep: Sweep, runs: Runs) -> pd.DataFrame:
    """Mean over seeds with its interval, and the paired difference to the variant `against` over the seeds both have,
    with Student's.

    Returns:
        Columns type, variant, one for each key of a grid over all variants, accuracy, low, high, few (fewer than 5
        wrong, or right, answers in all), min, seeds (which), n (questions of a run), chance, and against, pairs,
        difference, d_low, d_high, p, p_holm (over all rows of a type), NaN for the variant `against` itself and where
        no seed is shared. The interval of an accuracy has Student's width at Wilson's shape, which holds near 1 too;
        where all seeds answer equally many questions it is that of one seed's questions. One seed, and differences that
        are all equal, show no spread to judge by: their interval is infinite.
    """
    table, keys = accuracies(sweep, runs), [last(key) for key in sweep.keys]
    if sweep.against not in set(table["variant"]):
        raise RunError(f"no run of '{sweep.against}' is finished: expected one, since differences are taken against it")
    reference = table[table["variant"] == sweep.against]
    rows = []
    for place, part in table.groupby(["category", *keys, "variant"], sort=False):
        row = dict(zip(["type", *keys, "variant"], place, strict=True)) | _mean(part) | {"against": sweep.against}
        pairs = reference.merge(part, on=["category", *keys, "seed"], suffixes=("_a", "_b"))
        if row["variant"] != sweep.against and len(pairs):
            row |= _difference((pairs["accuracy_b"] - pairs["accuracy_a"]).to_numpy())
        rows.append(row)
    kinds = list(dict.fromkeys(row["type"] for row in rows))
    rows.sort(key=lambda row: kinds.index(row["type"]))
    columns = ["type", "variant", *keys, *OF_A_VARIANT, *OF_A_DIFFERENCE]
    result = pd.DataFrame(rows).reindex(columns=columns).astype({"pairs": "Int64"})
    for key in keys:
        if result[key].map(type).nunique() > 1 and result[key].map(lambda value: isinstance(value, str)).any():
            result[key] = result[key].astype(str)  # a column of parquet has one kind
    result["p_holm"] = (
        result[result["p"].notna()].groupby("type", sort=False)["p"].transform(lambda p: holm(p.to_numpy()))
    )
    return result


def _mean(part: pd.DataFrame) -> dict[str, object]:
    questions = int(part["n"].mean())
    interval = t_interval(part["accuracy"].to_numpy(), bounds=(0, 1), trials=questions)
    low, high = (interval.low, interval.high) if interval.n > 1 else (-np.inf, np.inf)
    row = {"accuracy": interval.estimate, "low": low, "high": high, "few": interval.few, "min": part["accuracy"].min()}
    return row | {"seeds": " ".join(map(str, part["seed"])), "n": questions, "chance": part["chance"].mean()}


def _difference(gain: np.ndarray) -> dict[str, object]:
    interval, p = t_interval(gain), sign_flip(gain[:, None])[0]
    low, high = (interval.low, interval.high) if np.ptp(gain) > SAME else (-np.inf, np.inf)
    return {"pairs": interval.n, "difference": interval.estimate, "d_low": low, "d_high": high, "p": p}


def notes(sweep: Sweep, runs: Runs, table: pd.DataFrame) -> list[str]:
    """What a reader of the table must know besides: settings of one seed, runs that are not there, other commits."""
    keys = [last(key) for key in sweep.keys]
    single = table[(table["type"] == MEAN) & ~table["seeds"].str.contains(" ")]
    names = [", ".join([row["variant"], *(f"{key} {row[key]}" for key in keys)]) for row in single.to_dict("records")]
    rows = "" if len(names) == int((table["type"] == MEAN).sum()) else f": {'; '.join(names)}"
    found = [f"one seed, so no interval and no difference that says much{rows}"] if names else []
    there = {str(job) for job, _ in runs}
    missing = [str(job) for job in sweep.runs() if str(job) not in there]
    if missing:
        found.append(
            f"{len(missing)} of {len(missing) + len(there)} runs are not there:"
            f" {', '.join(missing[:4])}{' ...' if len(missing) > 4 else ''}"
        )
    commits = Counter(
        f"{result.environment['git'][:8] or 'no commit'}{', dirty' if result.environment['dirty'] else ''}"
        for _, result in runs
    )
    if len(commits) > 1:
        found.append(
            f"the runs are of {len(commits)} states of the code:"
            f" {'; '.join(f'{name} ({count})' for name, count in commits.items())}"
        )
    return found


def write(sweep: Sweep, runs: Runs, table: pd.DataFrame, name: str) -> Path:
    """Store the table as parquet, and with its figure as one HTML file that needs no network; return the latter."""
    from workbench.analysis.report import figure_page
    from workbench.figures import sweep_figure

    folder = make_folder(sweep.output_dir)
    with atomic_file(folder / f"sweep-{name}.parquet") as partial:
        table.to_parquet(partial)
    mean = table[table["type"] == MEAN]
    target = folder / f"sweep-{name}.html"
    figure_page(target, f"Sweep {name}", _facts(sweep, runs, table), sweep_figure(mean), table)
    return target


def _facts(sweep: Sweep, runs: Runs, table: pd.DataFrame) -> dict[str, str]:
    mean = table[table["type"] == MEAN]
    pairs = int(table["pairs"].max()) if table["pairs"].notna().any() else 0
    data = runs[0][1].recipe.get("data", {})
    asked, seeds = data.get("test") or data.get("val"), dict.fromkeys(job.seed for job, _ in runs)
    commits = dict.fromkeys(
        f"{result.environment['git'][:8]}{' (dirty)' if result.environment['dirty'] else ''}" for _, result in runs
    )
    return {
        "what": (
            f"accuracy on {asked}, mean of question types; n = {mean['n'].max()} questions a run; intervals are 95 %,"
            f" over seeds {', '.join(map(str, seeds))}"
        ),
        "chance": f"{mean['chance'].mean():.3f}",
        "differences": (
            "paired by seed, against"
            f" {sweep.against}{' at the same ' + ', '.join(map(last, sweep.keys)) if sweep.keys else ''}; the sign-flip"
            f" p of {pairs} pairs is at least {2 / 2**pairs:.2g}, so read the intervals"
            if pairs
            else f"none: no seed is shared with {sweep.against}"
        ),
        **({"best checkpoint": f"the one with the highest score on {data.get('val')}"} if sweep.best else {}),
        **(
            {"first stage": f"{sweep.first.split(':')[0]}, trained once: the seeds vary what comes after it"}
            if sweep.first
            else {}
        ),
        "variants": "; ".join(
            sweep.variants if sweep.keys else (f"{setting.name}: {setting.words}" for setting in sweep.settings())
        ),
        **({"grid": "; ".join(sweep.grid)} if sweep.keys else {}),
        "code": ", ".join(commits),
        **({"note": ". ".join(lines)} if (lines := notes(sweep, runs, table)) else {}),
    }
