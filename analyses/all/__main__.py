"""All analyses at a chosen budget, as one HTML report that opens without a network.

    python -m analyses.all --model runs/baseline runs/viral --limit 50 --output_dir runs --report report.html

Each analysis runs with its own defaults besides what is said here, on one model after another; what is stored already
is not computed again, so an interrupted report goes on where it stopped. An analysis that refuses a model is left out,
and the report says why. Where output_dir has a claims ledger (`python -m analyses.claims`), the newest one comes first.
"""

from __future__ import annotations

import dataclasses
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.analysis import report
from workbench.analysis.declaration import Analysis, DataOptions, Where
from workbench.analysis.discover import analysis_names, load_analyses, load_analysis, words_of
from workbench.analysis.execution import execute
from workbench.claims.shown import newest
from workbench.cli import ConfigFile, changed_flags, command, parse_with_file
from workbench.data import load_data
from workbench.errors import ConfigError, UnknownNameError, WorkbenchError
from workbench.mllm.load import load_config
from workbench.models import check_revision, is_folder, label_of, named_models
from workbench.runs import Run, environment
from workbench.vfm import find_vfm


@dataclass(frozen=True)
class Budget(DataOptions, Where, ConfigFile):
    """What every analysis is given."""

    limit: int = 50
    """Images."""
    vfm: tuple[str, ...] = ()
    """Vision foundation models; by default each analysis has its own."""
    source: str = ""
    """The model whose visual tokens the others are given (patching); by default the last one."""
    only: tuple[str, ...] = ()
    """Names of analyses; all by default."""
    report: Path = Path("report.html")


def main(argv: list[str]) -> None:
    """Run them all and write the report; exit code 1 where one failed for a reason that is not the user's."""
    words = ["python", "-m", "analyses.all", *argv]
    asked = parse_with_file(Budget, argv, prog="python -m analyses.all", description="All analyses, one HTML report")
    names = _names(asked)
    models = named_models(asked.model)
    check_revision(models, asked.revision)
    for model in models.values():  # one that is not there is a mistake, not a model that analyses refuse
        load_config(
            model, revision=None if is_folder(model) else asked.revision, trust_remote_code=asked.trust_remote_code
        )
    for name in asked.vfm:
        find_vfm(name)
    if asked.report.is_dir():
        raise ConfigError(f"report is {asked.report}, a folder: expected a file such as {asked.report / 'report.html'}")
    data = load_data(asked.data, limit=asked.limit, seed=asked.data_seed)
    sections, failed = [], False
    for number, name in enumerate(names, start=1):
        sys.stderr.write(f"[{number}/{len(names)}] {name}\n")
        section, crashed = _section(name, asked, models)
        sections.append(section)
        failed |= crashed
    here: dict[str, Any] = environment(words)
    facts = {
        "date": f"{here['created']} (UTC)",
        "models": ", ".join(asked.model),
        "data": (
            f"{data.name}, {len(data.scenes)} images, {len(data)} questions, fingerprint {data.fingerprint}, data_seed"
            f" {asked.data_seed}"
        ),
        "seed": str(asked.seed),
        "git": f"{here['git'] or 'unknown'}{' with changes that are not committed' if here['dirty'] else ''}",
        "packages": ", ".join(f"{package} {version}" for package, version in here["packages"].items()),
        "platform": here["platform"],
        "command": " ".join(words),
    }
    report.write(asked.report, "VIRAL Workbench: " + ", ".join(models), facts, sections, newest(asked.output_dir))
    for section in sections:
        done = ", ".join(section.models) or "skipped"
        print(f"{section.analysis.name:<16} {done}{''.join(f'; {note}' for note in section.notes)}")
    print(asked.report)
    if failed:
        sys.exit(1)


def _names(asked: Budget) -> list[str]:
    """The analyses that are asked for; a plugin that cannot be loaded is an error where it is named, and left out where
    all are asked for."""
    known = analysis_names()
    for name in asked.only:
        if name not in known:
            raise UnknownNameError("analysis", name, known)
        load_analysis(name)
    return list(load_analyses(name for name in known if not asked.only or name in asked.only))


def _section(name: str, asked: Budget, models: Mapping[str, str]) -> tuple[report.Section, bool]:
    """One analysis on every model that it takes, and whether it crashed on one."""
    analysis = load_analysis(name)
    found: dict[str, Run] = {}
    notes: dict[str, list[str]] = {}
    commands, crashed = [], False
    for label, model in models.items():
        try:
            config = _config(analysis, asked, list(models.values())[-1])
            word = model if label == label_of(model) else f"{label}={model}"
            options: dict[str, Any] = {field.name: getattr(asked, field.name) for field in dataclasses.fields(Where)}
            where = Where(**options | {"model": (word,)} | ({"revision": None} if is_folder(model) else {}))
            words = [*words_of(name), "--model", word, *changed_flags(config), "--output_dir", str(asked.output_dir)]
            words += ["--revision", where.revision] if where.revision else []
            found |= execute(analysis, config, where, words)
            commands.append(words)
        except WorkbenchError as error:
            notes.setdefault(str(error), []).append(label)
        except Exception as error:  # a defect of one analysis must not cost the report of the others
            traceback.print_exc()
            notes.setdefault(f"failed with {type(error).__name__}: {error}", []).append(label)
            crashed = True
    drawn, table = {}, None
    try:
        drawn, table = (analysis.figures(found), analysis.summary(found)) if found else ({}, None)
    except Exception as error:
        traceback.print_exc()
        notes.setdefault(f"the figures failed with {type(error).__name__}: {error}", []).extend(found)
        crashed = True
    said = [f"Left out: {', '.join(labels)}. {text[:1].upper()}{text[1:]}." for text, labels in notes.items()]
    if table is None:
        return report.Section(analysis, notes=said), crashed
    return report.Section(analysis, list(found), said, commands, drawn, table), crashed


def _config(analysis: Analysis, asked: Budget, source: str) -> DataOptions:
    """The analysis' own defaults with the budget put in, where it has such options."""
    values: dict[str, Any] = {field.name: getattr(asked, field.name) for field in dataclasses.fields(DataOptions)}
    known = {field.name: field.default for field in dataclasses.fields(analysis.config)}
    if asked.vfm and "vfm" in known:
        values["vfm"] = asked.vfm if isinstance(known["vfm"], tuple) else asked.vfm[0]
    if "source" in known:
        values["source"] = asked.source or source
    return analysis.config(**values)


if __name__ == "__main__":
    command(main)
