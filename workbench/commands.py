"""The command `viral`, which runs every command of the workbench from any folder.

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

USAGE = (
    "usage: viral COMMAND [options]; viral COMMAND --help lists the options, --debug shows the traceback of an error"
)


@dataclass(frozen=True)
class Command:
    """One command of `viral`.

    Attributes:
        module: `python -m MODULE` is the same command.
        options: the dataclass of its options as MODULE:NAME; "" for `analyze`, where each analysis has its own.
        about: what the command does, in one line.
        first: the kind of name that its first word is: recipe, sweep, analysis, or "" for none.
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
    "overview": Command(
        "workbench.overview",
        "workbench.overview.__main__:Options",
        "write the short report of two groups of models: viral overview RUNS",
    ),
    "claims": Command(
        "analyses.claims",
        "analyses.claims.__main__:Options",
        "print the claims ledger with the verdicts of stored runs",
    ),
    "summary": Command(
        "workbench.summary", "workbench.summary:Config", "compare two trained models in three sentences"
    ),
    "app": Command(
        "workbench.dashboard", "workbench.dashboard.__main__:Config", "serve the dashboard: viral app --runs runs"
    ),
    "card": Command("trainer.card", "trainer.card:Card", "write the model card of a training; upload it and the model"),
    "convert": Command(
        "workbench.convert",
        "workbench.convert.__main__:ConvertConfig",
        "convert original LLaVA-1.5 and VIRAL checkpoints to transformers folders",
    ),
    "vfm": Command("workbench.vfm", "workbench.vfm.__main__:Config", "list the vision foundation models"),
    "path": Command(
        "workbench.paths",
        "workbench.paths:Config",
        "print the paths of the package's recipes, sweeps and launch files: viral path [NAME]",
    ),
    "completion": Command(
        "workbench.completion",
        "workbench.completion:Config",
        "print the completion script for a shell: viral completion bash",
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
    debug = ["--debug"] if "--debug" in sys.argv else []  # `workbench.cli.command` removed it from `argv`
    sys.argv[1:] = [*argv[1:], *debug]
    runpy.run_module(COMMANDS[argv[0]].module, run_name="__main__", alter_sys=True)


def version() -> str:
    """Return the name and version of this package, and in a checkout the commit."""
    from workbench.runs import PACKAGE, environment

    record = environment([])
    packages = record["packages"]
    assert isinstance(packages, dict)
    changes = ", with uncommitted changes" if record["dirty"] else ""
    commit = f" (commit {str(record['git'])[:12]}{changes})" if record["git"] else ""
    return f"{PACKAGE} {packages[PACKAGE]}{commit}"
