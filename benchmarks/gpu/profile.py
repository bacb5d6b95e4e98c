"""What the GPU waits for in a training step: copies between host and device, and synchronizations by line of code."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from benchmarks.gpu.cost_step import CACHED, Clock, Model
from benchmarks.gpu.harness import Bench

STEPS, FIRST = 8, 3  # steps of a run; the first of two profiled steps
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
HOST = ("aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero")
TABLE = "gpu-profile.txt"  # written next to the results


class Watch(TrainerCallback):
    """Profile two steps, and make the later ones warn when they synchronize."""

    def __init__(self, cuda: bool) -> None:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        self.profile, self.cuda, self.lines = profile(activities=activities, record_shapes=False), cuda, Counter[str]()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the profiler at step `FIRST`, and stop it two steps later."""
        if state.global_step == FIRST:
            self.profile.start()
        if state.global_step == FIRST + 2:
            if self.cuda:
                torch.cuda.synchronize()
            self.profile.stop()
            if self.cuda:
                torch.cuda.set_sync_debug_mode("warn")

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Switch the warnings off."""
        if self.cuda:
            torch.cuda.set_sync_debug_mode("default")


def run(bench: Bench) -> None:
    """Profile steps of VIRAL with cached features."""
    with bench.guard("profile"):
        model = Model(bench, torch.float32)
        if not bench.toy:
            model.halve()
        trainer = model.trainer(CACHED, batch=2 if bench.toy else 8, steps=STEPS, checkpointing=True)
        trainer.add_callback(clock := Clock("cpu"))  # "cpu", so that it does not synchronize
        trainer.add_callback(watch := Watch(bench.device == "cuda"))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
        events = watch.profile.key_averages()
        counts = {event.key: event.count for event in events}
        steps = 2
        figures: dict[str, Any] = {
            name: sum(n for key, n in counts.items() if key == name) / steps for name in (*WAITS, *HOST)
        }
        for name in ("Memcpy HtoD", "Memcpy DtoH"):
            figures[name] = sum(n for key, n in counts.items() if key.startswith(name)) / steps
        bench.add("calls of one step", {name: value for name, value in figures.items() if value}, setting=CACHED)
        busy = (
            sum(event.self_device_time_total for event in events if event.device_type == DeviceType.CUDA) / steps / 1e3
        )
        step = 1e3 * sum(clock.seconds[FIRST : FIRST + 2]) / 2
        figures = {"ms": busy, "of a step's ms": step} if bench.device == "cuda" else {"a step's ms": step}
        bench.add("device time of one step", figures, setting=CACHED)
        watched = STEPS - FIRST - 2
        lines = Counter(_where(w) for w in caught if "synchroniz" in str(w.message))
        for line, count in lines.most_common():
            bench.add("synchronizes", {"times a step": count / watched}, setting=line)
        sort = "self_device_time_total" if bench.device == "cuda" else "self_cpu_time_total"
        table = f"{bench.common['card']}, two training steps: {CACHED}\n\n" + events.table(
            sort_by=sort, row_limit=40, max_name_column_width=60
        )
        (bench.file.parent / TABLE).write_text(table, encoding="utf-8")


def _where(warning: warnings.WarningMessage) -> str:
    """Return file and line of a warning, with the last folders of the path."""
    return f"{'/'.join(Path(warning.filename).parts[-3:])}:{warning.lineno}"
