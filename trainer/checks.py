"""Checks before a training begins: everything that the recipe names exists, and the processes can run the recipe."""

from __future__ import annotations

from trainer import distributed
from trainer.alignment_config import AlignmentConfig
from trainer.build.lora import check_peft
from trainer.hub import check_hub
from trainer.model_config import ModelConfig
from trainer.monitor.progress import check_trackers
from trainer.output.folder import check_same_recipe
from trainer.recipe import Recipe
from trainer.stages import stages
from workbench.errors import ConfigError, UnknownNameError
from workbench.models import check_there, did_you_mean
from workbench.training_folder import RECIPE_FILE, RECORD_FILE
from workbench.vfm import find_vfm
from workbench.weights.catalogue import CATALOGUE as WEIGHTS


def checked_stages(recipe: Recipe) -> list[Recipe]:
    """Check everything that a recipe names, and return the trainings that it asks for (see `stages`).

    Nothing is written.

    Raises:
        WorkbenchError: something does not exist, or does not fit the rest of the recipe or the processes.
    """
    *earlier, recipe = stages(recipe)
    if recipe.start == recipe.output_dir:
        raise ConfigError(
            f"output_dir is {recipe.output_dir}, the folder that the run starts from: expected another folder"
        )
    if earlier:
        check_stage1(earlier[-1], recipe)
    elif recipe.start is not None and not (recipe.start / "model.safetensors").exists():
        raise ConfigError(
            f"start is {recipe.start}: expected the folder of a finished training{did_you_mean(str(recipe.start))}"
        )
    recipe.optim.accumulated(distributed.count())
    check_trackers(recipe.report_to)
    if recipe.push_to_hub is not None and distributed.is_main():  # this check uses the network
        check_hub(recipe.push_to_hub)
    check_model(recipe.model)
    check_launch(recipe)
    check_vfms(recipe.alignment)
    return [*earlier, recipe]


def check_stage1(stage1: Recipe, recipe: Recipe) -> None:
    """Check that stage 1 is finished and was trained from its present recipe, or that it can be trained now.

    Args:
        stage1: the recipe of stage 1, with the values that it takes from `recipe`.
        recipe: the recipe that starts from stage 1.
    """
    folder = stage1.output_dir
    if (folder / RECIPE_FILE).exists():
        check_same_recipe(folder, stage1)
    if (folder / RECORD_FILE).exists():
        return
    if (strategy := distributed.strategy()).startswith("zero"):
        raise ConfigError(
            f"stage 1 is not in {folder} yet, and with {strategy} a process can train only one stage: train stage 1"
            " first, in a command of its own"
        )
    # accelerate fixes the precision for the lifetime of a process
    if distributed.count() > 1 and stage1.optim.precision != recipe.optim.precision:
        precisions = f"optim.precision is {recipe.optim.precision}, and {stage1.optim.precision} in stage1"
        raise ConfigError(
            f"{precisions}: expected the same in several processes; or train stage 1 first, in a command of its own"
        )


def check_model(config: ModelConfig) -> None:
    """Check that the weights and the packages that the model needs are there."""
    parts = {key: name for key in ("name", "vision_encoder", "language") if (name := getattr(config, key)) is not None}
    if config.kind == "pretrained":
        check_there(parts["name"])
    elif config.kind == "toy":
        for name in parts.values():
            if name not in WEIGHTS:
                raise UnknownNameError(
                    "weights", name, WEIGHTS.names(), also="or a hub id or folder with model.kind assembled"
                )
    else:
        for key, name in parts.items():
            if name not in WEIGHTS:
                check_there(name)
            elif (revision := getattr(config, f"{key}_revision")) is not None:
                raise ConfigError(
                    f"model.{key}_revision is {revision}, but model.{key} is {name}, which is not a hub id: leave"
                    f" model.{key}_revision out"
                )
    if config.train == "lora":
        check_peft()
    if config.second_encoder is not None:
        find_vfm(config.second_encoder)


def check_launch(recipe: Recipe) -> None:
    """Check that the recipe can run with the launch file, which says how a training is sharded over processes."""
    strategy = distributed.strategy()
    if strategy == "zero3" and recipe.model.train == "lora":
        raise ConfigError(
            "model.train is lora with ZeRO-3, whose sharded weights cannot be merged with the adapters: expected the"
            " launch file ddp.yaml, fsdp.yaml or zero2.yaml"
        )
    if strategy != "ddp" and recipe.optim.frozen_precision == "bfloat16":
        raise ConfigError(
            f"optim.frozen_precision is bfloat16 with {strategy}, which shards weights of one precision only: expected"
            " the launch file ddp.yaml, or optim.frozen_precision float32"
        )
    if distributed.is_sharded() and recipe.model.kind == "toy" and recipe.data.features == "compute":
        raise ConfigError(
            f"data.features is compute with {strategy}, but a toy LLaVA's vision encoder cannot compute features while"
            " it is sharded: expected data.features cache, or the launch file ddp.yaml"
        )


def check_vfms(config: AlignmentConfig) -> None:
    """Check that the VFMs that the visual tokens are aligned with are there."""
    if config.aligned and config.target == "vfm":
        for name in config.vfm:
            find_vfm(name, teacher_norm=config.teacher_norm)
