"""Measure what the dashboard costs and whether every number that it shows is the stored one.

    python -m benchmarks.dashboard --runs runs     # a folder of `make demo`; about 20 minutes on 2 cores
    python -m benchmarks.dashboard --runs runs --sessions 3 --clicks 10 --seeds 3 --stored 40 --checkpoints 5  # 1 min

1. A fresh server and one user: time, server CPU, memory and bytes of the first and of later visits of every page, and
   of single clicks.
2. Twenty users at once, each with 200 clicks: links to all pages, models exchanged, layers, filters. Each page's
   numbers are compared with the stored ones, which are read here with pandas.
3. A folder of 20 trainings of each variant, 100 checkpoints each, and 500 stored analyses: every page.

The time of a page is from the request to the end of its script, without a browser. Limits are for CPU seconds of the
server, which a busy machine does not change much. The exit code is 1 if a limit is passed or a number is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.dashboard.folders import Facts, enlarge, facts
from benchmarks.dashboard.session import Session, Shown
from workbench.errors import one_line

ROOT = Path(__file__).parents[2]
PAGES = ("home", "models", "layers", "examples", "evidence")
LIMITS = {
    "first Home, CPU s": 1.5,
    "Home, MB": 250.0,
    "click, CPU s": 0.3,
    "all users, MB": 2000.0,
    "wrong numbers": 0.0,
    "errors": 0.0,
}
VALUE = re.compile(r"(\S+) (-?\d+\.\d{3} \[-?\d+\.\d{3}, -?\d+\.\d{3}\])")


@contextmanager
def server(runs: Path) -> Iterator[tuple[int, psutil.Process]]:
    """Serve a runs folder; yield the port and the server's process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "streamlit", "run", "app.py", "--server.port", str(port), "--", "--runs", str(runs)]
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    process = subprocess.Popen(words, cwd=ROOT, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while socket.socket().connect_ex(("127.0.0.1", port)):
            if process.poll() is not None:
                raise SystemExit("error: the server ended before it answered")
            time.sleep(0.1)
        yield port, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


def memory(process: psutil.Process) -> float:
    """Return the resident memory of the server in MB."""
    return process.memory_info().rss / 1e6


def cpu(process: psutil.Process) -> float:
    """Return the CPU seconds of the server so far."""
    times = process.cpu_times()
    return times.user + times.system


# --- one user -------------------------------------------------------------------------------------


def one_user(runs: Path, names: list[str], clicks: int) -> dict[str, float]:
    """Print the cost of every page, and return what is limited."""
    query = f"b={names[0]}&m={names[1]}"
    limited: dict[str, float] = {}
    with server(runs) as (port, _), Session(port) as session:
        session.open("home", query)  # the very first visit also compiles the modules
    with server(runs) as (port, process), Session(port) as session:
        print(f"{'page':10}{'':8}{'s':>8}{'CPU s':>8}{'MB':>8}{'kB sent':>9}")
        for visit in ("first", "later"):
            for page in PAGES:
                shown, used = _costs(session, process, page, query)
                print(f"{page:10}{visit:8}{shown.seconds:8.2f}{used:8.2f}{memory(process):8.0f}{_kb(shown):9.0f}")
                if page == "home" and visit == "first":
                    limited |= {"first Home, CPU s": used, "Home, MB": memory(process)}
        layers, filters = [{"l": str(n % 6 + 1)} for n in range(clicks)], [_outcome(names, n) for n in range(clicks)]
        for page, changes in (("layers", layers), ("examples", [{"outcome": outcome} for outcome in filters])):
            session.open(page, query)
            before = cpu(process)
            seconds = [session.click(**change).seconds for change in changes]
            used = (cpu(process) - before) / clicks
            limited["click, CPU s"] = max(used, limited.get("click, CPU s", 0.0))
            print(
                f"a click on {page}: {used:.3f} CPU s; median {statistics.median(seconds):.3f} s,"
                f" largest {max(seconds):.3f} s"
            )
    return limited


def _costs(session: Session, process: psutil.Process, page: str, query: str) -> tuple[Shown, float]:
    before = cpu(process)
    shown = session.open(page, query)
    return shown, cpu(process) - before


def _kb(shown: Shown) -> float:
    return shown.received / 1000


def _outcome(names: list[str], number: int) -> str:
    return ("all questions", f"only {names[1]} right", f"only {names[0]} right")[number % 3]


# --- many users -----------------------------------------------------------------------------------


@dataclass
class Tally:
    """What the sessions of one user came to.

    Attributes:
        seconds, received: of each page.
        numbers: how many were compared with a stored one.
        wrong: those that differ.
        errors: errors that pages showed.
    """

    seconds: list[float] = field(default_factory=list)
    received: list[int] = field(default_factory=list)
    numbers: int = 0
    wrong: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def compare(self, what: str, shown: object, stored: object) -> None:
        """Count one comparison."""
        self.numbers += 1
        if shown != stored:
            self.wrong.append(f"{what}: shown is {shown}, stored is {stored}")


def user(port: int, stored: Facts, clicks: int, seed: int) -> Tally:
    """Click through the pages and check every number, as one of several users."""
    rng, tally = random.Random(seed), Tally()
    names = sorted(stored.accuracies)[:2]
    with Session(port) as session:
        page = ""
        for _ in range(clicks):
            try:
                if not page or rng.random() < 0.4:
                    page = rng.choice(PAGES[:4])
                    rng.shuffle(names)
                    outcome, layer = "all questions", None
                    shown = session.open(page, f"b={names[0]}&m={names[1]}&outcome=all")  # a choice is remembered
                elif page == "layers":
                    layer = rng.randint(1, 6)
                    shown = session.click(l=str(layer))
                elif page == "examples":
                    outcome = _outcome(names, rng.randrange(3))
                    shown = session.click(outcome=outcome)
                else:
                    rng.shuffle(names)
                    shown = session.open(page, f"b={names[0]}&m={names[1]}")
            except LookupError as error:
                tally.errors.append(f"{page}: {error}: {one_line(session.shown.text, 200)}")
                page = ""
                continue
            tally.seconds.append(shown.seconds)
            tally.received.append(shown.received)
            tally.errors += [f"{page}: {error}" for error in shown.errors]
            _check(tally, page, shown, stored, names, layer=layer, outcome=outcome)
    return tally


def _check(
    tally: Tally, page: str, shown: Shown, stored: Facts, names: list[str], *, layer: int | None, outcome: str
) -> None:
    first, second = names
    if page == "home":
        words = " → ".join(f"{100 * stored.accuracy(name):.1f}" for name in names)
        tally.compare("accuracies of Home", words in shown.text, True)
        only = [stored.only(second, first), stored.only(first, second)]
        sentence = f"{only[0]:,} only {second} right, {only[1]:,} only {first}"
        tally.compare("disagreement of Home", sentence in shown.text, True)
    elif page == "models":
        table = shown.tables[0].set_index("key")
        for name in names:
            tally.compare(
                f"accuracy of {name}", table.loc[name, ["accuracy", "low", "high"]].tolist(), stored.accuracies[name]
            )
    elif page == "layers":
        lines = re.findall(r"\bLayer (\d+): (.*)$", shown.text, re.MULTILINE)
        tally.compare("sentences of Layers", bool(lines), True)
        for number, line in lines:
            if layer is not None:
                tally.compare("layer of Layers", int(number), layer)
            for model, words in VALUE.findall(line):
                there = words in stored.layers[model].get(int(number), ())
                tally.compare(f"{words} of {model} at layer {number}", there, True)
    else:
        _check_examples(tally, shown, stored, names, outcome)


def _check_examples(tally: Tally, shown: Shown, stored: Facts, names: list[str], outcome: str) -> None:
    first, second = names
    counts, rows = shown.tables[:2]
    only = [stored.only(first, second), stored.only(second, first)]
    tally.compare("counts of Examples", [int(counts.iloc[0, 1]), int(counts.iloc[1, 0])], only)
    number = {f"only {first} right": only[0], f"only {second} right": only[1]}.get(outcome, len(stored.answers[first]))
    tally.compare("number of questions of Examples", f"{number:,} questions;" in shown.text, True)
    known = stored.questions(first, second)
    for row in rows.itertuples():
        place = (row.question, row.answer, row.given_first, row.given_second, row.p_first, row.p_second)
        tally.compare("row of Examples", known[place] > 0, True)


def many_users(runs: Path, stored: Facts, sessions: int, clicks: int) -> dict[str, float]:
    """Print what several users at once cost, and return what is limited."""
    with server(runs) as (port, process):
        before, began = cpu(process), time.perf_counter()
        with ThreadPoolExecutor(sessions) as pool:
            tallies = list(pool.map(lambda seed: user(port, stored, clicks, seed), range(sessions)))
        wall, used, used_memory = time.perf_counter() - began, cpu(process) - before, memory(process)
    seconds = sorted(s for tally in tallies for s in tally.seconds)
    sent = sum(sum(tally.received) for tally in tallies)
    numbers = sum(tally.numbers for tally in tallies)
    wrong = [line for tally in tallies for line in tally.wrong]
    errors = [line for tally in tallies for line in tally.errors]
    print(
        f"{sessions} users, {len(seconds)} pages in {wall:.0f} s: {used / len(seconds):.3f} CPU s and"
        f" {sent / len(seconds) / 1000:.0f} kB each; median {statistics.median(seconds):.2f} s,"
        f" 95 % below {seconds[int(0.95 * len(seconds))]:.2f} s; {used_memory:.0f} MB"
    )
    print(f"{numbers:,} numbers compared with the stored ones, {len(wrong)} wrong; {len(errors)} errors on pages")
    for line in [*dict.fromkeys(wrong), *dict.fromkeys(errors)][:10]:
        print(f"  {line}")
    return {"all users, MB": used_memory, "wrong numbers": len(wrong), "errors": len(errors)}


# --- many runs ------------------------------------------------------------------------------------


def many_runs(source: Path, *, seeds: int, stored: int, checkpoints: int) -> dict[str, float]:
    """Print what the pages of a large folder cost, and return what is limited."""
    errors = []
    with tempfile.TemporaryDirectory() as folder:
        enlarge(source, Path(folder), seeds=seeds, runs=stored, checkpoints=checkpoints)
        with server(Path(folder)) as (port, process), Session(port) as session:
            print(f"{seeds} seeds, {stored} stored analyses, {checkpoints} checkpoints each")
            for visit in ("first", "later"):
                for page in PAGES:
                    shown, used = _costs(session, process, page, "part=runs" if page == "evidence" else "")
                    errors += [f"{page}: {error}" for error in shown.errors]
                    print(f"{page:10}{visit:8}{shown.seconds:8.2f}{used:8.2f}{memory(process):8.0f}{_kb(shown):9.0f}")
    for line in errors:
        print(f"  {line}")
    return {"errors": len(errors)}


def main() -> None:
    """Measure all of it, print the limits, and store the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="a folder with two finished, analyzed models")
    parser.add_argument("--sessions", type=int, default=20, help="users at once")
    parser.add_argument("--clicks", type=int, default=200, help="clicks of each user")
    parser.add_argument("--seeds", type=int, default=20, help="trainings of each variant in the large folder")
    parser.add_argument("--stored", type=int, default=500, help="stored analyses of the large folder")
    parser.add_argument("--checkpoints", type=int, default=100, help="checkpoints of each training of it")
    parser.add_argument("--output", type=Path, help="a JSON file for what is limited")
    options = parser.parse_args()
    stored = facts(options.runs)
    names = sorted(stored.accuracies)[:2]
    if len(names) < 2:
        raise SystemExit(
            f"error: {options.runs} has {len(names)} finished models: expected 2, as `make demo` makes them"
        )
    measured = one_user(options.runs, names, min(options.clicks, 30))
    measured |= many_users(options.runs, stored, options.sessions, options.clicks)
    large = many_runs(options.runs, seeds=options.seeds, stored=options.stored, checkpoints=options.checkpoints)
    measured["errors"] += large["errors"]
    over = [name for name, limit in LIMITS.items() if measured[name] > limit]
    for name, limit in LIMITS.items():
        print(f"{name:20}{measured[name]:10.2f}   limit {limit:g}{'   OVER' if name in over else ''}")
    if options.output is not None:
        options.output.write_text(json.dumps(measured, indent=1) + "\n")
    sys.exit(1 if over else 0)


if __name__ == "__main__":
    main()
