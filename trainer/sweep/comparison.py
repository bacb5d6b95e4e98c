"""The comparison of finished runs: mean accuracies over seeds with intervals, paired differences, and a page.

Intervals are over seeds (Student's t). That of an accuracy has the shape of Wilson's interval, which never leaves 0 to
1. Differences are paired by seed, at the same point of the grid. Their p is exact, from all sign flips, and so at least
2 / 2^S with S seeds; p_holm is corrected for all rows of a question type (Holm).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from trainer.sweep.results import Answers, Result
from trainer.sweep.spec import Job, Sweep, grid_value, last
from workbench.errors import RunError
from workbench.files import atomic_file, make_folder
from workbench.stats import holm, sign_flip, t_interval
from workbench.training_folder import BEST_ROW, MEAN

Runs = Sequence[tuple[Job, Result]]

SAME = 1e-9  # smaller differences are rounding errors: accuracies are fractions of at most some million questions
OF_A_VARIANT = ["accuracy", "low", "high", "few", "min", "seeds", "n", "chance"]
OF_A_DIFFERENCE = ["against", "pairs", "difference", "d_low", "d_high", "p", "p_holm"]


def accuracies(sweep: Sweep, runs: Runs) -> pd.DataFrame:
    """Return the accuracies of each run, and of its best checkpoint where `sweep.best` has its variant.

    Returns:
        One row for each run and question type, and for the mean of the types; columns variant, one for each key of a
        grid over all variants, seed, category, accuracy, n, chance.

    Raises:
        RunError: the runs answered different questions, or what they call by one name has different contents, or a best
            checkpoint does not exist.
    """
    check_comparable(runs)
    rows = []
    for job, result in runs:
        of_run = {last(key): grid_value(value) for key, value in job.setting.point} | {"seed": job.seed}
        rows += [{"variant": job.setting.variant} | of_run | score for score in _scores(result.last)]
        if job.setting.variant in sweep.best:
            if result.best is None:
                raise RunError(f"{job} has no best checkpoint: expected a run with keep_best")
            rows += [{"variant": f"{job.setting.variant}{BEST_ROW}"} | of_run | score for score in _scores(result.best)]
    return pd.DataFrame(rows)


def _scores(answers: Answers) -> list[dict[str, object]]:
    """Return the accuracy of each question type, and the mean of the types."""
    scores: list[dict[str, object]] = [
        {"category": category, "accuracy": counts.right / counts.n, "n": counts.n, "chance": counts.chance}
        for category, counts in answers.types.items()
    ]
    table = pd.DataFrame(scores)
    accuracy, chance = table["accuracy"].mean(), table["chance"].mean()
    return [*scores, {"category": MEAN, "accuracy": accuracy, "n": int(table["n"].sum()), "chance": chance}]


def check_comparable(runs: Runs) -> None:
    """Check that all runs answered the same questions, and that what has one name was the same in all of them.

    These are data and weights by their content, and the images of a step, which depend on the number of processes.

    Raises:
        RunError: names two runs that differ.
    """
    asked: dict[str, str] = {}
    alike: dict[tuple[str, str], tuple[Job, str]] = {}
    batches: dict[str, tuple[Job, int]] = {}
    for job, result in runs:
        if result.global_batch is not None:
            optim = [result.recipe["optim"].get(key) for key in ("batch_size", "accumulation", "global_batch")]
            earlier, size = batches.setdefault(json.dumps(optim), (job, result.global_batch))
            if result.global_batch != size:
                raise RunError(
                    f"{earlier} was trained on {size} images a step and {job} on {result.global_batch}, since their"
                    " numbers of processes differ: expected the same number, or optim.global_batch in the recipe"
                )
        for answers in filter(None, (result.last, result.best)):
            asked.setdefault(answers.asked, str(job))
        if len(asked) > 1:
            raise RunError(
                f"{' and '.join(asked.values())} were asked different questions: expected the same data.val, data.test,"
                " limits and questions in all runs"
            )
        for key, content in _contents(result).items():
            first, known = alike.setdefault(key, (job, content))
            if content != known:
                raise RunError(
                    f"{first} and {job} name the same {key[0]}, whose content was {known} and {content}: expected the"
                    " same in all runs"
                )


def _contents(result: Result) -> dict[tuple[str, str], str]:
    """Return the fingerprints of what a run uses, by its kind and the values of the recipe that name it.

    Kinds are its training data, the model that it starts from, its VFMs, and its pretrained parts.
    """
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
    # `Answers.asked` already has the fingerprints of validation and test data
    prints = {key: content for key, content in result.fingerprints.items() if key not in ("val", "test")}
    return {
        (key, json.dumps(names.get(key, [data, model]), sort_keys=True)): content for key, content in prints.items()
    }


def report(sweep: Sweep, runs: Runs) -> pd.DataFrame:
    """Compare the variants: mean accuracies over seeds, and paired differences to the variant `sweep.against`.

    Returns:
        One row for each question type (and the mean of the types), point of a grid over all variants, and variant:

        - type, variant, and a column for each key of the grid;
        - accuracy (mean over seeds), low, high (its interval), few (there are fewer than 5 wrong, or fewer than 5
          right, answers in all), min (lowest of the seeds), seeds (their numbers), n (questions of a run), chance;
        - against, pairs (seeds that both variants have), difference (mean of the pairs), d_low, d_high (its interval),
          p, p_holm (over all rows of a type); NaN for the variant `against` itself and where no seed is shared.

        The interval of an accuracy has the width of Student's and the shape of Wilson's, which is right near 1 too.
        If the accuracies of all seeds are equal, it is Wilson's interval for the questions of one seed. An interval is
        infinite where there is no spread to estimate it from: for one seed, and for differences that are all equal.

    Raises:
        RunError: no run of `sweep.against` is finished.
    """
    table, keys = accuracies(sweep, runs), [last(key) for key in sweep.keys]
    if sweep.against not in set(table["variant"]):
        raise RunError(
            f"no run of '{sweep.against}' is finished: expected at least one, since differences are taken against it"
        )
    reference = table[table["variant"] == sweep.against]
    rows = []
    for group, part in table.groupby(["category", *keys, "variant"], sort=False):
        row = dict(zip(["type", *keys, "variant"], group, strict=True)) | _mean(part) | {"against": sweep.against}
        pairs = reference.merge(part, on=["category", *keys, "seed"], suffixes=("_a", "_b"))
        if row["variant"] != sweep.against and len(pairs):
            row |= _difference((pairs["accuracy_b"] - pairs["accuracy_a"]).to_numpy())
        rows.append(row)
    types = list(dict.fromkeys(row["type"] for row in rows))
    rows.sort(key=lambda row: types.index(row["type"]))
    columns = ["type", "variant", *keys, *OF_A_VARIANT, *OF_A_DIFFERENCE]
    result = pd.DataFrame(rows).reindex(columns=columns).astype({"pairs": "Int64"})
    for key in keys:
        if result[key].map(type).nunique() > 1 and result[key].map(lambda value: isinstance(value, str)).any():
            result[key] = result[key].astype(str)  # parquet columns have one type
    compared = result[result["p"].notna()]
    result["p_holm"] = compared.groupby("type", sort=False)["p"].transform(lambda p: holm(p.to_numpy()))
    return result


def _mean(part: pd.DataFrame) -> dict[str, object]:
    """Return the columns of a variant's accuracy; `part` has one row for each seed."""
    questions = int(part["n"].mean())
    interval = t_interval(part["accuracy"].to_numpy(), bounds=(0, 1), trials=questions)
    low, high = (interval.low, interval.high) if interval.n > 1 else (-np.inf, np.inf)
    row = {"accuracy": interval.estimate, "low": low, "high": high, "few": interval.few, "min": part["accuracy"].min()}
    return row | {"seeds": " ".join(map(str, part["seed"])), "n": questions, "chance": part["chance"].mean()}


def _difference(differences: np.ndarray) -> dict[str, object]:
    """Return the columns of the paired differences, one for each seed."""
    differences = np.where(np.abs(differences) > SAME, differences, 0.0)
    interval, p = t_interval(differences), sign_flip(differences[:, None])[0]
    low, high = (interval.low, interval.high) if np.ptp(differences) > SAME else (-np.inf, np.inf)
    return {"pairs": interval.n, "difference": interval.estimate, "d_low": low, "d_high": high, "p": p}


def notes(sweep: Sweep, runs: Runs, table: pd.DataFrame) -> list[str]:
    """Return caveats for the reader of the table: variants with one seed, missing runs, runs of different commits."""
    keys = [last(key) for key in sweep.keys]
    single = table[(table["type"] == MEAN) & ~table["seeds"].str.contains(" ")]
    names = [", ".join([row["variant"], *(f"{key} {row[key]}" for key in keys)]) for row in single.to_dict("records")]
    rows = "" if len(names) == int((table["type"] == MEAN).sum()) else f": {'; '.join(names)}"
    caveats = [f"one seed, so no interval and no difference that says much{rows}"] if names else []
    there = {str(job) for job, _ in runs}
    missing = [str(job) for job in sweep.runs() if str(job) not in there]
    if missing:
        caveats.append(
            f"{len(missing)} of {len(missing) + len(there)} runs are missing:"
            f" {', '.join(missing[:4])}{' ...' if len(missing) > 4 else ''}"
        )
    commits = Counter(
        f"{result.environment['git'][:8] or 'no commit'}{', dirty' if result.environment['dirty'] else ''}"
        for _, result in runs
    )
    if len(commits) > 1:
        caveats.append(
            f"the runs were made with {len(commits)} versions of the code:"
            f" {'; '.join(f'{name} ({count})' for name, count in commits.items())}"
        )
    return caveats


def write(sweep: Sweep, runs: Runs, table: pd.DataFrame, name: str) -> Path:
    """Write the table as parquet, and as an HTML page with a figure, which needs no network; return the page."""
    from workbench.figures import sweep_figure
    from workbench.html_page import figure_page

    folder = make_folder(sweep.output_dir)
    with atomic_file(folder / f"sweep-{name}.parquet") as partial:
        table.to_parquet(partial)
    mean = table[table["type"] == MEAN]
    target = folder / f"sweep-{name}.html"
    figure_page(target, f"Sweep {name}", _facts(sweep, runs, table), sweep_figure(mean), table)
    return target


def write_figure(sweep: Sweep, runs: Runs, table: pd.DataFrame, name: str, folder: Path) -> list[str]:
    """Write the figure of the page into `folder` as files for a paper; return their names, and what is missing."""
    from workbench.figures import sweep_figure
    from workbench.figures.caption import Caption
    from workbench.figures.paper import MISSING, export

    mean, seeds = table[table["type"] == MEAN], sorted({job.seed for job, _ in runs})
    counts = mean["seeds"].str.split().map(len)
    said = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    if counts.nunique() > 1:
        said += f", {counts.min()} to {counts.max()} of them in a row of the table"
    shows = f"accuracy, mean of question types, and its difference to {sweep.against}, paired by seed"
    caption = Caption(shows, f"{mean['n'].max()} questions of {_evaluated_on(runs)} a training", said, "seeds")
    files, missing = export(folder, {name: sweep_figure(mean)}, {name: caption})
    return [*map(str, files), *([MISSING.format(missing)] if missing else [])]


def _evaluated_on(runs: Runs) -> str:
    """Return the name of the data that all runs were evaluated on."""
    data = runs[0][1].recipe.get("data", {})
    return str(data.get("test") or data.get("val"))


def _facts(sweep: Sweep, runs: Runs, table: pd.DataFrame) -> dict[str, str]:
    """Return the facts at the top of the page, by their titles."""
    mean = table[table["type"] == MEAN]
    pairs = int(table["pairs"].max()) if table["pairs"].notna().any() else 0
    data = runs[0][1].recipe.get("data", {})
    seeds = dict.fromkeys(job.seed for job, _ in runs)
    commits = dict.fromkeys(
        f"{result.environment['git'][:8]}{' (dirty)' if result.environment['dirty'] else ''}" for _, result in runs
    )
    facts = {
        "what": (
            f"accuracy on {_evaluated_on(runs)}, mean of question types; n = {mean['n'].max()} questions a run;"
            f" intervals are 95 %, over seeds {', '.join(map(str, seeds))}"
        ),
        "chance": f"{mean['chance'].mean():.3f}",
        "differences": f"none: no seed is shared with {sweep.against}",
    }
    if pairs:
        point = f" at the same {', '.join(map(last, sweep.keys))}" if sweep.keys else ""
        facts["differences"] = (
            f"paired by seed, against {sweep.against}{point}; the sign-flip p of {pairs} pairs is at least"
            f" {2 / 2**pairs:.2g}, so read the intervals"
        )
    if sweep.best:
        facts["best checkpoint"] = f"the one with the highest score on {data.get('val')}"
    if sweep.first:
        facts["trained once"] = f"{sweep.first.split(':')[0]}; the seeds vary only what comes after it"
    settings = [f"{setting.name}: {setting.words}" for setting in sweep.settings()]
    facts["variants"] = "; ".join(sweep.variants if sweep.keys else settings)
    if sweep.keys:
        facts["grid"] = "; ".join(sweep.grid)
    facts["code"] = ", ".join(commits)
    if caveats := notes(sweep, runs, table):
        facts["note"] = ". ".join(caveats)
    return facts
