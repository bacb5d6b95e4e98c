"""Verdicts of the claims ledger, on hand-made runs whose numbers are known."""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from tests.conftest import ROOT, refused
from tests.ledgers import SEEDS, analyzed, answers, commit, layers, ledger, pairs, train
from tests.workbench.dashboard.test_dashboard import open_page
from trainer.sweep.results import export, result_of
from trainer.sweep.spec import Job, Setting, Sweep
from workbench import runs
from workbench.analysis import report
from workbench.claims import verdicts
from workbench.claims.evidence import Evidence, changed_options
from workbench.claims.measures import check_measures
from workbench.claims.rules import parse_ledger
from workbench.claims.shown import newest
from workbench.claims.verdicts import judge
from workbench.errors import ConfigError, UnknownNameError

MORE = "{id: more, claim: B is better., paper: Table 1, measure: answers, of: {b: 1, a: -1}, expect: more}"
LESS = "{id: less, claim: B is worse., paper: Table 1, measure: answers, of: {b: 1, a: -1}, expect: less}"
COUNT = (
    "{id: count, claim: B counts., paper: Table 2, measure: answers, options: {categories: [count]}, of: {b: 1, a: -1},"
    " expect: more}"
)
STOPPED = "{id: stopped, claim: B beats the best A., paper: none, measure: answers, of: {b: 1, best: -1}, expect: more}"
NEVER = "{id: never, claim: Who knows., paper: Table 9, not_testable: too large}"
CLOSER = (
    "{id: closer, claim: B is closer., paper: none, measure: stored, options: {analysis: cknna, table: scores, where:"
    " {layer: [2, 3], vfm: dino}, column: score, chance: null_mean, n: n_images}, of: {b: 1, a: -1}, expect: more}"
)
FALLS = (
    "{id: falls, claim: A falls., paper: none, measure: slope, options: {analysis: cknna, table: scores, where: {layer:"
    " [1, 2, 3]}, column: score, over: layer, n: n_images}, of: {a: 1}, expect: less}"
)
GAINS = (9, 10, 11, 10, 9, 12)


class World:
    """A repository with a ledger, and a folder of runs."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.repository, self.runs = folder / "repository", folder / "runs" / "abc"
        self.runs.mkdir(parents=True)
        patch.setattr(verdicts, "checkout", lambda: self.repository)
        verdicts.rules_at.cache_clear()

    def commit(self, *claims: str) -> str:
        return commit(self.repository, ledger(*claims))

    def judge(self, *claims: str, text: str = "") -> dict[str, dict[str, Any]]:
        rules = parse_ledger(text or ledger(*claims), "rules.yaml")
        check_measures(rules, "rules.yaml")
        self.table, self.numbers, self.commands = judge(rules, Evidence(rules, [self.runs]))
        return {str(row["id"]): row for row in self.table.to_dict("records")}


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


def p_of(*values: float) -> float:
    """Student's two-sided p, written out."""
    array = np.array(values)
    t = array.mean() / (array.std(ddof=1) / np.sqrt(len(array)))
    return float(2 * scipy_stats.t.sf(abs(t), len(array) - 1))


# --- verdicts -------------------------------------------------------------------------------------


def test_a_gain_on_every_seed_is_reproduced_and_its_opposite_contradicted(world: World) -> None:
    claims = (MORE, LESS, NEVER)
    pairs(world.runs, GAINS, git=world.commit(*claims))
    found = world.judge(*claims)
    row = found["more"]
    assert (row["verdict"], found["less"]["verdict"], found["never"]["verdict"]) == (
        "reproduced",
        "contradicted",
        "not testable here",
    )
    assert row["ours"] == pytest.approx(np.mean(GAINS) / 100)
    assert row["n"] == 200
    assert row["seeds"] == "1 2 3 4 5 6"
    assert row["chance"] == 0.25
    half = scipy_stats.t.ppf(0.975, 5) * np.std(GAINS, ddof=1) / np.sqrt(6) / 100
    assert (row["low"], row["high"]) == (pytest.approx(row["ours"] - half), pytest.approx(row["ours"] + half))
    # two rules, one p
    assert row["p"] == pytest.approx(p_of(*GAINS))
    assert row["p_holm"] == pytest.approx(2 * p_of(*GAINS))
    assert row["trainings"] == "b 0.5367, a 0.435"
    assert found["never"]["reason"] == "too large"
    assert np.isnan(found["never"]["p_holm"])
    each = world.numbers.query("id == 'more' and training == 'b'").set_index("seed")["value"]
    assert each.to_dict() == pytest.approx(
        {seed: (40 + seed + gain) / 100 for seed, gain in zip(SEEDS, GAINS, strict=True)}
    )


def test_a_gain_that_the_seeds_do_not_agree_on_is_not_shown(world: World) -> None:
    pairs(world.runs, (5, -4, 3, -2, 1, 2), git=world.commit(MORE))
    row = world.judge(MORE)["more"]
    assert row["verdict"] == "not shown"
    assert row["p"] == pytest.approx(p_of(5, -4, 3, -2, 1, 2))
    assert "4 of 6" in row["reason"]


def test_significant_alone_but_not_among_all_rules(world: World) -> None:
    gains = (1, 4, 2, 5, 1, 5)  # p .01: below .05, and above .05 / 10
    others = [
        MORE.replace("id: more", f"id: other-{n}").replace("more}", f"more, than: 0.0{n}}}") for n in range(1, 10)
    ]
    pairs(world.runs, gains, git=world.commit(MORE, *others))
    # nine rules were dropped, and are counted
    assert 0.005 < p_of(*gains) < 0.05
    assert world.judge(MORE)["more"]["verdict"] == "not shown"
    assert world.judge(MORE)["more"]["p_holm"] == pytest.approx(10 * p_of(*gains))
    assert "Holm over 10 rules" in world.judge(MORE)["more"]["reason"]


def test_rules_without_runs_count_as_well(world: World) -> None:
    git = world.commit(MORE, CLOSER, FALLS)
    pairs(world.runs, GAINS, git=git)
    assert world.judge(MORE, CLOSER, FALLS)["more"]["p_holm"] == pytest.approx(3 * p_of(*GAINS))


def test_weights_share_the_error(world: World) -> None:
    heavy = MORE.replace("more}", "more, weight: 8}")
    pairs(world.runs, GAINS, git=world.commit(heavy, CLOSER, FALLS))
    assert world.judge(heavy, CLOSER, FALLS)["more"]["p_holm"] == pytest.approx(p_of(*GAINS) / 8 * 10)


def test_a_difference_without_spread_is_not_shown(world: World) -> None:
    pairs(world.runs, (10,) * 6, git=world.commit(MORE))
    row = world.judge(MORE)["more"]
    assert (row["verdict"], row["p"]) == ("not shown", 1.0)
    assert "no spread" in row["reason"]
    assert np.isnan(row["low"])


def test_the_null_need_not_be_zero(world: World) -> None:
    margin = MORE.replace("more}", "more, than: 0.2}")
    pairs(world.runs, GAINS, git=world.commit(margin))
    row = world.judge(margin)["more"]
    assert row["verdict"] == "contradicted"
    assert row["null"] == 0.2
    assert row["p"] == pytest.approx(p_of(*(gain - 20 for gain in GAINS)))


# --- refused: the rule may have been written afterwards -------------------------------------------


def test_a_rule_that_came_later_judges_nothing(world: World) -> None:
    git = world.commit(LESS)
    pairs(world.runs, GAINS, git=git)
    row = world.judge(MORE, LESS)["more"]
    assert row["verdict"] == "refused"
    assert f"is not in commit {git[:12]} of run b-s1" in row["reason"]
    assert np.isnan(row["p"])
    assert np.isnan(row["p_holm"])
    assert world.judge(MORE, LESS)["less"]["verdict"] == "contradicted"


def test_a_rule_that_was_changed_is_another_rule(world: World) -> None:
    pairs(world.runs, GAINS, git=world.commit(MORE.replace("expect: more", "expect: less")))
    assert world.judge(MORE)["more"]["verdict"] == "refused"


@pytest.mark.slow
def test_one_run_of_another_commit_is_enough(world: World) -> None:
    before, after = world.commit(LESS), world.commit(MORE)
    pairs(world.runs, GAINS, git=after)
    assert world.judge(MORE)["more"]["verdict"] == "reproduced"
    train(world.runs / "a-s4", answers(count=44, exist=44), git=world.commit(MORE, NEVER))
    assert world.judge(MORE)["more"]["verdict"] == "reproduced"
    assert world.judge(MORE)["more"]["reason"].endswith("6 of 6; its runs were trained at 2 commits")
    train(world.runs / "a-s4", answers(count=44, exist=44), git=before)
    row = world.judge(MORE)["more"]
    assert row["verdict"] == "refused"
    assert f"commit {before[:12]} of run a-s4" in row["reason"]
    assert row["commits"] == " ".join(sorted([before[:12], after[:12]]))


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"dirty": True}, "was trained with uncommitted changes"),
        ({"dirty": None}, "was trained with uncommitted changes"),
        ({"git": ""}, "was trained with code outside a repository"),
        ({"git": "f" * 40}, "since that commit is not in the repository"),
    ],
)
def test_a_run_whose_rules_are_not_known_is_refused(world: World, record: dict[str, Any], said: str) -> None:
    pairs(world.runs, GAINS, git=world.commit(MORE))
    facts = json.loads((world.runs / "b-s3" / "training.json").read_text())
    (world.runs / "b-s3" / "training.json").write_text(json.dumps(facts | record))
    row = world.judge(MORE)["more"]
    assert row["verdict"] == "refused"
    assert said in row["reason"]
    assert "b-s3" in row["reason"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "said"),
    [(None, "it has no analyses/claims.yaml"), ("seeds: 3", "its analyses/claims.yaml cannot be read")],
)
def test_a_commit_without_rules(world: World, text: str | None, said: str) -> None:
    pairs(world.runs, GAINS, git=commit(world.repository, text))
    assert said in world.judge(MORE)["more"]["reason"]
    assert world.judge(MORE)["more"]["verdict"] == "refused"


def test_an_installed_package_refuses(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs(world.runs, GAINS, git=world.commit(MORE))
    monkeypatch.setattr(verdicts, "checkout", lambda: None)
    assert "installed without its repository" in world.judge(MORE)["more"]["reason"]


# --- runs that are missing, damaged, or not what they are called ----------------------------------


def test_runs_that_are_not_there_are_no_error(world: World) -> None:
    row = world.judge(MORE, CLOSER)["more"]
    assert row["verdict"] == "no runs yet"
    assert row["reason"] == "12 runs are missing, such as b-s1"
    assert np.isnan(row["ours"])
    assert world.commands == ["python -m trainer.sweep abc.yaml"]


def test_one_seed_has_a_figure_and_no_interval(world: World) -> None:
    pairs(world.runs, (10,), git=world.commit(MORE))
    row = world.judge(MORE)["more"]
    assert row["verdict"] == "no runs yet"
    assert row["ours"] == pytest.approx(0.1)
    assert not np.isfinite(row["low"])
    assert "one seed has no interval" in row["reason"]
    assert np.isnan(row["p"])
    assert np.isnan(row["p_holm"])
    assert verdicts.ours(row).startswith("0.1 no interval, seeds 1, n 200, null 0; b 0.51, a 0.41")


def test_an_analysis_that_is_not_there_is_one_command_for_all_models(world: World) -> None:
    pairs(world.runs, GAINS, git=world.commit(CLOSER))
    analyzed(world.runs, world.runs / "a-s1", layers([0.5, 0.5, 0.5]))
    row = world.judge(CLOSER)["closer"]
    models = " ".join(
        str(world.runs / name) for seed in SEEDS for name in (f"b-s{seed}", f"a-s{seed}") if name != "a-s1"
    )
    assert row["verdict"] == "no runs yet"
    command = "python -m analyses.cknna --model {} --data shapes:test --limit 9 --output_dir {}"
    assert row["commands"] == command.format(models, world.runs)


def test_runs_that_were_asked_different_questions(world: World) -> None:
    pairs(world.runs, GAINS, git=(git := world.commit(MORE)))
    train(world.runs / "a-s2", answers(count=42, exist=42).iloc[:-1], git=git)
    row = world.judge(MORE)["more"]
    assert row["verdict"] == "refused"
    assert "were asked different questions" in row["reason"]
    assert "a-s2" in row["reason"]
    train(world.runs / "a-s2", answers(count=42, exist=42).assign(id=lambda t: "other-" + t["id"]), git=git)
    assert "were asked different questions" in world.judge(MORE)["more"]["reason"]
    train(world.runs / "a-s2", answers(count=42, exist=42), git=git, test="of another test split")
    assert "were asked different questions" in world.judge(MORE)["more"]["reason"]


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("evaluation.parquet", b"not parquet", "evaluation.parquet cannot be read"),
        ("training.json", b"{", "training.json is damaged"),
    ],
)
def test_a_damaged_run(world: World, file: str, content: bytes, said: str) -> None:
    pairs(world.runs, GAINS, git=world.commit(MORE))
    (world.runs / "b-s5" / file).write_bytes(content)
    row = world.judge(MORE)["more"]
    assert row["verdict"] == "refused"
    assert said in row["reason"]
    assert "b-s5" in row["reason"]


def test_nan_is_said(world: World) -> None:
    pairs(world.runs, GAINS, git=(git := world.commit(MORE, CLOSER)))
    broken = answers(count=41, exist=41).astype({"correct": float})
    broken.loc[broken["category"] == "count", "correct"] = np.nan
    train(world.runs / "a-s1", broken, git=git)
    for seed in SEEDS:
        for name in ("a", "b"):
            analyzed(
                world.runs,
                world.runs / f"{name}-s{seed}",
                layers([0.5, 0.5, np.nan if (name, seed) == ("b", 2) else 0.5]),
            )
    found = world.judge(MORE, CLOSER)
    assert "has question count-0 without an answer" in found["more"]["reason"]
    assert "has score nan" in found["closer"]["reason"]
    assert {found["more"]["verdict"], found["closer"]["verdict"]} == {"refused"}


@pytest.mark.parametrize(
    ("recipe", "record", "said"),
    [
        (
            {"alignment.objective": "none"},
            {},
            "was trained with alignment.objective none: expected cosine, as for b in the ledger",
        ),
        ({"alignment.objective": "cosine", "seed": 9}, {}, "was trained with seed 9: expected 2"),
        (
            {"alignment.objective": "cosine", "optim.weight_decay": 0.5},
            {},
            "differ in optim.weight_decay, 0.5 and 0.05: expected recipes that differ in alignment only",
        ),
        (
            {"alignment.objective": "cosine"},
            {"data": "another 300"},
            "were trained on data with fingerprints another 300 and fingerprint of 300",
        ),
    ],
)
def test_a_run_that_is_not_what_its_folder_is_called(
    world: World, recipe: dict[str, Any], record: dict[str, Any], said: str
) -> None:
    pairs(world.runs, GAINS, git=(git := world.commit(MORE)))
    train(world.runs / "b-s2", answers(count=90, exist=90), git=git, recipe=recipe, **record)
    row = world.judge(MORE)["more"]
    assert row["verdict"] == "refused"
    assert said in row["reason"]


def test_a_variant_that_is_no_variant(world: World) -> None:
    decay = "{id: decay, claim: Decay helps., paper: none, measure: answers, of: {c: 1, a: -1}, expect: more}"
    text = ledger(decay).replace(
        "analyses:",
        '  c: {folder: "c-s{seed}", sweep: c.yaml, runs: runs/abc, like: a, but: [optim.weight_decay]}\nanalyses:',
    )
    pairs(world.runs, GAINS, git=(git := commit(world.repository, text)))
    for seed in SEEDS:
        train(
            world.runs / f"c-s{seed}",
            answers(count=50, exist=51 + seed % 2),
            git=git,
            recipe={"optim.weight_decay": 0.5 if seed != 4 else 0.05},
        )
    row = world.judge(text=text)["decay"]
    assert row["verdict"] == "refused"
    assert "c-s4" in row["reason"]
    assert "have the same recipe: expected recipes that differ in optim.weight_decay" in row["reason"]
    train(world.runs / "c-s4", answers(count=50, exist=51), git=git, recipe={"optim.weight_decay": 0.5})
    assert world.judge(text=text)["decay"]["verdict"] == "reproduced"


def test_what_changes_no_number_may_differ(world: World) -> None:
    pairs(world.runs, GAINS, git=(git := world.commit(MORE)))
    train(
        world.runs / "b-s2",
        answers(count=52, exist=52),
        git=git,
        recipe={"alignment.objective": "cosine", "alignment.layer": [2], "output_dir": "there"},
    )
    assert world.judge(MORE)["more"]["verdict"] == "reproduced"


def test_runs_of_other_data_may_be_called_the_same(world: World, tmp_path: Path) -> None:
    rules = parse_ledger(ledger(MORE), "rules.yaml")
    other = tmp_path / "runs" / "photos"
    git = world.commit(MORE)
    pairs(world.runs, GAINS, git=git)
    pairs(other, (1,) * 6, git=git, recipe={"data.train": ["photos:train"]})
    table, _, _ = judge(rules, Evidence(rules, [other, world.runs, world.runs]))
    assert table["verdict"].tolist() == ["reproduced"]
    table, _, _ = judge(rules, Evidence(rules, [other]))
    assert table["verdict"].tolist() == ["no runs yet"]
    shutil.copytree(world.runs, tmp_path / "copy" / "abc")
    table, _, _ = judge(rules, Evidence(rules, [world.runs, tmp_path / "copy" / "abc"]))
    assert table["verdict"].tolist() == ["refused"]
    assert "are both b of seed 1" in table["reason"][0]


def exported(root: Path) -> None:
    """Keep of every run what `python -m trainer.sweep --export` does, and remove the folders."""
    jobs = [
        Job(Setting(folder.name.partition("-s")[0], "x.yaml"), int(folder.name.partition("-s")[2]), folder, [])
        for folder in sorted(root.glob("*-s*"))
    ]
    export(root, [(job, result_of(Sweep(output_dir=root, variants=("baseline: x.yaml",)), job)) for job in jobs])
    for job in jobs:
        shutil.rmtree(job.folder)


@pytest.mark.slow
def test_what_is_kept_of_runs_says_the_same_as_their_folders(world: World) -> None:
    claims = (MORE, COUNT, STOPPED, AT, SOON)
    pairs(
        world.runs,
        GAINS,
        git=world.commit(*claims),
        best=answers(count=60, exist=70),
        seconds=1.0,
        packages={},
        platform="here",
    )
    for seed in SEEDS:
        (world.runs / f"a-s{seed}" / "best" / "best.json").write_text('{"step": 50, "score": 0.6}')
    before = world.judge(*claims)
    exported(world.runs)
    assert len(list(world.runs.iterdir())) == 12
    after = world.judge(*claims)
    assert before["more"]["verdict"] == "reproduced"
    assert before["stopped"]["verdict"] == "contradicted"
    for name, row in after.items():
        for column in ("ours", "low", "high", "p", "p_holm", "verdict", "rule", "commits"):
            assert (
                row[column] == pytest.approx(before[name][column], nan_ok=True)
                if isinstance(row[column], float)
                else row[column] == before[name][column]
            )
    assert after["more"]["n"] == 200
    assert after["count"]["n"] == 100
    assert after["more"]["chance"] == 0.25
    kept = json.loads((world.runs / "a-s1.json").read_text())
    for content, said in (
        ({"last": {**kept["last"], "asked": "others"}}, "different questions"),
        ({"last": None}, "is not there"),
        ({"curve": 3}, "damaged"),
    ):
        (world.runs / "a-s1.json").write_text(json.dumps(kept | content))
        row = world.judge(*claims)["more"]
        assert row["verdict"] == "refused"
        assert said in row["reason"]
        assert "a-s1.json" in row["reason"]


# --- measures -------------------------------------------------------------------------------------


def test_accuracy_is_the_mean_of_types_or_of_some(world: World) -> None:
    git = world.commit(MORE, COUNT)
    pairs(world.runs, GAINS, git=git)
    for seed in SEEDS:  # three times as many questions of one type do not weigh more
        more = pd.concat(
            [
                answers(count=60 + seed),
                answers(exist=20).assign(id=lambda t: "x" + t["id"]),
                answers(exist=20),
                answers(exist=50).query("id < ''"),
            ]
        )
        train(world.runs / f"b-s{seed}", more, git=git, recipe={"alignment.objective": "cosine"})
        train(world.runs / f"a-s{seed}", more.assign(correct=(more["category"] == "exist") & more["correct"]), git=git)
    found = world.judge(MORE, COUNT)
    assert found["more"]["ours"] == pytest.approx((60 + 3.5) / 200)
    assert found["count"]["ours"] == pytest.approx(0.635)
    assert found["more"]["n"] == 300
    assert found["count"]["n"] == 100


def test_a_question_that_is_there_twice(world: World) -> None:
    git = world.commit(MORE)
    twice = pd.concat([answers(count=40, exist=40)] * 2)
    for seed in SEEDS:
        train(world.runs / f"a-s{seed}", twice, git=git)
        train(world.runs / f"b-s{seed}", twice, git=git, recipe={"alignment.objective": "cosine"})
    assert "has question count-0 twice" in world.judge(MORE)["more"]["reason"]


def test_the_best_checkpoint_has_answers_of_its_own(world: World) -> None:
    git = world.commit(MORE, STOPPED)
    pairs(world.runs, GAINS, git=git, best=answers(count=60, exist=70))
    found = world.judge(MORE, STOPPED)
    assert found["stopped"]["ours"] == pytest.approx(found["more"]["ours"] + 0.435 - 0.65)
    assert found["stopped"]["verdict"] == "contradicted"


def test_trainings_are_weighed(world: World) -> None:
    half = (
        "{id: half, claim: B gives more than half., paper: none, measure: answers, of: {best: 1, b: -0.5, a: -0.5},"
        " expect: more}"
    )
    pairs(world.runs, GAINS, git=world.commit(half), best=answers(count=60, exist=70))
    row = world.judge(half)["half"]
    assert row["ours"] == pytest.approx(
        np.mean([0.65 - (40 + seed + gain / 2) / 100 for seed, gain in zip(SEEDS, GAINS, strict=True)])
    )
    assert row["verdict"] == "reproduced"


def analyses(world: World, a: list[float], b: list[float], **more: Any) -> None:
    """An analysis of every model: scores by layer, with a hundredth more for each seed in b."""
    for seed in SEEDS:
        analyzed(world.runs, world.runs / f"a-s{seed}", layers(a), **more)
        analyzed(world.runs, world.runs / f"b-s{seed}", layers([value + 0.01 * seed for value in b]), **more)


def test_a_stored_score_and_its_slope(world: World) -> None:
    pairs(world.runs, GAINS, git=world.commit(CLOSER, FALLS))
    analyses(world, [0.9, 0.6, 0.2], [0.5, 0.7, 0.9])
    found = world.judge(CLOSER, FALLS)
    assert found["closer"]["ours"] == pytest.approx(0.8 - 0.4 + 0.035)
    assert found["closer"]["verdict"] == "reproduced"
    assert found["closer"]["n"] == 9
    assert found["closer"]["chance"] == pytest.approx(0.1)
    assert found["falls"]["ours"] == pytest.approx(-0.35)
    assert "no spread" in found["falls"]["reason"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t[t["layer"] != 3], "has 0 rows of scores with layer 3, vfm dino: expected 1"),
        (lambda t: pd.concat([t, t]), "has 2 rows of scores with layer 2, vfm dino: expected 1"),
        (lambda t: t.drop(columns="vfm"), "has no column vfm"),
        (lambda t: t.rename(columns={"score": "value"}), "has no column score"),
    ],
)
def test_every_row_that_a_rule_names_is_there_once(world: World, change: Any, said: str) -> None:
    pairs(world.runs, GAINS, git=world.commit(CLOSER))
    analyses(world, [0.9, 0.6, 0.2], [0.5, 0.7, 0.9])
    shutil.rmtree(
        next(
            path
            for path in world.runs.glob("cknna-*")
            if json.loads((path / "run.json").read_text())["label"] == "b-s4"
        )
    )
    analyzed(world.runs, world.runs / "b-s4", change(layers([0.5, 0.7, 0.9])))
    assert said in world.judge(CLOSER)["closer"]["reason"]


def test_an_analysis_that_was_asked_something_else_is_another_one(world: World) -> None:
    pairs(world.runs, GAINS, git=world.commit(CLOSER))
    analyses(world, [0.9, 0.6, 0.2], [0.5, 0.7, 0.9], config={"limit": 10})
    analyses(world, [0.9, 0.6, 0.2], [0.5, 0.7, 0.9], config={"seed": 1})
    assert world.judge(CLOSER)["closer"]["verdict"] == "no runs yet"
    analyses(world, [0.9, 0.6, 0.2], [0.5, 0.7, 0.9])
    assert world.judge(CLOSER)["closer"]["verdict"] == "reproduced"


@pytest.mark.parametrize("config", [{"metric": "cka"}, {"tokens_per_image": 4}, {"by": "tile"}, {"layers": [1]}])
def test_an_option_that_the_command_does_not_name_has_its_default(world: World, config: dict[str, Any]) -> None:
    """`by` came later, and is recorded only where it does not have its default."""
    assert changed_options("no such analysis", config) == set()
    pairs(world.runs, GAINS, git=world.commit(CLOSER))
    analyses(world, [0.9, 0.6, 0.2], [0.5, 0.7, 0.9], config=config)
    assert world.judge(CLOSER)["closer"]["verdict"] == "no runs yet"
    analyses(world, [0.9, 0.6, 0.2], [0.5, 0.7, 0.9], config={"metric": "cknna", "layers": [], "vfm_layers": []})
    assert world.judge(CLOSER)["closer"]["verdict"] == "reproduced"


def test_an_analysis_of_a_training_of_the_same_name_is_another_one(world: World) -> None:
    """Sweeps on other data name their folders alike, and an analysis of theirs may be stored beside these runs."""
    git = world.commit(CLOSER)
    pairs(world.runs, GAINS, git=git)
    analyses(world, [0.9, 0.6, 0.2], [0.5, 0.7, 0.9], trained="2026-01-01T00:00:00+00:00")
    assert world.judge(CLOSER)["closer"]["verdict"] == "no runs yet"
    created = json.loads((world.runs / "a-s1" / "training.json").read_text())["created"]
    analyses(world, [0.9, 0.6, 0.2], [0.5, 0.7, 0.9], trained=created, config={"vfm_layers": []})
    assert world.judge(CLOSER)["closer"]["verdict"] == "reproduced"


def test_a_damaged_analysis_is_said_and_not_there(world: World, caplog: pytest.LogCaptureFixture) -> None:
    pairs(world.runs, GAINS, git=world.commit(CLOSER))
    analyses(world, [0.9, 0.6, 0.2], [0.5, 0.7, 0.9])
    broken = sorted(world.runs.glob("cknna-*"))[0]
    (broken / "run.json").write_text("{")
    assert world.judge(CLOSER)["closer"]["verdict"] == "no runs yet"
    assert f"{broken / 'run.json'} is damaged" in caplog.text


def test_an_analysis_of_an_older_model(world: World) -> None:
    pairs(world.runs, GAINS, git=(git := world.commit(CLOSER)))
    analyses(world, [0.9, 0.6, 0.2], [0.5, 0.7, 0.9])
    train(world.runs / "a-s6", answers(count=46, exist=46), git=git, created="2026-11-26T06:00:00+00:00")
    row = world.judge(CLOSER)["closer"]
    assert row["verdict"] == "refused"
    assert "is older than the training in" in row["reason"]
    assert "a-s6" in row["reason"]


def test_analyses_of_other_images_or_another_version(world: World) -> None:
    pairs(world.runs, GAINS, git=world.commit(CLOSER))
    analyses(world, [0.9, 0.6, 0.2], [0.5, 0.7, 0.9])
    shutil.rmtree(
        next(
            path
            for path in world.runs.glob("cknna-*")
            if json.loads((path / "run.json").read_text())["label"] == "b-s4"
        )
    )
    analyzed(world.runs, world.runs / "b-s4", layers([0.5, 0.7, 0.9]), version=4)
    assert "were asked different questions" in world.judge(CLOSER)["closer"]["reason"]


SHARE = (
    "{id: share, claim: B loses more., paper: none, measure: share, options: {analysis: cknna, table: scores, where:"
    " {layer: 1}, column: score, of: whole, n: n_images}, of: {b: 1, a: -1}, expect: more}"
)
ABOVE = SHARE.replace("id: share", "id: above").replace("of: whole,", "of: whole, less: null_mean,")


def test_a_share_of_the_original_and_of_what_is_above_chance(world: World) -> None:
    pairs(world.runs, GAINS, git=world.commit(SHARE, ABOVE))
    for seed in SEEDS:
        analyzed(world.runs, world.runs / f"a-s{seed}", layers([0.1]).assign(whole=0.5))
        analyzed(world.runs, world.runs / f"b-s{seed}", layers([0.2 + 0.01 * seed]).assign(whole=0.6))
    found = world.judge(SHARE, ABOVE)
    assert found["share"]["ours"] == pytest.approx(0.235 / 0.6 - 0.2)
    assert found["above"]["ours"] == pytest.approx(0.235 / 0.5 - 0.25)
    for path in world.runs.glob("cknna-*"):
        if json.loads((path / "run.json").read_text())["label"] == "a-s3":
            layers([0.1]).assign(whole=0.05).to_parquet(path / "scores.parquet")
    found = world.judge(SHARE, ABOVE)
    assert found["share"]["verdict"] == "not shown"
    assert found["above"]["verdict"] == "not shown"
    assert found["above"]["reason"] == "seed 3: whole - null_mean is -0.050 in a-s3, but a share needs a whole above 0"
    assert found["above"]["p"] == 1


PATCHED = (
    "{id: patched, claim: Tokens carry it., paper: none, measure: stored, options: {analysis: patching, source: {a: b,"
    " b: a}, table: scores, where: {layer: 3}, column: score, n: n_images}, of: {a: 1, b: -1}, expect: more}"
)


def test_a_patch_is_found_by_its_source(world: World) -> None:
    pairs(world.runs, GAINS, git=world.commit(PATCHED))
    for seed in SEEDS:
        for one, source, value in (("a", "b", 0.7), ("b", "a", 0.4 - 0.01 * seed), ("a", "a", 0.9)):
            folder = world.runs / f"{source}-s{seed}"
            analyzed(
                world.runs,
                world.runs / f"{one}-s{seed}",
                layers([0, 0, value]),
                name="patching",
                config={"layers": [3], "source": str(folder)},
            )
    row = world.judge(PATCHED)["patched"]
    assert row["ours"] == pytest.approx(0.335)
    assert row["verdict"] == "reproduced"
    for path in world.runs.glob("patching-*"):
        shutil.rmtree(path)
    world.judge(PATCHED)
    assert len(world.commands) == 12
    assert f"--model {world.runs / 'a-s1'} --source {world.runs / 'b-s1'} --layers 3" in world.commands[0]


AT = (
    "{id: at, claim: B is behind., paper: none, measure: log_at, options: {column: accuracy/mean, at: 0.3}, of: {b: 1,"
    " a: -1}, expect: less}"
)
SOON = (
    "{id: soon, claim: B is quick., paper: none, measure: steps_to, options: {column: accuracy/mean, final_of: a}, of:"
    " {b: 1, a: -1}, expect: less}"
)


def test_scores_while_training_and_the_steps_to_a_score(world: World) -> None:
    git = world.commit(AT, SOON)
    for seed in SEEDS:
        train(world.runs / f"a-s{seed}", answers(count=40), git=git, log={20: 0.2, 40: 0.4, 100: 0.6})
        curve = {20: 0.1, 40: 0.5 + 0.01 * seed, 100: 0.9}
        train(
            world.runs / f"b-s{seed}", answers(count=40), git=git, log=curve, recipe={"alignment.objective": "cosine"}
        )
    found = world.judge(AT, SOON)
    assert found["at"]["ours"] == pytest.approx(np.mean([(0.6 + 0.01 * seed) / 2 - 0.3 for seed in SEEDS]))
    assert found["at"]["n"] == 800
    steps = [40 + 60 * (0.1 - 0.01 * seed) / (0.4 - 0.01 * seed) for seed in SEEDS]
    assert found["soon"]["ours"] == pytest.approx(np.mean(steps) / 100 - 1)
    assert found["soon"]["verdict"] == "reproduced"
    train(
        world.runs / "b-s2",
        answers(count=40),
        git=git,
        log={20: 0.1, 40: 0.5, 100: 0.59},
        recipe={"alignment.objective": "cosine"},
    )
    row = world.judge(AT, SOON)["soon"]
    assert row["verdict"] == "not shown"
    assert row["reason"] == "seed 2: the step at which b-s2 reaches the final score of a-s2 is not within 100 steps"


def test_logs_with_evaluations_at_other_steps(world: World) -> None:
    git = world.commit(AT, SOON)
    pairs(world.runs, GAINS, git=git)
    train(world.runs / "a-s1", answers(count=40), git=git, log={20: 0.2, 40: 0.4, 90: 0.6})
    found = world.judge(AT, SOON)
    assert "was last evaluated at step 90 of 100" in found["soon"]["reason"]
    assert "were asked different questions" in found["at"]["reason"]
    train(world.runs / "a-s1", answers(count=40), git=git, log={40: 0.4, 100: 0.6})
    assert "from step 40 to 100: expected some before and after step 30" in world.judge(AT)["at"]["reason"]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("answers: 1", "answers: 2", "measure answers has version 2 in rules.yaml: expected 1"),
        ("answers: 1", "answer: 1, answers: 1", "unknown measure of rules.yaml 'answer'"),
        ("over: layer, ", "", "claim falls of rules.yaml has no over"),
        ("over: layer", "across: layer, over: layer", "unknown option of slope in claim falls of rules.yaml 'across'"),
        (
            "source: {a: b, b: a}",
            "source: {a: b}",
            "claim patched of rules.yaml has sources for a: expected one for each of a, b",
        ),
    ],
)
def test_a_ledger_of_other_measures(world: World, old: str, new: str, said: str) -> None:
    text = ledger(MORE, FALLS, PATCHED)
    assert text.count(old) == 1
    with pytest.raises((ConfigError, UnknownNameError)) as error:
        world.judge(text=text.replace(old, new))
    assert said in str(error.value)
    assert len(str(error.value)) < 300


# --- the command ----------------------------------------------------------------------------------


def command(*words: object) -> str:
    """What `python -m analyses.claims ...` prints, run in this process."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(sys, "argv", ["analyses.claims", *map(str, words)])
        runpy.run_module("analyses.claims", run_name="__main__", alter_sys=True)
    return said.getvalue()


def test_the_command_prints_and_stores(world: World, tmp_path: Path) -> None:
    claims = (MORE, LESS, CLOSER, NEVER)
    pairs(world.runs, GAINS, git=world.commit(*claims))
    rules, out = world.repository / "analyses" / "claims.yaml", tmp_path / "out"
    printed = command("--runs", world.runs, "--claims", rules, "--output_dir", out)
    assert (
        "more: REPRODUCED\n    B is better.\n    paper: Table 1\n    ours: 0.1017 [0.0894, 0.1139] over 6 seeds, n 200,"
        " null 0; b 0.5367" in printed
    )
    assert "4 claims: 1 reproduced, 1 contradicted, 1 no runs yet, 1 not testable here" in printed
    (folder,) = out.iterdir()
    assert printed.strip().endswith(str(folder))
    stored = runs.load(folder)
    assert stored.record["analysis"] == "claims"
    assert stored.record["git"]
    assert stored.tables["claims"]["verdict"].tolist()[0] == "reproduced"
    assert len(stored.tables["numbers"]) == 24
    assert runs.index(out)["analysis"].tolist() == ["claims"]
    command("--runs", world.runs, "--claims", rules, "--output_dir", out)
    assert len(list(out.iterdir())) == 1  # the same ledger over the same runs is one stored run
    lines = command(
        "--runs", world.runs, "--claims", rules, "--output_dir", tmp_path / "none", "--commands"
    ).splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"python -m analyses.cknna --model {world.runs / 'b-s1'} ")
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_the_page_and_the_report_show_the_newest_ledger(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claims = (MORE.replace("B is better.", "B is <b>better</b>."), LESS, CLOSER, NEVER)
    pairs(world.runs, GAINS, git=world.commit(*claims))
    rules, out = world.repository / "analyses" / "claims.yaml", tmp_path / "out"
    command("--runs", world.runs, "--claims", rules, "--output_dir", out)
    app = open_page("evidence", out, monkeypatch, part="claims")
    table = app.dataframe[0].value
    assert table["verdict"].tolist() == ["reproduced", "contradicted", "no runs yet", "not testable here"]
    assert table["here, 95 % over seeds"][0].startswith("0.1017 [0.0894, 0.1139] over 6 seeds")
    assert app.dataframe[1].value["b"].tolist() == pytest.approx(
        [(40 + seed + gain) / 100 for seed, gain in zip(SEEDS, GAINS, strict=True)]
    )
    app.selectbox(key="claim").set_value("closer").run()
    assert "analyses.cknna --model" in app.code[0].value
    app.multiselect(key="verdict").set_value(["contradicted"]).run()
    assert app.dataframe[0].value["id"].tolist() == ["less"]
    text = report.page("A report", {}, [], newest(out))
    assert '<a href="#claims">' in text
    assert "B is &lt;b&gt;better&lt;/b&gt;." in text
    assert "1 reproduced, 1 contradicted" in text
    assert 'id="claims"' not in report.page("A report", {}, [], newest(tmp_path / "nothing"))


@pytest.mark.slow
def test_a_ledger_that_comes_out_as_an_older_one_is_the_newest_again(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs(world.runs, GAINS, git=world.commit(MORE, LESS))
    rules, out, keys = world.repository / "analyses" / "claims.yaml", tmp_path / "out", []
    changed = tmp_path / "other.yaml"
    changed.write_text(rules.read_text() + "# a comment\n")
    for day, file in enumerate((rules, changed, rules), start=1):
        monkeypatch.setattr(runs, "now", lambda day=day: f"2026-01-0{day}T00:00:00+00:00")
        command("--runs", world.runs, "--claims", file, "--output_dir", out)
        ledger = newest(out)
        assert ledger
        assert ledger.record["created"].startswith(f"2026-01-0{day}")
        keys.append(ledger.key)
    assert keys[0] == keys[2] != keys[1]


def test_the_projects_ledger_without_runs(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    printed = command("--runs", tmp_path / "empty", "--output_dir", tmp_path / "out")
    assert "reproduced" not in printed.splitlines()[-2]
    assert "no runs yet" in printed.splitlines()[-2]
    for folder in ("empty", "missing"):  # which the printed commands may make
        lines = command("--runs", tmp_path / folder, "--commands").splitlines()
        assert lines == [
            f"python -m trainer.sweep trainer/sweeps/{name}.yaml"
            for name in ("data_efficiency", "scarce_photos", "scarce_easy_vqa", "rivals")
        ]


def test_the_commands_in_the_docs(tmp_path: Path) -> None:
    lines = [
        line
        for line in (ROOT / "docs" / "claims.md").read_text().splitlines()
        if line.startswith("python -m analyses.claims ")
    ]
    assert len(lines) == 2
    for line in lines:
        words = line.split()[3:]
        places = [
            tmp_path / word if words[number - 1] == "--output_dir" else tmp_path if word.startswith("runs") else word
            for number, word in enumerate(words)
        ]
        assert ("python -m trainer.sweep" if "--commands" in words else "no runs yet") in command(*places)


def test_bad_input_is_one_sentence(tmp_path: Path) -> None:
    assert "no runs given: expected --runs FOLDER" in refused("analyses.claims")
    assert f"{tmp_path / 'nowhere'} is not a folder" in refused("analyses.claims", "--runs", str(tmp_path / "nowhere"))
    (tmp_path / "bad.yaml").write_text("seeds: [1, 2")
    assert "is not valid YAML" in refused(
        "analyses.claims", "--runs", str(tmp_path), "--claims", str(tmp_path / "bad.yaml")
    )
    assert "no-such.yaml cannot be read" in refused(
        "analyses.claims", "--runs", str(tmp_path), "--claims", str(tmp_path / "no-such.yaml")
    )
    assert "did you mean" in refused("analyses.claims", "--run", str(tmp_path))
