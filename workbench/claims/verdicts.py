"""Verdicts: judge every claim of a ledger by the stored runs.

Verdicts are computed, never typed, and refused where a rule may have been written after the runs that it judges.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from workbench.claims.evidence import Evidence, MissingRun, commands
from workbench.claims.measures import MEASURES, NoNumber, Number
from workbench.claims.rules import FILE, Claim, Ledger, parse_ledger
from workbench.claims.trained import Trained
from workbench.errors import RunError, WorkbenchError, one_line
from workbench.intervals import t_interval, t_test
from workbench.paired import holm
from workbench.runs import checkout, file_at, has_commit

REPRODUCED, CONTRADICTED, NOT_SHOWN, NOT_TESTABLE = "reproduced", "contradicted", "not shown", "not testable here"
MISSING, REFUSED = "no runs yet", "refused"
VERDICTS = (REPRODUCED, CONTRADICTED, NOT_SHOWN, REFUSED, MISSING, NOT_TESTABLE)
SAME = 1e-9  # numbers whose range is smaller than this, relative to their size, have no spread


@dataclass
class Case:
    """The evidence for one claim, before any test.

    Attributes:
        rule: hash of the claim's rule; empty if it has none.
        numbers: {seed: {training: number}}.
        missing: runs that were not found.
        refused: reasons why no verdict may be given.
        undefined: sentences about the seeds for which the measure is not defined.
        trained: every run that the rule refers to, by folder.
    """

    claim: Claim
    rule: str
    numbers: dict[int, dict[str, Number]] = field(default_factory=dict)
    missing: list[MissingRun] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    undefined: list[str] = field(default_factory=list)
    trained: dict[Path, Trained] = field(default_factory=dict)

    @property
    def seeds(self) -> dict[int, float]:
        """The number of each seed: the weighted sum over its trainings, where all of them have a number."""
        complete = {seed: numbers for seed, numbers in self.numbers.items() if numbers.keys() == self.claim.of.keys()}
        return {
            seed: sum(weight * numbers[name].value for name, weight in self.claim.of.items())
            for seed, numbers in complete.items()
        }

    @property
    def all(self) -> Iterator[Number]:
        """All numbers, of all seeds and trainings."""
        for numbers in self.numbers.values():
            yield from numbers.values()


def judge(ledger: Ledger, evidence: Evidence) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """Judge every claim of a ledger.

    Returns:
        A table with one row for each claim; a table of the numbers behind the verdicts, one row for each run; and the
        commands that make the missing runs.
    """
    cases = [_case(ledger, evidence, claim) for claim in ledger.claims]
    tested = [case for case in cases if case.claim.tested]
    p = {case.claim.id: _p(case, ledger) for case in tested}
    dropped = _dropped_rules(ledger, tested)
    weights = [*(case.claim.weight for case in tested), *dropped.values()]
    p_or_one = [1.0 if math.isnan(value) else value for value in p.values()]
    adjusted = holm([*p_or_one, *([1.0] * len(dropped))], weights)
    p_holm = dict(zip(p, adjusted, strict=False))
    rows = [
        _row(case, ledger, p.get(case.claim.id, math.nan), p_holm.get(case.claim.id, math.nan), len(weights))
        for case in cases
    ]
    number_rows = [
        {
            "id": case.claim.id,
            "seed": seed,
            "training": name,
            "value": number.value,
            "n": number.n,
            "chance": number.chance,
            "source": number.source,
        }
        for case in tested
        for seed, numbers in case.numbers.items()
        for name, number in numbers.items()
    ]
    columns = ["id", "seed", "training", "value", "n", "chance", "source"]
    missing = commands(run for case in tested for run in case.missing)
    return pd.DataFrame(rows), pd.DataFrame(number_rows, columns=columns), missing


def _case(ledger: Ledger, evidence: Evidence, claim: Claim) -> Case:
    """Collect all numbers for a claim, and everything that stands in the way of a verdict."""
    if not claim.tested:
        return Case(claim, "")
    case = Case(claim, ledger.hash(claim))
    compute = MEASURES[claim.measure].compute
    for seed in ledger.seeds:
        for name in [*claim.of, *(name for name in ledger.needed(claim) if name not in claim.of)]:
            try:
                run = evidence.trained(name, seed)
                case.trained[run.folder] = run
                if name in claim.of:
                    case.numbers.setdefault(seed, {})[name] = compute(evidence, run, claim.options)
            except MissingRun as error:
                case.missing.append(error)
            except NoNumber as error:
                case.undefined.append(f"seed {seed}: {error}")
            except RunError as error:
                case.refused.append(str(error))
    sources = {number.asked: number.source for number in case.all}
    if len(sources) > 1:
        first, other = list(sources.values())[:2]
        case.refused.append(
            f"{first} and {other} were asked different questions: expected the same data, options and version"
        )
    for run in case.trained.values():
        if reason := not_written_before(run, case.rule):
            case.refused.append(reason)
    return case


def not_written_before(run: Trained, rule: str) -> str:
    """Return why a rule may not judge a run, or "" if it may: it was in the commit at which the run was trained."""
    commit = str(run.record.get("git") or "")
    if not commit:
        return (
            f"{run.folder} was trained with code outside a repository, so no commit shows that the rule existed before"
        )
    if run.record.get("dirty") is not False:
        return (
            f"{run.folder} was trained with uncommitted changes, so commit {commit[:12]} does not show what the rules"
            " were"
        )
    rules = rules_at(commit)
    if isinstance(rules, str):
        return f"the rule is not known to be in commit {commit[:12]} of run {run.folder.name}, since {rules}"
    if rule not in rules:
        return (
            f"the rule {rule} is not in commit {commit[:12]} of run {run.folder.name}: expected a run that was trained"
            " after the rule was written"
        )
    return ""


@lru_cache(maxsize=64)
def rules_at(commit: str) -> Mapping[str, Claim] | str:
    """Return the rules in the ledger at a commit by their hash, or the reason why they are not known."""
    root = checkout()
    if root is None:
        return "this package is installed without its repository"
    if not has_commit(root, commit):
        return f"that commit is not in the repository {root}"
    text = file_at(root, commit, FILE)
    if text is None:
        return f"it has no {FILE}"
    try:
        return parse_ledger(text, FILE).rules()
    except WorkbenchError as error:
        return f"its {FILE} cannot be read ({one_line(error, 100)})"


def _dropped_rules(ledger: Ledger, cases: list[Case]) -> dict[str, float]:
    """Return the weights of rules that existed when a run was trained but were removed from the ledger since.

    Holm's correction counts them, because otherwise removing a rule would make the p-values of the others smaller.
    """
    commits = {str(run.record.get("git") or "") for case in cases for run in case.trained.values()} - {""}
    earlier = [rules for rules in map(rules_at, sorted(commits)) if not isinstance(rules, str)]
    return {rule: claim.weight for rules in earlier for rule, claim in rules.items() if rule not in ledger.rules()}


def _p(case: Case, ledger: Ledger) -> float:
    """Return the two-sided p of Student's t-test of a claim's seeds against its null value.

    NaN if runs are missing or refused; 1 if the seeds show no spread or the measure is undefined for one of them.
    """
    values = np.array(list(case.seeds.values()))
    if case.refused or case.missing:
        return math.nan
    if case.undefined or len(values) < len(ledger.seeds) or _no_spread(values):
        return 1.0
    return t_test(values, case.claim.than)


def _no_spread(values: np.ndarray) -> bool:
    return bool(np.ptp(values) <= SAME * max(1.0, float(np.abs(values).max())))


def _row(case: Case, ledger: Ledger, p: float, p_holm: float, rules: int) -> dict[str, object]:
    """Return a claim's row of the table; `rules` is how many rules Holm's correction counts."""
    claim, seeds = case.claim, case.seeds
    values = np.array(list(seeds.values()))
    verdict, reason = _verdict(case, ledger, values, p, p_holm, rules)
    interval = t_interval(values) if len(values) and not (len(values) > 1 and _no_spread(values)) else None
    numbers = list(case.all)
    chances = [number.chance for number in numbers if not math.isnan(number.chance)]
    by_training = {
        name: [of_seed[name].value for of_seed in case.numbers.values() if name in of_seed] for name in claim.of
    }
    commits = {str(run.record.get("git") or "none")[:12] for run in case.trained.values()}
    return {
        "id": claim.id,
        "claim": claim.claim,
        "origin": claim.origin,
        "paper": claim.paper,
        "ours": float(values.mean()) if len(values) else math.nan,
        "low": math.nan if interval is None else interval.low,
        "high": math.nan if interval is None else interval.high,
        "seeds": " ".join(map(str, seeds)),
        "n": min((number.n for number in numbers), default=0),
        "chance": float(np.mean(chances)) if chances else math.nan,
        "null": claim.than if claim.tested else math.nan,
        "expect": claim.expect,
        "trainings": ", ".join(f"{name} {np.mean(each):.4g}" for name, each in by_training.items() if each),
        "p": p,
        "p_holm": math.nan if math.isnan(p) else p_holm,
        "weight": claim.weight if claim.tested else math.nan,
        "verdict": verdict,
        "reason": reason,
        "note": claim.note,
        "rule": case.rule,
        "commits": " ".join(sorted(commits)),
        "commands": "\n".join(commands(case.missing)),
    }


def ours(row: Mapping[str, Any]) -> str:
    """Return our number in a claim's row as text, with interval, n, null and trainings; empty if there is none."""
    if math.isnan(row["ours"]):
        return ""
    seeds = str(row["seeds"]).split()
    has_interval = math.isfinite(row["low"])
    interval = f"[{row['low']:.4g}, {row['high']:.4g}] over {len(seeds)} seeds"
    spread = interval if has_interval else f"no interval, seeds {row['seeds']}"
    chance = "" if math.isnan(row["chance"]) else f", chance {row['chance']:.3g}"
    return f"{row['ours']:.4g} {spread}, n {row['n']}, null {row['null']:g}; {row['trainings']}{chance}"


def _verdict(case: Case, ledger: Ledger, values: np.ndarray, p: float, p_holm: float, rules: int) -> tuple[str, str]:
    """Return the verdict, and its reason in one sentence."""
    claim = case.claim
    if not claim.tested:
        return NOT_TESTABLE, claim.not_testable
    if case.refused:
        others = len(set(case.refused)) - 1
        return REFUSED, case.refused[0] + (f" (and {others} more)" if others else "")
    if case.missing:
        partial = f"; our number is from {len(values)} of {len(ledger.seeds)} seeds" if len(values) else ""
        single = ", and one seed has no interval" if len(values) == 1 else ""
        missing = list(dict.fromkeys(run.what for run in case.missing))
        are_missing = "run is missing" if len(missing) == 1 else "runs are missing"
        return MISSING, f"{len(missing)} {are_missing}, such as {missing[0]}{partial}{single}"
    if case.undefined:
        return NOT_SHOWN, "; ".join(case.undefined)
    if _no_spread(values):
        return NOT_SHOWN, f"all seeds have {values[0]:.4g}, so there is no spread to test against"
    is_expected = (values.mean() > claim.than) == (claim.expect == "more")
    agree = int(((values > claim.than) if claim.expect == "more" else (values < claim.than)).sum())
    commits = len({run.record.get("git") for run in case.trained.values()})
    reason = (
        f"p {p:.2g}, Holm over {rules} rules {p_holm:.2g}, seeds {claim.expect} than {claim.than:g}: {agree} of"
        f" {len(values)}"
    )
    reason += f"; its runs were trained at {commits} commits" if commits > 1 else ""
    if p_holm >= ledger.level:
        return NOT_SHOWN, reason
    return (REPRODUCED if is_expected else CONTRADICTED), reason
