"""Answers of other harnesses are scored like our own, and what does not fit the questions is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.conftest import refused, run
from workbench.benchmarks.comparison import compared
from workbench.benchmarks.exchange import read_answers, write_answers
from workbench.benchmarks.tables import ALL, answer_row, scores
from workbench.data.base import Sample
from workbench.errors import ConfigError, DataError

NOTHING: Any = None
SAMPLES = [
    Sample(f"random-{n}", f"image {n // 2}", NOTHING, f"Is there a {n}?", ("yes", "no")[n % 2], ("yes", "no"), "random")
    for n in range(12)
]


def lines(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_answers_by_id_and_of_lmms_eval_are_the_same(tmp_path: Path) -> None:
    said = ["Yes", "no"] * 5 + ["no", "Yes"]
    by_id = lines(
        tmp_path / "vllm.jsonl",
        [{"id": s.id, "answer": a} for s, a in zip(reversed(SAMPLES), reversed(said), strict=True)],
    )
    lmms = lines(
        tmp_path / "samples_pope.jsonl",
        [
            {
                "doc_id": n,
                "doc": {"question": s.question, "answer": s.answer},
                "target": s.answer,
                "filtered_resps": [[a]],
            }
            for n, (s, a) in enumerate(zip(SAMPLES, said, strict=True))
        ],
    )
    tables = [read_answers(file, "pope", SAMPLES).answers for file in (by_id, lmms)]
    pd.testing.assert_frame_equal(*tables)
    table = scores(tables[0], seed=0)
    own = table[(table["scorer"] == "own") & (table["measure"] == "accuracy")]
    assert own["score"].iloc[0] == pytest.approx(10 / 12)
    assert write_answers(tables[0], tmp_path / "out.jsonl") == 12
    again = read_answers(tmp_path / "out.jsonl", "pope", SAMPLES).answers
    pd.testing.assert_frame_equal(again, tables[0])


def test_questions_without_an_answer_are_counted_and_wrong(tmp_path: Path) -> None:
    file = lines(tmp_path / "a.jsonl", [{"id": s.id, "answer": s.answer} for s in SAMPLES[:9]])
    read = read_answers(file, "pope", SAMPLES)
    assert read.unanswered == ("random-9", "random-10", "random-11")
    table = scores(read.answers, seed=0)
    own = table[(table["scorer"] == "own") & (table["measure"] == "accuracy")].iloc[0]
    assert (own["score"], own["n"], own["unparsed"]) == (pytest.approx(9 / 12), 12, 3)


@pytest.mark.parametrize("benchmark", ["pope", "mme", "mmvp", "mmstar", "cv_bench", "whatsup coco_one", ""])
def test_a_missing_answer_is_wrong_by_every_scorer(tmp_path: Path, benchmark: str) -> None:
    """Some scorers take an empty answer as right: POPE's own as a yes, the paper's as any relation."""
    samples = [Sample(s.id, s.image_id, NOTHING, s.question, "yes", s.options, s.category) for s in SAMPLES]
    rows = [{"id": s.id, "answer": None} for s in samples[:-1]]  # the last one has no row
    read = read_answers(lines(tmp_path / "a.jsonl", rows), benchmark, samples)
    assert len(read.unanswered) == 12
    table = scores(read.answers, seed=0)
    accuracy = table[(table["measure"] == "accuracy") & (table["category"] == ALL)]
    assert set(accuracy["scorer"]) >= {"own"}
    assert (accuracy["score"] == 0).all()
    assert (accuracy["unparsed"] == 12).all()
    recall = table[table["measure"] == "recall"]
    assert (recall["score"] == 0).all(), "also by lmms-eval, whose recall forgets answers that it cannot read"
    write_answers(read.answers, tmp_path / "out.jsonl")
    again = read_answers(tmp_path / "out.jsonl", benchmark, samples)
    pd.testing.assert_frame_equal(again.answers, read.answers)


def test_an_empty_answer_is_what_a_model_said(tmp_path: Path) -> None:
    read = read_answers(lines(tmp_path / "a.jsonl", [{"id": s.id, "answer": ""} for s in SAMPLES]), "pope", SAMPLES)
    assert read.unanswered == ()
    table = scores(read.answers, seed=0)
    official = table[(table["scorer"] == "official") & (table["measure"] == "yes-ratio")]
    assert (official["score"] == 1).all()


def test_the_right_answer_beside_a_response_is_not_the_models(tmp_path: Path) -> None:
    """MMVP's own script writes the right answer as `answer`, and what the model said as `response`."""
    samples = [
        Sample(f"{n}", f"image {n}", NOTHING, "Is the door open?", ("open", "closed")[n % 2], ("open", "closed"))
        for n in range(4)
    ]
    said = {"prompt": "Is the door open? (a) Open (b) Closed", "response": "(a)", "answer_id": "x", "model_id": "m"}
    rows = [{"question_id": n, "answer": ("(a)", "(b)")[n % 2]} | said for n in range(4)]
    read = read_answers(lines(tmp_path / "answers.jsonl", rows), "mmvp", samples)
    assert read.answers["answer"].tolist() == ["(a)"] * 4
    table = scores(read.answers, seed=0)
    own = table[(table["scorer"] == "own") & (table["measure"] == "accuracy")]
    assert own["score"].iloc[0] == 0.5


def test_answers_to_rotated_options_are_not_written(tmp_path: Path) -> None:
    """A letter means nothing without the order of the options that it was chosen from."""
    turned = [replace(sample, options=sample.options[::-1]) for sample in SAMPLES]
    rows = [answer_row("pope", s, "image", "A", draw=n) for n, part in enumerate((SAMPLES, turned)) for s in part]
    with pytest.raises(ConfigError, match="question random-0 was asked with 2 orders of its options: expected one"):
        write_answers(pd.DataFrame(rows), tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "random-99", "answer": "Yes"}, "row 2 has the id random-99, which the data set does not have"),
        ({"id": "random-0", "answer": "Yes"}, "row 2 answers question random-0 again: expected one answer to each"),
        ({"id": "random-1"}, "row 2 has no answer: expected the key answer"),
        ({"id": "random-1", "answer": ["Yes", "No"]}, "row 2 has answer .*: expected one text"),
        ({"id": "random-1", "answer": 3}, "row 2 has answer '3': expected one text"),
        ({"id": "random-1", "answer": "no", "text": "Yes"}, "row 2 has the keys answer and text: expected one of them"),
        ({"answer": "Yes"}, "row 2 has the keys answer: expected id and answer"),
        ({"doc_id": 12, "filtered_resps": ["Yes"]}, "row 2 has doc_id 12: expected 0 to 11"),
        ({"doc_id": 1, "doc": {"question": "Is there a 7?"}, "resps": ["Yes"]}, "row 2 is not about question random-1"),
        ({"doc_id": 1, "filtered_resps": ["Yes"]}, "row 2 is not about question random-1"),
        (
            {"doc_id": 1, "doc": {"question": "Is there a 1?"}, "filtered_resps": ["Yes", "No"]},
            "row 2 has filtered_resps .*: expected one text",
        ),
    ],
)
def test_rows_that_do_not_fit_are_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    file = lines(tmp_path / "a.jsonl", [{"id": "random-0", "answer": "Yes"}, row])
    with pytest.raises(DataError, match=message):
        read_answers(file, "pope", SAMPLES)


def test_drawn_answers_are_not_compared_with_greedy_ones() -> None:
    """A drawn answer is worse than the likeliest one, whatever the model."""

    def asked(times: int) -> pd.DataFrame:
        return pd.DataFrame([answer_row("pope", s, "image", "yes", draw=n) for n in range(times) for s in SAMPLES])

    answers = {"drawn": asked(3), "greedy": asked(1), "drawn too": asked(3)}
    table = compared({name: scores(of, seed=0) for name, of in answers.items()}, answers)
    rows = table[(table["measure"] == "accuracy") & (table["category"] == ALL) & (table["scorer"] == "own")]
    differences = rows.set_index("model")["difference"]
    assert differences["drawn too"] == 0
    assert differences[["drawn", "greedy"]].isna().all()


def test_answers_to_different_prompts_are_neither_mixed_nor_compared() -> None:
    prompts = {"a": ("lmms", "No"), "b": ("llava", "Yes"), "c": ("lmms", "Yes"), "d": ("llava", "No")}
    answers = {
        name: pd.DataFrame([answer_row("pope", sample, "image", said, prompt=prompt) for sample in SAMPLES])
        for name, (prompt, said) in prompts.items()
    }
    table = compared({name: scores(of, seed=0) for name, of in answers.items()}, answers)
    rows = table[(table["measure"] == "accuracy") & (table["category"] == ALL) & (table["scorer"] == "own")]
    assert rows["prompt"].tolist() == ["lmms", "llava", "lmms", "llava"]
    assert rows.set_index("model")["difference"].notna().to_dict() == {"a": False, "b": False, "c": True, "d": False}
    both = scores(pd.concat([answers["a"], answers["b"]], ignore_index=True), seed=0)
    yes = both[(both["measure"] == "yes-ratio") & (both["scorer"] == "own")].set_index("prompt")["score"]
    assert yes.to_dict() == {"lmms": 0, "llava": 1}


def test_differences_are_to_the_first_model_alone() -> None:
    """A way of asking that the first model lacks has no difference, whoever else was asked so."""
    seen = pd.DataFrame([answer_row("pope", sample, "image", "Yes") for sample in SAMPLES])
    answers = {"a": seen, "b": seen.assign(shown="no image"), "c": seen.assign(shown="no image")}
    table = compared({name: scores(of, seed=0) for name, of in answers.items()}, answers)
    assert table["difference"].isna().all()


def test_other_questions_with_the_same_ids_are_not_compared() -> None:
    """Two copies of a benchmark with one other label."""
    one = pd.DataFrame([answer_row("pope", sample, "image", "Yes") for sample in SAMPLES])
    other = one.assign(gold=["no", *one["gold"][1:]])
    for second, paired in ((one, True), (other, False)):
        tables = {"a": one, "b": second}
        table = compared({name: scores(answers, seed=0) for name, answers in tables.items()}, tables)
        rows = table[(table["model"] == "b") & (table["measure"] == "accuracy") & (table["category"] == ALL)]
        assert rows["difference"].notna().all() == paired
        assert rows["difference"].isna().all() != paired


@pytest.mark.slow
def test_two_files_are_compared_by_the_command(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(b"not an image")  # scoring needs no image
    questions = [
        {"question_id": n, "image": "0.png", "text": f"Is there a {n}?", "label": ("yes", "no")[n % 2]}
        for n in range(20)
    ]
    lines(tmp_path / "coco_pope_random.json", questions)
    first = lines(tmp_path / "first.jsonl", [{"id": f"random-{n}", "answer": "Yes"} for n in range(20)])
    second = lines(
        tmp_path / "second.jsonl", [{"id": f"random-{n}", "answer": ("Yes", "No")[n % 2]} for n in range(20)]
    )
    spec = f"pope:{tmp_path / 'coco_pope_random.json'}"
    done = run("workbench.benchmarks", str(first), f"better={second}", "--data", spec)
    accuracy = [line.split() for line in done.stdout.splitlines() if " own " in line and " accuracy " in line]
    assert [row[0] for row in accuracy] == ["first", "better"]
    assert "0.500" in accuracy[0]
    assert "1.000" in accuracy[1]
    assert float(accuracy[1][-4]) == 0.5
    assert "expected --data, such as pope:FOLDER" in refused("workbench.benchmarks", str(first))
    assert "two files are called first" in refused("workbench.benchmarks", str(first), str(first), "--data", spec)
    assert "is no run of analyses.benchmark" in refused("workbench.benchmarks", str(tmp_path))
