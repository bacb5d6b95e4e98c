"""Test the tests: plant one small fault in each of some randomly drawn lines and run the tests of its module.

python -m benchmarks.planted_faults --seed 0 --count 40       # tests the committed code, one to ten minutes per fault;
                                                              # an interrupted run continues
python -m benchmarks.planted_faults --seed 1 --count 6 --output_dir /tmp/faults --areas metrics stats

Lines are drawn from eight areas in equal shares, and with equal probability within an area, from all lines on which a
fault can be planted (see `faults_in`; not in messages, log lines, annotations and docstrings). A fault is caught if a
test of its module fails that passes without the fault. If no test fails, the fault survived: the table names the line,
and a person writes whether the fault changes a number (`verdict` in the JSON lines).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from benchmarks.planted_faults.draw import AREAS, ROOT, drawn
from benchmarks.planted_faults.faults import plant
from benchmarks.planted_faults.page import write_table
from benchmarks.planted_faults.run_tests import cache, preload, tested, tests_of


def main() -> None:
    """Plant each fault, run its tests, and append the outcome to the JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--count", type=int, default=40, help="number of faults")
    parser.add_argument("--areas", nargs="+", choices=list(AREAS), default=list(AREAS), help="all by default")
    parser.add_argument("--timeout", type=float, default=900, help="time limit for the tests of one fault, in seconds")
    parser.add_argument(
        "--share", default="1/1", help="1/2 and 2/2 split the faults between two processes with the same folder"
    )
    parser.add_argument("--output_dir", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("--list", action="store_true", help="print the drawn faults and exit")
    parser.add_argument("--table", action="store_true", help="write the table of the existing records and exit")
    options = parser.parse_args()
    records = options.output_dir / "planted_faults.jsonl"
    if options.table:
        return write_table(records)
    faults = drawn(options.seed, options.count, options.areas)
    if options.list:
        for number, (area, fault) in enumerate(faults):
            print(
                number, area, f"{fault.file}:{fault.line}", fault.kind, repr(fault.new), " ".join(tests_of(fault.file))
            )
        return None
    if subprocess.run(
        ["git", "diff", "--quiet", "HEAD", "--", "workbench", "analyses", "trainer", "tests"], cwd=ROOT, check=False
    ).returncode:
        raise SystemExit(
            "error: the checkout has uncommitted changes: commit or stash them first, because faults are planted in"
            " copies of the last commit"
        )
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    known = [json.loads(line) for line in records.read_text().splitlines()] if records.exists() else []
    if any((record["commit"], record["seed"]) != (commit, options.seed) for record in known):
        raise SystemExit(
            f"error: {records} is from another commit or seed: use an empty --output_dir, or the same commit and seed"
        )
    part, parts = map(int, options.share.split("/"))
    preload()
    with tempfile.TemporaryDirectory(prefix="planted-") as temporary:
        folder, clean = Path(temporary) / "fault", Path(temporary) / "clean"
        for copy in (folder, clean):
            subprocess.run(["git", "clone", "-q", "--shared", str(ROOT), str(copy)], check=True)
        cache(Path(temporary) / "cache")
        without_fault: dict[str, str] = {}
        for number, (area, fault) in enumerate(faults):
            if number in {record["number"] for record in known} or number % parts != part - 1:
                continue
            begun, tests = time.monotonic(), tests_of(fault.file)
            lines = plant(fault, folder)
            outcome, failed = (
                tested(folder, tests, Path(temporary) / "work", options.timeout)
                if tests
                else ("nothing run", "no tests of this module")
            )
            subprocess.run(["git", "checkout", "-q", "."], cwd=folder, check=True)
            if outcome == "failed" and not failed.startswith("collection") and failed not in without_fault:
                without_fault[failed] = tested(clean, [failed], Path(temporary) / "work", options.timeout)[0]
            if outcome == "failed" and without_fault.get(failed, "passed") != "passed":
                outcome, failed = "nothing run", f"{failed}; without the fault: {without_fault[failed]}"
            name = {"failed": "caught", "passed": "survived", "timeout": "timeout"}.get(outcome, "not runnable")
            before, after = lines.split("\n")
            record = {
                "number": number,
                "area": area,
                **asdict(fault),
                "before": before,
                "after": after,
                "outcome": name,
                "by": failed,
            }
            record |= {
                "tests": tests,
                "seconds": round(time.monotonic() - begun),
                "commit": commit,
                "seed": options.seed,
                "verdict": "",
            }
            with records.open("a") as stream:
                stream.write(json.dumps(record) + "\n")
            print(
                f"{number:3} {name:12} {fault.file}:{fault.line} {fault.kind}: {after}  [{failed},"
                f" {record['seconds']} s]",
                flush=True,
            )
    return write_table(records)


if __name__ == "__main__":
    main()
