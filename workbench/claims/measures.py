"""The closed set of measures: each computes one number from the stored runs of one training.

    answers   accuracy on the data that the run was evaluated on, mean of question types (`categories`: of these types)
    stored    mean of the column `column` of an analysis's table, over the rows that `where` selects
    slope     of `column` against the column `over`, by least squares over these rows
    share     mean of `column` / (`of` - `less`) over these rows, all of them columns, `less` optional (such as an
              accuracy drop as a share of the accuracy before minus chance)
    log_at    value of the training log's `column` after the fraction `at` (0 to 1) of the training, with linear
              interpolation between evaluations
    steps_to  step at which `column` first reaches the final value of the training `final_of` (same seed), as a fraction
              of the training's steps

`where` gives a value or a list of values for each column. Every combination must be in the table exactly once, so that
no row is missed or counted twice unnoticed. A measure's version is part of every rule that uses it; raise it when the
measure would give other numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from workbench.claims.evidence import Evidence, StoredAnalysis
from workbench.claims.rules import Ledger
from workbench.claims.trained import Trained
from workbench.errors import ConfigError, RunError, UnknownNameError
from workbench.reached import first_reached

Options = Mapping[str, Any]


class NoNumber(Exception):
    """The runs are complete, but the measure is not defined for them, such as a step that is never reached."""


@dataclass(frozen=True)
class Number:
    """The value of a measure for one run.

    Attributes:
        n: number of questions, or of images if there are no questions.
        chance: chance level; NaN if there is none.
        asked: what must be equal for two numbers to be compared.
        source: the file or folder that the value comes from.
    """

    value: float
    n: int
    chance: float
    asked: tuple[object, ...]
    source: str


@dataclass(frozen=True)
class Measure:
    """A measure: how it is computed, its version, and its required and optional options."""

    compute: Callable[[Evidence, Trained, Options], Number]
    version: int
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


def _answers(evidence: Evidence, run: Trained, options: Options) -> Number:
    answers = run.answers
    known = sorted(answers.types)
    scores = []
    for name in options.get("categories", known):
        if name not in known:
            raise RunError(f"{run.source} has no questions of type {name}: expected one of {', '.join(known)}")
        scores.append(answers.types[name])
    accuracy = float(np.mean([score.right / score.n for score in scores]))
    chance = float(np.mean([score.chance for score in scores]))
    return Number(accuracy, sum(score.n for score in scores), chance, (answers.asked,), run.source)


def _stored(evidence: Evidence, run: Trained, options: Options) -> Number:
    stored, rows = _rows(evidence, run, options)
    return _number(float(rows[options["column"]].mean()), stored, rows, options)


def _slope(evidence: Evidence, run: Trained, options: Options) -> Number:
    stored, rows = _rows(evidence, run, options)
    over = _column(rows, options["over"], stored).to_numpy(float)
    if len(set(over)) < 2:
        raise ConfigError(
            f"{options['over']} is {over[0]:g} in all rows that `where` selects: expected several values for a slope"
        )
    return _number(float(np.polyfit(over, rows[options["column"]].to_numpy(float), 1)[0]), stored, rows, options)


def _share(evidence: Evidence, run: Trained, options: Options) -> Number:
    stored, rows = _rows(evidence, run, options)
    whole = _column(rows, options["of"], stored).to_numpy(float)
    if "less" in options:
        whole = whole - _column(rows, options["less"], stored).to_numpy(float)
    if not (whole > 0).all():
        less = f" - {options['less']}" if "less" in options else ""
        raise NoNumber(
            f"{options['of']}{less} is {whole.min():.3f} in {run.folder.name}, but a share needs a whole above 0"
        )
    return _number(float((rows[options["column"]].to_numpy(float) / whole).mean()), stored, rows, options)


def _rows(evidence: Evidence, run: Trained, options: Options) -> tuple[StoredAnalysis, pd.DataFrame]:
    """Return the stored analysis of a run, and the rows of its table that `where` selects.

    Raises:
        MissingRun, RunError: see `Evidence.analysis`; or a row is missing or there twice, or a value is not finite.
    """
    source = evidence.trained(options["source"][run.name], run.seed) if "source" in options else None
    stored = evidence.analysis(options["analysis"], run, source)
    table = stored.table(options["table"])
    values_of = {
        column: value if isinstance(value, list | tuple) else [value] for column, value in options["where"].items()
    }
    selected = []
    for values in product(*values_of.values()):
        rows = table
        for column, value in zip(values_of, values, strict=True):
            rows = rows[_column(rows, column, stored) == value]
        if len(rows) != 1:
            condition = ", ".join(f"{column} {value}" for column, value in zip(values_of, values, strict=True))
            raise RunError(f"{stored.folder} has {len(rows)} rows of {options['table']} with {condition}: expected 1")
        selected.append(rows)
    rows = pd.concat(selected, ignore_index=True)
    for value in _column(rows, options["column"], stored):
        _check_finite(value, str(stored.folder), options["column"])
    return stored, rows


def _column(table: pd.DataFrame, name: str, stored: StoredAnalysis) -> pd.Series:
    """Return a column of a stored table.

    Raises:
        RunError: the table does not have it.
    """
    if name not in table:
        raise RunError(f"{stored.folder} has no column {name}: expected one of {', '.join(map(str, table))}")
    return table[name]


def _number(value: float, stored: StoredAnalysis, rows: pd.DataFrame, options: Options) -> Number:
    """Return a value with the n, chance level and source of the rows that it comes from."""
    chance = float(_column(rows, options["chance"], stored).mean()) if "chance" in options else math.nan
    return Number(value, int(_column(rows, options["n"], stored).min()), chance, stored.asked, str(stored.folder))


def _check_finite(value: float, where: str, column: str) -> None:
    if not math.isfinite(value):
        raise RunError(f"{where} has {column} {value}: expected a finite number")


def _log_at(evidence: Evidence, run: Trained, options: Options) -> Number:
    log, steps = _log(run, options["column"])
    step = options["at"] * steps
    if not log["step"].iloc[0] <= step <= log["step"].iloc[-1]:
        raise RunError(
            f"{run.folder} has evaluations from step {log['step'].iloc[0]:g} to {log['step'].iloc[-1]:g}: expected some"
            f" before and after step {step:g}"
        )
    return _number_of_log(float(np.interp(step, log["step"], log["score"])), run, log)


def _steps_to(evidence: Evidence, run: Trained, options: Options) -> Number:
    log, steps = _log(run, options["column"])
    other = evidence.trained(options["final_of"], run.seed)
    other_log, last_step = _log(other, options["column"])
    if other_log["step"].iloc[-1] != last_step:
        raise RunError(
            f"{other.folder} was last evaluated at step {other_log['step'].iloc[-1]:g} of {last_step}: expected an"
            " evaluation at its last step"
        )
    target = float(other_log["score"].iloc[-1])
    reached = first_reached(log["step"].to_numpy(float), log["score"].to_numpy(float), target)
    if reached.step is None:
        raise NoNumber(
            f"the step at which {run.folder.name} reaches the final score of {other.folder.name} is {reached.text}"
        )
    return _number_of_log(reached.step / steps, run, log)


def _log(run: Trained, column: str) -> tuple[pd.DataFrame, int]:
    """Return the evaluations during a run's training, by step, and the number of steps of the training."""
    log = run.log(column)
    for value in log["score"]:
        _check_finite(value, f"the log of {run.folder}", column)
    return log, int(run.recipe["optim.steps"])


def _number_of_log(value: float, run: Trained, log: pd.DataFrame) -> Number:
    """Return a value with the n and chance level of the log's last evaluation."""
    # a training that was exported without its folder has no n in its log
    n, chance = log["n"].fillna(0).iloc[-1], float(log["chance"].iloc[-1])
    return Number(value, int(n), chance, (run.record.get("val"), tuple(log["step"])), f"the log of {run.folder}")


_TABLE = ("analysis", "table", "where", "column", "n")
MEASURES = {
    "answers": Measure(_answers, 1, optional=("categories",)),
    "stored": Measure(_stored, 1, _TABLE, ("chance", "source")),
    "slope": Measure(_slope, 1, (*_TABLE, "over"), ("chance", "source")),
    "share": Measure(_share, 1, (*_TABLE, "of"), ("less", "chance", "source")),
    "log_at": Measure(_log_at, 1, ("column", "at")),
    "steps_to": Measure(_steps_to, 1, ("column", "final_of")),
}


def check_measures(ledger: Ledger, where: str) -> None:
    """Check that every measure of a ledger exists, has the version that the ledger names, and gets its options.

    Args:
        where: name of the ledger's file, for the error.

    Raises:
        ConfigError, UnknownNameError: for the first problem.
    """
    for name, version in ledger.measures.items():
        if name not in MEASURES:
            raise UnknownNameError(f"measure of {where}", name, MEASURES)
        if MEASURES[name].version != version:
            raise ConfigError(
                f"measure {name} has version {version} in {where}: expected {MEASURES[name].version}, its version in"
                " this code"
            )
    for claim in ledger.claims:
        if not claim.tested:
            continue
        measure = MEASURES[claim.measure]
        known = (*measure.required, *measure.optional)
        for option in claim.options:
            if option not in known:
                raise UnknownNameError(f"option of {claim.measure} in claim {claim.id} of {where}", option, known)
        for option in measure.required:
            if option not in claim.options:
                raise ConfigError(
                    f"claim {claim.id} of {where} has no {option}: expected one, since the measure {claim.measure}"
                    " requires it"
                )
        if "source" in claim.options and set(claim.options["source"]) != set(claim.of):
            raise ConfigError(
                f"claim {claim.id} of {where} has sources for {', '.join(claim.options['source'])}: expected one for"
                f" each of {', '.join(claim.of)}"
            )
