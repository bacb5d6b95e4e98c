"""What is seen to before a training begins: that all a recipe names is there, and that the processes can do what it says."""

from __future__ import annotations

from dataclasses import replace

from trainer import distributed
from trainer.build.lora import check_peft
from trainer.hub import check_hub
from trainer.monitor.progress import check_trackers
from trainer.recipe import Recipe
from workbench.errors import ConfigError
from workbench.models import check_there, did_you_mean
from workbench.training_folder import RECORD_FILE
from workbench.vfm import find_vfm
from workbench.weights.catalogue import CATALOGUE as WEIGHTS


def with_stage(recipe: Recipe) -> Recipe:
    """The recipe with the folder where its first stage, if it is named by its recipe, is or will be."""
    if recipe.start is None or recipe.start.suffix != ".yaml":
        return recipe
    return replace(recipe, start=recipe.output_dir.parent / f"{recipe.start.stem.split('_')[-1]}-s{recipe.seed}")


def check_names(recipe: Recipe) -> None:
    """See that what the recipe names is there and fits the processes, before anything that takes long."""
    recipe.optim.accumulated(distributed.count())
    if recipe.start is not None and with_stage(recipe).start == recipe.output_dir:
        raise ConfigError(f"output_dir is {recipe.output_dir}, the folder of the first stage that the run starts from: expected another")
    if recipe.start is not None and not (recipe.start if recipe.start.suffix == ".yaml" else recipe.start / "model.safetensors").exists():
        raise ConfigError(
            f"start is {recipe.start}: expected the folder of a finished training, or the recipe of a first stage{did_you_mean(str(recipe.start))}"
        )
    check_trackers(recipe.report_to)
    if recipe.push_to_hub is not None and distributed.is_main():  # it asks the network
        check_hub(recipe.push_to_hub)
    for name in (recipe.model.tower, recipe.model.language) if recipe.model.name is None else (recipe.model.name,):
        if name is not None and not recipe.model.released:
            WEIGHTS.get(name)
        elif name is not None and name not in WEIGHTS:
            check_there(name)
    check_launch(recipe)
    if recipe.model.train == "lora":
        check_peft()
    if recipe.model.second_encoder is not None:
        find_vfm(recipe.model.second_encoder)
    if recipe.alignment.aligned and recipe.alignment.target == "vfm":
        for name in recipe.alignment.vfm:
            find_vfm(name, teacher_norm=recipe.alignment.teacher_norm)


def check_launch(recipe: Recipe) -> None:
    """See that the launch file, which says how the processes divide the work, can do what the recipe says."""
    strategy = distributed.strategy()
    if strategy == "zero3" and recipe.model.train == "lora":
        raise ConfigError("model.train is lora with ZeRO-3, whose divided weights cannot be merged: expected ddp.yaml, fsdp.yaml or zero2.yaml")
    stage = with_stage(recipe).start if recipe.start is not None and recipe.start.suffix == ".yaml" else None
    if strategy.startswith("zero") and stage is not None and not (stage / RECORD_FILE).exists():
        raise ConfigError(f"start is {recipe.start} with {strategy}, which trains once in a process: expected the first stage trained by itself before")
    if distributed.divided() and not recipe.model.released and recipe.data.features == "compute":
        raise ConfigError(f"data.features is compute with {strategy}, which divides the tower that is asked for them: expected cache, or ddp.yaml")
