"""Compare two trained models in three sentences, for a reader who sees them for the first time.

python -m workbench.summary --model runs/baseline runs/viral --report runs/report.html --sweep demo

The first sentence says what was compared (from the two recipes), the second what came out (from the stored answers of
both models to the same questions), the third what to open next. The difference is paired by question, with an interval
over images. A single pair of trainings says nothing about other seeds; the second sentence warns of this.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from workbench.cli import command, parse
from workbench.errors import ConfigError, RunError, one_line
from workbench.intervals import Interval, mean_interval
from workbench.models import named_models
from workbench.training_folder import alignment_words, evaluated_on, evaluation_of, training_record

# keys of a recipe that have no influence on the trained model
NOT_OF_THE_MODEL = (
    "output_dir",
    "resume",
    "repaired",
    "dry_run",
    "report_to",
    "push_to_hub",
    "keep_checkpoints",
    "save_every",
    "log_every",
    "eval_every",
)
TARGETS = {
    "vfm": "the features of a vision foundation model",
    "encoder": "the features of its own vision encoder",
    "projector": "the output of its own projector",
}
# keys below `alignment` that `alignment_words` describes
IN_WORDS = (
    "objective",
    "weight",
    "layer",
    "heads",
    "where",
    "selection",
    "selection.heads",
    "selection.k",
    "selection.images",
    "mask",
    "final_norm",
    "target",
    "vfm",
    "schedule",
    "final_weight",
    "warmup",
    "teacher_norm",
    "images",
    "center",
    "residual",
)
LISTED = 3  # number of differing recipe keys that the sentence names


@dataclass(frozen=True)
class Trained:
    """A finished training and its evaluation.

    Attributes:
        label: the name of the model in the sentences.
        record: the record of the training.
        evaluation: one row for each question.
    """

    label: str
    record: Mapping[str, Any]
    evaluation: pd.DataFrame

    @classmethod
    def read(cls, label: str, folder: Path) -> Trained:
        """Read a training folder.

        Raises:
            RunError: the training is not finished or damaged, or it was evaluated by its loss.
        """
        record, evaluation = training_record(folder), evaluation_of(folder)
        if "correct" not in evaluation:
            raise RunError(
                f"{folder} was evaluated by its loss: expected a model that was evaluated on questions with options"
            )
        return cls(label, record, evaluation)

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe of the training."""
        recipe: dict[str, Any] = self.record["recipe"]
        return recipe

    @property
    def test_data(self) -> str:
        """The spec of the data set of the final evaluation."""
        return evaluated_on(self.recipe)

    @property
    def test_fingerprint(self) -> str | None:
        """The fingerprint of that data set."""
        return self.record.get("test", self.record.get("val"))


@dataclass(frozen=True)
class Outcome:
    """The result of two models on the same questions.

    Attributes:
        accuracy: accuracy of the first and of the second model, each the mean over question types, 0 to 1.
        difference: accuracy of the second minus that of the first, with its 95 % interval over images.
        questions: number of questions.
        types: number of question types.
        chance: accuracy of guessing, the mean over question types.
    """

    accuracy: tuple[float, float]
    difference: Interval
    questions: int
    types: int
    chance: float


def outcome(first: Trained, second: Trained) -> Outcome:
    """Compare two models question by question.

    Raises:
        RunError: the models were not evaluated on the same questions.
    """
    a, b = (model.evaluation.sort_values("id", ignore_index=True) for model in (first, second))
    same = len(a) == len(b) and all((a[key] == b[key]).all() for key in ("id", "image_id", "category", "answer"))
    if not same or first.test_fingerprint != second.test_fingerprint or first.test_data != second.test_data:
        numbers = " and ".join(f"{len(model.evaluation)} of {model.test_data}" for model in (first, second))
        raise RunError(
            f"{first.label} and {second.label} were not asked the same questions ({numbers}): expected recipes with the"
            " same data.val and data.test"
        )
    types, images = a["category"].tolist(), a["image_id"].tolist()
    accuracy = [float(table["correct"].groupby(table["category"]).mean().mean()) for table in (a, b)]
    interval = mean_interval(
        b["correct"].astype(float) - a["correct"].astype(float), kind="difference", groups=images, strata=types
    )
    return Outcome(
        (accuracy[0], accuracy[1]),
        interval,
        len(a),
        len(set(types)),
        float(a["chance"].groupby(a["category"]).mean().mean()),
    )


# --- the sentences --------------------------------------------------------------------------------


def what_was_compared(first: Trained, second: Trained, seeds: Sequence[int] = ()) -> str:
    """Return the sentence that says what the two trainings share and how their recipes differ.

    Args:
        seeds: the seeds of all trainings, if each of the two stands for several that differ in the seed alone.
    """
    changed = _changed(first.recipe, second.recipe)
    ways = [_way(model.recipe) for model in (first, second)]
    # without an objective, the other keys of `alignment` have no effect
    not_aligned = all(model.recipe["alignment"]["objective"] == "none" for model in (first, second))
    rest = [
        key
        for key in changed
        if not key.startswith("alignment.") or not (not_aligned or key.removeprefix("alignment.") in IN_WORDS)
    ]
    parts = [] if ways[0] == ways[1] else [f"{first.label} {ways[0]}", f"{second.label} {ways[1]}"]
    parts += [
        f"{key} is {_value(first.recipe, key)} for {first.label} and {_value(second.recipe, key)} for {second.label}"
        for key in rest[:LISTED]
    ]
    parts += [f"{len(rest) - LISTED} more keys of the recipe differ"] * (len(rest) > LISTED)
    contents = {model.record.get("data") for model in (first, second)}  # None while a model is being trained
    same_data = len(contents) == 1
    # the seed may decide which training data are drawn
    if not same_data and None not in contents and not any(key.startswith("data.") or key == "seed" for key in rest):
        parts.append("the content of their training data differs")
    words_of = _shared(first)
    if len(seeds) > 1:
        words_of["seed"] = f"each with seeds {', '.join(map(str, seeds))}"
    shared = [words for key, words in words_of.items() if (same_data if key == "data" else key not in rest)]
    trained = (
        f"Two {'recipes' if len(seeds) > 1 else 'models'} were trained{' alike, ' if shared else ''}{', '.join(shared)}"
    )
    return (
        f"{trained}: {'; '.join(parts)}."
        if parts
        else f"{trained}, and their recipes do not differ in anything that affects the model."
    )


def what_came_out(first: Trained, second: Trained, result: Outcome) -> str:
    """Return the sentence with both accuracies, their difference with its interval, and what follows from it."""
    a, b = result.accuracy
    d = result.difference
    scores = f"{first.label} answers {a:.1%} right and {second.label} {b:.1%}".replace("%", " %")
    questions = f"{result.questions} questions about {d.n} images of {first.test_data}"
    by_chance = f"mean of {result.types} question types, guessing gives {100 * result.chance:.1f} %"
    points = (
        f"{second.label} minus {first.label} is {100 * d.estimate:+.1f} points, with a 95 % interval over images from"
        f" {100 * d.low:+.1f} to {100 * d.high:+.1f}"
    )
    if d.low > 0 or d.high < 0:
        ahead = f"{second.label if d.low > 0 else first.label} is ahead on such questions"
    else:
        ahead = "these questions do not show which of the two is ahead"
    few = " (wide, since few answers differ)" if d.few else ""
    once = (
        "each model was trained only once, so this says little about other seeds, with which the difference can be"
        " smaller, larger or of the opposite sign"
    )
    return f"On {questions}, {scores} ({by_chance}): {points}{few}, so {ahead}; {once}."


def what_to_open(
    *, report: Path | None = None, address: str = "", runs: Path | None = None, sweep: str | None = None
) -> str:
    """Return the sentence that says where to look next.

    Args:
        report: the HTML report; it is named if it exists.
        address: address of a running dashboard, "" if there is none.
        runs: the runs folder, for the commands that serve the dashboard and train more seeds.
        sweep: the sweep that trained the pair, for the command that trains more seeds.
    """
    parts = []
    if report is not None and report.exists():
        parts.append(f"{report} in a browser, every analysis with its intervals and chance levels")
    if address:
        parts.append(f"{address}, where each page shows one analysis of both models")
    elif runs is not None:
        parts.append(f"the dashboard, served by `{shlex.join(['viral', 'app', '--runs', str(runs)])}`")
    if sweep is not None and runs is not None:
        seeds = ["--seeds", "1", "2", "3", "--suffix"]
        words = ["python", "-m", "trainer.sweep", sweep, *seeds, "--output_dir", str(runs / "seeds")]
        parts.append(f"`{shlex.join(words)}`, which trains three more pairs and gives an interval over seeds")
    if not parts:
        return "Open next: `python -m analyses` lists the analyses that can be run on both models."
    return f"Open next: {'; '.join(parts)}."


def _changed(a: Mapping[str, Any], b: Mapping[str, Any], section: str = "") -> list[str]:
    """Return the keys (`section.key`) whose values differ between two recipes; a missing key counts as None."""
    changed = []
    for key in dict.fromkeys([*a, *b]):
        first, second = a.get(key), b.get(key)
        if isinstance(first, Mapping) and isinstance(second, Mapping):
            changed += _changed(first, second, f"{section}{key}.")
        elif first != second and not (section == "" and key in NOT_OF_THE_MODEL):
            changed.append(f"{section}{key}")
    return changed


def _value(recipe: Mapping[str, Any], key: str) -> str:
    """Return the value of `section.key` as text for a sentence."""
    value: Any = recipe
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return one_line(", ".join(map(str, value)) if isinstance(value, list) else value, 60)


def _way(recipe: Mapping[str, Any]) -> str:
    """Say in words what a model learns besides its answers."""
    settings = recipe["alignment"]
    words = alignment_words(settings)
    if settings["objective"] != "none":
        goal = (
            "predict from its visual tokens"
            if settings["objective"] == "predict"
            else "make its visual tokens resemble"
        )
        return f"also learns to {goal} {TARGETS[settings.get('target', 'vfm')]} ({words})"
    return "learns from the answers alone" + ("" if words == "none" else f", with a {words}")


def _shared(model: Trained) -> dict[str, str]:
    """Return {key of the recipe: words} for what two trainings may share; the key `data` is the content of the data."""
    recipe, record = model.recipe, model.record
    unit = "images" if recipe["model"]["kind"] == "toy" else "conversations"
    items = f"{record['items']} " if "items" in record else ""  # not known while it is being trained
    return {
        "data": f"on the same {items}{unit} of {', '.join(recipe['data']['train'])}",
        "optim.steps": f"for {recipe['optim']['steps']} steps",
        "seed": f"with seed {recipe['seed']}",
        "start": f"from {'random initialization' if recipe['start'] is None else recipe['start']}",
    }


def sentences(first: Trained, second: Trained, next_step: str) -> list[str]:
    """Return the three sentences; `next_step` is the sentence of `what_to_open`."""
    return [what_was_compared(first, second), what_came_out(first, second, outcome(first, second)), next_step]


# --- the command ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """The two models to compare, and what the last sentence is to name."""

    model: tuple[str, ...] = ()
    """The folders of two finished trainings, each as FOLDER or NAME=FOLDER; differences are second minus first."""
    report: Path | None = None
    """The HTML report of both models, which the last sentence then names."""
    address: str = ""
    """The address of a running dashboard, which the last sentence then names."""
    runs: Path | None = None
    """The runs folder; by default the folder that holds the first model."""
    sweep: str | None = None
    """The sweep that trained the models; the last sentence then has the command that trains more seeds."""


def main(argv: list[str]) -> None:
    """Print the three sentences, numbered."""
    config = parse(Config, argv, prog="python -m workbench.summary", description=__doc__ or "")
    models = named_models(config.model)
    if len(models) != 2:
        raise ConfigError(
            f"--model names {len(models)} models: expected two trained models, such as --model runs/baseline runs/viral"
        )
    first, second = (Trained.read(label, Path(folder)) for label, folder in models.items())
    runs = config.runs or Path(next(iter(models.values()))).parent
    next_step = what_to_open(report=config.report, address=config.address, runs=runs, sweep=config.sweep)
    lines = enumerate(sentences(first, second, next_step), start=1)
    sys.stdout.write("".join(f"{number}. {sentence}\n" for number, sentence in lines))


if __name__ == "__main__":
    command(main)
