"""Run all analyses with a limited number of images, and write one HTML report that opens without a network.

    python -m analyses.all --model runs/baseline runs/viral --limit 50 --output_dir runs --report report.html

Every analysis runs on one model after another, with its own defaults for all options that are not set here. Stored
results are not computed again, so an interrupted report continues where it stopped. If an analysis cannot be run on a
model, it is left out, and the report says why. If output_dir has a claims ledger (`python -m analyses.claims`), the
newest one comes first in the report.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.analysis import report
from workbench.analysis.declaration import Analysis, DataOptions, Where
from workbench.analysis.discover import analysis_names, load_analyses, load_analysis, words_of
from workbench.analysis.execution import chosen_data, execute
from workbench.analysis.exported import export
from workbench.claims.shown import newest
from workbench.cli import ConfigFile, changed_flags, command, parse_with_file
from workbench.data.benchmark_rows import BenchmarkDataset
from workbench.errors import ConfigError, RunError, UnknownNameError, WorkbenchError
from workbench.figures import plain_name
from workbench.files import check_can_make
from workbench.mllm.load import load_config
from workbench.models import check_revision, is_folder, label_of, named_models
from workbench.runs import Run, environment
from workbench.vfm import find_vfms


@dataclass(frozen=True)
class Budget(DataOptions, Where, ConfigFile):
    """Options that are passed on to every analysis, and those of the report."""

    limit: int = 50
    """Number of images."""
    vfm: tuple[str, ...] = ()
    """Vision foundation models (VFMs); by default, each analysis's own default."""
    source: str = ""
    """Model whose visual tokens are patched into the other models (patching); by default the last of --model."""
    only: tuple[str, ...] = ()
    """Names of the analyses to run; by default all, `benchmark` on benchmarks only."""
    report: Path = Path("report.html")
    """HTML file to write."""


def main(argv: list[str]) -> None:
    """Run the analyses and write the report; exit with code 1 if one crashed, which is not the user's fault."""
    words = ["python", "-m", "analyses.all", *argv]
    budget = parse_with_file(Budget, argv, prog="python -m analyses.all", description=__doc__ or "")
    names = _names(budget)
    models = named_models(budget.model)
    check_revision(models, budget.revision)
    for model in models.values():  # a model that does not exist is the user's mistake, not one that analyses refuse
        load_config(
            model, revision=None if is_folder(model) else budget.revision, trust_remote_code=budget.trust_remote_code
        )
    find_vfms(budget.vfm)
    if budget.report.is_dir():
        example = budget.report / "report.html"
        raise ConfigError(f"report is {budget.report}, a folder: expected a file such as {example}")
    for folder in filter(None, [budget.report.parent, budget.export]):
        check_can_make(folder)
    data = chosen_data(budget.data, budget.limit, budget.data_seed, budget.ids)
    if not budget.only and not isinstance(data, BenchmarkDataset):
        names = [name for name in names if not load_analysis(name).benchmarks]
    sections, failed = [], False
    for number, name in enumerate(names, start=1):
        sys.stderr.write(f"[{number}/{len(names)}] {name}\n")
        section, crashed = _section(name, budget, models)
        sections.append(section)
        failed |= crashed
    here = environment(words)
    facts = {
        "date": f"{here['created']} (UTC)",
        "models": ", ".join(budget.model),
        "data": (
            f"{data.name}, {len(data.scenes)} images, {len(data)} questions, fingerprint {data.fingerprint}, data_seed"
            f" {budget.data_seed}"
        ),
        "seed": str(budget.seed),
        "git": f"{here['git'] or 'unknown'}{' with uncommitted changes' if here['dirty'] else ''}",
        "packages": ", ".join(f"{package} {version}" for package, version in here["packages"].items()),
        "platform": here["platform"],
        "command": shlex.join(words),
    }
    ledger, why = ledger_of(budget.output_dir)
    facts |= {"claims": why} if why else {}
    report.write(budget.report, "VIRAL Workbench: " + ", ".join(models), facts, sections, ledger)
    for section in sections:
        done = ", ".join(section.models) or "skipped"
        print(f"{section.analysis.name:<16} {done}{''.join(f'; {note}' for note in section.notes)}")
    if why:
        print(f"{'claims':<16} left out: {why}")
    print(budget.report)
    if failed:
        sys.exit(1)


def _names(budget: Budget) -> list[str]:
    """Return the names of the analyses to run.

    A plugin that cannot be loaded is left out, unless `only` names it.

    Raises:
        UnknownNameError: `only` names an analysis that does not exist.
        WorkbenchError: `only` names a plugin that cannot be loaded.
    """
    known = analysis_names()
    for name in budget.only:
        if name not in known:
            raise UnknownNameError("analysis", name, known)
        load_analysis(name)
    return list(load_analyses(name for name in known if not budget.only or name in budget.only))


def ledger_of(folder: Path) -> tuple[Run | None, str]:
    """Return the newest claims ledger, None if there is none, and why it cannot be shown, "" if it can."""
    try:
        return newest(folder), ""
    except RunError as error:  # it must not cost the report of the analyses
        return None, str(error)


def _section(name: str, budget: Budget, models: Mapping[str, str]) -> tuple[report.Section, bool]:
    """Run one analysis on every model; return its section of the report, and whether it crashed on a model."""
    analysis = load_analysis(name)
    runs: dict[str, Run] = {}
    problems: dict[str, list[str]] = {}  # {sentence: labels of the models}
    commands, crashed = [], False
    for label, model in models.items():
        try:
            config = _config(analysis, budget, list(models.values())[-1])
            word = model if label == label_of(model) else f"{label}={model}"
            options: dict[str, Any] = {field.name: getattr(budget, field.name) for field in dataclasses.fields(Where)}
            where = Where(**options | {"model": (word,)} | ({"revision": None} if is_folder(model) else {}))
            words = command_of(name, word, config, where)
            runs |= execute(analysis, config, where, words)
            commands.append(words)
        except WorkbenchError as error:
            problems.setdefault(str(error), []).append(label)
        except Exception as error:  # noqa: BLE001  # a crash of one analysis must not cost the report of the others
            traceback.print_exc()
            problems.setdefault(f"failed with {type(error).__name__}: {error}", []).append(label)
            crashed = True
    drawn: Mapping[str, Any] = {}
    table = None
    try:
        if runs:
            drawn = analysis.figures({plain_name(label): run for label, run in runs.items()})
            table = analysis.summary(runs)
        if runs and budget.export is not None:
            export(analysis, runs, budget.export / name, budget.export_columns)
    except Exception as error:  # noqa: BLE001
        traceback.print_exc()
        problems.setdefault(f"the figures failed with {type(error).__name__}: {error}", []).extend(runs)
        crashed = True
    notes = [f"Left out: {', '.join(labels)}. {text[:1].upper()}{text[1:]}." for text, labels in problems.items()]
    if table is None:
        return report.Section(analysis, notes=notes), crashed
    return report.Section(analysis, list(runs), notes, commands, drawn, table), crashed


def command_of(name: str, model: str, config: DataOptions, where: Where) -> list[str]:
    """Return the command line that runs one analysis on one model as this command does."""
    kept_apart = {"model": (), "output_dir": Where.output_dir, "export": None, "export_columns": None}
    flags = [*changed_flags(config), *changed_flags(dataclasses.replace(where, **kept_apart))]  # type: ignore[arg-type]
    return [*words_of(name), "--model", model, *flags, "--output_dir", str(where.output_dir)]


def _config(analysis: Analysis, budget: Budget, source: str) -> DataOptions:
    """Return an analysis's config: its own defaults, with those options of the budget that it has."""
    values: dict[str, Any] = {field.name: getattr(budget, field.name) for field in dataclasses.fields(DataOptions)}
    defaults = {field.name: field.default for field in dataclasses.fields(analysis.config)}
    if budget.vfm and "vfm" in defaults:
        values["vfm"] = budget.vfm if isinstance(defaults["vfm"], tuple) else budget.vfm[0]
    if "source" in defaults:
        values["source"] = budget.source or source
    return analysis.config(**values)


if __name__ == "__main__":
    command(main)
