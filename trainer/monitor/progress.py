"""The log of a run: on the screen, on disk and in a tracker."""

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

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}  # the package of each tracker
SHOWN = {"lm_loss": "lm", "alignment_loss": "align", "accuracy/mean": "val accuracy", "val_lm_loss": "val lm"}
"""Columns of the log that are shown on the screen, and the short names that they have there."""
CUT = "data.max_length leaves no answer in"  # begins the warning that is given only once


def check_trackers(names: Sequence[str]) -> None:
    """Check that the packages of the trackers are installed, before anything is computed.

    Raises:
        ConfigError: a package is not installed; names it.
    """
    for name in names:
        spec = find_spec(PACKAGES[name])
        # a folder of old logs called `wandb` has a spec, but no loader
        if spec is None or spec.loader is None or spec.origin is None:
            raise ConfigError(
                f"report_to is {name}, which needs the package {PACKAGES[name]}: install it with"
                f" `pip install {PACKAGES[name]}`"
            )


class Progress(TrainerCallback):
    """Shows the losses on stderr, and stores the training log as parquet; both on rank 0 only.

    On a terminal it is a progress bar, elsewhere one line for each row of the log.
    """

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
        answers_cut = logs.get("answers_cut") if logs else None
        if answers_cut and not any(CUT in str(row.get("warning", "")) for row in state.log_history):
            warn(
                state,
                f"{CUT} {answers_cut} conversations since the last row of the log, so nothing is learned from them; the"
                " log's column answers_cut has their number from now on",
            )
        shown = {short: f"{logs[name]:.3f}" for name, short in SHOWN.items() if logs and name in logs}
        if not shown or not state.is_world_process_zero:
            return
        if self.bar is not None:
            self.latest |= shown
            self.bar.set_postfix(self.latest)
        else:
            parts = "  ".join(f"{short} {value}" for short, value in shown.items())
            sys.stderr.write(
                f"{self.folder.name}: step {state.global_step}/{self.steps}  {parts} "
                f" {time.monotonic() - self.start:.0f} s\n"
            )
        write_log(state.log_history, self.folder)

    def close(self) -> None:
        """Close the progress bar, so that what is printed next starts on a new line."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class LastLog(TrainerCallback):
    """Makes the last step write a row of the log too, even if it is not a multiple of `log_every`."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True


def write_log(history: list[dict[str, Any]], folder: Path) -> None:
    """Store the Trainer's log history as training.parquet, one row per entry.

    Columns are sorted by name, so that a resumed run, whose entries may have another order of keys, stores the same.
    """
    with atomic_file(folder / LOG_FILE) as partial:
        pd.DataFrame(history).sort_index(axis=1).to_parquet(partial)
