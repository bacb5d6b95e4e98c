"""The training run: the Trainer subclass, and what is written to the output folder."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import LlavaForConditionalGeneration, Trainer, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from trainer.alignment import weight_at
from trainer.card import check_hub, push, write_card
from trainer.checkpoint import load_model, save_model
from trainer.config import Recipe
from trainer.data import collate
from trainer.evaluation import accuracy_table, answer_packed
from trainer.language import check_language
from trainer.lora import adapters, check_peft, merge
from trainer.monitor import EarlyWarnings, Progress, check_trackers, counted, stop_unless_finite, subset_alignment, warnings_of, write_log
from trainer.output import RECIPE_FILE, alone, check_output, check_same_recipe, write_recipe
from trainer.prepare import Prepared, prepare
from workbench.config import as_mapping, parse
from workbench.errors import ConfigError, RunError
from workbench.files import atomic_file, atomic_folder, make_folder
from workbench.runs import environment
from workbench.training import RECORD_FILE
from workbench.vfm import find_vfm
from workbench.weights import CATALOGUE as WEIGHTS
from workbench.weights import check_unchanged, load_weights, weights_folder


class AlignmentTrainer(Trainer):
    """Trainer that adds the weighted alignment loss, logs both losses, and evaluates packed questions."""

    def __init__(self, *, recipe: Recipe, prepared: Prepared, **kwargs: Any) -> None:
        self.recipe, self.prepared = recipe, prepared
        self._sums: dict[str, Tensor] = {}
        self._steps = 0  # optimizer steps since the last log
        self._started, self._seconds_before = time.monotonic(), 0.0
        self.evaluation: pd.DataFrame | None = None
        self.evaluated_at = -1
        self.subset, left_out = subset_alignment(recipe, prepared)  # before the seed is set again, since building a VFM draws random numbers
        collator = counted(collate, prepared.processor.image_token_id)
        super().__init__(model=prepared.model, train_dataset=prepared.train, data_collator=collator, **kwargs)
        self.add_callback(EarlyWarnings(recipe.monitor.head_steps, left_out))
        self.model_accepts_loss_kwargs = True  # the LM loss is normalised over the accumulated batch, in the model

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """L = L_LM + lambda * L_VRA; L_VRA is a mean, so each accumulated part carries its share."""
        output = model(**inputs, num_items_in_batch=num_items_in_batch)
        loss = output.lm_loss
        self._steps += self.accelerator.sync_gradients
        self._note("lm_loss", output.lm_loss)
        parts = {"lm_loss": output.lm_loss}
        if output.alignment_loss is not None:
            share = output.alignment_loss / self.current_gradient_accumulation_steps
            loss = loss + self.alignment_weight(self.state.global_step) * share
            self._note("alignment_loss", share)
            parts |= {"alignment_loss": share}
            if len(output.alignment_losses) > 1:
                for name, part in output.alignment_losses.items():
                    self._note(f"alignment_loss/{name}", part / self.current_gradient_accumulation_steps)
        if model.training:
            stop_unless_finite(loss, parts, inputs, self.recipe.output_dir, self.state.global_step + 1)
        return loss

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
            self._seconds_before = next((row["seconds"] for row in reversed(state.log_history) if "seconds" in row), 0.0)
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
        """AdamW; the connector's first weight, whose input has a small deviation, takes proportionally larger steps and no decay.

        Adam's steps have the size of the learning rate whatever the gradient, so this equals training on standardised inputs.
        """
        if self.optimizer is None:
            optim, trainable = self.recipe.optim, [(n, p) for n, p in self.prepared.model.named_parameters() if p.requires_grad]
            groups = [
                {
                    "params": [p for n, p in trainable if n.endswith("linear_1.weight")],
                    "lr": optim.learning_rate * self.prepared.input_rate,
                    "weight_decay": 0.0,
                },
                {"params": [p for n, p in trainable if p.ndim > 1 and not n.endswith("linear_1.weight")], "weight_decay": optim.weight_decay},
                {"params": [p for n, p in trainable if p.ndim == 1], "weight_decay": 0.0},
            ]
            self.optimizer = torch.optim.AdamW(groups, lr=optim.learning_rate, betas=(optim.beta1, optim.beta2))
        return self.optimizer

    def evaluate(self, *args: object, **kwargs: object) -> dict[str, float]:
        """Accuracy per question type on the validation split, and CKNNA on its first images."""
        self.evaluation = answer_packed(self.prepared.model, self.prepared.val, self.recipe.optim.batch_size)
        accuracy = self.evaluation.groupby("category", sort=False)["correct"].mean()
        metrics = {f"accuracy/{name}": float(value) for name, value in accuracy.items()} | {"accuracy/mean": float(accuracy.mean())}
        self.log(metrics | (self.subset.measure() if self.subset is not None else {}))
        self.evaluated_at = self.state.global_step
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)  # or the last step is evaluated twice
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder = Path(output_dir or self.recipe.output_dir)
        save_model(self.accelerator.unwrap_model(self.model), self.prepared.processor, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        load_model(self.accelerator.unwrap_model(model or self.model), Path(resume_from_checkpoint))


def train(recipe: Recipe, argv: list[str]) -> pd.DataFrame:
    """Run a recipe to its end and return the final evaluation; the folder then loads with transformers alone.

    Raises:
        RunError: output_dir already holds a training run and `resume` is not set, or there is nothing to resume.
    """
    folder = recipe.output_dir
    check_trackers(recipe.report_to)
    if recipe.push_to_hub is not None:
        check_hub(recipe.push_to_hub)
    WEIGHTS.get(recipe.model.tower)
    if recipe.model.language is not None:
        WEIGHTS.get(recipe.model.language)
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
    prepared = prepare(recipe)
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
        logging_nan_inf_filter=False,
    )
    progress = Progress(folder, optim.steps)
    trainer = AlignmentTrainer(recipe=recipe, prepared=prepared, args=arguments, eval_dataset=prepared.val, callbacks=[progress])
    if arguments.world_size > 1:
        raise ConfigError(f"{arguments.world_size} processes: expected 1, since training in several processes is not supported yet")
    trainer.pop_callback(PrinterCallback)
    make_folder(folder)
    write_recipe(folder, recipe)
    try:
        trainer.run(checkpoint)
    finally:
        progress.close()
    seconds = trainer.seconds()
    if trainer.evaluated_at != optim.steps:  # the Trainer evaluates at its last step by itself
        trainer.evaluate()
    assert trainer.evaluation is not None
    model = trainer.accelerator.unwrap_model(trainer.model)
    _check_frozen(recipe, model.llava)
    if adapters(model.llava):
        merge(model.llava)  # what is stored is what is evaluated: merging rounds
        trainer.evaluation = answer_packed(model, prepared.val, optim.batch_size)
    with atomic_folder(folder / "final") as partial:
        save_model(model, prepared.processor, partial)
    for file in (folder / "final").iterdir():
        file.replace(folder / file.name)
    (folder / "final").rmdir()
    write_log(trainer.state.log_history, folder)
    for name, table in (("evaluation", trainer.evaluation), ("accuracy", accuracy_table(trainer.evaluation, recipe.seed))):
        with atomic_file(folder / f"{name}.parquet") as partial:
            table.to_parquet(partial)
    record = {"recipe": as_mapping(recipe), "seconds": seconds, "steps_per_second": optim.steps / seconds, **prepared.record, **environment(argv)}
    record |= {"warnings": warnings_of(trainer.state), "cknna": trainer.subset.record if trainer.subset is not None else None}
    write_card(folder, record)
    with atomic_file(folder / RECORD_FILE) as partial:
        partial.write_text(json.dumps(record, indent=2))
    if recipe.push_to_hub is not None:
        push(folder, recipe.push_to_hub)
    return trainer.evaluation


def _check_frozen(recipe: Recipe, llava: LlavaForConditionalGeneration) -> None:
    """See that training left alone what it should.

    Raises:
        WeightsError: the tower, or the language model where only the connector is trained, no longer holds its pretrained values.
    """
    check_unchanged(recipe.model.tower, llava.model.vision_tower.state_dict(), load_weights(recipe.model.tower))
    if recipe.model.language is not None and recipe.model.train == "connector" and recipe.start is None:
        check_language(llava, weights_folder(recipe.model.language))


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
