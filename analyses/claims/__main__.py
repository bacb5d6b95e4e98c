"""The claims ledger: judge the paper's claims, and those of rival explanations, by stored runs.

    python -m analyses.claims --runs runs/data_efficiency runs/scarce_photos runs/scarce_easy_vqa --output_dir runs
    python -m analyses.claims --runs runs/data_efficiency --commands        # print the commands that make missing runs

The rules are in analyses/claims.yaml and were written before the runs that they judge; docs/claims.md explains how a
verdict is computed. Intervals are Student's t, 95 %, over training seeds, and are not corrected for the number of
claims; p_holm is.
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
from workbench.claims.shown import count_verdicts
from workbench.claims.verdicts import judge, ours
from workbench.cli import command, parse
from workbench.errors import ConfigError, RunError
from workbench.files import check_can_make
from workbench.models import did_you_mean
from workbench.records import RunRecord
from workbench.runs import Run, environment
from workbench.yaml_config import as_mapping

VERSION = 1


@dataclass(frozen=True)
class Options:
    """Options of `python -m analyses.claims`."""

    runs: tuple[Path, ...] = ()
    """Folders that hold trainings and the analyses of these trainings; at least one."""
    claims: Path | None = None
    """Another ledger than analyses/claims.yaml; its rules too must be in analyses/claims.yaml at the commit at which
    each run was trained."""
    output_dir: Path = Path("runs")
    """Folder in which the ledger is stored."""
    commands: bool = False
    """Only print the commands that make missing runs; judge and store nothing."""


def main(argv: list[str]) -> None:
    """Judge every claim, print and store the ledger; claims without runs are no error."""
    options = parse(Options, argv, prog="python -m analyses.claims", description=__doc__ or "")
    started = time.monotonic()
    if not options.runs:
        raise ConfigError("no runs given: expected --runs FOLDER ..., such as --runs runs/data_efficiency")
    for folder in options.runs:
        if folder.is_dir():
            continue
        if not options.commands:
            raise RunError(
                f"{folder} is not a folder: expected one that holds trainings, such as"
                f" runs/data_efficiency{did_you_mean(str(folder))}"
            )
        sys.stderr.write(f"{folder} does not exist yet{did_you_mean(str(folder))}\n")  # the printed commands make it
    file = options.claims or Path(next(iter(import_module("analyses").__path__))) / "claims.yaml"
    ledger = read_ledger(file)
    check_measures(ledger, str(file))
    if not options.commands:
        check_can_make(options.output_dir)
    table, numbers, missing = judge(ledger, Evidence(ledger, options.runs))
    if options.commands:
        sys.stdout.write("".join(f"{line}\n" for line in missing))
        return
    ledger_run = _as_run(options, table, numbers, hash_of(file), argv, time.monotonic() - started)
    # renewed, since the newest ledger is shown, also where it came out as an older one
    folder = runs.save(ledger_run, options.output_dir, renew=True)
    for row in table.to_dict("records"):
        sys.stdout.write(_block(row))
    sys.stdout.write(f"{count_verdicts(table)}\n{folder}\n")


def hash_of(file: Path) -> str:
    """Return the SHA-256 of a ledger's file, including its wording and comments."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _as_run(
    options: Options, table: pd.DataFrame, numbers: pd.DataFrame, file_hash: str, argv: list[str], seconds: float
) -> Run:
    """Return the ledger as a run to store; the same file with the same numbers has the same key."""
    content = hashlib.sha256((table.to_json() + numbers.to_json() + file_hash).encode()).hexdigest()
    key = runs.run_key("claims", VERSION, {}, file_hash, content)
    record: RunRecord = {
        "analysis": "claims",
        "version": VERSION,
        "label": "ledger",
        "model": ", ".join(map(str, options.runs)),
        "data": "",
        "config": as_mapping(options),
        "claims_sha256": file_hash,  # type: ignore[typeddict-unknown-key]
        "seconds": round(seconds, 2),
    }
    command_line = ["python", "-m", "analyses.claims", *argv]
    return Run(key, record | environment(command_line), {"claims": table, "numbers": numbers})


def _block(row: dict[str, Any]) -> str:
    """Return a claim's row as the lines that are printed."""
    lines = [f"{row['id']}: {row['verdict'].upper()}", f"    {row['claim']}", f"    paper: {row['paper']}"]
    lines += [f"    ours: {number}"] if (number := ours(row)) else []
    lines += [f"    why: {row['reason']}"] if row["reason"] else []
    lines += [f"    note: {row['note']}"] if row["note"] else []
    return "\n".join(part for line in lines for part in textwrap.wrap(line, 160, subsequent_indent="        ")) + "\n\n"


if __name__ == "__main__":
    command(main)
