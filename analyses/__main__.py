"""Print the table of analyses, or run one of them by its name.

python -m analyses
python -m analyses cknna --model runs/baseline runs/viral --limit 50
"""

from __future__ import annotations

import runpy
import sys

from workbench.analysis.discover import analysis_commands, analysis_names, load_analyses, load_analysis
from workbench.cli import command
from workbench.errors import UnknownNameError


def main(argv: list[str]) -> None:
    """Run the analysis that the first word names; without one, print every analysis and how to run it."""
    if argv and not argv[0].startswith("-"):
        _run(argv[0], argv[1:])
        return
    if argv and argv not in (["--help"], ["-h"]):
        raise UnknownNameError("option", argv[0], ["--help"], also="or the name of an analysis")
    for name, analysis in load_analyses().items():
        print(f"{name:<16} {analysis.title}")
    print("\npython -m analyses.NAME --model A B --help\npython -m analyses.all --model A B --report report.html")
    print("python -m analyses.claims --runs FOLDER    the claims ledger: the paper's claims judged by stored runs")


def _run(name: str, argv: list[str]) -> None:
    if name in analysis_commands():
        sys.argv[1:] = argv
        runpy.run_module(f"analyses.{name}", run_name="__main__", alter_sys=True)
        return
    if name not in analysis_names():
        raise UnknownNameError("analysis", name, [*analysis_names(), *analysis_commands()])
    from workbench.analysis.command import run

    run(load_analysis(name), argv)


if __name__ == "__main__":
    command(main)
