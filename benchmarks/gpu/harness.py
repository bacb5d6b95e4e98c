"""Run the parts, each in its own process with a time limit, and append every result to a JSON file at once."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from benchmarks.gpu import MISSING
from workbench.errors import ConfigError, RunError, UnknownNameError
from workbench.files import atomic_file

# checking for a GPU must not initialize CUDA, because forked processes could not use it then
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
NEEDED = ("torch", "transformers", "timm", "accelerate", "peft", "pandas")
VERSIONS = ("torch", "transformers", "timm", "accelerate", "peft", "nnsight")
MARGIN = 5.0  # seconds by which a part should end before its process is killed
T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """One subject of the benchmark.

    Attributes:
        group: `right` compares numbers, `cost` measures time and memory, `clean` measures what the GPU waits for.
        home: MODULE:FUNCTION in benchmarks.gpu; the function takes a `Bench`.
        minutes: time limit.
    """

    name: str
    group: Literal["right", "cost", "clean"]
    home: str
    minutes: float
    title: str

    def load(self) -> Callable[[Bench], None]:
        """Import and return the function that runs the part."""
        module, function = self.home.split(":")
        return getattr(import_module(f"benchmarks.gpu.{module}"), function)  # type: ignore[no-any-return]


PARTS = (
    Part(
        "reading",
        "right",
        "right_reading:run",
        3,
        "hidden states, attention rows, edits, knockout, option scores and answers",
    ),
    Part("metrics", "right", "right_metrics:run", 2, "CKNNA and its null, and the other metrics"),
    Part(
        "losses",
        "right",
        "right_losses:run",
        3,
        "alignment losses and gradients, the packed mask, LoRA on a frozen bfloat16 base",
    ),
    Part("features", "right", "right_features:run", 2, "VFM features, cached against computed"),
    Part(
        "training",
        "right",
        "right_training:run",
        5,
        "a few steps of the trainer against the CPU's, and resuming to the bit",
    ),
    Part("step", "cost", "cost_step:run", 4, "training step with LoRA: baseline against VIRAL"),
    Part(
        "memory",
        "cost",
        "cost_step:memory",
        6,
        "peak memory of training with LoRA by micro-batch, against the dry run's estimate",
    ),
    Part("capture", "cost", "cost_reading:capture", 3, "reading all layers and attention rows at 2880 visual tokens"),
    Part("permutation", "cost", "cost_reading:permutation", 4, "100 questions with permuted tokens"),
    Part("answers", "cost", "cost_reading:answers", 3, "tokens per second of greedy answers"),
    Part("cknna", "cost", "cost_metrics:run", 6, "CKNNA of many layers, and of up to a million rows"),
    Part("profile", "clean", "profile:run", 4, "host copies and synchronizations of a training step"),
)
GROUPS = ("right", "cost", "clean")


def chosen(names: Sequence[str]) -> list[Part]:
    """Return the parts for names of parts or groups, or all parts if there are no names.

    Raises:
        UnknownNameError: a name is neither a part nor a group.
    """
    known = [*GROUPS, *(part.name for part in PARTS)]
    for name in names:
        if name not in known:
            raise UnknownNameError("part", name, known)
    return [part for part in PARTS if not names or part.name in names or part.group in names]


# --- the file -------------------------------------------------------------------------------------


def read_results(file: Path) -> list[dict[str, Any]]:
    """Return the entries of a results file, or none if the file does not exist.

    Raises:
        RunError: the file is not a results file.
    """
    if not file.exists():
        return []
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(
            f"results file {file} cannot be read ({' '.join(str(error).split())[:100]}): expected a JSON list; use"
            " another name"
        ) from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and "part" in entry for entry in entries):
        raise RunError(f"{file} is not a results file: expected a JSON list of results; use another name")
    return entries


def append(file: Path, entry: Mapping[str, Any]) -> None:
    """Append one result; the file is complete at any time."""
    with atomic_file(file) as partial:
        partial.write_text(json.dumps([*read_results(file), dict(entry)], indent=1), encoding="utf-8")


def line(entry: Mapping[str, Any]) -> str:
    """Return one result as a line for the terminal."""
    figures = "  ".join(f"{name} {number(value)}" for name, value in entry["figures"].items())
    verdict = {True: "ok", False: "FAILED", None: ""}[entry["passed"]]
    limit = "" if entry["tolerance"] is None else f"  ({number(entry['tolerance'])})"
    return f"{entry['part']:12} {entry['what']:52} {entry['setting']:18} {figures}{limit}  {verdict}".rstrip()


def number(value: object) -> str:
    """Return a figure in readable form."""
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    return f"{value:.2e}" if value and (abs(value) < 1e-3 or abs(value) >= 1e6) else f"{value:.4g}"


# --- what a part is given -------------------------------------------------------------------------


class Bench:
    """The setting of a part: device, size, time limit, and the file for its results.

    Attributes:
        device: "cuda" or "cpu".
        toy: use sizes that a CPU computes in seconds.
        folder: an empty folder for this part alone.
    """

    def __init__(self, part: Part, file: Path, common: Mapping[str, Any], seconds: float, folder: Path) -> None:
        self.part, self.file, self.common, self.folder = part, file, common, folder
        self.device, self.toy = str(common["device"]), common["size"] == "toy"
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Return the seconds until the part must end."""
        return self._end - time.monotonic()

    def time_for(self, what: str, seconds: float, setting: str = "") -> bool:
        """Return whether this many seconds are left; if not, record that `what` was not run."""
        if self.left() >= seconds:
            return True
        self.add(what, {"not run": f"{self.left():.0f} s left, {seconds:.0f} s needed"}, setting=setting)
        return False

    def add(
        self,
        what: str,
        figures: Mapping[str, Any],
        *,
        setting: str = "",
        tolerance: float | str | None = None,
        passed: bool | None = None,
    ) -> None:
        """Record and print one result; `passed` is None if there is no goal."""
        entry = {
            "part": self.part.name,
            "what": what,
            "setting": setting,
            "figures": dict(figures),
            "tolerance": tolerance,
            "passed": passed,
        }
        entry |= {"time": datetime.now(UTC).isoformat(timespec="seconds"), **self.common}
        append(self.file, entry)
        print(line(entry), flush=True)

    def error(self, what: str, error: float, tolerance: float, *, setting: str = "") -> None:
        """Record an error and whether it is within its tolerance, which NaN never is."""
        self.add(what, {"error": float(error)}, setting=setting, tolerance=tolerance, passed=bool(error <= tolerance))

    @contextmanager
    def guard(self, what: str, *, setting: str = "", full_is_fine: bool = False) -> Iterator[None]:
        """Record a failure of the enclosed code, or that a package is missing, and continue after it.

        Args:
            full_is_fine: running out of memory is a result here, not a failure.
        """
        import torch

        try:
            yield
        except ModuleNotFoundError as error:
            self.add(what, {"not run": f"the package {error.name} is missing"}, setting=setting)
        except torch.cuda.OutOfMemoryError:
            self.add(what, {"out of memory": setting or what}, setting=setting, passed=None if full_is_fine else False)
        except Exception as error:  # noqa: BLE001  # of any kind, because the other results are still wanted
            self.add(what, {"failed": _described(error)}, setting=setting, passed=False)
            if os.environ.get("BENCHMARK_TRACEBACK"):
                traceback.print_exc()
        if self.device == "cuda":
            import gc

            gc.collect()
            torch.cuda.empty_cache()


def _described(error: Exception) -> str:
    """Return type, message and place of an error in one line."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    message = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {message} ({Path(where.filename).name}:{where.lineno})"


# --- running --------------------------------------------------------------------------------------


def setting(toy: bool) -> dict[str, Any]:
    """Return what every result records: device, size, card and versions.

    Raises:
        ConfigError: packages are missing.
    """
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise ConfigError(f"packages are missing: the benchmark needs {', '.join(missing)}; install them with pip")
    import torch

    cuda = torch.cuda.is_available()
    card, driver = _card() if cuda else (f"CPU, {os.cpu_count()} cores", "")
    versions = {name: _version(name) for name in VERSIONS}
    return {
        "device": "cuda" if cuda else "cpu",
        "size": "toy" if toy or not cuda else "full",
        "card": card,
        "driver": driver,
        "versions": versions,
    }


def _card() -> tuple[str, str]:
    """Return name and driver of the first GPU, without initializing CUDA in this process."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown GPU", "unknown"
    name, _, driver = answer.strip().partition(", ")
    return name, driver


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def run_parts(parts: Sequence[Part], file: Path, *, minutes: float, toy: bool) -> bool:
    """Run parts one after another and return whether none failed."""
    common = setting(toy)
    if common["device"] == "cpu":
        print("no CUDA here: running the toy size on the CPU", flush=True)
    print(
        f"{common['card']}  {common['driver']}  {'  '.join(f'{k} {v}' for k, v in common['versions'].items())}",
        flush=True,
    )
    if MISSING:
        print(f"not installed: {', '.join(MISSING)}; results that need them are not run", flush=True)
    before, end = len(read_results(file)), time.monotonic() + 60 * minutes
    for part in parts:
        with suppress(Exception):  # the part records why it cannot be imported
            part.load()  # imports the modules once, before the processes are forked
    for part in parts:
        seconds = min(60 * part.minutes, end - time.monotonic())
        _run_alone(part, file, common, seconds)
    return not any(entry["passed"] is False for entry in read_results(file)[before:])


def _run_alone(part: Part, file: Path, common: Mapping[str, Any], seconds: float) -> None:
    """Run one part in its own process, kill it at its time limit, and record it if it did not end by itself."""
    folder = Path(tempfile.mkdtemp(prefix="gpu-benchmark-"))
    bench, started = Bench(part, file, common, seconds - MARGIN, folder), time.monotonic()
    try:
        if seconds < 2 * MARGIN:
            bench.add("whole part", {"not run": f"{max(seconds, 0):.0f} s left of --minutes"})
            return
        child = multiprocessing.get_context("fork").Process(target=_child, args=(bench,))
        child.start()
        child.join(seconds)
        if child.is_alive():
            os.killpg(child.pid or 0, signal.SIGKILL)  # with all processes that it started
            child.join()
            bench.add("whole part", {"stopped": f"at its limit of {seconds:.0f} s"})
        elif child.exitcode:
            bench.add("whole part", {"failed": f"its process ended with code {child.exitcode}"}, passed=False)
        else:
            bench.add("whole part", {"seconds": round(time.monotonic() - started, 1)})
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _child(bench: Bench) -> None:
    os.setpgrp()
    os.environ["VIRAL_CACHE"] = str(bench.folder / "cache")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with bench.guard("whole part"):
        bench.part.load()(bench)


class Apart(Generic[T]):
    """Run `action(*values)` in a fork of this process, which must not have used CUDA or several threads before.

    Args:
        cuda: False hides the GPU from the fork, so that it computes on the CPU.
    """

    def __init__(self, action: Callable[..., T], *values: Any, cuda: bool = True) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, there = context.Pipe(duplex=False)
        self._child = context.Process(target=_apart, args=(there, action, values, cuda))
        self._child.start()
        there.close()

    def result(self) -> T:
        """Wait for the result of the action and return it.

        Raises:
            RunError: the action failed; the message says why.
        """
        try:
            result, failure = self._pipe.recv()
        except EOFError:
            result, failure = None, "its process ended without a result"
        self._child.join()
        if failure is not None:
            raise RunError(failure)
        return result  # type: ignore[no-any-return]


def apart(action: Callable[..., T], *values: Any, cuda: bool = True) -> T:
    """Run `action(*values)` in a fork of this process and return its result."""
    return Apart(action, *values, cuda=cuda).result()


def _apart(pipe: Any, action: Callable[..., Any], values: Sequence[Any], cuda: bool) -> None:
    if not cuda:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        pipe.send((action(*values), None))
    except Exception as error:  # noqa: BLE001  # raised again by the caller, as a RunError
        pipe.send((None, _described(error)))
    pipe.close()
