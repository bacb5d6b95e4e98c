"""Warnings during training, one sentence each: on stderr, in the log (column `warning`) and in the record."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn
from tqdm import tqdm
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from trainer import distributed
from trainer.alignment import site_name
from workbench.hashing import fingerprint


def warn(state: TrainerState, sentence: str) -> None:
    """Print a warning on stderr, and add it to the log history, which checkpoints store."""
    state.log_history.append({"step": state.global_step, "warning": sentence})  # type: ignore[dict-item]
    if state.is_world_process_zero:
        tqdm.write(f"warning: {sentence}", file=sys.stderr)


def warn_once(state: TrainerState, sentences: Sequence[str]) -> None:
    """Give those warnings that the run has not given yet; a resumed run has given those in its log history."""
    for sentence in sentences:
        if not any(row.get("warning") == sentence for row in state.log_history):
            warn(state, sentence)


def warnings_of(state: TrainerState) -> list[str]:
    """Return every warning of the run so far with its step, including those before a resume."""
    return [f"step {row['step']}: {row['warning']}" for row in state.log_history if "warning" in row]


class EarlyWarnings(TrainerCallback, ExportableState):
    """Gives the warnings that are known at the start, and warns of an alignment head whose values do not change.

    In the official code's documented LoRA recipe, for example, the head P_pi stays as it was initialized. What was
    observed so far is stored in checkpoints, so that a resumed run gives the same warnings as an uninterrupted one.

    Args:
        steps: after so many steps with images a head must have changed.
        sentences: the warnings that are known at the start.
        aligned: whether the latest step had an image.
    """

    def __init__(self, steps: int, sentences: Sequence[str], aligned: Callable[[], bool]) -> None:
        self.steps, self.sentences, self.aligned = steps, sentences, aligned
        self.first, self.seen, self.done = 0, 0, False
        # fingerprints of each head's tensors at the start; the tensors themselves would not fit into a checkpoint
        self.before: dict[str, list[str]] = {}

    def state(self) -> dict[str, Any]:
        """Return what checkpoints store of this callback."""
        return {
            "args": {},
            "attributes": {"first": self.first, "seen": self.seen, "done": self.done, "before": self.before},
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: object, model: nn.Module | None = None, **_: object
    ) -> None:
        warn_once(state, self.sentences)
        stored: Any = state.stateful_callbacks if state.global_step else None  # of the checkpoint, for a resumed run
        stored = stored.get(type(self).__name__, {}).get("attributes", {}) if isinstance(stored, dict) else {}
        initial = {
            "first": state.global_step,
            "seen": 0,
            "done": False,
            "before": {name: _fingerprints(head) for name, head in _heads(model)},
        }
        vars(self).update(initial | stored)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: object, model: nn.Module | None = None, **_: object
    ) -> None:
        if self.done:
            return
        # with a warm-up, the first step has learning rate 0
        self.seen += self.aligned() and not (state.global_step == 1 and args.warmup_steps > 0)
        if self.seen < self.steps and state.global_step < state.max_steps:
            return
        steps = state.global_step - self.first
        for name, head in _heads(model):
            pairs = [(old, new) for old, new in zip(self.before[name], _fingerprints(head), strict=True) if new]
            unchanged = sum(old == new for old, new in pairs)
            if unchanged:  # one unchanged tensor is enough: weight decay changes matrices even without a gradient
                warn(
                    state,
                    f"the alignment head of {name} does not move: {unchanged} of its {len(pairs)} tensors are as they"
                    f" were {steps} steps ago; check alignment.weight, the learning rate and what is frozen",
                )
        self.before, self.done = {}, True


def _fingerprints(head: nn.Module) -> list[str]:
    """Return a fingerprint of each tensor of the head, or of this rank's shard of it; "" where the rank has none.

    Checkpoints store those of rank 0, which gives the warnings.
    """
    return [
        fingerprint({"": part.detach()}) if (part := distributed.local_part(p)).numel() else ""
        for p in head.parameters()
    ]


def _heads(model: nn.Module | None) -> Iterator[tuple[str, nn.Module]]:
    """Yield each alignment head with the layer and the target that it compares, as a name for messages."""
    alignment = getattr(model, "alignment", None)
    if alignment is not None:
        each = [site_name(site).replace("_", " ") for site in alignment.sites]
        sites = ["all layers"] if alignment.sharing == "shared" else each
        names = [f"{site} with {target}" for site in sites for target in alignment.dims]
        yield from zip(names, alignment.heads, strict=False)  # heads: none has names, but no heads
