"""The log of a run, on the screen, on disk and in a tracker."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trainer.monitor.warnings import warn
from workbench.errors import ConfigError
from workbench.files import atomic_file
from workbench.training_folder import LOG_FILE

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}  # what each tracker needs
SHOWN = {"lm_loss": "lm", "alignment_loss": "align", "accuracy/mean": "val accuracy", "val_lm_loss": "val lm"}


def check_trackers(names: Sequence[str]) -> None:
    """See that the packages of the trackers are installed, before anything is computed.

    Raises:
        ConfigError: names the package.
    """
    for name in names:
        spec = find_spec(PACKAGES[name])
        if spec is None or spec.loader is None or spec.origin is None:  # a folder `wandb` with old logs is no package
            raise ConfigError(
                f"report_to is {name}: expected the package {PACKAGES[name]}, which `pip install {PACKAGES[name]}`"
                " brings"
            )


CUT = "data.max_length leaves no answer in"


class Progress(TrainerCallback):
    """Both losses on stderr, of the first process: a bar on a terminal, elsewhere a line per log. Keeps the training
    log on disk as parquet."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps, self.start = folder, steps, time.monotonic()
        self.bar: tqdm | None = None
        self.latest: dict[str, str] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: object, **_: object) -> None:
        if state.is_world_process_zero and sys.stderr.isatty():
            self.bar = tqdm(
                total=self.steps,
                initial=state.global_step,
                desc=self.folder.name,
                unit="step",
                file=sys.stderr,
                dynamic_ncols=True,
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: object, **_: object) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: object,
        logs: dict[str, float] | None = None,
        **_: object,
    ) -> None:
        if (
            logs
            and logs.get("answers_cut")
            and not any(CUT in str(row.get("warning", "")) for row in state.log_history)
        ):
            warn(
                state,
                f"{CUT} {logs['answers_cut']} conversations since the last row of the log, whose column answers_cut"
                " counts on; they teach nothing",
            )
        own = {short: f"{logs[name]:.3f}" for name, short in SHOWN.items() if logs and name in logs}
        if not own or not state.is_world_process_zero:
            return
        if self.bar is not None:
            self.latest |= own
            self.bar.set_postfix(self.latest)
        else:
            parts = "  ".join(f"{short} {value}" for short, value in own.items())
            sys.stderr.write(
                f"{self.folder.name}: step {state.global_step}/{self.steps}  {parts} "
                f" {time.monotonic() - self.start:.0f} s\n"
            )
        write_log(state.log_history, self.folder)

    def close(self) -> None:
        """End the bar's line, so that what is said next has its own."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class LastLog(TrainerCallback):
    """Logs the losses since the last row at the last step too, wherever it falls."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True


def write_log(history: list[dict[str, Any]], folder: Path) -> None:
    """Store the Trainer's log history as training.parquet, one row per log; columns by name, since rows from a
    checkpoint have theirs in another order."""
    with atomic_file(folder / LOG_FILE) as partial:
        pd.DataFrame(history).sort_index(axis=1).to_parquet(partial)
