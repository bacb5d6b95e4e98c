"""Train one model.

python -m trainer shapes_viral --seed 1 --output_dir runs/viral-s1
python -m trainer shapes_stage1 --optim.steps 20 --data.limit_train 64 --output_dir runs/try
accelerate launch --num_processes 2 -m trainer shapes_viral

A recipe is a name (`viral path` lists those in the package) or the path of a YAML file.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from trainer import distributed
from trainer.recipe import Recipe
from workbench.cli import command, parse
from workbench.errors import ConfigError, RunError
from workbench.package_files import RECIPES


def main(argv: list[str]) -> None:
    """Run `python -m trainer ARGV`, in one process or in several."""
    distributed.start()
    try:
        run(distributed.together(read, argv))
    except distributed.ElsewhereError:
        sys.exit(2)
    except RuntimeError as error:
        if not distributed.lost(error):
            raise
        raise RunError(
            f"process {distributed.rank()} stops, since another one ended (unless it was killed, it said why): continue"
            " with --resume"
        ) from error
    distributed.stop()


def read(argv: list[str]) -> Recipe:
    """The recipe that a command line describes."""
    if not argv or argv[0].startswith("-"):
        if "--help" not in argv and "-h" not in argv:
            raise ConfigError("no recipe given: expected python -m trainer RECIPE [--section.key value ...]")
        recipe, rest = None, argv
    else:
        recipe, rest = RECIPES.find(argv[0]), argv[1:]
    config = parse(Recipe, rest, prog="python -m trainer RECIPE", description=__doc__ or "", recipe=recipe)

    if config.stage1 is not None and recipe is not None and not config.stage1.exists():
        config = replace(config, stage1=recipe.parent / config.stage1)
    return config


def run(config: Recipe) -> None:
    """Train, and print the accuracy per question type, or the loss."""
    if config.dry_run:
        from trainer.dry_run.disk import check_disk
        from trainer.dry_run.plan import plan

        found = distributed.together(lambda: plan(config) if distributed.is_main() else None)
        if found is not None:
            print(found.report(), flush=True)
        distributed.together(lambda: check_disk(found) if found is not None else None)
        return
    from trainer.evaluation import summary  # after parsing: a typo is answered at once
    from trainer.run import train

    evaluation = train(config, sys.argv)
    if distributed.is_main():
        print(summary(evaluation, config.seed).to_string(index=False, float_format="{:.3f}".format))


if __name__ == "__main__":
    distributed.program(lambda: command(main))
