"""The table of analyses.

python -m analyses
"""

from __future__ import annotations

from importlib import import_module

from workbench.analysis.discover import analysis_files
from workbench.cli import command


def main(argv: list[str]) -> None:
    """Print the name and title of every analysis in this package, and how to run one or all of them."""
    for name in analysis_files():
        print(f"{name:<16} {import_module(f'analyses.{name}').ANALYSIS.title}")
    print("\npython -m analyses.NAME --model A B --help\npython -m analyses.all --model A B --report report.html")
    print("python -m analyses.claims --runs FOLDER    the claims ledger: what the paper says, and the verdict of stored runs")


if __name__ == "__main__":
    command(main)
