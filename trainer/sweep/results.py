"""The result of a finished run, read from its folder or from a small JSON file that remains when the folder is deleted.

python -m trainer.sweep SWEEP.yaml --export FOLDER                 # writes FOLDER/RUN.json, a few kB each
python -m trainer.sweep SWEEP.yaml --report --exported FOLDER      # makes the table from these files alone

A file looks like this:

{"run": "viral_limit_train-300-s10", "words": "RECIPE.yaml --data.limit_train 300", "seed": 10, "git": ...,
"last": {"asked": ..., "types": ...}, ...}
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.output.folder import check_same_values
from trainer.recipe import Recipe
from trainer.sweep.spec import Job, Sweep, check
from workbench.errors import RunError
from workbench.files import atomic_file
from workbench.scoring.answers import Answers, answers_of
from workbench.stored_recipe import current_recipe
from workbench.training_folder import BEST, LOG_FILE, RECORD_FILE, best_of, read_table, training_record
from workbench.yaml_config import as_mapping, merge

CURVE = {
    "step": "step",
    "accuracy": "accuracy/mean",
    "val_lm_loss": "val_lm_loss",
    "val_alignment_loss": "val_alignment_loss",
}
# keys of a recipe that do not change the model
MACHINE = ("output_dir", "resume", "repaired", "dry_run", "report_to", "push_to_hub")
ENVIRONMENT = ("git", "dirty", "packages", "platform", "created")


@dataclass(frozen=True)
class Result:
    """The result of a finished run; an exported JSON file has these fields.

    Attributes:
        run: name of its folder.
        words: recipe and options as the sweep writes them; {output_dir}, {point} and {seed} are not filled in.
        seed: of the run.
        recipe: all values of the recipe but those of `MACHINE`; `start` is relative to the sweep's folder.
        steps: optimizer steps.
        seconds: of training.
        environment: git, dirty, packages, platform, created.
        vfm: VFMs of the targets, if any.
        fingerprints: {part: hash of its content}, such as data, val, test, tower, vfm.
        last: answers of the model after the last step.
        best: answers of the checkpoint with the highest validation score, if there is one.
        best_step: its step.
        curve: {step, accuracy (mean of types), val_lm_loss, val_alignment_loss}, with one value for each evaluation on
            the validation split.
        losses: {step, lm_loss, alignment_loss} of the last row of the training log.
        warnings: of the training.
        global_batch: images in an optimizer step, of all processes; None in files that are older than this field.
    """

    run: str
    words: str
    seed: int
    recipe: dict[str, Any]
    steps: int
    seconds: float
    environment: dict[str, Any]
    vfm: str | None
    fingerprints: dict[str, str]
    last: Answers
    best: Answers | None
    best_step: int | None
    curve: dict[str, list[float | None]]
    losses: dict[str, float | None]
    warnings: list[str]
    global_batch: int | None = None


def finished(sweep: Sweep) -> list[tuple[Job, Result]]:
    """Read all finished runs of a sweep, from their folders or, with `exported`, from their JSON files.

    Raises:
        RunError: no run is finished, or one is damaged or was evaluated by its loss instead of its answers.
        ConfigError: a run was trained from another recipe.
    """
    check(sweep)
    if sweep.exported is None:
        runs = [(job, result_of(sweep, job)) for job in sweep.runs() if job.finished]
    else:
        runs = [
            (job, _read(sweep, job, file)) for job in sweep.runs() if (file := sweep.exported / f"{job}.json").exists()
        ]
    if not runs:
        expected = "train the sweep first"
        if sweep.exported is not None:
            gone = "" if sweep.exported.is_dir() else "there is no such folder; "
            expected = f"{gone}expected files such as {next(iter(sweep.runs()))}.json, which --export writes"
        raise RunError(f"no finished run in {sweep.exported or sweep.output_dir}: {expected}")
    return runs


def result_of(sweep: Sweep, job: Job) -> Result:
    """Read the result of a finished run from its folder.

    Raises:
        RunError: a file is missing or damaged, or the run was evaluated by its loss instead of its answers.
    """
    record: Mapping[str, Any] = training_record(job.folder)
    if missing := next((key for key in ("seconds", *ENVIRONMENT) if key not in record), None):
        raise RunError(
            f"{job.folder / RECORD_FILE} is damaged (no '{missing}'): delete the folder and train the run again"
        )
    recipe = {key: value for key, value in record["recipe"].items() if key not in MACHINE}
    if recipe.get("start"):
        recipe["start"] = os.path.relpath(recipe["start"], sweep.output_dir)
    prints = {
        key.removesuffix("_fingerprint"): value
        for key, value in record.items()
        if key in ("data", "val", "test") or key.endswith("_fingerprint")
    }
    data, steps = prints.get("test") or prints.get("val"), recipe["optim"]["steps"]
    curve, losses = _log(job.folder)
    best = best_of(job.folder)
    return Result(
        run=str(job),
        words=job.setting.words,
        seed=job.seed,
        recipe=recipe,
        steps=steps,
        seconds=round(record["seconds"], 1),
        environment={key: record[key] for key in ENVIRONMENT},
        vfm=record.get("vfm"),
        fingerprints={key: str(value) for key, value in prints.items() if value is not None},
        last=answers_of(job.folder, data),
        best=answers_of(job.folder / BEST, data) if best else None,
        best_step=int(best["step"]) if best else None,
        curve=curve,
        losses=losses,
        warnings=record.get("warnings", []),
        global_batch=record.get("global_batch"),
    )


def _log(folder: Path) -> tuple[dict[str, list[float | None]], dict[str, float | None]]:
    """Return the validation curve and the last losses of a training log, as `Result.curve` and `Result.losses`."""
    log = read_table(folder / LOG_FILE).reindex(columns=[*CURVE.values(), "lm_loss", "alignment_loss"])
    evaluated = log[log["accuracy/mean"].notna()].drop_duplicates("step", keep="last")
    trained = log.loc[log["lm_loss"].notna(), ["step", "lm_loss", "alignment_loss"]].tail(1).to_dict("records")
    curve = {name: [_number(value) for value in evaluated[column]] for name, column in CURVE.items()}
    return curve, {name: _number(value) for name, value in (trained[0] if trained else {}).items()}


def _number(value: float) -> float | None:
    """Return a value of the log unrounded, since the claims' rules use it; None if it was not measured."""
    if not math.isfinite(value):
        return None
    return int(value) if value == int(value) else float(value)


def export(folder: Path, runs: Sequence[tuple[Job, Result]]) -> None:
    """Write a JSON file for each run, with one line for each field.

    Raises:
        RunError: a file of that name holds another run; nothing is written.
    """
    for _, result in runs:
        _check_same_run(folder / f"{result.run}.json", result)
    for _, result in runs:
        with atomic_file(folder / f"{result.run}.json") as partial:
            lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in asdict(result).items())
            partial.write_text(f"{{\n{lines}\n}}\n")


def _check_same_run(file: Path, result: Result) -> None:
    """Check that an exported file, if it is there, is of a run with the recipe of `result`."""
    try:
        stored = current_recipe(json.loads(file.read_text())["recipe"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # missing or damaged
    both = [merge(as_mapping(Recipe()), recipe) | {"keep_checkpoints": None} for recipe in (stored, result.recipe)]
    if both[0] != both[1]:
        raise RunError(
            f"{file} holds a run with another recipe, which would be lost: expected another folder for --export, or"
            " that file removed"
        )


def _read(sweep: Sweep, job: Job, file: Path) -> Result:
    """Read an exported result, and check that the run was trained with the recipe that the sweep has now."""
    try:
        content = json.loads(file.read_text())
        last, best = (
            None if content[key] is None else Answers.stored(content[key], f"{file}, {key}") for key in ("last", "best")
        )
        result = Result(**content | {"recipe": current_recipe(content["recipe"]), "last": last, "best": best})
        assert result.last is not None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise RunError(
            f"{file} is damaged ({' '.join(str(error).split())[:120]}): expected what --export wrote there"
        ) from error
    stored = result.recipe
    if stored.get("start"):
        stored = stored | {"start": str(sweep.output_dir / stored["start"])}
    check_same_values(
        file, stored, job.recipe(), advice=f"expected the sweep as it was at commit {result.environment['git'][:8]}"
    )
    return result
