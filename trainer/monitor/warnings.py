"""Early warnings: each is one sentence on stderr, in the training log (column `warning`) and in the record."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn
from tqdm import tqdm
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from trainer import distributed
from workbench.hashing import fingerprint


def warn(state: TrainerState, sentence: str) -> None:
    """Say `sentence` on stderr, and keep it in the log history, which checkpoints carry on."""
    state.log_history.append({"step": state.global_step, "warning": sentence})  # type: ignore[dict-item]
    if state.is_world_process_zero:
        tqdm.write(f"warning: {sentence}", file=sys.stderr)


def tell(state: TrainerState, sentences: Sequence[str]) -> None:
    """Say what a resumed run has not said yet."""
    for sentence in sentences:
        if not any(row.get("warning") == sentence for row in state.log_history):
            warn(state, sentence)


def warnings_of(state: TrainerState) -> list[str]:
    """Every warning of a run so far, those before a resume included."""
    return [f"step {row['step']}: {row['warning']}" for row in state.log_history if "warning" in row]


class EarlyWarnings(TrainerCallback, ExportableState):
    """Says what is known at the start, and warns when an alignment head does not move, as the paper's P_pi does not
    under its documented LoRA recipe.

    What it has seen goes into the checkpoints, so that a resumed run says what the uninterrupted one says.

    Args:
        steps: a head must have moved after so many that had an image.
        sentences: what is known at the start.
        aligned: whether the step that was just made had an image.
    """

    def __init__(self, steps: int, sentences: Sequence[str], aligned: Callable[[], bool]) -> None:
        self.steps, self.sentences, self.aligned = steps, sentences, aligned
        self.first, self.seen, self.done = 0, 0, False
        # of each head the fingerprints of its tensors, which fit into a checkpoint
        self.before: dict[str, list[str]] = {}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "args": {},
            "attributes": {"first": self.first, "seen": self.seen, "done": self.done, "before": self.before},
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: object, model: nn.Module | None = None, **_: object
    ) -> None:
        tell(state, self.sentences)
        kept: Any = state.stateful_callbacks if state.global_step else None  # as it is in a checkpoint
        kept = kept.get(type(self).__name__, {}).get("attributes", {}) if isinstance(kept, dict) else {}
        fresh = {
            "first": state.global_step,
            "seen": 0,
            "done": False,
            "before": {name: _fingerprints(head) for name, head in _heads(model)},
        }
        vars(self).update(fresh | kept)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: object, model: nn.Module | None = None, **_: object
    ) -> None:
        if self.done:
            return
        # whose learning rate is 0
        self.seen += self.aligned() and not (state.global_step == 1 and args.warmup_steps > 0)
        if self.seen < self.steps and state.global_step < state.max_steps:
            return
        steps = state.global_step - self.first
        for name, head in _heads(model):
            pairs = [(old, new) for old, new in zip(self.before[name], _fingerprints(head), strict=True) if new]
            still = sum(old == new for old, new in pairs)
            if still:  # one tensor is enough: weight decay moves matrices that no gradient reaches
                found = f"{still} of its {len(pairs)} tensors are as they were {steps} steps ago"
                warn(
                    state,
                    f"the alignment head of {name} does not move: {found}; look at alignment.weight, the learning rate"
                    " and what is frozen",
                )
        self.before, self.done = {}, True


def _fingerprints(head: nn.Module) -> list[str]:
    """Of each tensor, or this process's part of it; empty where it has none. (A checkpoint holds the main process's,
    whose warning is the one that counts.)"""
    return [
        fingerprint({"": part.detach()}) if (part := distributed.local_part(p)).numel() else ""
        for p in head.parameters()
    ]


def _heads(model: nn.Module | None) -> Iterator[tuple[str, nn.Module]]:
    """Each head of the alignment with the names of what it compares."""
    alignment = getattr(model, "alignment", None)
    if alignment is not None:
        layers = ["all layers"] if alignment.sharing == "shared" else [f"layer {layer}" for layer in alignment.layers]
        names = [f"{layer} with {target}" for layer in layers for target in alignment.dims]
        yield from zip(names, alignment.heads, strict=False)  # heads: none has names, but no heads
