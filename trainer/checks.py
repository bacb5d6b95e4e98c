"""What is checked before a training begins: that all a recipe names is there, and that the processes can do what it
says."""

from __future__ import annotations

from trainer import distributed
from trainer.build.lora import check_peft
from trainer.hub import check_hub
from trainer.monitor.progress import check_trackers
from trainer.output.folder import check_same_recipe
from trainer.recipe import AlignmentConfig, ModelConfig, Recipe
from trainer.stages import stages
from workbench.errors import ConfigError, UnknownNameError
from workbench.models import check_there, did_you_mean
from workbench.training_folder import RECIPE_FILE, RECORD_FILE
from workbench.vfm import find_vfm
from workbench.weights.catalogue import CATALOGUE as WEIGHTS


def checked_stages(recipe: Recipe) -> list[Recipe]:
    """Return the trainings that a recipe asks for (see `stages`), after a check of all that it names and of what the
    processes can do; nothing is written.

    Raises:
        WorkbenchError: something is not there, or does not fit.
    """
    *before, own = stages(recipe)
    if own.start == own.output_dir:
        raise ConfigError(
            f"output_dir is {own.output_dir}, the folder of the first stage that the run starts from: expected another"
        )
    if before:
        check_stage1(before[-1], own)
    elif own.start is not None and not (own.start / "model.safetensors").exists():
        raise ConfigError(
            f"start is {own.start}: expected the folder of a finished training{did_you_mean(str(own.start))}"
        )
    own.optim.accumulated(distributed.count())
    check_trackers(own.report_to)
    if own.push_to_hub is not None and distributed.is_main():  # it asks the network
        check_hub(own.push_to_hub)
    check_model(own.model)
    check_launch(own)
    check_vfms(own.alignment)
    return [*before, own]


def check_stage1(first: Recipe, own: Recipe) -> None:
    """Check that stage 1 is in its folder as its recipe describes it, or can be trained there."""
    folder = first.output_dir
    if (folder / RECIPE_FILE).exists():
        check_same_recipe(folder, first)
    if (folder / RECORD_FILE).exists():
        return
    if (strategy := distributed.strategy()).startswith("zero"):
        raise ConfigError(
            f"stage1 belongs in {folder} with {strategy}, which trains once in a process: expected the first stage"
            " trained by itself before"
        )
    # accelerate fixes it for the processes' whole life
    if distributed.count() > 1 and first.optim.precision != own.optim.precision:
        precisions = f"optim.precision is {own.optim.precision}, and {first.optim.precision} in stage1"
        raise ConfigError(
            f"{precisions}: expected the same in several processes, or the first stage trained by itself before"
        )


def check_model(config: ModelConfig) -> None:
    """Check that the weights and the packages that a model is made with are there."""
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
                    f"model.{key}_revision is {revision}: expected none, since model.{key} is {name}, which is no"
                    " hub id"
                )
    if config.train == "lora":
        check_peft()
    if config.second_encoder is not None:
        find_vfm(config.second_encoder)


def check_launch(recipe: Recipe) -> None:
    """Check that the launch file, which says how the processes divide the work, can do what the recipe says."""
    strategy = distributed.strategy()
    if strategy == "zero3" and recipe.model.train == "lora":
        raise ConfigError(
            "model.train is lora with ZeRO-3, whose divided weights cannot be merged: expected ddp.yaml, fsdp.yaml or"
            " zero2.yaml"
        )
    if distributed.divided() and recipe.model.kind == "toy" and recipe.data.features == "compute":
        raise ConfigError(
            f"data.features is compute with {strategy}, which divides the vision encoder that is asked for them:"
            " expected cache, or ddp.yaml"
        )


def check_vfms(config: AlignmentConfig) -> None:
    """Check that the VFMs of the targets are there."""
    if config.aligned and config.target == "vfm":
        for name in config.vfm:
            find_vfm(name, teacher_norm=config.teacher_norm)
