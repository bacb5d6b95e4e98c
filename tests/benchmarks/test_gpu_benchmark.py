"""The GPU benchmark at its toy size on the CPU: with the packages of a bare machine, within limits, and a page of its
results."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from benchmarks.gpu import harness
from benchmarks.gpu.cost_step import CACHED, Model
from benchmarks.gpu.harness import PARTS, Bench, Part, apart, append, chosen, read_results, run_parts
from benchmarks.gpu.report import report
from tests.conftest import ROOT, refused
from workbench.errors import RunError, UnknownNameError

INSTALLED = ("torch", "transformers", "timm", "accelerate", "peft", "pandas")
COMMON: dict[str, Any] = {"device": "cpu", "size": "toy", "card": "CPU", "driver": "", "versions": {"torch": "2"}}


def link_installed(packages: Sequence[str], folder: Path) -> None:
    """Make a folder of modules with these packages and what they need, and nothing else that is installed here."""
    folder.mkdir()
    wanted, linked = list(packages), set[str]()
    while wanted:
        name = wanted.pop()
        if canonicalize_name(name) in linked:
            continue
        linked.add(canonicalize_name(name))
        package = metadata.distribution(name)
        requirements = map(Requirement, package.requires or [])
        wanted += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
        for top in {file.parts[0] for file in package.files or []} - {"..", "__pycache__"}:
            if not (folder / top).exists():  # parts of `nvidia` belong to several packages
                (folder / top).symlink_to(package.locate_file(top))


@pytest.mark.slow
def test_a_bare_machine_runs_the_toy_size(tmp_path: Path) -> None:
    """With six packages and what they need, every part runs, every comparison is within its tolerance, and what is
    missing is named."""
    file, site = tmp_path / "gpu.json", tmp_path / "site"
    link_installed(INSTALLED, site)
    python: str = getattr(sys, "_base_executable", sys.executable)
    command = [python, "-S", "-s", "-m", "benchmarks.gpu", "--part", "right", "cost", "clean", "--output", str(file)]
    environment = os.environ | {
        "PYTHONPATH": f"{site}{os.pathsep}{ROOT}",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [*command, "--report"], cwd=ROOT, capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout.splitlines()
    assert said[0] == "no CUDA here: running the toy size on the CPU"
    assert said[2] == "not installed: jaxtyping, lazy_loader, scipy, nnsight; results that need them are not run"
    entries = read_results(file)
    assert {entry["part"] for entry in entries} == {part.name for part in PARTS}
    assert not [entry for entry in entries if entry["passed"] is False or "failed" in entry["figures"]]
    judged = Counter(entry["part"] for entry in entries if entry["passed"])
    assert all(judged[part] > 5 for part in ("reading", "metrics", "losses", "training"))
    assert judged["features"] == 5
    missing = {entry["what"]: entry["figures"]["not run"] for entry in entries if "not run" in entry["figures"]}
    assert missing == {
        "edit at the vision encoder": "the package nnsight is missing",
        "edit at the projector": "the package nnsight is missing",
        "edit at layer 2": "the package nnsight is missing",
        "rsa, 8 images of n 64": "the package scipy is missing",
    }
    assert not [entry for entry in entries if {"GB", "extra GB"} & set(entry["figures"])], "not measured on a CPU"
    assert {"card", "driver", "versions", "tolerance", "time"} <= set(entries[0])
    page = file.with_suffix(".md").read_text()
    assert "Not run yet." in page
    assert "### reading" in page
    assert "| hidden states of all layers | float32 |" in page


def test_bad_input_is_one_sentence(tmp_path: Path) -> None:
    said = refused("benchmarks.gpu", "--part", "redaing")
    assert "unknown part 'redaing'" in said
    assert said.endswith("did you mean 'reading'?")
    assert "minutes is 0.0" in refused("benchmarks.gpu", "--minutes", "0")
    assert "JSON" in refused("benchmarks.gpu", "--output", str(tmp_path / "gpu.txt"))
    (tmp_path / "gpu.json").write_text('{"part": 1}')
    assert "expected a JSON list" in refused("benchmarks.gpu", "--output", str(tmp_path / "gpu.json"))
    assert (tmp_path / "gpu.json").read_text() == '{"part": 1}'


def test_groups_and_names_choose_parts() -> None:
    assert [part.name for part in chosen(["right"])] == ["reading", "metrics", "losses", "features", "training"]
    assert [part.name for part in chosen(["profile", "reading"])] == ["reading", "profile"]
    assert chosen([]) == list(PARTS)
    assert all(callable(part.load()) for part in PARTS)
    assert all(part.minutes <= 10 for part in PARTS)
    with pytest.raises(UnknownNameError):
        chosen(["all of it"])


def _part(monkeypatch: pytest.MonkeyPatch, action: Any) -> Part:
    monkeypatch.setattr(Part, "load", lambda _: action)
    return replace(PARTS[0], name="one")


def _hang(bench: Bench) -> None:
    bench.add("before", {"n": 1}, passed=True)
    time.sleep(60)


def _crash(bench: Bench) -> None:
    os._exit(7)


def _parts_fail(bench: Bench) -> None:
    with bench.guard("first"):
        raise ValueError("no\nsuch kernel")
    with bench.guard("second", setting="batch 16", full_is_fine=True):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")
    with bench.guard("third"):
        bench.error("third", 0.5, 1.0)
    bench.error("fourth", float("nan"), 1.0)


@pytest.mark.slow
def test_a_part_that_hangs_or_dies_leaves_what_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "gpu.json"
    monkeypatch.setattr(harness, "MARGIN", 0.5)
    assert run_parts([_part(monkeypatch, _hang)], file, minutes=2 / 60, toy=True)
    before, whole = read_results(file)
    assert before["what"] == "before"
    assert whole["figures"]["stopped"].startswith("at its limit of 2 s")
    assert not run_parts([_part(monkeypatch, _crash)], file, minutes=1, toy=True)
    assert read_results(file)[-1]["figures"] == {"failed": "its process ended with code 7"}
    assert run_parts([_part(monkeypatch, _crash)], file, minutes=0.01, toy=True)
    assert read_results(file)[-1]["figures"]["not run"].endswith("of --minutes")


def test_a_failure_is_recorded_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "gpu.json"
    assert not run_parts([_part(monkeypatch, _parts_fail)], file, minutes=1, toy=True)
    first, second, third, fourth, whole = read_results(file)
    assert first["figures"]["failed"].startswith("ValueError: no such kernel (test_gpu_benchmark.py:")
    assert first["passed"] is False
    assert second["figures"] == {"out of memory": "batch 16"}
    assert second["passed"] is None
    assert third["passed"] is True
    assert fourth["passed"] is False
    assert "seconds" in whole["figures"]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "NEEDED", ("torch", "no_such_package"))
    with pytest.raises(harness.ConfigError, match="the benchmark needs no_such_package"):
        harness.setting(True)


def test_the_page_has_the_newest_result_of_each_card(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    one = {
        "part": "step",
        "what": "training step",
        "setting": "cached",
        "tolerance": "ratio <= 1.03",
        "time": "2026-01-02T03:04:05+00:00",
        **COMMON,
    }
    card = one | {"device": "cuda", "size": "full", "card": "H100", "driver": "580.1"}
    for entry in (
        one | {"figures": {"ratio": 1.5}, "passed": None},
        card | {"figures": {"ratio": 1.2}, "passed": False},
        card | {"figures": {"ratio": 1.01}, "passed": True},
    ):
        append(file, entry)
    page = report(read_results(file), file.name)
    assert page.index("## H100, full size") < page.index("## CPU, toy size")
    assert "| training step | cached | ratio 1.01 | ratio <= 1.03 | yes |" in page
    assert "1.2 " not in page
    assert "2026-01-02, driver 580.1; torch 2. 1 of 1 results" in page
    assert page.count("Not run yet.") == len(PARTS) - 1
    assert "Not run yet." in report([], "gpu.json")


def test_the_page_has_the_largest_batches() -> None:
    """Where the next larger one ran out of memory, and where it was not tried."""
    peak = {"part": "memory", "what": "peak memory", "tolerance": None, "passed": None, "time": "2026-01-02", **COMMON}
    peak |= {"device": "cuda"}
    measured = [(1, "", {"GB": 20.0, "dry run's GB": 45.0}), (2, "", {"GB": 50.0, "dry run's GB": 60.0})]
    entries = [
        peak | {"setting": f"float32 base, batch {batch}, {kind}checkpointing", "figures": figures}
        for batch, kind, figures in (*measured, (4, "", {"out of memory": "batch 4"}), (1, "no ", {"GB": 30.0}))
    ]
    page = report(entries, "gpu.json")
    assert "| float32 base, checkpointing | 1 | none | 2 | 2 |" in page
    assert "| float32 base, no checkpointing | 1 or more |  | 1 or more |  |" in page


@pytest.mark.slow
def test_an_error_in_a_process_apart_is_the_callers() -> None:
    assert apart(os.path.basename, "a/b") == "b"
    with pytest.raises(RunError, match="ZeroDivisionError: "):
        apart(lambda: 1 // 0)
    with pytest.raises(RunError, match="ended without a result"):
        apart(os._exit, 1)
    assert apart(lambda: os.environ["CUDA_VISIBLE_DEVICES"], cuda=False) == ""


def test_the_published_page_is_that_of_the_published_results() -> None:
    file = ROOT / "docs" / "results" / "gpu.json"
    entries = read_results(file)
    assert report(entries, file.name) == file.with_suffix(".md").read_text()
    assert {entry["part"] for entry in entries if entry["device"] == "cuda"} == {part.name for part in PARTS}
    assert not [entry for entry in entries if entry["passed"] is False]


class Waits(TorchDispatchMode):
    """Records the lines of the product that would make the host wait for a GPU, apart from those that run on the CPU.

    A number or a condition read from a tensor, or a selection whose size depends on its values.
    """

    ON_CPU = ("conversation_data.py", "guards.py")  # the collator, and values that were copied without waiting

    DISPATCH = ("torch/_compile.py", "torch/_dynamo/eval_frame.py")  # of the mode itself

    def __init__(self) -> None:
        super().__init__()
        self.lines, self.on = set[str](), False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.on and self._waits(str(function), args):
            frames = [frame for frame in traceback.extract_stack()[:-1] if not frame.filename.endswith(self.DISPATCH)]
            files = [Path(frame.filename).name for frame in frames]
            ours = any(Path(frames[-1].filename).is_relative_to(ROOT / name) for name in ("trainer", "workbench"))
            if ours and not set(files) & set(self.ON_CPU):
                self.lines.add(f"{function} in line {frames[-1].lineno} of {frames[-1].filename}")
        return function(*args, **(kwargs or {}))

    @staticmethod
    def _waits(name: str, args: Any) -> bool:
        if name.startswith("aten.index.Tensor"):
            return any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in args[1])
        return any(word in name for word in ("_local_scalar_dense", "nonzero", "masked_select", "aten.equal"))


@pytest.mark.slow
def test_a_step_does_not_wait_for_the_device(tmp_path: Path) -> None:
    """Beyond what transformers does: nothing of ours reads a value from the device between two rows of the log."""
    part = next(part for part in PARTS if part.name == "profile")
    model = Model(Bench(part, tmp_path / "gpu.json", COMMON, 1000, tmp_path), torch.float32)
    trainer, waits = model.trainer(CACHED, batch=2, steps=6, checkpointing=True), Waits()

    class Steps(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            waits.on = 2 <= state.global_step < 4

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_evaluate = control.should_save = False

    trainer.add_callback(Steps())
    with waits:
        trainer.train()
    assert not waits.lines
