"""The trainings that a recipe asks for: its own and, where it names a recipe for it, pre-training (stage 1) before."""

from __future__ import annotations

from dataclasses import replace

from trainer.recipe import Recipe
from workbench.cli import parse


def stages(recipe: Recipe) -> list[Recipe]:
    """Return the trainings of a recipe in their order, each as a complete recipe.

    Each starts from the output folder of the one before. Stage 1 takes seed, data and model from `recipe`, but which
    parts of the model it trains (with LoRA or dropout) from its own recipe. Its output folder is beside output_dir.

    Raises:
        ConfigError: the recipe of stage 1 cannot be read.
    """
    if recipe.stage1 is None:
        return [recipe]
    stage1 = parse(Recipe, [], prog="stage1", recipe=recipe.stage1)
    folder = recipe.output_dir.parent / f"{recipe.stage1.stem.split('_')[-1]}-s{recipe.seed}"
    model = replace(recipe.model, train=stage1.model.train, lora=stage1.model.lora, dropout=stage1.model.dropout)
    stage1 = replace(stage1, seed=recipe.seed, output_dir=folder, data=recipe.data, model=model)
    return [*stages(stage1), replace(recipe, start=folder)]
