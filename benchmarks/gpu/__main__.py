"""The command line: see benchmarks/gpu/__init__.py."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import benchmarks.gpu
from benchmarks.gpu.harness import GROUPS, PARTS, chosen, read_results, run_parts
from benchmarks.gpu.report import write_report
from workbench.cli import command
from workbench.errors import ConfigError

RESULTS = Path("docs/results/gpu.json")


def main(argv: list[str]) -> None:
    """Run parts, list them, or write the report."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=benchmarks.gpu.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--part",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"parts, or groups of them ({', '.join(GROUPS)}); all by default",
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="time limit of the whole command")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FILE.json", help="results are appended to it")
    parser.add_argument("--toy", action="store_true", help="the toy size on a GPU too")
    parser.add_argument("--list", action="store_true", help="say what the parts are")
    parser.add_argument(
        "--report",
        action="store_true",
        help="write the report of the results file beside it, after running what --part names, if anything",
    )
    asked = parser.parse_args(argv)
    if not asked.minutes > 0:
        raise ConfigError(f"minutes is {asked.minutes}: expected more than 0")
    if asked.output.suffix != ".json":
        raise ConfigError(f"output is {asked.output}: expected the name of a JSON file, such as {RESULTS}")
    parts = chosen(asked.part)
    if asked.list:
        for part in PARTS:
            print(f"{part.group:6} {part.name:12} {part.minutes:2.0f} min  {part.title}")
        return
    read_results(asked.output)
    passed = True
    if asked.part or not asked.report:
        asked.output.parent.mkdir(parents=True, exist_ok=True)
        passed = run_parts(parts, asked.output, minutes=asked.minutes, toy=asked.toy)
    if asked.report:
        print(write_report(asked.output))
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    command(main)
