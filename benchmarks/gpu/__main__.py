"""The command line of the GPU benchmark; benchmarks/gpu/__init__.py describes it."""

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
        help=f"names of parts or groups ({', '.join(GROUPS)}); all by default",
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="time limit of the whole command (60)")
    parser.add_argument(
        "--output",
        type=Path,
        default=RESULTS,
        metavar="FILE.json",
        help=f"results are appended to this file ({RESULTS})",
    )
    parser.add_argument("--toy", action="store_true", help="use the toy size on a GPU, too")
    parser.add_argument("--list", action="store_true", help="list the parts and exit")
    parser.add_argument(
        "--report",
        action="store_true",
        help="write the report next to the results file, after running the parts named by --part, if any",
    )
    options = parser.parse_args(argv)
    if not options.minutes > 0:
        raise ConfigError(f"minutes is {options.minutes}: expected a time limit above 0")
    if options.output.suffix != ".json":
        raise ConfigError(f"output is {options.output}: expected the name of a JSON file, such as {RESULTS}")
    parts = chosen(options.part)
    if options.list:
        for part in PARTS:
            print(f"{part.group:6} {part.name:12} {part.minutes:2.0f} min  {part.title}")
        return
    read_results(options.output)
    passed = True
    if options.part or not options.report:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        passed = run_parts(parts, options.output, minutes=options.minutes, toy=options.toy)
    if options.report:
        print(write_report(options.output))
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    command(main)
