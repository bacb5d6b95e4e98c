"""Two trained models in three sentences for someone who sees them for the first time.

python -m workbench.summary --model runs/baseline runs/viral --report runs/report.html --sweep demo

What was compared follows from the two recipes, what came out from the answers that both folders hold to the same
questions, and what to open next from what is there. The difference is paired by question, with an interval over images.
One pair of trainings says nothing about other seeds, and the sentence says so.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from workbench.cli import command, parse
from workbench.errors import ConfigError, RunError, one_line
from workbench.intervals import Interval, mean_interval
from workbench.models import named_models
from workbench.training_folder import alignment_words, evaluated_on, evaluation_of, training_record

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
    "vfm": "the features of another vision network",
    "encoder": "the features of its own vision encoder",
    "projector": "what its own projector gives",
}
IN_WORDS = (
    "objective",
    "weight",
    "layer",
    "heads",
    "where",
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
LISTED = 3  # differences of recipes that a sentence names


@dataclass(frozen=True)
class Trained:
    """A finished training as it is called here."""

    label: str
    record: Mapping[str, Any]
    evaluation: pd.DataFrame

    @classmethod
    def read(cls, label: str, folder: Path) -> Trained:
        """Read a training folder.

        Raises:
            RunError: it is not finished, damaged, or was evaluated by its loss.
        """
        record, evaluation = training_record(folder), evaluation_of(folder)
        if "correct" not in evaluation:
            raise RunError(
                f"{folder} was evaluated by its loss: expected answers to questions with options, which are compared"
            )
        return cls(label, record, evaluation)

    @property
    def recipe(self) -> dict[str, Any]:
        """Every key of its recipe."""
        found: dict[str, Any] = self.record["recipe"]
        return found

    @property
    def asked(self) -> str:
        """The data set of its final evaluation."""
        return evaluated_on(self.recipe)

    @property
    def asked_content(self) -> str | None:
        """The fingerprint of that data set."""
        return self.record.get("test", self.record.get("val"))


@dataclass(frozen=True)
class Outcome:
    """The same questions, answered by two models.

    Attributes:
        accuracy: of the first and of the second, mean of question types, 0 to 1.
        difference: second less first, with its 95 % interval over images.
        questions: how many there were.
        types: how many types of them.
        chance: accuracy of a guess, mean of types.
    """

    accuracy: tuple[float, float]
    difference: Interval
    questions: int
    types: int
    chance: float


def outcome(first: Trained, second: Trained) -> Outcome:
    """Compare two models on the questions that both answered, pair by pair.

    Raises:
        RunError: they were not asked the same questions.
    """
    a, b = (model.evaluation.sort_values("id", ignore_index=True) for model in (first, second))
    same = len(a) == len(b) and all((a[key] == b[key]).all() for key in ("id", "image_id", "category", "answer"))
    if not same or first.asked_content != second.asked_content or first.asked != second.asked:
        asked = " and ".join(f"{len(model.evaluation)} of {model.asked}" for model in (first, second))
        raise RunError(
            f"{first.label} and {second.label} were not asked the same questions ({asked}): expected recipes with the"
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


def what_was_compared(first: Trained, second: Trained) -> str:
    """What the two trainings share, and all that differs between their recipes."""
    changed = _changed(first.recipe, second.recipe)
    ways = [_way(model.recipe) for model in (first, second)]
    # whose other keys of alignment do nothing
    plain = all(model.recipe["alignment"]["objective"] == "none" for model in (first, second))
    rest = [
        key
        for key in changed
        if not key.startswith("alignment.") or not (plain or key.removeprefix("alignment.") in IN_WORDS)
    ]
    parts = (
        [f"{model.label} {way}" for model, way in zip((first, second), ways, strict=True)] if ways[0] != ways[1] else []
    )
    parts += [
        f"{key} is {_value(first.recipe, key)} for {first.label} and {_value(second.recipe, key)} for {second.label}"
        for key in rest[:LISTED]
    ]
    parts += [f"{len(rest) - LISTED} more keys of the recipe differ"] * (len(rest) > LISTED)
    same_data = first.record.get("data") == second.record.get("data")
    if not same_data and not any(key.startswith("data.") or key == "seed" for key in rest):  # the seed may draw them
        parts.append("the content of their training data differs")
    shared = [words for key, words in _shared(first).items() if (same_data if key == "data" else key not in rest)]
    alike = f"Two models were trained{' alike, ' if shared else ''}{', '.join(shared)}"
    return f"{alike}: {'; '.join(parts)}." if parts else f"{alike}, and nothing in their recipes sets them apart."


def what_came_out(first: Trained, second: Trained, found: Outcome) -> str:
    """Both accuracies, their difference with its interval, who is ahead by it, and what it cannot say."""
    a, b = found.accuracy
    d = found.difference
    scores = f"{first.label} answers {a:.1%} right and {second.label} {b:.1%}".replace("%", " %")
    asked = f"{found.questions} questions about {d.n} images of {first.asked}"
    by_chance = f"mean of {found.types} question types, guessing gives {100 * found.chance:.1f} %"
    points = (
        f"{second.label} less {first.label} is {100 * d.estimate:+.1f} points, with a 95 % interval over images from"
        f" {100 * d.low:+.1f} to {100 * d.high:+.1f}"
    )
    if d.low > 0 or d.high < 0:
        ahead = f"{second.label if d.low > 0 else first.label} is ahead on such questions"
    else:
        ahead = "these questions do not show which of the two is ahead"
    few = " (wide, since few answers differ)" if d.few else ""
    once = (
        "this says little about training again, since each was trained once: with another seed the difference can be"
        " another one, or change sign"
    )
    return f"On {asked}, {scores} ({by_chance}): {points}{few}, so {ahead}; {once}."


def what_to_open(
    *, report: Path | None = None, address: str = "", runs: Path | None = None, sweep: str | None = None
) -> str:
    """Where to look next, of what there is.

    Args:
        report: the HTML report, named if it is there.
        address: of a dashboard that is being served.
        runs: the runs folder, for the command that serves it otherwise.
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
        words = [
            "python",
            "-m",
            "trainer.sweep",
            sweep,
            "--seeds",
            "1",
            "2",
            "3",
            "--suffix",
            "--output_dir",
            str(runs / "seeds"),
        ]
        parts.append(f"`{shlex.join(words)}`, three pairs more, whose interval is over seeds")
    return (
        f"Open next: {'; '.join(parts)}."
        if parts
        else "Open next: python -m analyses lists what can be asked of both models."
    )


def _changed(a: Mapping[str, Any], b: Mapping[str, Any], section: str = "") -> list[str]:
    """The keys, `section.key`, whose values differ; a key that only one recipe has, being newer, differs where its
    value is not empty."""
    found = []
    for key in dict.fromkeys([*a, *b]):
        own, other = a.get(key), b.get(key)
        if isinstance(own, Mapping) and isinstance(other, Mapping):
            found += _changed(own, other, f"{section}{key}.")
        elif own != other and not (section == "" and key in NOT_OF_THE_MODEL):
            found.append(f"{section}{key}")
    return found


def _value(recipe: Mapping[str, Any], key: str) -> str:
    value: Any = recipe
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return one_line(", ".join(map(str, value)) if isinstance(value, list) else value, 60)


def _way(recipe: Mapping[str, Any]) -> str:
    """What a model learns besides its answers."""
    settings = recipe["alignment"]
    words = alignment_words(settings)
    if settings["objective"] != "none":
        return f"also learns to make its image tokens resemble {TARGETS[settings.get('target', 'vfm')]} ({words})"
    return "learns from the answers alone" + ("" if words == "none" else f", with a {words}")


def _shared(model: Trained) -> dict[str, str]:
    """What two trainings may have in common: words by the key of the recipe that says it; `data` by the content."""
    recipe, record = model.recipe, model.record
    unit = "images" if recipe["model"]["kind"] == "toy" else "conversations"
    return {
        "data": f"on the same {record['items']} {unit} of {', '.join(recipe['data']['train'])}",
        "optim.steps": f"for {recipe['optim']['steps']} steps",
        "seed": f"with seed {recipe['seed']}",
        "start": f"from {'random initialization' if recipe['start'] is None else recipe['start']}",
    }


def sentences(first: Trained, second: Trained, next_step: str) -> list[str]:
    """The three of them; `next_step` is what `what_to_open` says."""
    return [what_was_compared(first, second), what_came_out(first, second, outcome(first, second)), next_step]


# --- the command ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Which pair, and what there is to open."""

    model: tuple[str, ...] = ()
    """The folders of two finished trainings, or NAME=FOLDER; the second is compared with the first."""
    report: Path | None = None
    """The HTML report of both, if it was written."""
    address: str = ""
    """Where the dashboard is served, if it is."""
    runs: Path | None = None
    """The runs folder; by default the one that holds the first model."""
    sweep: str | None = None
    """The sweep that trained them."""


def main(argv: list[str]) -> None:
    """Print the three sentences, numbered."""
    asked = parse(Config, argv, prog="python -m workbench.summary", description=__doc__ or "")
    models = named_models(asked.model)
    if len(models) != 2:
        raise ConfigError(
            f"model names {len(models)}: expected two trained models, such as --model runs/baseline runs/viral"
        )
    first, second = (Trained.read(label, Path(folder)) for label, folder in models.items())
    runs = asked.runs or Path(next(iter(models.values()))).parent
    said = sentences(
        first, second, what_to_open(report=asked.report, address=asked.address, runs=runs, sweep=asked.sweep)
    )
    sys.stdout.write("".join(f"{number}. {sentence}\n" for number, sentence in enumerate(said, start=1)))


if __name__ == "__main__":
    command(main)
