"""Train one model from a recipe.

python -m trainer shapes_viral --seed 1 --output_dir runs/viral-s1
python -m trainer shapes_stage1 --optim.steps 20 --data.limit_train 64 --output_dir runs/try
accelerate launch --num_processes 2 -m trainer shapes_viral

RECIPE is a name (`viral path` lists those in the package) or the path of a YAML file. The results, in the folder
`output_dir`, are a model that plain transformers can load, its evaluation on the validation or test split, and a log.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from trainer import distributed
from trainer.recipe import Recipe
from workbench.cli import command, number_text, parse
from workbench.errors import ConfigError, RunError
from workbench.package_files import RECIPES


def main(argv: list[str]) -> None:
    """Run `python -m trainer ARGV`, in one process or in each of several."""
    distributed.start()
    try:
        run(distributed.together(read, argv))
    except distributed.ElsewhereError:
        sys.exit(2)
    except RuntimeError as error:
        if not distributed.is_lost_connection(error):
            raise
        raise RunError(
            f"process {distributed.rank()} stops, since another process ended (its own message, if any, says why):"
            " continue with --resume"
        ) from error
    distributed.stop()


def read(argv: list[str]) -> Recipe:
    """Return the recipe that a command line describes: the YAML file that it names first, with its flags applied."""
    if not argv or argv[0].startswith("-"):
        if "--help" not in argv and "-h" not in argv:
            raise ConfigError("no recipe given: expected python -m trainer RECIPE [--section.key value ...]")
        file, flags = None, argv
    else:
        file, flags = RECIPES.find(argv[0]), argv[1:]
    recipe = parse(Recipe, flags, prog="python -m trainer RECIPE", description=__doc__ or "", recipe=file)

    if recipe.stage1 is not None and file is not None and not recipe.stage1.exists():
        recipe = replace(recipe, stage1=file.parent / recipe.stage1)
    return recipe


def run(recipe: Recipe) -> None:
    """Train, and print the accuracy per question type or, for conversations, the loss."""
    if recipe.dry_run:
        from trainer.dry_run.disk import check_disk
        from trainer.dry_run.plan import plan

        dry_run = distributed.together(lambda: plan(recipe) if distributed.is_main() else None)
        if dry_run is not None:
            print(dry_run.report(), flush=True)
        distributed.together(lambda: check_disk(dry_run) if dry_run is not None else None)
        return
    from trainer.evaluation import summary  # these imports are slow, so a typo in a flag is reported before them
    from trainer.run import train

    evaluation = train(recipe, sys.argv)
    if distributed.is_main():
        print(summary(evaluation, recipe.seed).to_string(index=False, float_format=number_text))


if __name__ == "__main__":
    distributed.program(lambda: command(main))
