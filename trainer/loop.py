"""The training run: the Trainer subclass, and what is written to the output folder."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from trainer.alignment import weight_at
from trainer.checkpoint import load_model, save_model
from trainer.config import Recipe
from trainer.evaluation import metrics_of, summary
from trainer.lora import adapters, check_peft, merge
from trainer.output import RECIPE_FILE, alone, check_output, check_same_recipe, write_recipe
from trainer.prepare import Prepared, prepare
from trainer.student import PreparedStudent, prepare_student
from workbench.config import as_mapping, parse
from workbench.errors import ConfigError, RunError
from workbench.files import atomic_file, atomic_folder, make_folder
from workbench.runs import environment
from workbench.training import LOG_FILE, RECORD_FILE
from workbench.vfm import find_vfm
from workbench.weights import CATALOGUE as WEIGHTS

Ready = Prepared | PreparedStudent


class AlignmentTrainer(Trainer):
    """Trainer that adds the weighted alignment loss, logs both losses, and evaluates; packed questions and conversations differ in what is prepared only."""

    def __init__(self, *, recipe: Recipe, prepared: Ready, **kwargs: Any) -> None:
        self.recipe, self.prepared = recipe, prepared
        self._sums: dict[str, Tensor] = {}
        self._steps = 0  # optimizer steps since the last log
        self._started, self._seconds_before = time.monotonic(), 0.0
        self.evaluation: pd.DataFrame | None = None
        super().__init__(model=prepared.model, train_dataset=prepared.train, data_collator=prepared.collate, **kwargs)
        self.model_accepts_loss_kwargs = True  # the LM loss is normalised over the accumulated batch, in the model

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """L = L_LM + lambda * L_VRA; L_VRA is a mean, so each accumulated part carries its share."""
        inputs = dict(inputs)
        part = inputs.pop("share", None)  # of a step's visual tokens; packed images have equally many
        part = 1 / self.current_gradient_accumulation_steps if part is None else part
        inputs.pop("aligned", None)
        output = model(**inputs, num_items_in_batch=num_items_in_batch)
        loss = output.lm_loss
        self._steps += self.accelerator.sync_gradients
        self._note("lm_loss", output.lm_loss)
        if output.alignment_loss is not None:
            share = output.alignment_loss * part
            loss = loss + self.alignment_weight(self.state.global_step) * share
            self._note("alignment_loss", share)
            if len(output.alignment_losses) > 1:
                for name, value in output.alignment_losses.items():
                    self._note(f"alignment_loss/{name}", value * part)
        return loss

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> tuple[list[Any], Tensor | int | None]:
        """The batches of one step; each says which share of the step's visual tokens it holds, where these differ."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches and "aligned" in batches[0]:
            total = self.accelerator.gather(torch.tensor([sum(batch["aligned"] for batch in batches)], device=device)).sum().item()
            for batch in batches:
                batch["share"] = batch["aligned"] * self.accelerator.num_processes / max(1, total)  # processes average their gradients
        return batches, items

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.prepared.sampler(self.recipe, self.accelerator.num_processes) or super()._get_train_sampler(train_dataset)

    def alignment_weight(self, step: int) -> float:
        """lambda at optimiser step `step`, from 0."""
        own = self.recipe.alignment
        final = own.final_weight or 0.0
        return weight_at(step, steps=self.recipe.optim.steps, weight=own.weight, schedule=own.schedule, final=final, warmup=own.warmup)

    def _note(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums.get(name, torch.zeros((), device=value.device)) + value.detach()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= {name: (total / self._steps).item() for name, total in self._sums.items()}
            if self.recipe.alignment.aligned:
                logs["alignment_weight"] = self.alignment_weight(self.state.global_step - 1)  # of the last step that was made
            self._sums, self._steps = {}, 0
        logs["seconds"] = self.seconds()
        super().log(logs, start_time)

    def seconds(self) -> float:
        """Time spent training, that of the interrupted runs before this one included."""
        return self._seconds_before + time.monotonic() - self._started

    def run(self, checkpoint: str | None) -> None:
        """Train from `checkpoint` or from the beginning; a checkpoint of the last step needs no training."""
        state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json")) if checkpoint else None
        if state is not None and state.log_history:
            self._seconds_before = state.log_history[-1]["seconds"]
        if checkpoint is not None and state is not None and state.global_step >= self.recipe.optim.steps:
            self._load_from_checkpoint(checkpoint)
            self.state = state
            return
        self.train(resume_from_checkpoint=checkpoint)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint, or say in one sentence why not and leave none."""
        try:
            super()._save_checkpoint(*args, **kwargs)
        except (OSError, SafetensorError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not isinstance(error, OSError | SafetensorError) and "write" not in str(error) and "pos" not in str(error):
                raise
            folder = self.recipe.output_dir / f"checkpoint-{self.state.global_step}"
            shutil.rmtree(folder, ignore_errors=True)
            raise RunError(f"cannot write checkpoint {folder} ({' '.join(str(error).split())[:120]}); resume from the one before with --resume") from error

    def create_optimizer(self, *args: object, **kwargs: object) -> torch.optim.Optimizer:
        """AdamW on the groups of parameters that the model asks for."""
        if self.optimizer is None:
            optim = self.recipe.optim
            self.optimizer = torch.optim.AdamW(self.prepared.parameter_groups(optim), lr=optim.learning_rate, betas=(optim.beta1, optim.beta2))
        return self.optimizer

    def evaluate(self, *args: object, **kwargs: object) -> dict[str, float]:
        """Accuracy per question type on the validation split, or the loss on it."""
        self.evaluation = self.prepared.evaluate(self.recipe.optim.batch_size)
        metrics = metrics_of(self.evaluation)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)  # or the last step is evaluated twice
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder = Path(output_dir or self.recipe.output_dir)
        save_model(self.accelerator.unwrap_model(self.model), self.prepared.processor, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        load_model(self.accelerator.unwrap_model(model or self.model), Path(resume_from_checkpoint))


class Progress(TrainerCallback):
    """One line per log on stderr; keeps the training log on disk as parquet."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps, self.start = folder, steps, time.monotonic()

    def on_log(self, args: TrainingArguments, state: object, control: object, logs: dict[str, float] | None = None, **_: object) -> None:
        shown = {"lm_loss": "lm", "alignment_loss": "align", "accuracy/mean": "val accuracy", "val_lm_loss": "val lm"}
        parts = [f"{short} {logs[name]:.3f}" for name, short in shown.items() if logs and name in logs]
        if parts and state.is_world_process_zero:  # type: ignore[attr-defined]
            seconds = time.monotonic() - self.start
            sys.stderr.write(f"{self.folder.name}: step {state.global_step}/{self.steps}  {'  '.join(parts)}  {seconds:.0f} s\n")  # type: ignore[attr-defined]
            write_log(state.log_history, self.folder)  # type: ignore[attr-defined]


def write_log(history: list[dict[str, float]], folder: Path) -> None:
    """Store the Trainer's log history as training.parquet, one row per log."""
    with atomic_file(folder / LOG_FILE) as partial:
        pd.DataFrame(history).to_parquet(partial)


def train(recipe: Recipe, argv: list[str]) -> pd.DataFrame:
    """Run a recipe to its end and return the final evaluation; the folder then loads with transformers alone.

    Raises:
        RunError: output_dir already holds a training run and `resume` is not set, or there is nothing to resume.
    """
    folder = recipe.output_dir
    for name in () if recipe.model.released else (recipe.model.tower, recipe.model.language):
        if name is not None:
            WEIGHTS.get(name)
    if recipe.model.train == "lora":
        check_peft()
    if recipe.alignment.aligned and recipe.alignment.target == "vfm":
        for name in recipe.alignment.vfm:
            find_vfm(name, teacher_norm=recipe.alignment.teacher_norm)
    stage = recipe.start if recipe.start is not None and recipe.start.suffix == ".yaml" else None
    if stage is not None:
        recipe = replace(recipe, start=folder.parent / f"{stage.stem.split('_')[-1]}-s{recipe.seed}")
    checkpoint = check_output(folder, recipe)
    if stage is not None:
        _first_stage(stage, recipe, argv)
    with alone(folder):
        return _train(recipe, checkpoint, argv)


def _train(recipe: Recipe, checkpoint: str | None, argv: list[str]) -> pd.DataFrame:
    folder, optim = recipe.output_dir, recipe.optim
    prepared = prepare_student(recipe) if recipe.model.released else prepare(recipe)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=optim.steps,
        per_device_train_batch_size=optim.batch_size,
        gradient_accumulation_steps=optim.accumulation,
        learning_rate=optim.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": optim.final_rate},
        warmup_steps=optim.warmup,
        max_grad_norm=optim.max_grad_norm,
        logging_steps=recipe.log_every,
        eval_strategy="steps",
        eval_steps=recipe.eval_every,
        save_steps=recipe.save_every,
        save_total_limit=recipe.keep_checkpoints,
        seed=recipe.seed,
        data_seed=recipe.seed,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=list(recipe.report_to),
        dataloader_num_workers=0,
        dataloader_pin_memory=torch.cuda.is_available(),
        label_names=["labels"],
        bf16=optim.precision == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        logging_nan_inf_filter=False,
    )
    trainer = AlignmentTrainer(recipe=recipe, prepared=prepared, args=arguments, eval_dataset=prepared.val, callbacks=[Progress(folder, optim.steps)])
    if arguments.world_size > 1:
        raise ConfigError(f"{arguments.world_size} processes: expected 1, since training in several processes is not supported yet")
    trainer.pop_callback(PrinterCallback)
    make_folder(folder)
    write_recipe(folder, recipe)
    trainer.run(checkpoint)
    seconds = trainer.seconds()
    if optim.steps % recipe.eval_every or trainer.evaluation is None:
        trainer.evaluate()
    assert trainer.evaluation is not None
    model = trainer.accelerator.unwrap_model(trainer.model)
    prepared.check_frozen(recipe)
    if adapters(model.student):
        merge(model.student)  # what is stored is what is evaluated: merging rounds
        trainer.evaluation = prepared.evaluate(optim.batch_size)
    with atomic_folder(folder / "final") as partial:
        save_model(model, prepared.processor, partial)
    for file in (folder / "final").iterdir():
        file.replace(folder / file.name)
    (folder / "final").rmdir()
    write_log(trainer.state.log_history, folder)
    for name, table in (("evaluation", trainer.evaluation), ("accuracy", summary(trainer.evaluation, recipe.seed))):
        with atomic_file(folder / f"{name}.parquet") as partial:
            table.to_parquet(partial)
    record = {"recipe": as_mapping(recipe), "seconds": seconds, "steps_per_second": optim.steps / seconds, **prepared.record, **environment(argv)}
    with atomic_file(folder / RECORD_FILE) as partial:
        partial.write_text(json.dumps(record, indent=2))
    return trainer.evaluation


def _first_stage(stage: Path, recipe: Recipe, argv: list[str]) -> None:
    """Train the first stage that the recipe `stage` describes into `recipe.start`, unless it is there.

    Raises:
        ConfigError: what is there was trained from another recipe.
    """
    assert recipe.start is not None
    own = parse(Recipe, [], prog="first stage", recipe=stage)
    model = replace(recipe.model, train=own.model.train, lora=own.model.lora)  # its sizes, but not what this run trains of it
    own = replace(own, seed=recipe.seed, output_dir=recipe.start, data=recipe.data, model=model)
    if (recipe.start / RECIPE_FILE).exists():
        check_same_recipe(recipe.start, own)
    if not (recipe.start / RECORD_FILE).exists():
        train(replace(own, resume=(recipe.start / RECIPE_FILE).exists()), argv)
