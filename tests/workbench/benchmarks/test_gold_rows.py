"""Parsers and scores of the benchmarks give the values that were computed by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.workbench.benchmarks.oracle import (
    YesNo,
    all_right,
    by_group,
    cv_bench_averages,
    l2_mean,
    mme_scores,
    mme_sums,
    pope_lmms_scores,
)
from workbench.benchmarks import peers
from workbench.benchmarks.parsers import parse_letter, parse_relation, parse_word
from workbench.benchmarks.tables import ALL, answer_row, scores
from workbench.data.base import Sample
from workbench.errors import DataError

GOLD: dict[str, Any] = json.loads((Path(__file__).parent / "gold_rows.json").read_text())
ABSENT = ("zebra crossing", "quince", "xylophone", "velvet", "umbra")  # options that occur in no answer
UNKNOWN = {"other": None, "unknown": None, "": ""}


def near(value: float | None) -> Any:
    return None if value is None else pytest.approx(value, abs=1e-6)


def check_yes_no(counts: YesNo, wanted: Mapping[str, Any]) -> None:
    for name in {"tp", "fp", "tn", "fn", "unparsed", "accuracy", "precision", "recall", "f1", "yes_ratio"} & set(
        wanted
    ):
        assert getattr(counts, name) == near(wanted[name]), name


# --- POPE and MME ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("scorer", "parse"), [("word", parse_word), ("official", peers.pope_official)])
def test_pope(scorer: str, parse: Callable[[str], str | None]) -> None:
    pope = GOLD["pope"]
    parsed = [parse(answer) for answer in pope["answers"]]
    assert parsed == pope[scorer]["parsed"]
    check_yes_no(YesNo.count(pope["gold"], parsed), pope[scorer])


def test_pope_as_lmms_eval_scores_it() -> None:
    pope = GOLD["pope"]
    scores = pope_lmms_scores(pope["gold"], [peers.pope_lmms(answer) for answer in pope["answers"]])
    assert scores == {name: near(pope["lmms"][name]) for name in scores}


def test_pope_without_any_yes_has_no_precision() -> None:
    rows = GOLD["pope"]["all_no"]
    check_yes_no(YesNo.count(rows["gold"], [parse_word(answer) for answer in rows["answers"]]), rows)


def test_pope_scores_of_published_counts() -> None:
    published = GOLD["pope"]["published"]
    tp, fp, tn, fn = (published[name] for name in ("tp", "fp", "tn", "fn"))
    check_yes_no(YesNo(tp=tp, fp=fp, tn=tn, positives=tp + fn, unparsed=0, n=tp + fp + tn + fn), published)


@pytest.mark.parametrize(("answer", "wanted"), GOLD["pope"]["parser"])
def test_pope_answers(answer: str, wanted: dict[str, str | None]) -> None:
    assert peers.pope_official(answer) == wanted["official"]
    assert (peers.pope_paper(answer) or "unknown") == wanted["paper"]
    assert parse_word(answer) == wanted["word"]


@pytest.mark.parametrize(("answer", "wanted"), GOLD["mme"]["parser"])
def test_mme_answers(answer: str, wanted: dict[str, str | None]) -> None:
    assert peers.mme_official(answer) == wanted["official"]
    assert peers.mme_lmms(answer) == wanted["lmms"]
    assert parse_word(answer) == wanted["word"]


@pytest.mark.parametrize("parse", [parse_word, peers.mme_lmms, peers.mme_official])
def test_mme_scores(parse: Callable[[str], str | None]) -> None:
    images, categories, gold, answers = zip(*GOLD["mme"]["rows"], strict=True)
    correct = [parse(answer) == right.lower() for answer, right in zip(answers, gold, strict=True)]
    scores = mme_scores(correct, categories, images)
    for category, score in scores.items():
        values = {"acc": score.acc, "acc_plus": score.acc_plus, "score": score.score}
        assert values == {name: near(GOLD["mme"][category][name]) for name in values}
    assert mme_sums(scores) == {name: GOLD["mme"][name] for name in ("perception", "cognition", "total")}


def test_a_pair_that_is_not_one_is_named() -> None:
    with pytest.raises(DataError, match=r"group 2\.jpg has 1 questions: expected 2"):
        mme_scores([True, True, True], ["count"] * 3, ["1.jpg", "1.jpg", "2.jpg"])
    with pytest.raises(DataError, match="a right answer is 'maybe': expected yes or no"):
        YesNo.count(["maybe"], ["yes"])


# --- letters --------------------------------------------------------------------------------------


def test_mmvp() -> None:
    mmvp = GOLD["mmvp"]
    options = re.findall(r"\([a-z]\) (\w+)", mmvp["options"])
    indexes, gold, answers = zip(*mmvp["rows"], strict=True)
    parsed = [parse_letter(answer, options) for answer in answers]
    assert parsed == mmvp["mcq"]["parsed"]
    assert parsed.count(None) == mmvp["mcq"]["unparsed"]
    correct = [answer == right.strip("()").upper() for answer, right in zip(parsed, gold, strict=True)]
    assert sum(correct) / len(correct) == near(mmvp["mcq"]["single"])
    assert all_right(correct, [(index - 1) // 2 for index in indexes], 2) == near(mmvp["mcq"]["pair"])


@pytest.mark.parametrize(("answer", "wanted"), GOLD["mmvp"]["parser"])
def test_mmvp_answers(answer: str, wanted: dict[str, str | None]) -> None:
    assert peers.mmvp_lmms(answer) == wanted["lmms"]
    assert peers.mmvp_paper(answer, {"a": "Open", "b": "Closed"}) == wanted["paper"]
    assert parse_letter(answer, ["Open", "Closed"]) == wanted["mcq"]


def test_cv_bench() -> None:
    bench = GOLD["cvbench"]
    tasks, sources, options, gold, answers = zip(*bench["rows"], strict=True)
    parsed = [parse_letter(answer, texts) for answer, texts in zip(answers, options, strict=True)]
    assert parsed == bench["mcq"]["parsed"]
    correct = [answer == right.strip("()") for answer, right in zip(parsed, gold, strict=True)]
    assert correct == [bool(value) for value in bench["mcq"]["correct"]]
    averages = cv_bench_averages(correct, tasks, sources)
    assert averages == {name: near(bench["mcq"][name]) for name in averages}
    accuracy = by_group(correct, tasks)
    assert (accuracy["Count"], accuracy["Relation"]) == (near(bench["mcq"]["count"]), near(bench["mcq"]["relation"]))


def test_cv_bench_averages_of_unequal_sources() -> None:
    rows = [
        (number < right, source)
        for source in ("ADE20K", "COCO")
        for right, n in [GOLD["cvbench"]["unbalanced"][source]]
        for number in range(n)
    ]
    averages = cv_bench_averages([right for right, _ in rows], ["Count"] * len(rows), [source for _, source in rows])
    for name in ("paper_2d", "official_2d"):
        assert averages[name] == near(GOLD["cvbench"]["unbalanced"][name])
    assert averages["official_3d"] is averages["official_total"] is None


@pytest.mark.parametrize(("answer", "wanted"), GOLD["cvbench"]["parser"])
def test_cv_bench_answers(answer: str, wanted: dict[str, Any]) -> None:
    assert peers.cv_bench_lmms(answer) == wanted["lmms"]
    assert parse_letter(answer, wanted.get("options", ABSENT)) == wanted["mcq"]


def test_mmstar() -> None:
    star = GOLD["mmstar"]
    _, subcategories, gold, answers = zip(*star["rows"], strict=True)
    official = [peers.mmstar_official(answer, right) for answer, right in zip(answers, gold, strict=True)]
    parsed = [parse_letter(answer, ABSENT[:4], texts=False) for answer in answers]
    letters = [answer == right for answer, right in zip(parsed, gold, strict=True)]
    for correct, wanted in ((official, star["official"]), (letters, star["mcq_letters_only"])):
        assert correct == [bool(value) for value in wanted["correct"]]
        assert sum(correct) / len(correct) == near(wanted["overall"])
        assert l2_mean(correct, subcategories) == near(wanted["l2_mean"])
    assert parsed.count(None) == star["mcq_letters_only"]["unparsed"]


# --- spatial relations ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "pairs"),
    [
        ("a", ("on", "under", "left", "right"), (("left", "right"), ("on", "under"))),
        ("b", ("left", "right", "front", "behind"), (("left", "right"), ("front", "behind"))),
    ],
)
def test_whats_up_with_objects(name: str, options: Sequence[str], pairs: Sequence[Sequence[str]]) -> None:
    _, gold, answers = zip(*GOLD["whatsup"][f"{name}_rows"], strict=True)
    parsed = [parse_relation(answer, options) for answer in answers]
    wanted = GOLD["whatsup"][name]
    assert parsed == wanted.get("parsed", parsed)
    correct = [answer == right for answer, right in zip(parsed, gold, strict=True)]
    assert sum(correct) / len(correct) == near(wanted["individual"])
    assert all_right(correct, [next(n for n, pair in enumerate(pairs) if right in pair) for right in gold], 2) == near(
        wanted["pair"]
    )
    assert all_right(correct, [0] * len(correct), 4) == near(wanted["set"])


def test_whats_up_of_coco() -> None:
    coco = GOLD["whatsup"]["coco"]
    right: dict[str, list[bool]] = {}
    for name, options in (
        ("one", ("left", "right", "top", "bottom")),
        ("two", ("left", "right", "above", "below")),
    ):
        right[name] = [parse_relation(answer, options) == gold.lower() for gold, answer in coco[name]]
        assert sum(right[name]) / len(right[name]) == near(coco[f"{name}_accuracy"])
    shares = [sum(values) / len(values) for values in right.values()]
    assert sum(shares) / 2 == near(coco["paper"])
    pooled = [*right["one"], *right["two"]]
    assert sum(pooled) / len(pooled) == near(coco["pooled"])


@pytest.mark.parametrize(("case", "wanted"), GOLD["whatsup"]["peers"])
def test_whats_up_as_others_score_it(case: str, wanted: dict[str, bool]) -> None:
    gold, answer = re.fullmatch(r"gold (\w+), answer (?:'(.*)'|empty)", case).groups(default="")  # type: ignore[union-attr]
    options = ("on", "under", "left", "right", "top", "bottom")
    ours = {
        "paper": peers.whatsup_paper(answer, gold),
        "adaptvis": peers.whatsup_adaptvis(answer, gold),
        "word": parse_relation(answer, options) == gold.lower(),
    }
    assert {name: ours[name] for name in wanted} == wanted


# --- the whole way --------------------------------------------------------------------------------


def table_of(benchmark: str, rows: Sequence[tuple[Sample, str]]) -> dict[tuple[str, str, str], float]:
    """Return {(scorer, measure, category): score} of the answers, as `analyses.benchmark` computes them."""
    table = scores(pd.DataFrame([answer_row(benchmark, sample, "image", answer) for sample, answer in rows]), seed=0)
    keys = zip(table["scorer"], table["measure"], table["category"], strict=True)
    return dict(zip(keys, table["score"], strict=True))


def sample(number: int, answer: str, options: Sequence[str], **more: str) -> Sample:
    nothing: Any = None
    return Sample(f"{number}", f"image {number}", nothing, "what ?", answer, tuple(options), **more)


def test_scores_of_pope_rows() -> None:
    pope = GOLD["pope"]
    rows = [
        (sample(n, gold, ("yes", "no"), category="random"), answer)
        for n, (gold, answer) in enumerate(zip(pope["gold"], pope["answers"], strict=True))
    ]
    table = table_of("pope", rows)
    for scorer, key in (("own", "word"), ("official", "official"), ("lmms", "lmms")):
        for measure, name in {"F1": "f1", "yes-ratio": "yes_ratio", "accuracy": "accuracy", "recall": "recall"}.items():
            assert table[scorer, measure, ALL] == near(pope[key][name]), (scorer, measure)
        assert table[scorer, "precision", ALL] == near(pope[key]["precision"])


def test_scores_of_mme_rows() -> None:
    rows = [
        (sample(n, gold.lower(), ("yes", "no"), category=category, pair=f"{category}/{image}"), answer)
        for n, (image, category, gold, answer) in enumerate(GOLD["mme"]["rows"])
    ]
    table = table_of("mme", rows)
    for scorer in ("own", "official", "lmms"):
        for category in ("existence", "code_reasoning"):
            assert table[scorer, "MME score", category] == near(GOLD["mme"][category]["score"])
        for name in ("perception", "cognition", "total"):
            assert table[scorer, f"MME {name}", ALL] == near(GOLD["mme"][name])


def test_scores_of_mmvp_rows() -> None:
    options = ("Open", "Closed")
    rows = [
        (sample(index, options["ab".index(gold[1])], options, pair=f"{(index - 1) // 2}"), answer)
        for index, gold, answer in GOLD["mmvp"]["rows"]
    ]
    table = table_of("mmvp", rows)
    assert table["own", "accuracy", ALL] == near(GOLD["mmvp"]["mcq"]["single"])
    assert table["own", "pair", ALL] == near(GOLD["mmvp"]["mcq"]["pair"])


def test_scores_of_cv_bench_rows() -> None:
    rows = [
        (sample(n, options["ABCDE".index(gold[1])], options, category=task, source=source), answer)
        for n, (task, source, options, gold, answer) in enumerate(GOLD["cvbench"]["rows"])
    ]
    table, wanted = table_of("cv_bench", rows), GOLD["cvbench"]["mcq"]
    for measure, name in {"paper: 2D": "paper_2d", "accuracy": "rows_all"}.items():
        assert table["own", measure, ALL] == near(wanted[name])
    for name in ("2d", "3d", "total"):
        measure = f"official: {name.upper() if name != 'total' else name}"
        assert table["own", measure, ALL] == near(wanted[f"official_{name}"])
    for task in ("Count", "Relation"):
        assert table["own", "accuracy", task] == near(wanted[task.lower()])


def test_scores_of_mmstar_rows() -> None:
    rows = [
        (sample(n, ABSENT["ABCD".index(gold)], ABSENT[:4], category=category, source=subcategory), answer)
        for n, (category, subcategory, gold, answer) in enumerate(GOLD["mmstar"]["rows"])
    ]
    table = table_of("mmstar", rows)
    for scorer, key in (("official", "official"), ("own", "mcq_letters_only")):
        assert table[scorer, "accuracy", ALL] == near(GOLD["mmstar"][key]["overall"])
        assert table[scorer, "l2 mean", ALL] == near(GOLD["mmstar"][key]["l2_mean"])


@pytest.mark.parametrize(("subset", "sides"), [("a", ("on", "under")), ("b", ("front", "behind"))])
def test_scores_of_whats_up_rows(subset: str, sides: Sequence[str]) -> None:
    options = ("left", "right", *sides)
    rows = [
        (
            sample(n, gold, options, category=gold, pair="sides" if gold in sides else "left or right", source="cup"),
            answer,
        )
        for n, (_, gold, answer) in enumerate(GOLD["whatsup"][f"{subset}_rows"])
    ]
    table, wanted = table_of(f"whatsup {subset}", rows), GOLD["whatsup"][subset]
    assert table["own", "accuracy", ALL] == near(wanted["individual"])
    assert table["own", "pair", ALL] == near(wanted["pair"])
    assert table["own", "set", ALL] == near(wanted["set"])
