"""One training run, from a recipe to a finished folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor
from transformers import TrainerState

from trainer import distributed
from trainer.build.frozen_precision import is_halved
from trainer.build.lora import lora_layers, merge_lora, merged_state
from trainer.card import origins, write_card
from trainer.checks import checked_stages
from trainer.evaluation import Evaluation, summary
from trainer.head_choice import check_same_choice
from trainer.hub import push
from trainer.loop import AlignmentTrainer, build_trainer
from trainer.monitor.progress import write_log
from trainer.monitor.warnings import warnings_of
from trainer.output.checkpoints import UNFINISHED, check_same_sources
from trainer.output.folder import FINAL, check_output, output_lock, write_recipe
from trainer.output.model_folder import load_model, save_model, tensors_below
from trainer.recipe import Recipe
from trainer.setups.base import Setup
from trainer.setups.conversation import ConversationSetup
from trainer.setups.packed import PackedSetup
from workbench.errors import ConfigError
from workbench.files import atomic_file, atomic_folder
from workbench.records import write_record
from workbench.runs import environment
from workbench.training_folder import BEST, RECIPE_FILE, RECORD_FILE, best_of
from workbench.yaml_config import as_mapping

SETUPS: Mapping[str, type[Setup]] = {
    "toy": PackedSetup,
    "assembled": ConversationSetup,
    "pretrained": ConversationSetup,
}
"""The setup that trains each kind of model, by `model.kind`."""


def train(recipe: Recipe, argv: list[str]) -> pd.DataFrame:
    """Train a model as its recipe says, and return the table of the final evaluation.

    Afterwards, plain transformers can load output_dir. If the recipe names a stage 1 that is not trained yet, it is
    trained first.

    Args:
        recipe: the recipe.
        argv: the command line, for the record.

    Raises:
        RunError: output_dir already contains a training run and `resume` is not set, or there is nothing to resume.
    """
    *earlier, recipe = distributed.together(checked_stages, recipe)
    checkpoint = distributed.on_main(check_output, recipe.output_dir, recipe)
    for stage in earlier:
        if not (stage.output_dir / RECORD_FILE).exists():
            train(replace(stage, resume=(stage.output_dir / RECIPE_FILE).exists()), argv)
    with output_lock(recipe.output_dir):
        trainer = _trained(recipe, checkpoint)
        return _finished(trainer, argv)


def setup_of(recipe: Recipe, checkpoint: Path | None = None) -> Setup:
    """Load everything that a run needs before its first step: model, data and features.

    Args:
        recipe: of the run.
        checkpoint: where the run is to be resumed.

    Raises:
        ConfigError: there are more processes than training items.
        WorkbenchError: model, data or VFMs cannot be loaded, or do not fit one another.
    """
    setup = SETUPS[str(recipe.model.kind)].from_recipe(recipe, checkpoint)
    if (count := len(setup.train)) < distributed.count():
        raise ConfigError(
            f"{distributed.count()} processes for {count} training {setup.unit}: expected at most as many processes as"
            f" {setup.unit}"
        )
    setup.record["items"] = count
    return setup


def _trained(recipe: Recipe, checkpoint: Path | None) -> AlignmentTrainer:
    """Train from the beginning or from a checkpoint to the last step and its evaluation; return the Trainer."""
    setup = distributed.together(setup_of, recipe, checkpoint)
    distributed.together(check_same_choice, distributed.gathered([setup.choice]))
    state, warnings = None, list[str]()
    if checkpoint is not None:
        warnings = distributed.on_main(check_same_sources, checkpoint, setup.record, repaired=recipe.repaired)
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if state.global_step >= recipe.optim.steps:
            # must be loaded before the Trainer is built, since ZeRO-3 then shards every model that is loaded
            load_model(setup.model, checkpoint)
    trainer = build_trainer(recipe, setup)
    trainer.warnings += warnings
    distributed.on_main(write_recipe, recipe.output_dir, recipe, checkpoint)
    trainer.run(checkpoint, state)
    return trainer


def _finished(trainer: AlignmentTrainer, argv: list[str]) -> pd.DataFrame:
    """Check, evaluate and store the trained model, then write its record; return the table of the final evaluation."""
    setup, tensors = trainer.setup, trainer.whole_state()
    distributed.on_main(lambda: setup.check_frozen(tensors_below(tensors, "base.")))
    base = setup.model.base
    if lora_layers(base):
        # of matrices in bfloat16 the exact sums are stored; autocast rounds them in every pass, as merging does here
        exact = merged_state(base, tensors_below(tensors, "base.")) if is_halved(base) else {}
        merge_lora(base)  # before the evaluation, since merging rounds: what is stored is what is evaluated
        tensors = trainer.whole_state() | {f"base.{name}": value for name, value in exact.items()}
    evaluation = setup.evaluate(final=True)
    record = _record(trainer, argv)
    distributed.on_main(_write_results, trainer, tensors, evaluation)
    if trainer.recipe.keep_best:
        record["best"] = _evaluate_best(trainer, evaluation)
    distributed.on_main(_write_record, trainer, record)
    return evaluation.table


def _record(trainer: AlignmentTrainer, argv: list[str]) -> dict[str, Any]:
    """Return the content of training.json: recipe, origins of the weights, times, launch, data and environment."""
    recipe, seconds, processes = as_mapping(trainer.recipe), trainer.trained_for, distributed.count()
    optim = trainer.recipe.optim
    run = {"recipe": recipe, "origins": origins(recipe), "seconds": seconds, "steps_per_second": optim.steps / seconds}
    launch = {"processes": processes, "strategy": distributed.strategy(), "global_batch": optim.images(processes)}
    return run | launch | trainer.setup.record | environment(argv)


def _evaluate_best(trainer: AlignmentTrainer, last: Evaluation) -> dict[str, float]:
    """Evaluate the model in `best/` as the last one was, store the tables there, and return its step and score.

    Where the best model is the last one, its evaluation `last` is stored again.
    """
    folder, setup = trainer.recipe.output_dir, trainer.setup
    best = distributed.together(best_of, folder)
    if best["step"] != trainer.state.global_step:
        distributed.together(load_model, setup.model, folder / BEST)
        last = setup.evaluate(final=True)
    distributed.on_main(_write_tables, folder / BEST, last, trainer.recipe.seed)
    return best


def _write_results(trainer: AlignmentTrainer, state: dict[str, Tensor], evaluation: Evaluation) -> None:
    """Write the trained model, the log, and the tables of the final evaluation."""
    folder = trainer.recipe.output_dir
    with atomic_folder(folder / FINAL) as partial:
        save_model(trainer.setup.model, trainer.setup.processor, partial, state)
    for file in (folder / FINAL).iterdir():
        file.replace(folder / file.name)
    (folder / FINAL).rmdir()
    write_log(trainer.state.log_history, folder)
    _write_tables(folder, evaluation, trainer.recipe.seed)


def _write_tables(folder: Path, evaluation: Evaluation, seed: int) -> None:
    """Write evaluation.parquet (one row per question or conversation) and accuracy.parquet (the summary)."""
    for name, table in (("evaluation", evaluation.table), ("accuracy", summary(evaluation.table, seed))):
        with atomic_file(folder / f"{name}.parquet") as partial:
            table.to_parquet(partial)


def _write_record(trainer: AlignmentTrainer, record: dict[str, Any]) -> None:
    """Write the card, then the record, which marks the run as finished; upload the model if the recipe says so."""
    folder, hub = trainer.recipe.output_dir, trainer.recipe.push_to_hub
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
    record |= {
        "warnings": warnings_of(trainer.state),
        "cknna": trainer.subset.record if trainer.subset is not None else None,
    }
    write_card(folder, record)
    with atomic_file(folder / RECORD_FILE) as partial:
        write_record(partial, record)
    if hub is not None:
        push(folder, hub)
