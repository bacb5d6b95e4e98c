"""One training run, from a recipe to a finished folder."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor
from transformers import TrainerState

from trainer import distributed
from trainer.build.lora import adapters, merge
from trainer.card import origins, write_card
from trainer.checks import check_names, with_stage
from trainer.evaluation import Evaluation, summary
from trainer.hub import push
from trainer.loop import AlignmentTrainer, Ready, build_trainer
from trainer.monitor.progress import write_log
from trainer.monitor.warnings import warnings_of
from trainer.output.checkpoints import UNFINISHED, check_same_sources
from trainer.output.folder import FINAL, alone, check_output, check_same_recipe, write_recipe
from trainer.output.model_folder import load_model, part, save_model
from trainer.recipe import Recipe
from trainer.setups.conversation import prepare_student
from trainer.setups.packed import prepare
from workbench.cli import parse
from workbench.errors import ConfigError
from workbench.files import atomic_file, atomic_folder
from workbench.runs import environment
from workbench.training_folder import BEST, RECIPE_FILE, RECORD_FILE, best_of
from workbench.yaml_config import as_mapping


def train(recipe: Recipe, argv: list[str]) -> pd.DataFrame:
    """Run a recipe to its end and return the final evaluation; the folder then loads with transformers alone.

    Raises:
        RunError: output_dir already holds a training run and `resume` is not set, or there is nothing to resume.
    """
    folder = recipe.output_dir
    distributed.together(lambda: check_names(recipe))
    stage = recipe.start if recipe.start is not None and recipe.start.suffix == ".yaml" else None
    recipe = with_stage(recipe)
    checkpoint = distributed.on_main(lambda: check_output(folder, recipe))
    if stage is not None:
        _first_stage(stage, recipe, argv)
    with ExitStack() as held:
        distributed.together(lambda: held.enter_context(alone(folder)) if distributed.is_main() else None)
        return _train(recipe, checkpoint, argv)


def _train(recipe: Recipe, checkpoint: str | None, argv: list[str]) -> pd.DataFrame:
    folder, optim = recipe.output_dir, recipe.optim
    prepared = distributed.together(lambda: _enough(_prepared(recipe, checkpoint)))
    said = [] if checkpoint is None else distributed.on_main(lambda: check_same_sources(Path(checkpoint), prepared.record, repaired=recipe.repaired))
    state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json")) if checkpoint is not None else None
    if checkpoint is not None and state is not None and state.global_step >= optim.steps:
        load_model(prepared.model, Path(checkpoint))  # before there is a Trainer, from when on ZeRO-3 divides whatever is loaded
    trainer = build_trainer(recipe, prepared)
    trainer.known += said
    distributed.on_main(lambda: write_recipe(folder, recipe))
    trainer.run(checkpoint, state)
    seconds = trainer.seconds()
    if trainer.evaluated_at != optim.steps:  # the Trainer evaluates at its last step by itself
        trainer.evaluate()
    tensors = trainer.whole_state()
    distributed.on_main(lambda: prepared.check_frozen(part(tensors, "student.")))
    if adapters(prepared.model.student):
        merge(prepared.model.student)  # what is stored is what is evaluated: merging rounds
        tensors = trainer.whole_state()
    evaluation = prepared.evaluate(optim.batch_size, final=True)
    launch = {"processes": distributed.count(), "strategy": distributed.strategy(), "global_batch": optim.images(distributed.count())}
    own = {"recipe": as_mapping(recipe), "origins": origins(as_mapping(recipe)), "seconds": seconds, "steps_per_second": optim.steps / seconds}
    record = own | launch | prepared.record | environment(argv)
    distributed.on_main(lambda: _write_results(trainer, tensors, evaluation))
    if recipe.keep_best:
        record["best"] = _evaluate_best(trainer, evaluation)
    distributed.on_main(lambda: _write_record(trainer, record))
    return evaluation.table


def _evaluate_best(trainer: AlignmentTrainer, last: Evaluation) -> dict[str, float]:
    """Evaluate the model in `best/` as the finished one was, beside it; returns its step and its validation score."""
    folder, prepared, seed = trainer.recipe.output_dir, trainer.prepared, trainer.recipe.seed
    best = distributed.together(lambda: best_of(folder))
    if best["step"] != trainer.state.global_step:
        distributed.together(lambda: load_model(prepared.model, folder / BEST))
        last = prepared.evaluate(trainer.recipe.optim.batch_size, final=True)
    distributed.on_main(lambda: _write_tables(folder / BEST, last, seed))
    return best


def _prepared(recipe: Recipe, checkpoint: str | None) -> Ready:
    if not recipe.model.released:
        return prepare(recipe)
    return prepare_student(recipe, Path(checkpoint) if checkpoint is not None else None)


def _enough(prepared: Ready) -> Ready:
    """See that every process has something to train on."""
    if (found := len(prepared.train)) < distributed.count():
        raise ConfigError(f"{distributed.count()} processes for {found} training {prepared.unit}: expected at most as many processes as {prepared.unit}")
    prepared.record["items"] = found
    return prepared


def _write_results(trainer: AlignmentTrainer, state: dict[str, Tensor], evaluation: Evaluation) -> None:
    """Write the trained model, the log and the accuracies."""
    recipe, folder = trainer.recipe, trainer.recipe.output_dir
    with atomic_folder(folder / FINAL) as partial:
        save_model(trainer.prepared.model, trainer.prepared.processor, partial, state)
    for file in (folder / FINAL).iterdir():
        file.replace(folder / file.name)
    (folder / FINAL).rmdir()
    write_log(trainer.state.log_history, folder)
    _write_tables(folder, evaluation, recipe.seed)


def _write_tables(folder: Path, evaluation: Evaluation, seed: int) -> None:
    for name, table in (("evaluation", evaluation.table), ("accuracy", summary(evaluation.table, seed))):
        with atomic_file(folder / f"{name}.parquet") as partial:
            table.to_parquet(partial)


def _write_record(trainer: AlignmentTrainer, record: dict[str, Any]) -> None:
    """Write the card and, last, the record."""
    recipe, folder = trainer.recipe, trainer.recipe.output_dir
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
    record |= {"warnings": warnings_of(trainer.state), "cknna": trainer.subset.record if trainer.subset is not None else None}
    write_card(folder, record)
    with atomic_file(folder / RECORD_FILE) as partial:
        partial.write_text(json.dumps(record, indent=2))
    if recipe.push_to_hub is not None:
        push(folder, recipe.push_to_hub)


def _first_stage(stage: Path, recipe: Recipe, argv: list[str]) -> None:
    """Train the first stage that the recipe `stage` describes into `recipe.start`, unless it is there.

    Raises:
        ConfigError: what is there was trained from another recipe.
    """
    assert recipe.start is not None
    own = parse(Recipe, [], prog="first stage", recipe=stage)
    model = replace(recipe.model, train=own.model.train, lora=own.model.lora, dropout=own.model.dropout)  # its sizes, but not how this run trains it
    own = replace(own, seed=recipe.seed, output_dir=recipe.start, data=recipe.data, model=model)
    if (recipe.start / RECIPE_FILE).exists():
        check_same_recipe(recipe.start, own)
    if not (recipe.start / RECORD_FILE).exists():
        if distributed.count() > 1 and own.optim.precision != recipe.optim.precision:  # accelerate fixes it for the processes' whole life
            said = f"optim.precision is {recipe.optim.precision}, and {own.optim.precision} in {stage}"
            raise ConfigError(f"{said}: expected the same in several processes, or the first stage trained by itself before")
        train(replace(own, resume=(recipe.start / RECIPE_FILE).exists()), argv)
