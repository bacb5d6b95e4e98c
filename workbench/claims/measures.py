"""The closed set of measures: each makes one number of one training's stored runs. Its version is in every rule, and
rises when it would give other numbers.

    answers   accuracy on the data that the run was evaluated on, mean of question types (`categories`: of these types)
    stored    mean of a column of an analysis' table over the rows that `where` names
    slope     of that column over the column `over`, by least squares
    share     that column over the column `of`, less the column `less` if there is one (a drop in accuracy over the
              accuracy before, less chance)
    log_at    a score of the training log when `at` (0 to 1) of the training is done, on straight lines between
              evaluations
    steps_to  the step at which that score first is the last one of the training `final_of` (same seed), over all steps

`where` gives each column a value or a list; every combination must be in the table once, so that no row is missed or
counted twice in silence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from workbench.claims.evidence import Evidence, Stored
from workbench.claims.rules import Ledger
from workbench.claims.trained import Trained
from workbench.errors import ConfigError, RunError, UnknownNameError
from workbench.stats import first_reached

Options = Mapping[str, Any]


class NoNumber(Exception):
    """The runs are there and whole, and the measure is not defined for them, such as a step that is never reached."""


@dataclass(frozen=True)
class Number:
    """What a measure says of one run.

    Attributes:
        n: questions, or images where there are no questions.
        chance: the level of a model that knows nothing, NaN where there is none.
        asked: what must be equal for two numbers to be compared.
        source: the file or folder that it comes from.
    """

    value: float
    n: int
    chance: float
    asked: tuple[object, ...]
    source: str


@dataclass(frozen=True)
class Measure:
    """A measure, its version, and the options that it must and may have."""

    measured: Callable[[Evidence, Trained, Options], Number]
    version: int
    needs: tuple[str, ...] = ()
    may: tuple[str, ...] = ()


def _answers(evidence: Evidence, run: Trained, options: Options) -> Number:
    answers = run.answers
    known = sorted(answers.types)
    scores = []
    for name in options.get("categories", known):
        if name not in known:
            raise RunError(f"{run.source} has no questions of type {name}: expected one of {', '.join(known)}")
        scores.append(answers.types[name])
    value, chance = (
        float(np.mean(own)) for own in ([score.right / score.n for score in scores], [score.chance for score in scores])
    )
    return Number(value, sum(score.n for score in scores), chance, (answers.asked,), run.source)


def _stored(evidence: Evidence, run: Trained, options: Options) -> Number:
    stored, rows = _rows(evidence, run, options)
    return _number(float(rows[options["column"]].mean()), stored, rows, options)


def _slope(evidence: Evidence, run: Trained, options: Options) -> Number:
    stored, rows = _rows(evidence, run, options)
    over = _column(rows, options["over"], stored).to_numpy(float)
    if len(set(over)) < 2:
        raise ConfigError(
            f"{options['over']} is {over[0]:g} in all rows that where names: expected several values for a slope"
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
            f"{options['of']}{less} is {whole.min():.3f} in {run.folder.name}, and nothing can be a share of that"
        )
    return _number(float((rows[options["column"]].to_numpy(float) / whole).mean()), stored, rows, options)


def _rows(evidence: Evidence, run: Trained, options: Options) -> tuple[Stored, pd.DataFrame]:
    """The stored analysis of a run, and the rows of its table that `where` names, each once."""
    source = evidence.trained(options["source"][run.name], run.seed) if "source" in options else None
    stored = evidence.analysis(options["analysis"], run, source)
    table = stored.table(options["table"])
    lists = {
        column: value if isinstance(value, list | tuple) else [value] for column, value in options["where"].items()
    }
    parts = []
    for values in product(*lists.values()):
        rows = table
        for column, value in zip(lists, values, strict=True):
            rows = rows[_column(rows, column, stored) == value]
        if len(rows) != 1:
            named = ", ".join(f"{column} {value}" for column, value in zip(lists, values, strict=True))
            raise RunError(f"{stored.folder} has {len(rows)} rows of {options['table']} with {named}: expected 1")
        parts.append(rows)
    found = pd.concat(parts, ignore_index=True)
    for value in _column(found, options["column"], stored):
        _known(value, str(stored.folder), options["column"])
    return stored, found


def _column(table: pd.DataFrame, name: str, stored: Stored) -> pd.Series:
    if name not in table:
        raise RunError(f"{stored.folder} has no column {name}: expected one of {', '.join(map(str, table))}")
    return table[name]


def _number(value: float, stored: Stored, rows: pd.DataFrame, options: Options) -> Number:
    chance = float(_column(rows, options["chance"], stored).mean()) if "chance" in options else math.nan
    return Number(value, int(_column(rows, options["n"], stored).min()), chance, stored.asked, str(stored.folder))


def _known(value: float, where: str, column: str) -> float:
    if not math.isfinite(value):
        raise RunError(f"{where} has {column} {value}: expected a finite number")
    return float(value)


def _log_at(evidence: Evidence, run: Trained, options: Options) -> Number:
    log, steps = _log(run, options["column"])
    step = options["at"] * steps
    if not log["step"].iloc[0] <= step <= log["step"].iloc[-1]:
        raise RunError(
            f"{run.folder} has evaluations from step {log['step'].iloc[0]:g} to {log['step'].iloc[-1]:g}: expected them"
            f" around step {step:g}"
        )
    return _of_log(float(np.interp(step, log["step"], log["score"])), run, log)


def _steps_to(evidence: Evidence, run: Trained, options: Options) -> Number:
    log, steps = _log(run, options["column"])
    other = evidence.trained(options["final_of"], run.seed)
    final, last = _log(other, options["column"])
    if final["step"].iloc[-1] != last:
        raise RunError(
            f"{other.folder} was last evaluated at step {final['step'].iloc[-1]:g} of {last}: expected an evaluation at"
            " its end"
        )
    reached = first_reached(log["step"].to_numpy(float), log["score"].to_numpy(float), float(final["score"].iloc[-1]))
    if reached.step is None:
        raise NoNumber(f"{run.folder.name} is at the last score of {other.folder.name} {reached.text}")
    return _of_log(reached.step / steps, run, log)


def _log(run: Trained, column: str) -> tuple[pd.DataFrame, int]:
    """The evaluations of a run while it was trained, by step, and how many steps it has."""
    log = run.log(column)
    for value in log["score"]:
        _known(value, f"the log of {run.folder}", column)
    return log, int(run.recipe["optim.steps"])


def _of_log(value: float, run: Trained, log: pd.DataFrame) -> Number:
    # what is kept of a run without its folder has no n
    n, chance = log["n"].fillna(0).iloc[-1], float(log["chance"].iloc[-1])
    return Number(value, int(n), chance, (run.record.get("val"), tuple(log["step"])), f"the log of {run.folder}")


_TABLE = ("analysis", "table", "where", "column", "n")
MEASURES = {
    "answers": Measure(_answers, 1, may=("categories",)),
    "stored": Measure(_stored, 1, _TABLE, ("chance", "source")),
    "slope": Measure(_slope, 1, (*_TABLE, "over"), ("chance", "source")),
    "share": Measure(_share, 1, (*_TABLE, "of"), ("less", "chance", "source")),
    "log_at": Measure(_log_at, 1, ("column", "at")),
    "steps_to": Measure(_steps_to, 1, ("column", "final_of")),
}


def check_measures(ledger: Ledger, where: str) -> None:
    """See that every measure of a ledger is one of these, in the version that the ledger means, with its options.

    Raises:
        ConfigError, UnknownNameError: names the first that is not.
    """
    for name, version in ledger.measures.items():
        if name not in MEASURES:
            raise UnknownNameError(f"measure of {where}", name, MEASURES)
        if MEASURES[name].version != version:
            raise ConfigError(
                f"measure {name} has version {version} in {where}: expected {MEASURES[name].version}, the version that"
                " there is"
            )
    for claim in ledger.claims:
        if not claim.tested:
            continue
        measure = MEASURES[claim.measure]
        for option in claim.options:
            if option not in (*measure.needs, *measure.may):
                raise UnknownNameError(
                    f"option of {claim.measure} in claim {claim.id} of {where}", option, (*measure.needs, *measure.may)
                )
        for option in measure.needs:
            if option not in claim.options:
                raise ConfigError(
                    f"claim {claim.id} of {where} has no {option}: expected one, since {claim.measure} needs it"
                )
        if "source" in claim.options and set(claim.options["source"]) != set(claim.of):
            raise ConfigError(
                f"claim {claim.id} of {where} has sources for {', '.join(claim.options['source'])}: expected one for"
                f" each of {', '.join(claim.of)}"
            )
