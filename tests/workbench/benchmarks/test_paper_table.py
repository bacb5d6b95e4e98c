"""Table 1 of the paper from stored answers, against the conventions by hand."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from workbench.benchmarks.paper_table import paper_table, text_of
from workbench.benchmarks.tables import answer_row, scores
from workbench.data.base import Sample
from workbench.errors import ConfigError, UnknownNameError
from workbench.runs import Run

NOTHING: Any = None


def run(model: str, benchmark: str, rows: list[tuple[bool, dict[str, Any]]], options: tuple[str, ...]) -> Run:
    """A run whose answers are right or wrong as given."""
    table = []
    for number, (right, fields) in enumerate(rows):
        sample = Sample(f"{number}", f"{benchmark} {number // 2}", NOTHING, "what ?", options[0], options, **fields)
        letters = ("A", "B") if benchmark in ("cv_bench", "mmstar", "mmvp") else options
        table.append(answer_row(benchmark, sample, "image", letters[0] if right else letters[1]))
    answers = pd.DataFrame(table)
    record: Any = {"label": model, "benchmark": benchmark, "config": {"prompt": "plain", "limit": len(rows)}}
    record |= {"prompt": "plain", "decoding": "greedy", "labels": "the authors' labels, verified copy"}
    return Run(benchmark, record, {"answers": answers, "scores": scores(answers, seed=0)})


def runs_of(model: str) -> list[Run]:
    yes_no = ("yes", "no")
    return [
        run(
            model,
            "cv_bench",
            [(True, {"category": c}) for c in ("Count", "Count", "Relation")] + [(False, {"category": "Depth"})],
            ("1", "2"),
        ),
        run(model, "mmvp", [(n != 1, {"pair": str(n // 2)}) for n in range(6)], ("open", "closed")),
        run(model, "whatsup coco_one", [(n < 3, {}) for n in range(4)], ("left", "right", "top", "bottom")),
        run(model, "whatsup coco_two", [(n < 1, {}) for n in range(2)], ("left", "right", "above", "below")),
        run(
            model,
            "pope",
            [(n != 0, {"category": ("random", "popular", "adversarial")[n % 3]}) for n in range(12)],
            yes_no,
        ),
        run(
            model, "mme", [(n != 0, {"category": "existence", "pair": f"existence {n // 2}"}) for n in range(4)], yes_no
        ),
    ]


def test_each_score_follows_the_convention_of_the_paper() -> None:
    table = paper_table([*runs_of("baseline"), *runs_of("viral")[:2]], "own")
    of = table[table["model"] == "baseline"].set_index("benchmark")["score"]
    assert of["CV-Bench2D"] == 100  # Depth is not part of it
    assert of["MMVP"] == pytest.approx(100 * 2 / 3)
    assert of["What's Up"] == pytest.approx(100 * (3 / 4 + 1 / 2) / 2)  # not pooled
    assert of["POPE"] == pytest.approx(100 * (3 / 4 + 1) / 2)
    assert of["MME, sum of 1"] == pytest.approx(100 * (3 / 4 + 1 / 2))
    assert (table["low"] <= table["score"]).all() and (table["score"] <= table["high"]).all()
    assert table.set_index(["model", "benchmark"]).loc[("baseline", "What's Up"), "n_images"] == 3
    text = text_of(table)
    assert "62.50" in text and "125.00" in text
    assert text.endswith("no run of MMStar with this scorer")
    assert next(line for line in text.splitlines() if "viral" in line).split()[1:] == ["100.00", "66.67", "-", "-", "-"]


def test_answers_by_likelihood_have_a_scorer_of_ours_too() -> None:
    runs = runs_of("baseline")[1:4]
    for one in runs[:2]:
        answers = one.tables["answers"]
        logprobs = [str([-1.0, *[-2.0] * row.options.count(",")]) for row in answers.itertuples()]
        answers = answers.assign(logprobs=logprobs, tokens=[value.replace("-", "") for value in logprobs])
        one.tables.update(answers=answers, scores=scores(answers, seed=0))
        one.record.update(decoding="likelihood")  # type: ignore[typeddict-unknown-key]
    table = paper_table(runs, "").set_index("benchmark")
    assert table["score"].to_dict() == {"MMVP": 100, "What's Up": pytest.approx(75)}  # coco_one 1, coco_two 1/2
    assert table.loc["What's Up", "asked_with"] == "plain, greedy and plain, likelihood"
    assert list(paper_table(runs, "sum")["benchmark"]) == ["MMVP"], "one half of What's Up has no such scorer"


def test_a_run_without_a_place_is_named() -> None:
    """Half of What's Up makes no column, and other data sets are not in the paper's table."""
    runs = [*runs_of("baseline")[1:3], run("baseline", "", [(True, {}), (False, {})], ("left", "right"))]
    lines = text_of(paper_table(runs, "own"), runs).splitlines()
    assert [line.split(", which")[0] for line in lines if line.startswith("not in")] == [
        "not in the table: whatsup coco_one of baseline",
        "not in the table: a data set of questions of baseline",
    ]
    assert "not in the table" not in text_of(paper_table(runs_of("viral"), "own"), runs_of("viral"))


def test_what_cannot_be_told_apart_is_refused() -> None:
    runs = runs_of("baseline")
    with pytest.raises(UnknownNameError, match="did you mean 'own'"):
        paper_table(runs, "owm")
    runs[0].record["config"]["limit"] = 3  # type: ignore[index]
    with pytest.raises(ConfigError, match="baseline has two runs of cv_bench, which differ in limit"):
        paper_table([*runs, *runs_of("baseline")], "own")


def test_a_score_has_its_prompt_and_its_labels() -> None:
    one, other = runs_of("baseline"), runs_of("viral")
    other[4].record.update(prompt="paper", labels="RePOPE's labels, unknown copy")  # type: ignore[typeddict-unknown-key]
    other[1].record.update(prompt="llava")  # type: ignore[typeddict-unknown-key]
    table = paper_table([*one, *other], "own").set_index(["model", "benchmark"])
    assert table.loc[("baseline", "POPE"), "asked_with"] == "plain, greedy"
    assert table.loc[("viral", "RePOPE"), "asked_with"] == "paper, greedy"
    assert ("viral", "POPE") not in table.index
    text = text_of(table.reset_index())
    assert "RePOPE: RePOPE's labels, unknown copy" in text.splitlines()
    assert "MMVP: not comparable between models, which were asked with plain, greedy / llava, greedy" in text
    assert "POPE: not comparable" not in text, "these are two columns"


def test_a_score_has_its_scorer_and_its_n() -> None:
    """A subset is not to be taken for the whole benchmark."""
    whole, part = runs_of("baseline"), runs_of("viral")
    splits = [{"category": ("random", "popular")[n % 2]} for n in range(4)]
    part[4] = run("viral", "pope", [(True, split) for split in splits], ("yes", "no"))
    answers = part[4].tables["answers"]
    answers.loc[0, "answer"] = "maybe"
    part[4].tables["scores"] = scores(answers, seed=0)
    runs = [*whole, *part]
    table = paper_table(runs, "own").set_index(["model", "benchmark"])
    columns = ["scorer", "unparsed", "n", "n_images"]
    assert table.loc[("baseline", "POPE"), columns].tolist() == ["own", 0, 8, 6]
    assert table.loc[("viral", "POPE"), columns].tolist() == ["own", 1, 4, 2]
    assert table.loc[("baseline", "MMVP"), columns].tolist() == ["own", 0, 3, 3]
    assert table.loc[("baseline", "What's Up"), columns].tolist() == ["own", 0, 6, 3]
    lines = text_of(table.reset_index(), runs).splitlines()
    assert [" ".join(line.split()) for line in lines if "n (images)" in line] == [
        "n (images) 3 (2) 3 (3) 6 (3) 8 (6) 4 (2)",
        "n (images) 3 (2) 3 (3) 6 (3) 4 (2) 4 (2)",
    ]
    assert sum("own, 1 unparsed" in line for line in lines) == 1
    assert [line for line in lines if "not comparable" in line] == [
        "POPE: not comparable between models, which were asked different questions"
    ]


def test_questions_that_a_score_leaves_out_may_differ() -> None:
    """The paper's score of POPE is of two splits; who asked the third one, too, has the same score."""
    three = runs_of("baseline")[4]
    answers = three.tables["answers"]
    answers = answers[answers["category"] != "adversarial"].reset_index(drop=True)
    two = Run("pope", {**three.record, "label": "viral"}, {"answers": answers, "scores": scores(answers, seed=0)})
    assert "not comparable" not in text_of(paper_table([three, two], "own"))


def test_other_labels_of_the_same_questions_are_named() -> None:
    one, other = runs_of("baseline")[4], runs_of("viral")[4]
    other.tables["answers"].loc[0, "gold"] = "no"
    assert "POPE: not comparable between models, which were asked different questions" in text_of(
        paper_table([one, other], "own")
    )


def test_draws_are_no_questions() -> None:
    """The interval and n of What's Up are over its questions, whose ids the two sets share."""
    runs = runs_of("baseline")[2:4]
    once = paper_table(runs, "own").iloc[0]
    for one in runs:
        answers = one.tables["answers"]
        one.tables["answers"] = pd.concat([answers.assign(draw=draw) for draw in range(5)], ignore_index=True)
    drawn = paper_table(runs, "own").iloc[0]
    assert (drawn["n"], drawn["n_images"]) == (6, 3)
    assert drawn[["score", "low", "high"]].tolist() == pytest.approx(once[["score", "low", "high"]].tolist())
