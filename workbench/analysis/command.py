"""The command line of an analysis."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any, TypeVar

from workbench import runs
from workbench.analysis.declaration import Analysis, Where
from workbench.analysis.discover import words_of
from workbench.analysis.execution import execute
from workbench.cli import ConfigFile, command, parse_with_file
from workbench.ranks import Ranks

T = TypeVar("T")


def main(analysis: Analysis) -> None:
    """The command line of one analysis."""
    command(lambda argv: run(analysis, argv))


def run(analysis: Analysis, argv: list[str]) -> None:
    """Run an analysis as its command line asks, and print the table and the folders of its runs."""
    words = words_of(analysis.name)
    both = dataclasses.make_dataclass("Command", [], bases=(analysis.config, Where, ConfigFile), frozen=True)
    asked: Any = parse_with_file(both, argv, prog=" ".join(words), description=analysis.title)
    config, where = _part(asked, analysis.config), _part(asked, Where)
    found = execute(analysis, config, where, [*words, *argv])
    if not Ranks.here().main:
        return
    sys.stdout.write(analysis.summary(found).to_string(index=False, float_format="{:.3f}".format) + "\n")
    for label, run in found.items():
        for sentence in _named(run.record.get("left_out", ())):
            sys.stdout.write(f"{label}: left out {sentence}\n")
        sys.stdout.write(f"{label}: {runs.folder_of(where.output_dir, analysis.name, run.key)}\n")


def _named(left_out: Sequence[str], most: int = 5) -> list[str]:
    """The first sentences about what was left out, and how many more there are."""
    more = len(left_out) - most
    return [*left_out[:most], *([f"{more} more, which {runs.RUN_FILE} names"] if more > 0 else [])]


def _part(asked: Any, cls: type[T]) -> T:
    """The fields of `asked` that belong to the dataclass `cls`."""
    return cls(**{field.name: getattr(asked, field.name) for field in dataclasses.fields(cls)})  # type: ignore[arg-type]
