"""The subclass of transformers' Trainer: both losses and their log, evaluation, checkpoints."""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import Sampler
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from trainer import distributed
from trainer.evaluation import metrics_of
from trainer.monitor.cknna import CknnaMonitor, build_cknna_monitor
from trainer.monitor.guards import FiniteCheck, ImageCheck, check_token_counts
from trainer.monitor.progress import LastLog, Progress
from trainer.monitor.warnings import EarlyWarnings, warn, warn_once
from trainer.objectives import weight_at
from trainer.output.checkpoints import UNFINISHED, publish_checkpoint, write_sources
from trainer.output.model_folder import load_model, save_model
from trainer.prefetch import Prefetched
from trainer.recipe import Recipe
from trainer.setups.base import Setup
from trainer.training_arguments import training_arguments
from workbench.errors import RunError
from workbench.mllm.conversation import IGNORED
from workbench.training_folder import BEST, BEST_FILE, best_of


class AlignmentTrainer(Trainer):
    """Trainer that adds the weighted alignment loss, logs both losses, and evaluates.

    It trains on packed questions and on conversations alike; their differences are in the `Setup`.

    An optimizer step is the same for any number of processes and accumulated batches, because both losses are means
    over the global batch: the language-model loss over its answer tokens, the alignment loss over its visual tokens
    (`relation`: over its images and tiles). With `loss_average: microbatch` the language-model loss is the mean of the
    means of all forward passes, which depends on how the batch is divided. Each process and accumulated batch
    contributes its share of the mean. Since gradients are averaged over the processes, each share is multiplied by
    their number.
    """

    def __init__(
        self, *, recipe: Recipe, setup: Setup, watched: tuple[CknnaMonitor | None, list[str]], **kwargs: Any
    ) -> None:
        self.recipe, self.setup = recipe, setup
        # since the last row of the log:
        self._loss_sums: dict[str, Tensor] = {}
        self._steps = 0  # optimizer steps
        self._aligned_steps: Tensor | int = 0  # optimizer steps with an image
        self._answers_cut: Tensor | int = 0  # conversations that max_length left without an answer
        # of the current optimizer step:
        self._aligned_items: Tensor | None = None  # what the alignment loss is a mean over, in the global batch
        self._microbatches: Tensor | int = 1  # of all processes, those that have an answer
        self._batches: list[dict[str, Tensor]] = []  # of this process
        self._finite = FiniteCheck(recipe.output_dir)
        self._images = ImageCheck(setup.model.base)
        self._saving = False
        self._started, self._seconds_before = time.monotonic(), 0.0
        self.trained_for, self.evaluated_at = 0.0, -1  # seconds; optimizer step of the last evaluation
        self.subset, self.warnings = watched[0], [*watched[1], *setup.warnings(distributed.count())]
        collator = check_token_counts(setup.collate, setup.model.config.image_token_id)
        arguments: TrainingArguments = kwargs["args"]
        # one process uses one GPU: with several visible, transformers would multiply the batch and split it over them
        arguments._n_gpu = min(arguments.n_gpu, 1)
        super().__init__(model=setup.model, train_dataset=setup.train, data_collator=collator, **kwargs)
        # bfloat16 is autocast around float32 weights with FSDP too: FSDP's own mixed precision would round the averaged
        # gradients, and the losses in the log
        if self.is_fsdp_enabled:
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
        self.prefetching = self.args.device.type == "cuda"
        self._prefetched: Prefetched | None = None
        self.progress = Progress(recipe.output_dir, recipe.optim.steps)
        self.add_callback(self.progress)
        self.add_callback(LastLog())
        if recipe.optim.warmup >= recipe.optim.steps:
            self.warnings.append(
                f"optim.warmup is {recipe.optim.warmup} of {recipe.optim.steps} steps, so the learning rate never"
                f" reaches {recipe.optim.learning_rate:g}: use fewer warm-up steps"
            )
        self.add_callback(EarlyWarnings(recipe.monitor.head_steps, self.warnings, lambda: bool(self._aligned_items)))
        self.model_accepts_loss_kwargs = True  # the model divides by the answer tokens of the accumulated batch

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return this batch's share of L = L_LM + lambda * L_VRA, times the number of processes.

        The gradients are then averaged over the processes.
        """
        by_microbatch = self.recipe.optim.loss_average == "microbatch"
        output = model(**inputs, num_items_in_batch=None if by_microbatch else num_items_in_batch)
        lm_loss = output.lm_loss / self._microbatches if by_microbatch else output.lm_loss
        loss = lm_loss
        if self.accelerator.sync_gradients:
            self._steps += 1
            self._aligned_steps = self._aligned_steps + (
                0 if self._aligned_items is None else (self._aligned_items > 0).int()
            )
        self._add_to_log("lm_loss", lm_loss)
        terms = {"lm_loss": lm_loss}
        if output.alignment_loss is not None:
            assert self._aligned_items is not None
            items = self._count_aligned(inputs)
            alignment_loss = output.alignment_loss * items / self._aligned_items
            loss = loss + self.alignment_weight(self.state.global_step) * alignment_loss
            self._add_to_log("alignment_loss", alignment_loss)
            terms |= {"alignment_loss": alignment_loss}
            if len(output.alignment_losses) > 1:
                for name, value in output.alignment_losses.items():
                    self._add_to_log(f"alignment_loss/{name}", value * items / self._aligned_items)
        if model.training:
            self._images.check(lm_loss, inputs, self.state.global_step + 1)
            self._finite.add(loss, terms, inputs, self.state.global_step + 1)
            self._batches.append(inputs)
        return loss * self.accelerator.num_processes

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Tensor | float | None = None) -> float:
        """Return the norm of the gradient, which stops the training if it is not finite."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None:
            value = torch.as_tensor(norm)
            batch = self._batches[0] if len(self._batches) == 1 else self._batches
            self._finite.add(value, {"grad_norm": value}, batch, self.state.global_step + 1)
        self._batches = []
        return norm  # type: ignore[no-any-return]

    def _get_learning_rate(self) -> float:
        """Return the rate that `optim.learning_rate` becomes at this step: that of the last parameter group.

        The first one, which transformers would log, is the projector's and may have another rate.
        """
        assert self.lr_scheduler is not None
        return float(self.lr_scheduler.get_last_lr()[-1])

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | int | None]:
        """Return the batches of the next optimizer step, and over how many tokens its loss is a mean.

        With a GPU, they were prepared in a thread during the step before.
        """
        if self.prefetching:
            if self._prefetched is None or self._prefetched.source is not epoch_iterator:
                self._prefetched = Prefetched(epoch_iterator, num_batches)
            epoch_iterator = self._prefetched
        return super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[no-any-return]

    def _wait_for_prefetching(self) -> None:
        if self._prefetched is not None:
            self._prefetched.wait()

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor:
        """Count the answer tokens of the global batch and, for the losses and the log, three more quantities.

        These are what the alignment loss is a mean over, the conversations that max_length left without an answer, and
        the forward passes with an answer.
        """
        is_answer = [batch["labels"].ne(IGNORED) for batch in batch_samples]
        counts = [
            torch.stack([mask.sum(), self._count_aligned(batch), (~mask.any(1)).sum(), mask.any().long()])
            for mask, batch in zip(is_answer, batch_samples, strict=True)
        ]
        tokens, self._aligned_items, cut, microbatches = self.accelerator.reduce(
            torch.stack(counts).sum(0).to(device, non_blocking=True), "sum"
        )
        self._answers_cut = self._answers_cut + cut
        self._microbatches = microbatches.clamp(min=1)
        return tokens

    def _count_aligned(self, batch: dict[str, Any]) -> Tensor:
        """Count the visual tokens of a batch or, for `relation`, its images and tiles."""
        return self.setup.count_aligned(batch).to(batch["labels"].device, non_blocking=True)

    def _get_train_sampler(self, train_dataset: object = None) -> Sampler[int]:
        return self.setup.sampler(distributed.count())

    def alignment_weight(self, step: int) -> float:
        """Return lambda at optimizer step `step`, counted from 0."""
        alignment = self.recipe.alignment
        return weight_at(
            step,
            steps=self.recipe.optim.steps,
            weight=alignment.weight,
            schedule=alignment.schedule,
            final=alignment.final_weight or 0.0,
            warmup=alignment.warmup,
        )

    def _add_to_log(self, name: str, value: Tensor) -> None:
        self._loss_sums[name] = self._loss_sums.get(name, torch.zeros((), device=value.device)) + value.detach()

    def _logged_losses(self) -> list[str]:
        """Return the names of the logged losses, the same in every process, whether its batches have images or not."""
        alignment = self.setup.model.alignment
        if alignment is None:
            return ["lm_loss"]
        each = [f"alignment_loss/{name}" for name in alignment.names]
        return ["lm_loss", "alignment_loss", *(each if len(each) > 1 else [])]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log a row; a row of training has the mean of each loss over the steps since the row before."""
        if "train_runtime" in logs:  # the Trainer's final summary, which counts only the steps since a resume
            return
        self._finite.check()
        self.state.epoch = (
            self.state.global_step * self.recipe.optim.images(distributed.count()) / len(self.setup.train)
        )
        if "loss" in logs:
            names, zero = self._logged_losses(), torch.zeros((), device=self.args.device)
            totals = self.accelerator.reduce(torch.stack([self._loss_sums.get(name, zero) for name in names]), "sum")
            aligned = int(self._aligned_steps)
            steps = [self._steps if name == "lm_loss" else aligned for name in names]
            logs |= {
                name: float(total / count) for name, total, count in zip(names, totals, steps, strict=True) if count
            }
            if self.recipe.data.max_length is not None:
                logs["answers_cut"], self._answers_cut = int(self._answers_cut), 0
            if self.recipe.alignment.aligned:
                logs["alignment_weight"] = self.alignment_weight(self.state.global_step - 1)  # of the latest step
            self._loss_sums, self._steps, self._aligned_steps = {}, 0, 0
        logs["seconds"] = self.seconds()
        super().log(logs, start_time)

    def seconds(self) -> float:
        """Return the seconds spent training, including those of interrupted runs before this one."""
        return self._seconds_before + time.monotonic() - self._started

    def run(self, checkpoint: Path | None = None, state: TrainerState | None = None) -> None:
        """Train to the last step and evaluate there.

        Args:
            checkpoint: where to resume; None starts from the beginning.
            state: of the Trainer in the checkpoint. If it is that of the last step, the model is only evaluated.
        """
        if state is not None and state.log_history:
            self._seconds_before = next(
                (row["seconds"] for row in reversed(state.log_history) if "seconds" in row), 0.0
            )
        if state is not None and state.global_step >= self.recipe.optim.steps:
            self._restore_last_step(state)
        else:
            # all ranks have built the same model by now; from here on, each needs its own random dropout
            torch.manual_seed(self.recipe.seed + 1_000_003 * distributed.rank())
            try:
                self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
                self._finite.check()
            finally:
                self.progress.close()
        self.trained_for = self.seconds()
        if self.evaluated_at != self.recipe.optim.steps:  # the Trainer evaluates at its last step by itself
            self.evaluate()
        if self.recipe.keep_best:
            self._warn_of_lost_best()

    def _warn_of_lost_best(self) -> None:
        """Warn if an evaluation had a higher score than `best/`, whose model an interrupted part of the run replaced.

        That happens only if the resumed run did not repeat this part to the bit.
        """
        best = distributed.on_main(best_of, self.recipe.output_dir)
        scores = {
            row["step"]: row["accuracy/mean"] if "accuracy/mean" in row else -row["val_lm_loss"]
            for row in self.state.log_history
            if "accuracy/mean" in row or "val_lm_loss" in row
        }
        step = max(scores, key=lambda number: scores[number])
        if best and scores[step] > best["score"] + 1e-9:
            warn(
                self.state,
                f"best/ holds step {best['step']:g}, but step {step} had the higher score {scores[step]:g}: its model"
                " was replaced before the run was interrupted, and the resumed run did not repeat that part to the bit",
            )

    def _restore_last_step(self, state: TrainerState) -> None:
        """Continue from a checkpoint of the last step: drop the evaluation of that step, which is repeated."""
        state.log_history = [
            row for row in state.log_history if row["step"] < state.global_step or "lm_loss" in row or "warning" in row
        ]
        self.state = state
        warn_once(state, self.warnings)  # as at the beginning of a training
        # wrap the forward pass as training does, so that the evaluation has the precision of an uninterrupted run
        if self.accelerator.native_amp:
            self.accelerator.prepare_model(self.setup.model, evaluation_mode=True)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint to a temporary folder and, once every process is done, move it to its place.

        Raises:
            RunError: it cannot be written, such as on a full disk; nothing of it remains.
        """
        self._finite.check()
        self._wait_for_prefetching()
        folder, name = self.recipe.output_dir, f"checkpoint-{self.state.global_step}"
        self._saving = True
        distributed.together(
            lambda: self._write(lambda: super(AlignmentTrainer, self)._save_checkpoint(*args, **kwargs), name)
        )
        self._saving = False

        def publish() -> None:
            self._write(lambda: write_sources(folder / UNFINISHED / name, self.setup.record), name)
            self._write(lambda: self.setup.write_extras(folder / UNFINISHED / name), name)
            publish_checkpoint(folder, name, self.recipe.keep_checkpoints)

        distributed.on_main(publish)

    def _write(self, action: Callable[[], None], name: str) -> None:
        """Run an action that writes checkpoint `name`; if it fails, remove the checkpoint and raise a RunError."""
        try:
            action()
        except (OSError, SafetensorError, RuntimeError) as error:
            # torch reports a full disk as a RuntimeError with one of these phrases
            if isinstance(error, RuntimeError) and not re.search("PytorchStreamWriter|unexpected pos", str(error)):
                raise
            folder = self.recipe.output_dir
            shutil.rmtree(folder / UNFINISHED / name, ignore_errors=True)
            reason = " ".join(str(error).split())[:120]
            raise RunError(
                f"cannot write checkpoint {folder / name} ({reason}): once this is fixed, resume from the previous"
                " checkpoint with --resume"
            ) from error

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.recipe.output_dir / UNFINISHED) if self._saving else str(super()._get_output_dir(trial))

    def create_optimizer(self, *args: object, **kwargs: object) -> torch.optim.Optimizer:
        """Return AdamW on the parameter groups of the setup."""
        if self.optimizer is None:
            optim = self.recipe.optim
            self.optimizer = torch.optim.AdamW(
                self.setup.parameter_groups(), lr=optim.learning_rate, betas=(optim.beta1, optim.beta2), fused=True
            )
        return self.optimizer

    def evaluate(self, *args: object, **kwargs: object) -> dict[str, float]:
        """Evaluate on the validation split: accuracies by question type, losses, and CKNNA on its first images."""
        self._finite.check()
        self._wait_for_prefetching()
        evaluation = self.setup.evaluate()
        metrics = metrics_of(evaluation, self.recipe.seed)
        self.log(metrics | (self.subset.measure() if self.subset is not None else {}))
        if self.recipe.keep_best:
            self._keep_best(evaluation.score)
        self.evaluated_at = self.state.global_step
        # without this event the Trainer would evaluate the last step twice
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the whole model in the main process, after gathering its weights where they are sharded."""
        folder, state = Path(output_dir or self.recipe.output_dir), self.whole_state()
        name = folder.name
        distributed.on_main(
            lambda: self._write(lambda: save_model(self.setup.model, self.setup.processor, folder, state), name)
        )

    def _keep_best(self, score: float) -> None:
        """Write the model to `best/` if its validation score is the highest so far.

        A stored model of this step or a later one is of an interrupted part of the run that is being repeated, maybe
        not to the bit: it does not count.
        """
        folder, now = self.recipe.output_dir, self.state.global_step

        def is_best() -> bool:
            best = best_of(folder)
            return score > (best["score"] if best and best["step"] < now else -math.inf)

        if not distributed.on_main(is_best):
            return
        state, unfinished = self.whole_state(), folder / UNFINISHED / BEST

        def write() -> None:
            shutil.rmtree(unfinished, ignore_errors=True)  # left by a run that was killed
            unfinished.mkdir(parents=True)
            save_model(self.setup.model, self.setup.processor, unfinished, state)
            (unfinished / BEST_FILE).write_text(json.dumps({"step": self.state.global_step, "score": score}))
            publish_checkpoint(folder, BEST, None)

        distributed.on_main(lambda: self._write(write, BEST))

    def whole_state(self) -> dict[str, Tensor]:
        """Return the model's tensors; with a sharded model all processes must call this, and only rank 0 gets them."""
        if distributed.strategy() == "ddp" or (self.model_wrapped is self.setup.model and not self.is_fsdp_enabled):
            return self.setup.model.state_dict()
        return self.accelerator.get_state_dict(self.model_wrapped)  # type: ignore[no-any-return]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_model(self.setup.model, Path(resume_from_checkpoint))


def build_trainer(recipe: Recipe, setup: Setup) -> AlignmentTrainer:
    """Return the Trainer of a recipe for the present number of processes; it writes nothing yet."""
    if recipe.optim.precision == "bfloat16" and distributed.strategy().startswith("zero"):
        # autocast as with the other strategies: DeepSpeed's own bfloat16 would round the weights
        setup.model.forward = convert_outputs_to_fp32(
            torch.autocast(distributed.device().split(":")[0], torch.bfloat16)(setup.model.forward)
        )  # type: ignore[method-assign]
    watched = build_cknna_monitor(recipe, setup)  # before the arguments: it loads VFMs, which ZeRO-3 must not shard
    arguments = training_arguments(recipe)
    trainer = AlignmentTrainer(recipe=recipe, setup=setup, watched=watched, args=arguments, eval_dataset=setup.val)
    trainer.pop_callback(PrinterCallback)
    return trainer
