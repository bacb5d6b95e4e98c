"""Run an analysis from the command line."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any, TypeVar

from workbench import runs
from workbench.analysis.declaration import Analysis, Where
from workbench.analysis.discover import words_of
from workbench.analysis.execution import execute
from workbench.analysis.exported import export
from workbench.cli import ConfigFile, command, number_text, parse_with_file
from workbench.files import check_can_make
from workbench.progress import emit
from workbench.ranks import Ranks

T = TypeVar("T")


def main(analysis: Analysis) -> None:
    """Run the command of one analysis with the arguments of this process."""
    command(lambda argv: run(analysis, argv))


def run(analysis: Analysis, argv: list[str]) -> None:
    """Run an analysis with the options in `argv`, and print its summary and the folders of its runs."""
    words = words_of(analysis.name)
    options_class = dataclasses.make_dataclass("Command", [], bases=(analysis.config, Where, ConfigFile), frozen=True)
    paragraphs = [f"{analysis.title}.", "\n".join(analysis.examples), *analysis.explanation]
    description = "\n\n".join(filter(None, paragraphs))
    options: Any = parse_with_file(options_class, argv, prog=" ".join(words), description=description)
    config, where = _part(options, analysis.config), _part(options, Where)
    if where.export is not None:
        check_can_make(where.export)
    results = execute(analysis, config, where, [*words, *argv])
    if not Ranks.here().main:
        return
    summary = analysis.summary(results).to_string(index=False, float_format=number_text, na_rep="")
    sys.stdout.write(f"{summary}\n")
    for label, run in results.items():
        for sentence in _shortened(run.record.get("left_out", ())):
            sys.stdout.write(f"{label}: left out {sentence}\n")
        emit("run", analysis=analysis.name, key=run.key)
        sys.stdout.write(f"{label}: {runs.folder_of(where.output_dir, analysis.name, run.key)}\n")
    if where.export is not None:
        export(analysis, results, where.export, where.export_columns)


def _shortened(left_out: Sequence[str], most: int = 5) -> list[str]:
    """Return the first `most` sentences about what was left out, and one that counts the others."""
    more = len(left_out) - most
    return [*left_out[:most], *([f"{more} more, which {runs.RUN_FILE} names"] if more > 0 else [])]


def _part(options: Any, cls: type[T]) -> T:
    """Return the dataclass `cls` with the values of its fields in `options`."""
    return cls(**{field.name: getattr(options, field.name) for field in dataclasses.fields(cls)})  # type: ignore[arg-type]
