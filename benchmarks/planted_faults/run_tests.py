"""Which tests are those of a module, and what they say about a copy of the project."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

from benchmarks.planted_faults.draw import ROOT

# more tests of a file or of a folder's files; run after the tests of the same name and before those that import it
TESTS: dict[str, tuple[str, ...]] = {
    "workbench/capture/": ("families", "attention", "knockout", "mllm"),
    "workbench/data/": ("rows", "identity", "images", "conversations", "photos", "analyses"),
    "workbench/stats.py": ("stats", "metrics", "linear_probe"),
    "workbench/scoring/": ("options", "answers", "permutation", "knockout"),
    "analyses/attention/": ("attention", "attention_positions"),
    "analyses/cknna/": ("cknna", "analyses"),
    "trainer/": ("trainer", "student"),
}
ANOTHER = ("workbench/metrics/alignment.py",)  # files whose namesake among the tests is for another module
# tests of whole commands, browsers and several ranks, which take minutes each; run only for their namesake
NOT_RUN = (
    "tests/analyses/test_report",
    "tests/benchmarks/",
    "tests/project/",
    "tests/trainer/sweep/",
    "tests/trainer/test_deepspeed",
    "tests/trainer/test_processes",
    "tests/trainer/test_student_processes",
    "tests/workbench/dashboard/",
)
# tests with one of these words in their name or fixtures run last
SLOW = ("runs_folder", "command", "browser", "bitwise")


def tests_of(file: str) -> list[str]:
    """Return the test files of a module, those that most probably notice a fault first.

    They are the tests with its name or that of its folder, those of `TESTS`, those that import it, and in a package of
    `workbench` all others of that package.
    """
    path = Path(file)
    module, package = ".".join(path.with_suffix("").parts), ".".join(path.parent.parts)
    imported = re.compile(
        rf"(from {re.escape(module)} import|import {re.escape(module)}\b|from {re.escape(package)} import"
        rf" [^\n]*\b{path.stem}\b)"
    )
    tests = [test.relative_to(ROOT) for test in sorted(ROOT.glob("tests/**/test_*.py"))]
    named = [*reversed(path.parent.parts)] if file in ANOTHER else [path.stem, *reversed(path.parent.parts)]
    chosen = [
        test for stem in named for test in tests if test.parts[1] == path.parts[0] and test.stem == f"test_{stem}"
    ]
    for key, stems in TESTS.items():
        if file == key or (key[-1] == "/" and file.startswith(key)):
            chosen += [test for stem in stems for test in tests if test.stem == f"test_{stem}"]
    chosen += [test for test in tests if imported.search((ROOT / test).read_text())]
    chosen += [test for test in tests if test.parent == "tests" / path.parent and len(path.parts) > 2]
    names = [str(test) for test in dict.fromkeys(chosen)]
    return [name for name in names if not name.startswith(NOT_RUN) or Path(name).stem == f"test_{path.stem}"]


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


def cache(folder: Path) -> None:
    """Make a separate cache for the copies with faults, with links to the weights and data that are available."""
    real = Path(os.environ.get("VIRAL_CACHE", Path.home() / ".cache" / "viral-workbench"))
    for part in ("weights", "data", "datasets"):
        for file in (real / part).rglob("*"):
            if file.is_file():
                (link := folder / part / file.relative_to(real / part)).parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(file.resolve())
    os.environ["VIRAL_CACHE"] = str(folder)
