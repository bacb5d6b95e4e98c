"""Score stored answers of one or more models, without any model.

    python -m workbench.benchmarks runs/benchmark-KEY other/samples_pope.jsonl --data pope:FOLDER
    python -m workbench.benchmarks runs/benchmark-* --paper_table

A file is the folder of a run of `analyses.benchmark`, lmms-eval's `samples_*.jsonl`, or JSON lines with the keys id and
answer, which need --data. Every scorer of the benchmark is computed anew; differences are to the first file, paired by
question, and only between answers to the same prompt.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import pandas as pd
import tyro

from workbench.benchmarks.comparison import compared, whole
from workbench.benchmarks.exchange import benchmark_run, read_answers, read_run, write_answers
from workbench.benchmarks.paper_table import paper_table, text_of
from workbench.benchmarks.tables import scores
from workbench.cli import command, number_text, parse
from workbench.data import load_data
from workbench.data.benchmark_rows import BenchmarkDataset
from workbench.errors import ConfigError, RunError
from workbench.models import did_you_mean
from workbench.runs import Run


@dataclass(frozen=True)
class Options:
    """Which answers are scored."""

    files: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Run folders and files of answers; NAME=FILE gives one the name NAME, and several runs in the paper's table."""
    data: str = ""
    """Data set of the questions, such as pope:FOLDER; files of others need it."""
    prompt: str = ""
    """Name of the prompt that files of others were asked with, such as lmms; if it is not known, they are compared with
    one another only."""
    paper_table: bool = False
    """Print Table 1 of the paper instead, from runs of several benchmarks: one row for each model."""
    scorer: str = ""
    """Scorer of that table, such as paper; by default ours: own, or sum for answers by likelihood."""
    write: Path | None = None
    """Write the answers of the first file as JSON lines, which other harnesses read."""


def main(argv: list[str]) -> None:
    """Read the answers, score them and print the table of scores and differences."""
    options = parse(Options, argv, prog="python -m workbench.benchmarks", description=__doc__ or "")
    if options.paper_table:
        if options.data or options.write is not None:
            name = "data" if options.data else "write"
            raise ConfigError(f"paper_table and {name} are set: expected one of them; the table is of stored runs")
        runs = _runs(options.files)
        print(text_of(paper_table(runs, options.scorer), runs))
        return
    answers: dict[str, pd.DataFrame] = {}
    for name, place in _named(options.files).items():
        answers[name] = _read(name, place, options.data, options.prompt)
    if options.write is not None:
        if options.write.exists():
            raise ConfigError(f"{options.write} exists: expected the name of a new file")
        count = write_answers(next(iter(answers.values())), options.write)
        print(f"{options.write}: {count} answers")
    tables = {name: scores(table, seed=0) for name, table in answers.items()}
    print(whole(compared(tables, answers)).to_string(index=False, float_format=number_text, na_rep=""))


def _named(files: tuple[str, ...]) -> dict[str, Path]:
    """Return {name: file}, the name of NAME=FILE or else that of the file.

    Raises:
        ConfigError: no file, or two with the same name.
    """
    named: dict[str, Path] = {}
    for name, path in _split(files):
        name = name or path.stem
        if name in named:
            raise ConfigError(f"two files are called {name}: expected NAME=FILE for one of them")
        named[name] = path
    return named


def _split(files: tuple[str, ...]) -> list[tuple[str, Path]]:
    """Return the name and the path of each file; the name is "" where the word is the path alone.

    Raises:
        ConfigError: no file.
    """
    if not files:
        raise ConfigError("no files are given: expected run folders of analyses.benchmark, or files of answers")
    words = [("", word) if Path(word).exists() or "=" not in word else word.split("=", 1) for word in files]
    return [(name, Path(place)) for name, place in words]


def _runs(files: tuple[str, ...]) -> list[Run]:
    """Return the runs of some folders, each with the name of its model, or that of NAME=FOLDER."""
    runs = [(name, benchmark_run(place)) for name, place in _split(files)]
    return [replace(run, record=run.record | {"label": name}) if name else run for name, run in runs]


def _read(name: str, place: Path, spec: str, prompt: str) -> pd.DataFrame:
    """Return the answers of a run folder, or of a file to the questions of a data set."""
    if place.is_dir():
        return read_run(place).answers
    if not spec:
        if not place.exists():
            raise RunError(
                f"{place} does not exist: expected a run folder or a file of answers{did_you_mean(str(place))}"
            )
        raise ConfigError(f"{place} holds answers without their questions: expected --data, such as pope:FOLDER")
    data = load_data(spec, decode=False)
    benchmark = data.benchmark if isinstance(data, BenchmarkDataset) else ""
    read = read_answers(place, benchmark, [sample for sample in data if sample.options], prompt)
    if read.unanswered:
        count, first = len(read.unanswered), read.unanswered[0]
        sys.stderr.write(f"{name}: {count} questions have no answer, first {first}; they count as wrong\n")
    return read.answers


if __name__ == "__main__":
    command(main)
