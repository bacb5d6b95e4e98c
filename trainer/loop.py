"""The training run: data and features, the Trainer subclass, evaluation, and what is written to the output folder."""

from __future__ import annotations

import json
import shutil
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlavaForConditionalGeneration, LlavaProcessor, Trainer, TrainerCallback, TrainerState, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from trainer.alignment import attach_alignment, weight_at
from trainer.config import AlignmentConfig, Recipe
from trainer.data import PackedDataset, Packer, collate, first_questions
from trainer.features import DerivedFeatures, Features, frozen_features
from trainer.language import check_language
from trainer.lora import adapters, add_lora, check_peft, merge, merged_state
from trainer.model import (
    IGNORED,
    AlignedForConditionalGeneration,
    build_llava,
    build_processor,
    connector_inputs,
    input_deviation,
    load_start,
    start_connector,
)
from trainer.output import RECIPE_FILE, alone, check_output, check_same_recipe, write_recipe
from workbench.config import as_mapping, parse
from workbench.data import Dataset, load_data
from workbench.errors import ConfigError, RunError
from workbench.files import HEAD_FILE, atomic_file, atomic_folder, make_folder
from workbench.mllm.residual import FILE as RESIDUAL_FILE
from workbench.mllm.residual import attach_residual, save_residual
from workbench.runs import environment
from workbench.stats import bootstrap_ci
from workbench.training import LOG_FILE, RECORD_FILE
from workbench.vfm import VFM, find_vfm, load_vfm
from workbench.weights import CATALOGUE as WEIGHTS
from workbench.weights import check_unchanged, load_weights, weights_folder

LORA_FILE = "trained.safetensors"  # in a checkpoint of a LoRA run: what is trained, exactly; its model.safetensors is merged


@dataclass(frozen=True)
class Prepared:
    """Everything a run needs before its first step."""

    model: AlignedForConditionalGeneration
    processor: LlavaProcessor
    train: PackedDataset
    val: PackedDataset
    input_rate: float
    record: dict[str, object]


def prepare(recipe: Recipe) -> Prepared:
    """Build model, data and features. The language model's initial weights depend on the seed only, never on the alignment."""
    train, val = load_data(recipe.data.train, limit=recipe.data.limit_train), load_data(recipe.data.val, limit=recipe.data.limit_val)
    processor = build_processor(recipe.model, sorted(train.vocabulary | val.vocabulary))
    set_seed(recipe.seed)
    llava, parts = build_llava(recipe.model, processor)
    recipe.check_layer(len(llava.model.language_model.layers))
    record: dict[str, object] = {"tower": recipe.model.tower, "data": train.fingerprint, "val": val.fingerprint}
    record |= {f"{part}_fingerprint": value for part, value in parts.items()}

    llava.eval()
    key = (parts["tower"], recipe.model.tower_features, recipe.model.image_size)
    train_inputs, val_inputs = (
        frozen_features(data, key, lambda images: connector_inputs(llava, processor, images), what=recipe.model.tower, mode=recipe.data.features)
        for data in (train, val)
    )
    side = recipe.model.image_size // processor.patch_size
    sample = train_inputs.rows(range(min(256, len(train_inputs))))  # a few thousand tokens fix mean and deviation well
    if recipe.start is None:
        start_connector(llava, sample, side)
    else:
        record["start_fingerprint"] = load_start(llava, processor, recipe.start)
        check_unchanged(recipe.model.tower, llava.model.vision_tower.state_dict(), load_weights(recipe.model.tower))
    input_rate = llava.lm_head.in_features / sample.shape[-1] / input_deviation(sample)

    if recipe.model.train == "lora":
        add_lora(llava, recipe.model.lora)
        llava.model.multi_modal_projector.requires_grad_(True)
    settings, residual = recipe.alignment, None
    if settings.residual != "none":
        residual = attach_residual(llava, settings.residual, sorted(settings.layer), train_inputs.shape[-1])
    packer = Packer(processor, train_inputs.shape[1])
    few_train, few_val = (first_questions(data, recipe.data.questions) for data in (train, val))
    val_set = PackedDataset(few_val, packer, val_inputs)
    if not settings.aligned:
        model = AlignedForConditionalGeneration(llava, None, residual)
        return Prepared(model, processor, PackedDataset(few_train, packer, train_inputs), val_set, input_rate, record)
    targets: dict[str, Features] | None = None
    if settings.target == "projector":
        dims = {"projector": llava.lm_head.in_features}
    else:
        if settings.target == "vfm":
            targets, vfm_record = _vfm_features(recipe, train, (side, side))
            record |= vfm_record
        else:
            targets = {"encoder": train_inputs}
        targets = {name: _controlled(settings, values, recipe.seed) for name, values in targets.items()}
        dims = {name: values.shape[-1] for name, values in targets.items()}
    alignment = attach_alignment(
        llava, layers=settings.layer, dims=dims, objective=_objective(settings), heads=settings.heads, where=settings.where, hidden=settings.hidden
    )
    model = AlignedForConditionalGeneration(llava, alignment, residual, to_projector=settings.target == "projector")
    return Prepared(model, processor, PackedDataset(few_train, packer, train_inputs, targets), val_set, input_rate, record)


def _objective(settings: AlignmentConfig) -> Literal["cosine", "relation"]:
    assert settings.objective != "none"
    return settings.objective


def _vfm_features(recipe: Recipe, data: Dataset, grid: tuple[int, int]) -> tuple[dict[str, Features], dict[str, object]]:
    """Features (image, token, dim) of `data` by VFM, and the VFMs' record: plain values for one, lists for several."""
    features, records = {}, []
    for name in recipe.alignment.vfm:
        vfm = load_vfm(name, teacher_norm=recipe.alignment.teacher_norm)
        key = (vfm.entry.identity(), grid)
        features[name] = frozen_features(data, key, partial(_tokens, vfm, grid), what=vfm.name, mode=recipe.data.features)
        records.append(vfm.record())
    return features, dict(records[0]) if len(records) == 1 else {key: [record[key] for record in records] for key in records[0]}


def _tokens(vfm: VFM, grid: tuple[int, int], images: list[Image.Image]) -> Tensor:
    return vfm(images, grid=grid).tokens()


def _controlled(settings: AlignmentConfig, targets: Features, seed: int) -> Features:
    """Targets with the controls that the recipe asks for."""
    if settings.centre:
        targets = DerivedFeatures(targets, minus=targets.mean())
    if settings.images == "others":
        order = _cyclic(torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed)))
        targets = DerivedFeatures(targets, order=order.tolist())
    return targets


def _cyclic(order: Tensor) -> Tensor:
    """A permutation without fixed points: each element goes to the next one in `order`."""
    result = torch.empty_like(order)
    result[order] = order.roll(1)
    return result


class AlignmentTrainer(Trainer):
    """Trainer that adds the weighted alignment loss, logs both losses, and evaluates packed questions."""

    def __init__(self, *, recipe: Recipe, prepared: Prepared, **kwargs: Any) -> None:
        self.recipe, self.prepared = recipe, prepared
        self._sums: dict[str, Tensor] = {}
        self._steps = 0  # optimizer steps since the last log
        self._started, self._seconds_before = time.monotonic(), 0.0
        self.evaluation: pd.DataFrame | None = None
        super().__init__(model=prepared.model, train_dataset=prepared.train, data_collator=collate, **kwargs)
        self.model_accepts_loss_kwargs = True  # the LM loss is normalised over the accumulated batch, in the model

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """L = L_LM + lambda * L_VRA; L_VRA is a mean, so each accumulated part carries its share."""
        output = model(**inputs, num_items_in_batch=num_items_in_batch)
        loss = output.lm_loss
        self._steps += self.accelerator.sync_gradients
        self._note("lm_loss", output.lm_loss)
        if output.alignment_loss is not None:
            share = output.alignment_loss / self.current_gradient_accumulation_steps
            loss = loss + self.alignment_weight(self.state.global_step) * share
            self._note("alignment_loss", share)
            if len(output.alignment_losses) > 1:
                for name, part in output.alignment_losses.items():
                    self._note(f"alignment_loss/{name}", part / self.current_gradient_accumulation_steps)
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
        """Accuracy per question type on the validation split."""
        self.evaluation = answer_packed(self.prepared.model, self.prepared.val, self.recipe.optim.batch_size)
        accuracy = self.evaluation.groupby("category", sort=False)["correct"].mean()
        metrics = {f"accuracy/{name}": float(value) for name, value in accuracy.items()} | {"accuracy/mean": float(accuracy.mean())}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)  # or the last step is evaluated twice
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder = Path(output_dir or self.recipe.output_dir)
        save_model(self.accelerator.unwrap_model(self.model), self.prepared.processor, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Load through from_pretrained: the checkpoint has the hub's key layout, which a plain load with strict=False drops in silence."""
        target = self.accelerator.unwrap_model(model or self.model)
        folder = Path(resume_from_checkpoint)
        if adapters(target.llava):
            _load_trained(target.llava, load_file(folder / LORA_FILE))
        else:
            target.llava.load_state_dict(LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).state_dict())
        if (heads := _heads(target)) is not None:
            heads.load_state_dict(load_file(folder / HEAD_FILE))
        if target.residual is not None and len(target.residual.adapters):
            target.residual.adapters.load_state_dict(load_file(folder / RESIDUAL_FILE))


def save_model(model: AlignedForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Write a plain transformers folder, LoRA merged, with the alignment heads and the residual's adapters beside it."""
    if adapters(model.llava):
        model.llava.save_pretrained(folder, state_dict=merged_state(model.llava))
        save_file(_trained(model.llava), folder / LORA_FILE)
    else:
        model.llava.save_pretrained(folder)
    processor.save_pretrained(folder)
    if (heads := _heads(model)) is not None:
        save_file(heads.state_dict(), folder / HEAD_FILE)
    if model.residual is not None:
        save_residual(model.residual, folder)


def _heads(model: AlignedForConditionalGeneration) -> torch.nn.Module | None:
    """What HEAD_FILE holds: one head by itself (`0.weight`), several by number (`1.0.weight`), layer by layer, within a layer VFM by VFM."""
    if model.alignment is None or not len(model.alignment.heads):
        return None
    return model.alignment.heads[0] if len(model.alignment.heads) == 1 else model.alignment.heads


def _trained(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}


def _load_trained(model: torch.nn.Module, saved: dict[str, Tensor]) -> None:
    """Put back what `_trained` gave; the rest is as the recipe builds it.

    Raises:
        RunError: other tensors than this recipe trains.
    """
    own = _trained(model)
    if own.keys() != saved.keys():
        raise RunError(f"the checkpoint holds other trained tensors than this recipe has, first {min(own.keys() ^ saved.keys())}")
    for name, value in own.items():
        value.copy_(saved[name])


@torch.inference_mode()
def answer_packed(model: AlignedForConditionalGeneration, data: PackedDataset, batch_size: int) -> pd.DataFrame:
    """Whether each question is answered right by greedy decoding: every answer token and the end token is the most likely one.

    Returns:
        One row per sample: id, image_id, category, answer, correct, chance (one over the number of options).
    """
    was_training = model.training
    model.eval()
    rows, scenes = [], iter(data.data.scenes)
    for batch in DataLoader(data, batch_size=batch_size, collate_fn=collate):
        device = next(model.parameters()).device
        output = model(**{name: value.to(device) for name, value in batch.items()})
        right = (output.logits.argmax(-1).cpu() == batch["labels"]) | (batch["labels"] == IGNORED)
        for row in range(len(right)):
            for number, sample in enumerate(next(scenes), start=1):
                correct = bool(right[row][batch["segments"][row] == number].all())
                rows.append((sample.id, sample.image_id, sample.category, sample.answer, correct, 1 / max(1, len(sample.options))))
    model.train(was_training)
    return pd.DataFrame(rows, columns=["id", "image_id", "category", "answer", "correct", "chance"])


def accuracy_table(evaluation: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Accuracy per question type with a 95 % interval over images: columns category, accuracy, low, high, n, n_images, chance, seed."""
    rows = []
    for category, part in evaluation.groupby("category"):
        interval = bootstrap_ci(part["correct"].to_numpy(), groups=part["image_id"].tolist(), seed=seed)
        row = {"category": category, "accuracy": interval.estimate, "low": interval.low, "high": interval.high, "n": len(part), "n_images": interval.n}
        rows.append(row | {"chance": part["chance"].mean(), "seed": seed})
    return pd.DataFrame(rows)


class Progress(TrainerCallback):
    """One line per log on stderr; keeps the training log on disk as parquet."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps, self.start = folder, steps, time.monotonic()

    def on_log(self, args: TrainingArguments, state: object, control: object, logs: dict[str, float] | None = None, **_: object) -> None:
        shown = {"lm_loss": "lm", "alignment_loss": "align", "accuracy/mean": "val accuracy"}
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
    with atomic_file(folder / RECORD_FILE) as partial:
        partial.write_text(json.dumps(record, indent=2))
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
