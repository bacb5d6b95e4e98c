"""The trainer's Python API: what `python -m trainer` does, from a script or a notebook.

training = train("shapes_viral", seed=1, output_dir="runs/viral-s1", alignment={"layer": 4})
training.scores                      # accuracy by question type, with intervals and chance
training.log                         # losses and validation scores by step
model = training.model()             # the trained model, to probe it: run_analysis("cknna", model, ...)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from trainer.__main__ import read
from trainer.recipe import Recipe
from workbench.cli import as_flags
from workbench.errors import ConfigError
from workbench.records import TrainingRecord
from workbench.training_folder import evaluation_of, training_log, training_record
from workbench.yaml_config import flatten

if TYPE_CHECKING:
    from workbench.mllm import MLLM


@dataclass(frozen=True)
class Training:
    """A finished training run, read from its folder."""

    folder: Path

    @cached_property
    def record(self) -> TrainingRecord:
        """The content of training.json: the recipe, fingerprints, versions, seconds."""
        return training_record(self.folder)

    @cached_property
    def evaluation(self) -> pd.DataFrame:
        """The answers to the evaluation questions, or the losses on the conversations, one row each."""
        return evaluation_of(self.folder)

    @property
    def scores(self) -> pd.DataFrame:
        """Accuracy by question type and their mean, or the loss per answer token, with n, interval and chance."""
        from trainer.evaluation import summary

        return summary(self.evaluation, self.record["recipe"]["seed"])

    @property
    def log(self) -> pd.DataFrame:
        """The training log: losses and validation scores by step."""
        return training_log(self.folder)

    def model(self, **options: Any) -> MLLM:
        """Load the trained model; `options` are those of `MLLM.load`."""
        from workbench.mllm import MLLM

        return MLLM.load(str(self.folder), **options)


def train(recipe: str | Path | Recipe, **options: Any) -> Training:
    """Train the model of a recipe and return the finished run.

    The output folder must be new, as on the command line; `resume=True` continues the interrupted run in it.

    Args:
        recipe: the name of a recipe (`viral path` lists them), the path of a YAML file, or a `Recipe`.
        options: values that differ from the recipe's, such as `seed=1` or `optim={"steps": 200}`; not for a `Recipe`.

    Raises:
        ConfigError: an unknown option, or a value out of its range.
        RunError: the output folder already contains a run.
        WorkbenchError: model, data or VFMs cannot be loaded.
    """
    if isinstance(recipe, Recipe):
        if options:
            raise ConfigError(
                f"option '{next(iter(options))}' beside a Recipe: set it in the Recipe itself, with dataclasses.replace"
            )
        complete = recipe
    else:
        complete = read_recipe(recipe, **options)
    if complete.dry_run:
        raise ConfigError(
            "dry_run is True, and train returns a finished run: expected False, or python -m trainer RECIPE --dry_run,"
            " which prints the plan and trains nothing"
        )
    from trainer.run import train as run

    run(complete, ["train", str(recipe) if not isinstance(recipe, Recipe) else "Recipe"])
    return Training(complete.output_dir)


def read_recipe(recipe: str | Path, **options: Any) -> Recipe:
    """Read a recipe by its name or from a YAML file, and replace values of it by `options`.

    Raises:
        ConfigError: an unknown option, or a value out of its range.
    """
    flags = [
        word
        for key, value in flatten(options)
        for word in as_flags(key, list(value) if isinstance(value, tuple) else value)
    ]
    return read([str(recipe), *flags])
