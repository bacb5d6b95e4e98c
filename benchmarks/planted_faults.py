"""Test the tests: plant one small fault in each of some randomly drawn lines and run the tests of its module.

python -m benchmarks.planted_faults --seed 0 --count 40       # tests the committed code, one to ten minutes per fault;
                                                              # an interrupted run continues
python -m benchmarks.planted_faults --seed 1 --count 6 --output_dir /tmp/faults --areas metrics stats

Lines are drawn from six areas in equal shares, and with equal probability within an area, from all lines on which a
fault can be planted (see `faults_in`; not in messages, log lines, annotations and docstrings). A fault is caught if a
test of its module fails that passes without the fault. If no test fails, the fault survived: the table names the line,
and a person writes whether the fault changes a number (`verdict` in the JSON lines).
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
AREAS: dict[str, tuple[str, ...]] = {
    "capture": ("workbench/capture/*.py", "workbench/lens.py", "workbench/spatial/*.py"),
    "data": ("workbench/data/*.py",),
    "metrics": ("workbench/metrics/*.py",),
    "stats": ("workbench/stats.py", "workbench/scoring/*.py"),
    "analyses": ("analyses/*.py",),
    "trainer": ("trainer/*.py", "trainer/*/*.py"),
}
# more tests of a file or of a folder's files; run after the tests of the same name and before those that import it
TESTS: dict[str, tuple[str, ...]] = {
    "workbench/capture/": ("families", "attention", "knockout", "mllm"),
    "workbench/metrics/": ("metrics",),
    "workbench/data/": ("rows", "identity", "images", "conversations", "photos", "analyses"),
    "workbench/stats.py": ("stats", "metrics", "linear_probe"),
    "workbench/scoring/": ("options", "answers", "permutation", "knockout"),
    "analyses/attention/": ("attention", "attention_positions"),
    "analyses/cknna/": ("cknna", "analyses"),
    "analyses/tokens/": ("tokens",),
    "trainer/": ("trainer", "student"),
}
ANOTHER = ("workbench/metrics/alignment.py",)  # files whose namesake among the tests is for another module
# tests of whole commands, browsers and several ranks, which take minutes each
NOT_RUN = ("processes", "deepspeed", "resume", "docs", "dashboard", "jobs", "sweep", "report")
SLOW = (
    "runs_folder",
    "command",
    "browser",
    "bitwise",
)  # tests with one of these words in their name or fixtures run last
SILENT = ("log", "logger", "warnings", "print", "progress", "tqdm")


@dataclass(frozen=True)
class Fault:
    """One replacement in a file: the bytes from `start` to `end` become `new`."""

    file: str
    line: int
    kind: str
    start: int
    end: int
    new: str


# --- faults ---------------------------------------------------------------------------------------

COMPARED = {
    "<": "<=",
    "<=": "<",
    ">": ">=",
    ">=": ">",
    "==": "!=",
    "!=": "==",
    "in": "not in",
    "not in": "in",
    "is": "is not",
    "is not": "is",
}
COMPUTED = {"+": "-", "-": "+", "*": "/", "/": "*", "//": "*", "**": "*", "&": "|", "|": "&"}
PAIRS = [
    "mean sum",
    "max min",
    "argmax argmin",
    "any all",
    "floor ceil",
    "amax amin",
    "maximum minimum",
    "std var",
    "zeros ones",
    "append extend",
    "abs exp",
]
CALLED = {a: b for pair in PAIRS for a, b in (pair.split(), reversed(pair.split()))}
CHOSEN = {"arguments exchanged": 0.3}  # share that is used; most of them stop the program at once
TEXTS = ast.Constant | ast.JoinedStr


def faults_in(text: str, file: str) -> list[Fault]:
    """Return all faults that can be planted in a file, in the order of its lines."""
    tree, faults = ast.parse(text), []
    starts = [0]
    for line in text.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    raw = text.encode()

    def at(node: ast.AST, end: bool = False) -> int:
        row, column = (node.end_lineno, node.end_col_offset) if end else (node.lineno, node.col_offset)  # type: ignore[attr-defined]
        return starts[row - 1] + column

    def source(node: ast.AST) -> str:
        return raw[at(node) : at(node, end=True)].decode()

    for node in _numeric(tree):
        for kind, start, end, new in _replacements(node, at, source, raw):
            faults.append(Fault(file, raw[:start].count(b"\n") + 1, kind, start, end, new))
    return sorted(set(faults), key=lambda fault: (fault.start, fault.kind, fault.new))


def _numeric(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes that can change a number.

    Annotations, messages, errors, log lines, decorators and imports are left out.
    """
    if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom):
        return
    call = node.value if isinstance(node, ast.Expr) else node
    if isinstance(call, ast.Call) and any(name in ast.unparse(call.func).split(".") for name in SILENT):
        return
    yield node
    skipped = {"annotation", "returns", "decorator_list", "type_params"}
    for name, value in ast.iter_fields(node):
        if name not in skipped:
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from _numeric(child)


def _replacements(node: ast.AST, at, source, raw: bytes) -> Iterator[tuple[str, int, int, str]]:  # type: ignore[no-untyped-def]
    """Yield (kind, start, end, new text) for one node."""

    def between(kind: str, left: ast.AST, right: ast.AST, table: dict[str, str]) -> Iterator[tuple[str, int, int, str]]:
        start, end = at(left, end=True), at(right)
        text = raw[start:end].decode()
        operator = re.search(r"not in|is not|\bin\b|\bis\b|[<>=!]=|\*\*|//|[-+*/<>&|]", text)
        if operator and operator.group() in table:
            yield kind, start + operator.start(), start + operator.end(), table[operator.group()]

    if isinstance(node, ast.Compare):
        for left, right in zip([node.left, *node.comparators], node.comparators, strict=False):
            yield from between("comparison", left, right, COMPARED)
    elif (
        isinstance(node, ast.BinOp)
        and not isinstance(node.left, TEXTS | ast.List | ast.Tuple)
        and not isinstance(node.right, ast.JoinedStr | ast.List)
    ):
        yield from between("operator", node.left, node.right, COMPUTED)
    elif isinstance(node, ast.BoolOp):
        old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        start, end = at(node.values[0], end=True), at(node.values[1])
        word = re.search(rf"\b{old}\b", raw[start:end].decode())
        if word:
            yield "and / or", start + word.start(), start + word.end(), new
    elif isinstance(node, ast.UnaryOp) and not isinstance(node.operand, ast.Constant):
        yield "negation dropped", at(node), at(node, end=True), f"({source(node.operand)})"
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
        value: Any = node.value
        changed: list[float]
        if isinstance(value, bool):
            changed = [not value]
        elif isinstance(value, int):
            changed = [value + 1, value - 1]
        else:
            changed = [value * 2 or 0.5]
        yield from (
            ("constant", at(node), at(node, end=True), repr(new) if repr(new)[0] != "-" else f"({new!r})")
            for new in changed
        )
    elif isinstance(node, ast.IfExp):
        yield (
            "branches exchanged",
            at(node),
            at(node, end=True),
            f"({source(node.orelse)} if {source(node.test)} else {source(node.body)})",
        )
    elif isinstance(node, ast.If | ast.While):
        yield "condition negated", at(node.test), at(node.test, end=True), f"not ({source(node.test)})"
    elif isinstance(node, ast.AugAssign) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        yield "statement dropped", at(node), at(node, end=True), "pass"
    if isinstance(node, ast.Call):
        plain = [part for part in node.args if not isinstance(part, ast.Starred)]
        if len(plain) == len(node.args) > 1 and ast.dump(plain[0]) != ast.dump(plain[1]):
            first, second = node.args[:2]
            yield "arguments exchanged", at(first), at(second, end=True), f"{source(second)}, {source(first)}"
        name = ""
        if isinstance(node.func, ast.Attribute):
            name = node.func.attr
        elif isinstance(node.func, ast.Name):
            name = node.func.id
        if name in CALLED:
            end = at(node.func, end=True)
            yield "another function", end - len(name), end, CALLED[name]
        for keyword in node.keywords:
            if keyword.arg in ("dim", "axis"):
                new = "0" if source(keyword.value) in ("1", "-1") else "-1"
                yield "another dim", at(keyword.value), at(keyword.value, end=True), new


def drawn(seed: int, count: int, areas: list[str]) -> list[tuple[str, Fault]]:
    """Draw `count` lines, in turn from each area, and one fault for each line.

    The draw is the same for the same commit, seed and areas.
    """
    rng, pools = random.Random(seed), {}
    for area in areas:
        files = sorted(
            file
            for pattern in AREAS[area]
            for file in ROOT.glob(pattern)
            if file.name not in ("__init__.py", "__main__.py")
        )
        lines: dict[tuple[str, int], list[Fault]] = {}
        for file in files:
            for fault in faults_in(file.read_text(), str(file.relative_to(ROOT))):
                lines.setdefault((fault.file, fault.line), []).append(fault)
        pools[area] = rng.sample(list(lines.values()), len(lines))
    chosen = []
    for number in range(count):
        area = areas[number % len(areas)]
        while True:
            fault = rng.choice(pools[area].pop(0))
            if rng.random() < CHOSEN.get(fault.kind, 1.0) and _valid(fault):
                break
        chosen.append((area, fault))
    return chosen


def _valid(fault: Fault) -> bool:
    """Return whether the file is still valid Python with the fault in it."""
    raw = (ROOT / fault.file).read_bytes()
    try:
        ast.parse(raw[: fault.start] + fault.new.encode() + raw[fault.end :])
    except SyntaxError:
        return False
    return True


# --- tests ----------------------------------------------------------------------------------------


def tests_of(file: str) -> list[str]:
    """Return the test files of a module: the one of the same name, those of `TESTS`, then those that import it."""
    module = file.removesuffix(".py").replace("/", ".")
    package, _, name = module.rpartition(".")
    imported = re.compile(
        rf"(from {re.escape(module)} import|import {re.escape(module)}\b|from {re.escape(package)} import"
        rf" [^\n]*\b{name}\b)"
    )
    stems = [] if file in ANOTHER else [name]
    for key, more in TESTS.items():
        if file == key or (key[-1] == "/" and file.startswith(key)):
            stems += more
    tests = {path.stem.removeprefix("test_"): path for path in sorted(ROOT.glob("tests/**/test_*.py"))}
    named = [tests[stem] for stem in stems if stem in tests]
    importing = [path for path in tests.values() if imported.search(path.read_text())]
    chosen = [str(path.relative_to(ROOT)) for path in dict.fromkeys([*named, *importing])]
    return [test for test in chosen if not _left_out(test, name)]


def _left_out(test: str, name: str) -> bool:
    return any(test.endswith(f"{stem}.py") for stem in NOT_RUN if stem != name)


class _FastFirst:
    """A pytest plugin that runs fast tests first and writes the name of the first failed test to a file."""

    def __init__(self, failed: Path) -> None:
        self.failed = failed

    def pytest_collection_modifyitems(self, items: list) -> None:  # type: ignore[type-arg]
        items.sort(key=lambda item: any(word in " ".join([item.name, *item.fixturenames]) for word in SLOW))

    def pytest_runtest_logreport(self, report) -> None:  # type: ignore[no-untyped-def]
        if report.failed and not self.failed.exists():
            self.failed.write_text(report.nodeid)

    def pytest_collectreport(self, report) -> None:  # type: ignore[no-untyped-def]
        if report.failed and not self.failed.exists():
            self.failed.write_text(f"collection of {report.nodeid}")


def tested(folder: Path, tests: list[str], work: Path, timeout: float) -> tuple[str, str]:
    """Run tests of the copy in `folder` until one fails.

    The tests run in a fork of this process, which has imported the large libraries and nothing of the project.

    Returns:
        "passed", "failed", "timeout" or "nothing run", and the name of the failed test or the reason.
    """
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    failed = work / "failed"
    child = os.fork()
    if child == 0:
        os.setsid()
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        for name in [name for name in sys.modules if name.split(".")[0] in ("benchmarks", "tests")]:
            del sys.modules[name]
        with (work / "log").open("w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            sys.stdout = sys.stderr = log
            import pytest

            options = [
                "-x",
                "-q",
                "--no-header",
                "-p",
                "no:cacheprovider",
                "-p",
                "no:xdist",
                f"--basetemp={work / 'tmp'}",
            ]
            code = int(pytest.main([*options, *tests], plugins=[_FastFirst(failed)]))
        os._exit(code)
    ends, status = time.monotonic() + timeout, None
    while status is None and time.monotonic() < ends:
        time.sleep(0.2)
        ended, code = os.waitpid(child, os.WNOHANG)
        status = os.waitstatus_to_exitcode(code) if ended else None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # and the processes that the tests started
    if status is None:
        os.waitpid(child, 0)
        return "timeout", ""
    if failed.exists():
        return "failed", failed.read_text()
    return ("passed", "") if status == 0 else ("nothing run", (work / "log").read_text()[-300:])


def plant(fault: Fault, folder: Path) -> str:
    """Write a fault into the copy in `folder` and return the line without and with it, one per line."""
    file = folder / fault.file
    old = file.read_bytes()
    new = old[: fault.start] + fault.new.encode() + old[fault.end :]
    file.write_bytes(new)
    before, after = (text.decode().splitlines()[fault.line - 1].strip() for text in (old, new))
    return f"{before}\n{after}"


# --- the run --------------------------------------------------------------------------------------


def cache(folder: Path) -> None:
    """Make a separate cache for the copies with faults, with links to the weights and data that are available."""
    real = Path(os.environ.get("VIRAL_CACHE", Path.home() / ".cache" / "viral-workbench"))
    for part in ("weights", "data", "datasets"):
        for file in (real / part).rglob("*"):
            if file.is_file():
                (link := folder / part / file.relative_to(real / part)).parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(file.resolve())
    os.environ["VIRAL_CACHE"] = str(folder)


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


def preload() -> None:
    """Import large libraries (nothing of the project) once, for all forks."""
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    sys.dont_write_bytecode = True
    import pandas  # noqa: F401
    import plotly.graph_objects  # noqa: F401
    import pytest  # noqa: F401
    import scipy.stats  # noqa: F401
    import sklearn.linear_model  # noqa: F401
    import torch
    import torchvision  # noqa: F401
    import transformers

    torch.set_num_threads(1)
    # these are loaded on first use
    for name in ("AutoModelForImageTextToText", "AutoProcessor", "Trainer"):
        getattr(transformers, name)


def write_table(records: Path) -> None:
    """Write the Markdown page next to the JSON lines: counts, and every fault that no test caught."""
    rows = sorted((json.loads(line) for line in records.read_text().splitlines()), key=lambda record: record["number"])
    if not rows:
        return
    seed, commit = rows[0]["seed"], rows[0]["commit"]
    outcomes = ("caught", "survived", "timeout", "not runnable")
    text = ["# Planted faults", ""]
    text += [
        (
            f"`python -m benchmarks.planted_faults --seed {seed} --count {len(rows)}` on commit `{commit[:12]}`: one"
            f" fault in each of {len(rows)} drawn lines."
        ),
        "",
    ]
    text += [
        (
            "`timeout`: no test had failed when the time limit was reached; `not runnable`: a test failed, but it could"
            " not be shown to pass without the fault."
        ),
        "",
    ]
    text += ["| area | " + " | ".join(outcomes) + " |", "|---|" + "---|" * len(outcomes)]
    for area in [*dict.fromkeys(record["area"] for record in rows), "all"]:
        counts = [
            sum(record["outcome"] == outcome and area in (record["area"], "all") for record in rows)
            for outcome in outcomes
        ]
        text.append(f"| {area} | " + " | ".join(map(str, counts)) + " |")
    text += [
        "",
        "## Not caught",
        "",
        "| line | fault | before | after | outcome | does it change a number? |",
        "|---|---|---|---|---|---|",
    ]
    for record in rows:
        if record["outcome"] != "caught":
            before, after = (record[key].replace("|", "\\|") for key in ("before", "after"))
            where, verdict = f"{record['file']}:{record['line']}", record["verdict"] or "not yet judged"
            text.append(f"| `{where}` | {record['kind']} | `{before}` | `{after}` | {record['outcome']} | {verdict} |")
    text += ["", "## Caught", "", "| line | fault | after | first test that fails |", "|---|---|---|---|"]
    for record in rows:
        if record["outcome"] == "caught":
            after = record["after"].replace("|", "\\|")
            text.append(f"| `{record['file']}:{record['line']}` | {record['kind']} | `{after}` | `{record['by']}` |")
    records.with_suffix(".md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
