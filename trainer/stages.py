"""The trainings that a recipe asks for: pre-training (stage 1), where it names a recipe for that, and its own."""

from __future__ import annotations

from dataclasses import replace

from trainer.recipe import Recipe
from workbench.cli import parse


def stages(recipe: Recipe) -> list[Recipe]:
    """Return the trainings of a recipe in their order, each as a recipe that stands by itself: every one but the first
    starts from the folder before it.

    Stage 1 has this run's seed, data and model, but trains the parts of the model that its own recipe says; it is
    trained beside output_dir.

    Raises:
        ConfigError: the recipe of stage 1 cannot be read.
    """
    if recipe.stage1 is None:
        return [recipe]
    first = parse(Recipe, [], prog="stage1", recipe=recipe.stage1)
    folder = recipe.output_dir.parent / f"{recipe.stage1.stem.split('_')[-1]}-s{recipe.seed}"
    model = replace(recipe.model, train=first.model.train, lora=first.model.lora, dropout=first.model.dropout)
    first = replace(first, seed=recipe.seed, output_dir=folder, data=recipe.data, model=model)
    return [*stages(first), replace(recipe, start=folder)]
