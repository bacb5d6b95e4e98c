"""The claims ledger: rules and their hashes."""

from __future__ import annotations

import pytest

from tests.conftest import ROOT
from trainer.sweep.spec import Sweep
from workbench.claims.evidence import Evidence
from workbench.claims.rules import Ledger, options_of, parse_ledger, read_ledger
from workbench.claims.trained import Trained
from workbench.cli import parse
from workbench.errors import ConfigError, UnknownNameError
from workbench.yaml_config import as_mapping

LEDGER = ROOT / "analyses" / "claims.yaml"
SMALL = """
seeds: [1, 2, 3]
level: 0.05
measures: {answers: 1, stored: 1}
trainings:
  a: {folder: "a-s{seed}", sweep: s.yaml, runs: runs, recipe: {data.train: [d], alignment.objective: none}}
  b: {folder: "b-s{seed}", sweep: s.yaml, runs: runs, like: a, but: [alignment]}
analyses:
  cknna:
    python -m analyses.cknna --model {models} --vfm x y --limit 9 --no-objects --localise --output_dir {runs}
    --batch_size 4
claims:
  - {id: better, claim: B is better., paper: none, measure: answers, of: {b: 1, a: -1}, expect: more}
  - {id: closer, claim: B is closer., paper: none, expect: more,
     measure: stored, options: {analysis: cknna, where: {layer: 3}}, of: {b: 1}}
  - {id: later, claim: Who knows., paper: none, not_testable: too large}
"""


def small(*changes: tuple[str, str]) -> Ledger:
    text = SMALL
    for old, new in changes:
        assert text.count(old) >= 1
        text = text.replace(old, new)
    return parse_ledger(text, "small.yaml")


def hashes(ledger: Ledger) -> dict[str, str]:
    return {claim.id: rule for rule, claim in ledger.rules().items()}


def test_the_projects_ledger_can_be_read() -> None:
    ledger = read_ledger(LEDGER)
    assert len(ledger.rules()) == sum(claim.tested for claim in ledger.claims) > 40
    assert ledger.seeds == (10, 11, 12, 13, 14, 15)


@pytest.mark.slow
def test_the_sweeps_train_what_the_ledger_judges() -> None:
    """A run whose recipe is not the ledger's would be refused, after hours of training."""
    ledger = read_ledger(LEDGER)
    planned: dict[str, Trained] = {}
    for name, training in ledger.trainings.items():
        sweep = parse(Sweep, [], prog="sweep", recipe=LEDGER.parent.parent / training.sweep)
        assert str(sweep.output_dir) == training.runs
        assert sweep.seeds == ledger.seeds
        jobs = [job for job in sweep.runs() if job.folder.name == training.folder.format(seed=10) and job.seed == 10]
        (job,) = jobs
        planned[name] = Trained(name, training, 10, job.folder, {"recipe": as_mapping(job.recipe())})
        assert list(Evidence.mismatches(planned[name])) == []
        assert training.checkpoint == "last" or planned[name].recipe["keep_best"]
        if training.like:
            Evidence.check_like(planned[name], planned[training.like])


def test_options_of_a_command() -> None:
    assert options_of(small().analyses["cknna"]) == {
        "vfm": ["x", "y"],
        "limit": ["9"],
        "objects": False,
        "localise": True,
    }


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("B is better.", "B is a little better."),
        ("paper: none, measure: answers", "paper: Table 1, note: so it says, measure: answers"),
        ("sweep: s.yaml", "sweep: t.yaml"),
        ("runs: runs", "runs: elsewhere"),
        ("--batch_size 4", "--batch_size 8"),
        ("expect: more}\n  - {id: closer", "expect: more, weight: 1.0, than: 0}\n  - {id: closer"),
        ("seeds: [1, 2, 3]", "seeds: [3, 1, 2]"),
        ("too large", "far too large"),
        ("{b: 1, a: -1}", "{a: -1.0, b: 1.0}"),
    ],
)
def test_words_and_places_do_not_decide(old: str, new: str) -> None:
    assert hashes(small((old, new))) == hashes(small())


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        ("level: 0.05", "level: 0.1", {"better", "closer"}),
        ("seeds: [1, 2, 3]", "seeds: [1, 2, 4]", {"better", "closer"}),
        ("{answers: 1,", "{answers: 2,", {"better"}),
        ("{b: 1, a: -1}, expect: more", "{b: 1, a: -1}, expect: less", {"better"}),
        ("{b: 1, a: -1}, expect: more", "{b: 1, a: -1}, expect: more, than: 0.01", {"better"}),
        ("{b: 1, a: -1}, expect: more", "{b: 1, a: -1}, expect: more, weight: 2", {"better"}),
        ("{b: 1, a: -1}", "{b: 1, a: -2}", {"better"}),
        ("{layer: 3}", "{layer: 4}", {"closer"}),
        ("--limit 9", "--limit 10", {"closer"}),
        ("objective: none", "objective: cosine", {"better", "closer"}),  # of a, which b is like
        ("but: [alignment]", "but: [alignment, optim]", {"better", "closer"}),
        ('folder: "b-s', 'folder: "c-s', {"better", "closer"}),
        ("like: a, but", "checkpoint: best, like: a, but", {"better", "closer"}),
    ],
)
def test_what_decides_is_in_the_hash(old: str, new: str, changed: set[str]) -> None:
    before, after = hashes(small()), hashes(small((old, new)))
    assert {name for name in before if before[name] != after[name]} == changed


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "of: {b: 1, a: -1}",
            "of: {b: 1, c: -1}",
            "unknown training of claim better in small.yaml 'c': expected one of a, b",
        ),
        ("measure: answers", "measure: answer", "'answer': expected one of answers, stored; did you mean 'answers'"),
        ("analysis: cknna", "analysis: cknn", "did you mean 'cknna'"),
        ("expect: more}\n  - {id: closer", "expects: more}\n  - {id: closer", "did you mean 'expect'"),
        ("expect: more}\n  - {id: closer", "expect: bigger}\n  - {id: closer", "expected one of less, more"),
        ("like: a,", "like: q,", "unknown training that b is like 'q'"),
        (
            "recipe: {data.train: [d], alignment.objective: none}",
            "like: b",
            "training a in small.yaml is like b like a",
        ),
        ("data.train: [d], ", "", "training a in small.yaml has neither `like` nor data.train"),
        ("id: closer", "id: better", "two claims of small.yaml have the id better"),
        ("seeds: [1, 2, 3]", "seeds: [1]", "seeds of small.yaml are [1]"),
        ("seeds: [1, 2, 3]", "seeds: [1, 2, 2]", "seeds of small.yaml are [1, 2, 2]"),
        ("level: 0.05", "level: 5", "level of small.yaml is 5"),
        ("level: 0.05\n", "", "small.yaml has no level"),
        ("not_testable: too large", "not_testable: too large, expect: more", "has both a rule and not_testable"),
        ("{b: 1, a: -1}", "{b: 1, a: 0}", "other than 0"),
        ('"a-s{seed}"', "a-s1", "expected a name with {seed}"),
        ("level: 0.05", "level: 0.05\nlevel: 0.1", "key 'level' appears twice"),
        (
            "stored, options: {analysis: cknna, where: {layer: 3}}, of: {b: 1}",
            "answers, of: {a: -1, b: 1}",
            "the claims better, closer of small.yaml have the same rule",
        ),
    ],
)
def test_what_cannot_decide_is_refused(old: str, new: str, said: str) -> None:
    with pytest.raises((ConfigError, UnknownNameError)) as error:
        small((old, new))
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300
