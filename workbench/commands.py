"""The command `viral`: every command of the workbench under one name, from any folder.

viral demo
viral train shapes_viral --seed 1 --output_dir runs/viral-s1
viral sweep shapes_seeds --output_dir runs/seeds
viral analyze cknna --model runs/baseline runs/viral --vfm dinov2-small --limit 200
viral app --runs runs
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from workbench.errors import ConfigError, UnknownNameError

USAGE = "usage: viral COMMAND [options]; viral COMMAND --help shows the options, viral COMMAND --debug a traceback"


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        module: `python -m MODULE` is the same command.
        options: module and name of the dataclass of its options; "" for `analyze`, where each analysis has its own.
        about: what it does, in a line.
        first: what its first word names: a recipe, a sweep, an analysis, or "" for nothing.
    """

    module: str
    options: str
    about: str
    first: str = ""


COMMANDS: Mapping[str, Command] = {
    "demo": Command(
        "workbench.demo",
        "workbench.demo:Config",
        "train a baseline and a VIRAL model, run every analysis of both, and serve the dashboard",
    ),
    "train": Command(
        "trainer", "trainer.recipe:Recipe", "train one model: viral train RECIPE [--section.key value ...]", "recipe"
    ),
    "sweep": Command(
        "trainer.sweep",
        "trainer.sweep.spec:Sweep",
        "train several variants over several seeds, and compare them: viral sweep SWEEP",
        "sweep",
    ),
    "analyze": Command(
        "analyses", "", "run an analysis: viral analyze NAME --model A B; without a name, list them", "analysis"
    ),
    "report": Command("analyses.all", "analyses.all.__main__:Budget", "run all analyses into one HTML file"),
    "claims": Command(
        "analyses.claims", "analyses.claims.__main__:Options", "the claims ledger, with the verdicts of stored runs"
    ),
    "summary": Command("workbench.summary", "workbench.summary:Config", "two trained models in three sentences"),
    "app": Command(
        "workbench.dashboard", "workbench.dashboard.__main__:Config", "serve the dashboard: viral app --runs runs"
    ),
    "card": Command("trainer.card", "trainer.card:Card", "the model card of a training, and its upload"),
    "convert": Command(
        "workbench.convert",
        "workbench.convert.__main__:ConvertConfig",
        "original LLaVA-1.5 and VIRAL checkpoints as transformers folders",
    ),
    "vfm": Command("workbench.vfm", "workbench.vfm.__main__:Config", "the catalogue of vision foundation models"),
    "path": Command(
        "workbench.paths",
        "workbench.paths:Config",
        "where recipes, sweeps and launch files of the package are: viral path [NAME]",
    ),
    "completion": Command(
        "workbench.completion",
        "workbench.completion:Config",
        "what a shell needs to complete `viral`: viral completion bash",
    ),
}


def main(argv: Sequence[str]) -> None:
    """Run `viral ARGV`.

    Raises:
        UnknownNameError: no such command.
    """
    if not argv:
        raise ConfigError(f"no command given: expected viral {'|'.join(COMMANDS)}")
    if argv[0] in ("--help", "-h"):
        table = "".join(f"  {name:<12}{command.about}\n" for name, command in COMMANDS.items())
        sys.stdout.write(f"{USAGE}\n\n{table}\n  {'--version':<12}version and commit\n")
        return
    if argv[0] == "--version":
        sys.stdout.write(f"{version()}\n")
        return
    if argv[0] not in COMMANDS:
        raise UnknownNameError("command", argv[0], [*COMMANDS, "--help", "--version"])
    debug = ["--debug"] if "--debug" in sys.argv else []  # which `command` has taken out of ours
    sys.argv[1:] = [*argv[1:], *debug]
    runpy.run_module(COMMANDS[argv[0]].module, run_name="__main__", alter_sys=True)


def version() -> str:
    """Name and version of this package, and the commit where it lies in a checkout."""
    from workbench.runs import PACKAGE, environment

    record = environment([])
    packages = record["packages"]
    assert isinstance(packages, dict)
    changed = ", with changes that are not committed" if record["dirty"] else ""
    return f"{PACKAGE} {packages[PACKAGE]}" + (f" (commit {str(record['git'])[:12]}{changed})" if record["git"] else "")
