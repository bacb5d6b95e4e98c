"""The claims ledger: every claim of the paper that can be tested here, and of its rivals, with the verdict that its
rule computes from stored runs.

    python -m analyses.claims --runs runs/data_efficiency runs/scarce_photos runs/scarce_easy_vqa --output_dir runs
    python -m analyses.claims --runs runs/data_efficiency --commands        # what makes the runs that are not there

The rules are in analyses/claims.yaml, written before the runs that they judge; docs/claims.md says how a verdict comes
about. Intervals are Student's, 95 %, over training seeds, and are not corrected for the number of claims; p_holm is.
"""

from __future__ import annotations

import hashlib
import sys
import textwrap
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd

from workbench import runs
from workbench.claims.evidence import Evidence
from workbench.claims.measures import check_measures
from workbench.claims.rules import read_ledger
from workbench.claims.shown import counted
from workbench.claims.verdicts import judge, ours
from workbench.cli import command, parse
from workbench.errors import ConfigError, RunError
from workbench.files import check_can_make
from workbench.models import did_you_mean
from workbench.runs import Run, environment
from workbench.yaml_config import as_mapping

VERSION = 1


@dataclass(frozen=True)
class Options:
    """Which runs are judged, and by which rules."""

    runs: tuple[Path, ...] = ()
    """Folders that hold trainings, and beside them analyses of them."""
    claims: Path | None = None
    """Another ledger than analyses/claims.yaml; its rules too must be in analyses/claims.yaml at the commit of every
    run."""
    output_dir: Path = Path("runs")
    commands: bool = False
    """Print the commands that make the runs that are not there, judge nothing and store nothing."""


def main(argv: list[str]) -> None:
    """Judge every claim, print and store the ledger; claims without runs are no error."""
    asked = parse(Options, argv, prog="python -m analyses.claims", description=__doc__ or "")
    started = time.monotonic()
    if not asked.runs:
        raise ConfigError("no runs given: expected --runs FOLDER ..., such as --runs runs/data_efficiency")
    for folder in asked.runs:
        if not folder.is_dir():
            raise RunError(
                f"{folder} is not a folder: expected one that holds trainings, such as"
                f" runs/data_efficiency{did_you_mean(str(folder))}"
            )
    file = asked.claims or Path(next(iter(import_module("analyses").__path__))) / "claims.yaml"
    ledger = read_ledger(file)
    check_measures(ledger, str(file))
    if not asked.commands:
        check_can_make(asked.output_dir)
    table, numbers, missing = judge(ledger, Evidence(ledger, asked.runs))
    if asked.commands:
        sys.stdout.write("".join(f"{line}\n" for line in missing))
        return
    stored = _stored(asked, table, numbers, [hash_of(file), *argv], time.monotonic() - started)
    folder = runs.save(stored, asked.output_dir)
    for row in table.to_dict("records"):
        sys.stdout.write(_block(row))
    sys.stdout.write(f"{counted(table)}\n{folder}\n")


def hash_of(file: Path) -> str:
    """SHA-256 of a ledger's file, words and all."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _stored(asked: Options, table: pd.DataFrame, numbers: pd.DataFrame, words: list[str], seconds: float) -> Run:
    """The ledger as a run: the same claims over the same numbers have one key."""
    content = hashlib.sha256((table.to_json() + numbers.to_json() + words[0]).encode()).hexdigest()
    key = runs.run_key("claims", VERSION, {}, words[0], content)
    record: dict[str, Any] = {
        **{
            "analysis": "claims",
            "version": VERSION,
            "label": "ledger",
            "model": ", ".join(map(str, asked.runs)),
            "data": "",
            "config": as_mapping(asked),
        },
        **{"claims_sha256": words[0], "seconds": round(seconds, 2)},
    }
    return Run(
        key,
        record | environment(["python", "-m", "analyses.claims", *words[1:]]),
        {"claims": table, "numbers": numbers},
    )


def _block(row: dict[str, Any]) -> str:
    """A claim as it is printed."""
    lines = [f"{row['id']}: {row['verdict'].upper()}", f"    {row['claim']}", f"    paper: {row['paper']}"]
    lines += [f"    ours: {said}"] if (said := ours(row)) else []
    lines += [f"    why: {row['reason']}"] if row["reason"] else []
    lines += [f"    note: {row['note']}"] if row["note"] else []
    return "\n".join(part for line in lines for part in textwrap.wrap(line, 160, subsequent_indent="        ")) + "\n\n"


if __name__ == "__main__":
    command(main)
