"""What the GPU waits for in a training step: copies to and from the host, and synchronizations, by the line that asks
for them."""

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

STEPS, FIRST = 8, 3  # steps of a run; the first one that is looked at
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
HOST = ("aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero")
TABLE = "gpu-profile.txt"  # beside the results


class Watch(TrainerCallback):
    """Profiles some steps, and counts what synchronizes in the others."""

    def __init__(self, cuda: bool) -> None:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        self.profile, self.cuda, self.lines = profile(activities=activities, record_shapes=False), cuda, Counter[str]()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin at the first step that is looked at."""
        if state.global_step == FIRST:
            self.profile.start()
        if state.global_step == FIRST + 2:
            if self.cuda:
                torch.cuda.synchronize()
            self.profile.stop()
            if self.cuda:
                torch.cuda.set_sync_debug_mode("warn")

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """End."""
        if self.cuda:
            torch.cuda.set_sync_debug_mode("default")


def run(bench: Bench) -> None:
    """Profile steps of VIRAL with cached features."""
    with bench.guard("profile"):
        model = Model(bench, torch.float32)
        if not bench.toy:
            model.halve()
        trainer = model.trainer(CACHED, batch=2 if bench.toy else 8, steps=STEPS, checkpointing=True)
        trainer.add_callback(clock := Clock("cpu"))  # which does not synchronize
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
        bench.add(
            "device time of one step",
            {"ms": busy, "of a step's ms": 1e3 * sum(clock.seconds[FIRST : FIRST + 2]) / 2},
            setting=CACHED,
        )
        looked = STEPS - FIRST - 2
        lines = Counter(_where(w) for w in caught if "synchroniz" in str(w.message))
        for line, count in lines.most_common():
            bench.add("synchronizes", {"times a step": count / looked}, setting=line)
        sort = "self_device_time_total" if bench.device == "cuda" else "self_cpu_time_total"
        table = f"{bench.common['card']}, two training steps: {CACHED}\n\n" + events.table(
            sort_by=sort, row_limit=40, max_name_column_width=60
        )
        (bench.file.parent / TABLE).write_text(table, encoding="utf-8")


def _where(warning: warnings.WarningMessage) -> str:
    """The file with its package, and the line."""
    return f"{'/'.join(Path(warning.filename).parts[-3:])}:{warning.lineno}"
