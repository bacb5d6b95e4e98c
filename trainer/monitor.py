"""What is watched while a model trains: progress, CKNNA of the aligned layer, and early warnings.

Each warning is one sentence on stderr, in the training log (column `warning`) and in the record. What cannot go on is an error: a loss that is not finite
stops the run with its batch on disk, and images and visual tokens that do not match never reach the model.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import torch
from accelerate.utils import send_to_device
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from trainer import processes
from trainer.config import Recipe
from trainer.prepare import Prepared
from trainer.student import PreparedStudent
from trainer.watched import WatchedBatch
from workbench.errors import ConfigError, DataError, RunError, UnknownNameError, WeightsError
from workbench.files import atomic_file
from workbench.fingerprints import fingerprint
from workbench.metrics import METRICS
from workbench.metrics.alignment import MIN_ROWS
from workbench.rasters import Within
from workbench.stats import null_of
from workbench.training import LOG_FILE

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}  # what each tracker needs
SHOWN = {"lm_loss": "lm", "alignment_loss": "align", "accuracy/mean": "val accuracy", "val_lm_loss": "val lm"}


# --- before training -----------------------------------------------------------------------------------------------------------------------


def check_trackers(names: Sequence[str]) -> None:
    """See that the packages of the trackers are installed, before anything is computed.

    Raises:
        ConfigError: names the package.
    """
    for name in names:
        spec = find_spec(PACKAGES[name])
        if spec is None or spec.loader is None or spec.origin is None:  # a folder `wandb` with old logs is no package
            raise ConfigError(f"report_to is {name}: expected the package {PACKAGES[name]}, which `pip install {PACKAGES[name]}` brings")


# --- progress and log ----------------------------------------------------------------------------------------------------------------------


CUT = "data.max_length leaves no answer in"


class Progress(TrainerCallback):
    """Both losses on stderr, of the first process: a bar on a terminal, elsewhere a line per log. Keeps the training log on disk as parquet."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps, self.start = folder, steps, time.monotonic()
        self.bar: tqdm | None = None
        self.latest: dict[str, str] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: object, **_: object) -> None:
        if state.is_world_process_zero and sys.stderr.isatty():
            self.bar = tqdm(total=self.steps, initial=state.global_step, desc=self.folder.name, unit="step", file=sys.stderr, dynamic_ncols=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: object, **_: object) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: object, logs: dict[str, float] | None = None, **_: object) -> None:
        if logs and logs.get("answers_cut") and not any(CUT in str(row.get("warning", "")) for row in state.log_history):
            warn(state, f"{CUT} {logs['answers_cut']} conversations since the last row of the log, whose column answers_cut counts on; they teach nothing")
        own = {short: f"{logs[name]:.3f}" for name, short in SHOWN.items() if logs and name in logs}
        if not own or not state.is_world_process_zero:
            return
        if self.bar is not None:
            self.latest |= own
            self.bar.set_postfix(self.latest)
        else:
            parts = "  ".join(f"{short} {value}" for short, value in own.items())
            sys.stderr.write(f"{self.folder.name}: step {state.global_step}/{self.steps}  {parts}  {time.monotonic() - self.start:.0f} s\n")
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
    """Store the Trainer's log history as training.parquet, one row per log; columns by name, since rows from a checkpoint have theirs in another order."""
    with atomic_file(folder / LOG_FILE) as partial:
        pd.DataFrame(history).sort_index(axis=1).to_parquet(partial)


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


# --- early warnings ------------------------------------------------------------------------------------------------------------------------


class EarlyWarnings(TrainerCallback, ExportableState):
    """Says what is known at the start, and warns when an alignment head does not move, as the paper's P_pi does not under its documented LoRA recipe.

    What it has seen goes into the checkpoints, so that a resumed run says what the uninterrupted one says.

    Args:
        steps: a head must have moved after so many that had an image.
        sentences: what is known at the start.
        aligned: whether the step that was just made had an image.
    """

    def __init__(self, steps: int, sentences: Sequence[str], aligned: Callable[[], bool]) -> None:
        self.steps, self.sentences, self.aligned = steps, sentences, aligned
        self.first, self.seen, self.done = 0, 0, False
        self.before: dict[str, list[str]] = {}  # of each head the fingerprints of its tensors, which fit into a checkpoint

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {}, "attributes": {"first": self.first, "seen": self.seen, "done": self.done, "before": self.before}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: object, model: nn.Module | None = None, **_: object) -> None:
        tell(state, self.sentences)
        kept: Any = state.stateful_callbacks if state.global_step else None  # as it is in a checkpoint
        kept = kept.get(type(self).__name__, {}).get("attributes", {}) if isinstance(kept, dict) else {}
        fresh = {"first": state.global_step, "seen": 0, "done": False, "before": {name: _fingerprints(head) for name, head in _heads(model)}}
        vars(self).update(fresh | kept)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: object, model: nn.Module | None = None, **_: object) -> None:
        if self.done:
            return
        self.seen += self.aligned() and not (state.global_step == 1 and args.warmup_steps > 0)  # whose learning rate is 0
        if self.seen < self.steps and state.global_step < state.max_steps:
            return
        steps = state.global_step - self.first
        for name, head in _heads(model):
            pairs = [(old, new) for old, new in zip(self.before[name], _fingerprints(head), strict=True) if new]
            still = sum(old == new for old, new in pairs)
            if still:  # one tensor is enough: weight decay moves matrices that no gradient reaches
                found = f"{still} of its {len(pairs)} tensors are as they were {steps} steps ago"
                warn(state, f"the alignment head of {name} does not move: {found}; look at alignment.weight, the learning rate and what is frozen")
        self.before, self.done = {}, True


def _fingerprints(head: nn.Module) -> list[str]:
    """Of each tensor, or this process's part of it; empty where it has none. (A checkpoint holds the main process's, whose warning is the one that counts.)"""
    return [fingerprint({"": part.detach()}) if (part := processes.own_part(p)).numel() else "" for p in head.parameters()]


def _heads(model: nn.Module | None) -> Iterator[tuple[str, nn.Module]]:
    """Each head of the alignment with the names of what it compares."""
    alignment = getattr(model, "alignment", None)
    if alignment is not None:
        layers = ["all layers"] if alignment.sharing == "shared" else [f"layer {layer}" for layer in alignment.layers]
        names = [f"{layer} with {target}" for layer in layers for target in alignment.dims]
        yield from zip(names, alignment.heads, strict=False)  # heads: none has names, but no heads


# --- what cannot go on ---------------------------------------------------------------------------------------------------------------------


def stop_unless_finite(value: Tensor, parts: Mapping[str, Tensor], batch: Mapping[str, Any] | Sequence[Any], folder: Path, step: int) -> None:
    """See that a loss or the norm of a gradient is finite, so that no checkpoint has what it would make of the model.

    Args:
        parts: what it is, or is made of, by name, for the message.
        batch: what the model was given, saved as safetensors where the value is not finite.
        step: the optimiser step that is being made, from 1.

    Raises:
        RunError: names the value, the step and the file.
    """
    if torch.isfinite(value):
        return
    bad = [f"{name} is {part.item()}" for name, part in parts.items() if not torch.isfinite(part)] or [f"the loss is {value.item()}"]
    file = folder / f"not_finite-step-{step}.safetensors"
    said = f"{', '.join(bad)} at step {step}"
    with atomic_file(file) as partial:
        save_file(dict(_tensors(batch)), partial, metadata={"step": str(step), "why": said})
    raise RunError(f"{said}: training stopped before a checkpoint has it; its batch is in {file}, and the checkpoints before are as they were")


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a nested batch by its dotted name."""
    if isinstance(value, Tensor):
        yield name, value.detach().cpu().clone(memory_format=torch.contiguous_format)  # a file holds no tensor twice
    elif isinstance(value, Mapping | list | tuple):
        for key, part in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _tensors(part, f"{name}.{key}" if name else str(key))


def counted(collator: Callable[[list[Any]], dict[str, Any]], image_token: int) -> Callable[[list[Any]], dict[str, Any]]:
    """`collator`, whose batches are checked: as many visual tokens in each text as the image and every target have.

    Of conversations every image and tile is compared with its target; that they fit the text is what `MLLM.visual_tokens` sees to.

    Raises:
        DataError: from the returned function, with both counts. A sample is never left out.
    """

    def checked(items: list[Any]) -> dict[str, Any]:
        batch = collator(items)
        targets = {f"target {name}": values for name, values in batch.get("targets", {}).items()}
        if "visual" in batch:
            found = [[len(part.index) for part in sample] for sample in batch["visual"]]
            others = {name: [[len(part) for part in sample] for sample in values] for name, values in targets.items()}
        else:
            found = [[count] for count in (batch["input_ids"] == image_token).sum(1).tolist()]
            others = {name: [[len(row)] for row in values] for name, values in ({"image": batch["connector_inputs"]} | targets).items()}
        for name, counts in others.items():
            for row, (own, other) in enumerate(zip(found, counts, strict=True)):
                if own != other:
                    said, had = (" + ".join(map(str, value)) or "no" for value in (own, other))
                    raise DataError(f"sample {row} of a batch has {said} visual tokens in its text and {had} of its {name}: expected as many")
        return batch

    return checked


# --- CKNNA ---------------------------------------------------------------------------------------------------------------------------------


class SubsetAlignment:
    """CKNNA of the visual tokens of some layers with VFMs, within images, on the same first validation images at every evaluation.

    The layers are the aligned ones (or those with a residual); a baseline's is the middle one, as in `analyses.dynamics`. The VFMs are the recipe's.

    Raises:
        ConfigError: k is not below the number of visual tokens.
        WeightsError, UnknownNameError: a VFM that cannot be had.
    """

    def __init__(self, recipe: Recipe, prepared: Prepared | PreparedStudent) -> None:
        settings, alignment = recipe.monitor, recipe.alignment
        decoder = prepared.model.student.get_decoder()
        self.blocks = getattr(decoder, "model", decoder).layers
        given = alignment.aligned or alignment.residual != "none"
        self.layers = sorted(alignment.layer) if given else [max(1, len(self.blocks) // 2)]
        self.model, self.settings, self.seed = prepared.model, settings, recipe.seed
        self.watched = prepared.watched(recipe)
        lengths = [[len(raster) for raster in image] for batch in self.watched.batches for _, image in batch.places]
        large = [own for own in lengths if min(own) >= max(settings.k + 1, MIN_ROWS)]
        if not large:
            raise ConfigError(f"monitor.k is {settings.k}: expected less than {max(map(min, lengths))}, the visual tokens of an image")
        self.n, self.images, self.left_out = int(median(chain.from_iterable(large))), len(large), len(lengths) - len(large)

    @property
    def record(self) -> dict[str, object]:
        """What the scores are of."""
        shared = {"n": self.n, "k": self.settings.k, "n_images": self.images, "permutations": self.settings.permutations, "seed": self.seed}
        return {"pooling": "within", "layers": self.layers, **shared, "vfm_fingerprint": self.watched.fingerprint}

    @torch.no_grad()  # sharded weights know no inference mode
    def measure(self) -> dict[str, float]:
        """The score of each layer and VFM as `cknna/layer_L/VFM`, its 95 % interval over images and its permutation null, with n, k and images."""
        collector = Within(METRICS.get("cknna"), self.settings.k, null=self.settings.permutations, seed=self.seed)
        training = self.model.training
        self.model.eval()
        for batch in self.watched.batches:
            collector.add(self._hidden(batch), list(batch.patches.values()))
        self.model.train(training)
        try:
            found = collector.finish()
        except DataError as error:  # the tokens of every image are alike by now, perhaps
            tqdm.write(f"warning: CKNNA is not measured here: {error}", file=sys.stderr)
            return {}
        logs: dict[str, float] = {}
        for row, layer in enumerate(self.layers):
            for column, name in enumerate(self.watched.batches[0].patches):
                interval = found.intervals[row][column]
                null = null_of(interval.estimate, found.nulls[:, row, column])
                values = {"cknna": interval.estimate, "cknna_low": interval.low, "cknna_high": interval.high}
                logs |= {f"{key}/layer_{layer}/{name}": value for key, value in values.items()}
                logs |= {f"cknna_null_mean/layer_{layer}/{name}": null.mean, f"cknna_null_q95/layer_{layer}/{name}": null.q95}
        return logs | {"cknna_n": found.n, "cknna_k": self.settings.k, "cknna_images": len(collector.scored)}

    def _hidden(self, batch: WatchedBatch) -> list[list[list[Tensor]]]:
        """The visual tokens of each layer, [layer][image][raster]."""
        kept: dict[int, Tensor] = {}

        def keep(layer: int) -> Callable[..., None]:
            def hook(_: nn.Module, __: object, output: Any) -> None:
                kept[layer] = output[0] if isinstance(output, tuple) else output

            return hook

        handles = [self.blocks[layer - 1].register_forward_hook(keep(layer)) for layer in self.layers]
        try:
            self.model(**send_to_device(batch.inputs, next(self.model.parameters()).device))
        finally:
            for handle in handles:
                handle.remove()
        return [[[kept[layer][row, index.to(kept[layer].device)].float().cpu() for index in image] for row, image in batch.places] for layer in self.layers]


def subset_alignment(recipe: Recipe, prepared: Prepared | PreparedStudent) -> tuple[SubsetAlignment | None, list[str]]:
    """What measures CKNNA during training; a run that cannot have it, such as a baseline without a VFM at hand, goes on, and a sentence says so."""
    if recipe.monitor.cknna_images == 0:
        return None, []
    try:
        subset = SubsetAlignment(recipe, prepared)
        few = f"CKNNA during training leaves out {subset.left_out} of {subset.left_out + subset.images} images, which have too few visual tokens for it"
        return subset, [few] if subset.left_out else []
    except (ConfigError, DataError, WeightsError, UnknownNameError) as error:
        return None, [f"CKNNA is not measured during training: {error}"]
