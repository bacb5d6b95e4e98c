"""Verdicts: every claim of a ledger against the stored runs. They are computed, never typed, and refused where a rule
may have been written afterwards."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats as scipy_stats

from workbench.claims.evidence import Evidence, MissingRun, commands
from workbench.claims.measures import MEASURES, NoNumber, Number
from workbench.claims.rules import FILE, Claim, Ledger, parse_ledger
from workbench.claims.trained import Trained
from workbench.errors import RunError, WorkbenchError, one_line
from workbench.runs import checkout, file_at, has_commit
from workbench.stats import holm, t_interval

REPRODUCED, CONTRADICTED, NOT_SHOWN, NOT_TESTABLE = "reproduced", "contradicted", "not shown", "not testable here"
MISSING, REFUSED = "no runs yet", "refused"
VERDICTS = (REPRODUCED, CONTRADICTED, NOT_SHOWN, REFUSED, MISSING, NOT_TESTABLE)
SAME = 1e-9  # numbers that differ by less, relative to their size, show no spread


@dataclass
class Case:
    """What the runs say of one claim, before any test.

    Attributes:
        numbers: by seed and training.
        missing: runs that are not there.
        refused: why no verdict may be given.
        undefined: seeds for which the measure has no value, in words.
        trained: every run that the rule refers to.
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
        """The number of each seed for which every training has one."""
        whole = {seed: own for seed, own in self.numbers.items() if own.keys() == self.claim.of.keys()}
        return {
            seed: sum(weight * own[name].value for name, weight in self.claim.of.items()) for seed, own in whole.items()
        }

    @property
    def all(self) -> Iterator[Number]:
        for own in self.numbers.values():
            yield from own.values()


def judge(ledger: Ledger, evidence: Evidence) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """Every claim's row, the numbers of every run that they come from, and the commands that make the runs that are not
    there."""
    cases = [_case(ledger, evidence, claim) for claim in ledger.claims]
    tested = [case for case in cases if case.claim.tested]
    p = {case.claim.id: _p(case, ledger) for case in tested}
    dropped = _dropped(ledger, tested)
    shares = [*(case.claim.weight for case in tested), *dropped.values()]
    known = [1.0 if math.isnan(value) else value for value in p.values()]
    adjusted = holm([*known, *([1.0] * len(dropped))], shares)
    corrected = dict(zip(p, adjusted, strict=False))
    rows = [
        _row(case, ledger, p.get(case.claim.id, math.nan), corrected.get(case.claim.id, math.nan)) for case in cases
    ]
    each = [
        {
            "id": case.claim.id,
            "seed": seed,
            "training": name,
            "value": own.value,
            "n": own.n,
            "chance": own.chance,
            "source": own.source,
        }
        for case in tested
        for seed, numbers in case.numbers.items()
        for name, own in numbers.items()
    ]
    columns = ["id", "seed", "training", "value", "n", "chance", "source"]
    return (
        pd.DataFrame(rows),
        pd.DataFrame(each, columns=columns),
        commands(run for case in tested for run in case.missing),
    )


def _case(ledger: Ledger, evidence: Evidence, claim: Claim) -> Case:
    """All that can be read for a claim, and everything that is wrong with it."""
    if not claim.tested:
        return Case(claim, "")
    case = Case(claim, ledger.hash(claim))
    for seed in ledger.seeds:
        for name in [*claim.of, *(name for name in ledger.needed(claim) if name not in claim.of)]:
            try:
                run = evidence.trained(name, seed)
                case.trained[run.folder] = run
                if name in claim.of:
                    case.numbers.setdefault(seed, {})[name] = MEASURES[claim.measure].measured(
                        evidence, run, claim.options
                    )
            except MissingRun as error:
                case.missing.append(error)
            except NoNumber as error:
                case.undefined.append(f"seed {seed}: {error}")
            except RunError as error:
                case.refused.append(str(error))
    sources = {own.asked: own.source for own in case.all}
    if len(sources) > 1:
        first, other = list(sources.values())[:2]
        case.refused.append(
            f"{first} and {other} were asked different questions: expected the same data, options and version"
        )
    for run in case.trained.values():
        if said := not_written_before(run, case.rule):
            case.refused.append(said)
    return case


def not_written_before(run: Trained, rule: str) -> str:
    """Why a rule may not judge a run: it is not seen to have been in the commit that the run was trained at. Empty
    where it was."""
    commit = str(run.record.get("git") or "")
    if not commit:
        return (
            f"{run.folder} was trained by a copy without a repository, so no commit says that the rule was there before"
        )
    if run.record.get("dirty") is not False:
        return (
            f"{run.folder} was trained with changes that are not committed, so commit {commit[:12]} does not say what"
            " the rules were"
        )
    rules = rules_at(commit)
    if isinstance(rules, str):
        return f"the rule is not known to be in commit {commit[:12]} of run {run.folder.name}, since {rules}"
    if rule not in rules:
        return (
            f"the rule {rule} is not in commit {commit[:12]} of run {run.folder.name}: expected a run that was trained"
            " after it was written"
        )
    return ""


@lru_cache(maxsize=64)
def rules_at(commit: str) -> Mapping[str, Claim] | str:
    """The rules of the ledger as it was at a commit, by hash, or why they are not known."""
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


def _dropped(ledger: Ledger, cases: list[Case]) -> dict[str, float]:
    """Rules, with their weights, that were there when a run was trained and are not any more: leaving them out would
    make the others' p smaller."""
    commits = {str(run.record.get("git") or "") for case in cases for run in case.trained.values()} - {""}
    before = [rules for rules in map(rules_at, sorted(commits)) if not isinstance(rules, str)]
    return {rule: claim.weight for rules in before for rule, claim in rules.items() if rule not in ledger.rules()}


def _p(case: Case, ledger: Ledger) -> float:
    """Student's two-sided p of a claim's seeds against its null; NaN where there is nothing to test, 1 where they show
    no spread or one has no value."""
    values = np.array(list(case.seeds.values()))
    if case.refused or case.missing:
        return math.nan
    if case.undefined or len(values) < len(ledger.seeds) or _no_spread(values):
        return 1.0
    return float(scipy_stats.ttest_1samp(values, case.claim.than).pvalue)


def _no_spread(values: np.ndarray) -> bool:
    return bool(np.ptp(values) <= SAME * max(1.0, float(np.abs(values).max())))


def _row(case: Case, ledger: Ledger, p: float, p_holm: float) -> dict[str, object]:
    """The row of a claim."""
    claim, seeds = case.claim, case.seeds
    values = np.array(list(seeds.values()))
    verdict, reason = _verdict(case, ledger, values, p, p_holm)
    interval = t_interval(values) if len(values) and not (len(values) > 1 and _no_spread(values)) else None
    numbers = list(case.all)
    chance = [own.chance for own in numbers if not math.isnan(own.chance)]
    means = {name: [own[name].value for own in case.numbers.values() if name in own] for name in claim.of}
    tested = not math.isnan(p)
    return {
        **{"id": claim.id, "claim": claim.claim, "origin": claim.origin, "paper": claim.paper},
        **{"ours": float(values.mean()) if len(values) else math.nan},
        **{
            "low": math.nan if interval is None else interval.low,
            "high": math.nan if interval is None else interval.high,
        },
        **{"seeds": " ".join(map(str, seeds)), "n": min((own.n for own in numbers), default=0)},
        **{
            "chance": float(np.mean(chance)) if chance else math.nan,
            "null": claim.than if claim.tested else math.nan,
            "expect": claim.expect,
        },
        **{"trainings": ", ".join(f"{name} {np.mean(own):.4g}" for name, own in means.items() if own)},
        **{"p": p, "p_holm": p_holm if tested else math.nan, "weight": claim.weight if claim.tested else math.nan},
        **{"verdict": verdict, "reason": reason, "note": claim.note, "rule": case.rule},
        **{"commits": " ".join(sorted({str(run.record.get("git") or "none")[:12] for run in case.trained.values()}))},
        **{"commands": "\n".join(commands(case.missing))},
    }


def ours(row: Mapping[str, Any]) -> str:
    """Our figure of a claim's row in words; empty where there is none."""
    if math.isnan(row["ours"]):
        return ""
    seeds = str(row["seeds"]).split()
    spread = (
        f"[{row['low']:.4g}, {row['high']:.4g}] over {len(seeds)} seeds"
        if math.isfinite(row["low"])
        else f"no interval, seeds {row['seeds']}"
    )
    chance = "" if math.isnan(row["chance"]) else f", chance {row['chance']:.3g}"
    return f"{row['ours']:.4g} {spread}, n {row['n']}, null {row['null']:g}; {row['trainings']}{chance}"


def _verdict(case: Case, ledger: Ledger, values: np.ndarray, p: float, p_holm: float) -> tuple[str, str]:
    """The verdict, and its reason in a sentence."""
    claim = case.claim
    if not claim.tested:
        return NOT_TESTABLE, claim.not_testable
    if case.refused:
        others = len(set(case.refused)) - 1
        return REFUSED, case.refused[0] + (f" (and {others} more)" if others else "")
    if case.missing:
        there = f"; the figure is of {len(values)} of {len(ledger.seeds)} seeds" if len(values) else ""
        alone = ", and one seed has no interval" if len(values) == 1 else ""
        gone = list(dict.fromkeys(run.what for run in case.missing))
        return (
            MISSING,
            f"{len(gone)} {'run is' if len(gone) == 1 else 'runs are'} not there, such as {gone[0]}{there}{alone}",
        )
    if case.undefined:
        return NOT_SHOWN, "; ".join(case.undefined)
    if _no_spread(values):
        return NOT_SHOWN, f"all seeds have {values[0]:.4g}, which shows no spread to judge by"
    side = (values.mean() > claim.than) == (claim.expect == "more")
    test = f"p {p:.2g}, Holm over {len(ledger.rules())} rules {p_holm:.2g}, seeds {claim.expect} {claim.than:g}: "
    agree = int(((values > claim.than) if claim.expect == "more" else (values < claim.than)).sum())
    test += f"{agree} of {len(values)}"
    commits = len({run.record.get("git") for run in case.trained.values()})
    test += f"; its runs are of {commits} commits" if commits > 1 else ""
    if p_holm >= ledger.level:
        return NOT_SHOWN, test
    return (REPRODUCED if side else CONTRADICTED), test
