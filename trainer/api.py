"""What `python -m trainer` does, from Python.

training = train("shapes_viral", seed=1, output_dir="runs/viral-s1", alignment={"layer": 4})
training.scores                      # accuracy by question type, with intervals and chance
training.log                         # losses and validation scores by step
model = training.model()             # the trained model, to be probed: run_analysis("cknna", model, ...)
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
from workbench.training_folder import evaluation_of, training_log, training_record
from workbench.yaml_config import flatten

if TYPE_CHECKING:
    from workbench.mllm import MLLM


@dataclass(frozen=True)
class Training:
    """A finished training run, read from its folder."""

    folder: Path

    @cached_property
    def record(self) -> dict[str, Any]:
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
        """Language modeling and alignment losses by step."""
        return training_log(self.folder)

    def model(self, **options: Any) -> MLLM:
        """Load the trained model; `options` are those of `MLLM.load`."""
        from workbench.mllm import MLLM

        return MLLM.load(str(self.folder), **options)


def train(recipe: str | Path | Recipe, **options: Any) -> Training:
    """Train the model of a recipe and return the finished run.

    A folder that holds a finished run is refused, as on the command line; `resume=True` continues an interrupted one.

    Args:
        recipe: the name of a recipe (`viral path` lists them), the path of a YAML file, or a `Recipe`.
        options: what differs from the recipe, such as `seed=1` or `optim={"steps": 200}`; not for a `Recipe`.

    Raises:
        ConfigError: an unknown option, or a value out of its range.
        RunError: the output folder already holds a run.
        WorkbenchError: model, data or VFMs cannot be loaded.
    """
    if isinstance(recipe, Recipe):
        if options:
            raise ConfigError(
                f"option '{next(iter(options))}' beside a Recipe: expected it in the Recipe itself, by"
                " dataclasses.replace"
            )
        config = recipe
    else:
        config = read_recipe(recipe, **options)
    from trainer.run import train as run

    run(config, ["train", str(recipe) if not isinstance(recipe, Recipe) else "Recipe"])
    return Training(config.output_dir)


def read_recipe(recipe: str | Path, **options: Any) -> Recipe:
    """Return the recipe of a name or a YAML file, with `options` in place of its values.

    Raises:
        ConfigError: an unknown option, or a value out of its range.
    """
    flags = [
        word
        for key, value in flatten(options)
        for word in as_flags(key, list(value) if isinstance(value, tuple) else value)
    ]
    return read([str(recipe), *flags])
