"""Answers in files: those of our runs, of lmms-eval, and of anything else that writes an id and an answer.

Scoring them needs the questions, but neither a model nor images that can be decoded:

    run folder      `RUNS/benchmark-KEY`, which holds its own questions
    lmms-eval       `samples_TASK.jsonl`: `doc_id` counts the questions in their order, `filtered_resps` is the answer
    any JSON lines  `id`, as our data set names the question, and `answer`; `draw` where each question has several

Of `response` and `answer` in one row, as MMVP's own script writes them, `response` is the model's and `answer` the
right one. An answer that is null is missing, as one without a row is: it is wrong by every scorer. An empty text is
what a model said.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from workbench.benchmarks.tables import answer_row
from workbench.data.base import Sample
from workbench.data.hf_tables import json_rows
from workbench.data.images import shown
from workbench.errors import ConfigError, DataError, RunError, one_line
from workbench.files import atomic_file
from workbench.models import did_you_mean
from workbench.runs import Run, load

SEEN = "image"
OUTPUTS = ("filtered_resps", "resps", "response")  # keys that only a model's output has


@dataclass(frozen=True)
class AnswerFile:
    """Answers that were read from a file.

    Attributes:
        answers: one row per question, as `tables.answer_row` makes them.
        unanswered: ids of questions of the data set that the file has no answer to, or not in each draw; what is
            missing is wrong by every scorer, and counts as unparsed.
    """

    answers: pd.DataFrame
    unanswered: tuple[str, ...] = ()


def read_run(folder: Path) -> AnswerFile:
    """Read the answers of a stored run of `analyses.benchmark`.

    Raises:
        RunError: the folder is no such run.
    """
    return AnswerFile(with_prompt(benchmark_run(folder), "answers"))


def benchmark_run(folder: Path) -> Run:
    """Read a stored run of `analyses.benchmark`.

    Raises:
        RunError: the folder is no such run.
    """
    try:
        run = load(folder)
    except RunError as error:
        near = "" if folder.is_dir() else did_you_mean(str(folder))
        raise RunError(f"{shown(folder)} is no run of analyses.benchmark ({one_line(error, 80)}){near}") from error
    if run.record["analysis"] != "benchmark":
        raise RunError(f"{shown(folder)} is a run of {run.record['analysis']}: expected one of analyses.benchmark")
    return run


def with_prompt(run: Run, table: str) -> pd.DataFrame:
    """Return a table of a run with the column `prompt`, which older runs have in their record only."""
    rows = run.tables[table]
    return rows if "prompt" in rows else rows.assign(prompt=str(run.extra["prompt"]))


def read_answers(file: Path, benchmark: str, samples: Sequence[Sample], prompt: str = "") -> AnswerFile:
    """Read the answers of others to the questions of a data set.

    Args:
        file: JSON lines, of lmms-eval or with the keys `id` and `answer`.
        benchmark: name of the benchmark, "" if the data set is none.
        samples: its questions, in order.
        prompt: name of the prompt that they were asked with, "" if that is not known.

    Raises:
        DataError: a row without these keys, a question that the data set does not have or that is answered twice, or
            a question that is not the one at its place; the message names the row.
    """
    if not file.is_file():
        raise DataError(f"{shown(file)} does not exist: expected JSON lines with the keys id and answer")
    rows = json_rows(file)
    by_id = {sample.id: sample for sample in samples}
    answers: dict[tuple[str, int], str | None] = {}
    for number, row in enumerate(rows, start=1):
        where = f"{shown(file.name)} row {number}"
        sample = _of_lmms(where, row, samples) if "doc_id" in row else _of_id(where, row, by_id)
        draw = row.get("draw", 0)
        if not isinstance(draw, int) or isinstance(draw, bool):
            raise DataError(f"{where} has draw {shown(str(draw), 20)}: expected a number")
        if (sample.id, draw) in answers:
            raise DataError(f"{where} answers question {sample.id} again: expected one answer to each")
        answers[sample.id, draw] = _answer(where, row)
    if not answers:
        raise DataError(f"{shown(file)} has no answers: expected JSON lines with the keys id and answer")
    draws = sorted({draw for _, draw in answers})
    table = [
        answer_row(benchmark, sample, SEEN, answers.get((sample.id, draw)), prompt=prompt, draw=draw)
        for draw in draws
        for sample in samples
    ]
    lost = [sample.id for sample in samples if any(answers.get((sample.id, draw)) is None for draw in draws)]
    return AnswerFile(pd.DataFrame(table), tuple(lost))


def write_answers(answers: pd.DataFrame, file: Path) -> int:
    """Write the answers of a model that saw the images as JSON lines, and return how many there are.

    The keys are id, answer, gold, category and question, as other harnesses read them, and draw where each question has
    several answers.

    Raises:
        ConfigError: the options were rotated, whose order a file of answers does not have.
    """
    seen = answers[answers["shown"] == SEEN]
    orders = seen.groupby("id")["options"].nunique()
    if orders.max() > 1:
        raise ConfigError(
            f"question {orders.idxmax()} was asked with {orders.max()} orders of its options: expected one, as in a run"
            " without circular, since a file of answers does not say the order"
        )
    seen = seen.assign(answer=[None if pd.isna(answer) else answer for answer in seen["answer"]])
    names = ["id", "answer", "gold", "category", "question", *(["draw"] if seen["draw"].nunique() > 1 else [])]
    with atomic_file(file) as partial:
        lines = (json.dumps({name: row[name] for name in names}) for row in seen.to_dict("records"))
        partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return len(seen)


def _of_id(where: str, row: Mapping[str, Any], by_id: Mapping[str, Sample]) -> Sample:
    name = row.get("id", row.get("question_id"))
    if name is None:
        raise DataError(f"{where} has the keys {shown(', '.join(row), 60)}: expected id and answer")
    if str(name) not in by_id:
        raise DataError(
            f"{where} has the id {shown(name, 40)}, which the data set does not have: expected ids such as"
            f" {next(iter(by_id))}"
        )
    return by_id[str(name)]


def _of_lmms(where: str, row: Mapping[str, Any], samples: Sequence[Sample]) -> Sample:
    """Return the question at the place `doc_id`, whose text must be in the row's document."""
    place = row["doc_id"]
    if not isinstance(place, int) or not 0 <= place < len(samples):
        raise DataError(f"{where} has doc_id {shown(place, 20)}: expected 0 to {len(samples) - 1}")
    document = row.get("doc")
    texts = [str(value) for value in document.values()] if isinstance(document, Mapping) else []
    sample = samples[place]
    if not any(sample.question in text for text in texts):  # without the text, another order would go unnoticed
        raise DataError(
            f"{where} is not about question {sample.id}, which is at its place: expected the same data set, in the same"
            " order"
        )
    return sample


def _answer(where: str, row: Mapping[str, Any]) -> str | None:
    """Return the model's answer; beside a key of OUTPUTS, `answer` is the right one and `text` the question."""
    names = [name for name in OUTPUTS if name in row][:1] or [name for name in ("answer", "text") if name in row]
    if not names:
        raise DataError(f"{where} has no answer: expected the key answer, or filtered_resps as lmms-eval writes it")
    if len(names) > 1:
        raise DataError(f"{where} has the keys {' and '.join(names)}: expected one of them, what the model answered")
    value = row[names[0]]
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None or isinstance(value, str):
        return value
    raise DataError(f"{where} has {names[0]} {str(value)[:40]!r}: expected one text")
