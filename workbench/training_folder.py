"""Read what `trainer` writes into a training folder: record, recipe, log, evaluation and checkpoints."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from workbench.errors import RunError, one_line
from workbench.models import did_you_mean
from workbench.records import TrainingRecord, read_training_record
from workbench.stored_recipe import current_recipe

log = logging.getLogger(__name__)

RECORD_FILE = "training.json"  # written last: a folder without it is not a finished model
RECIPE_FILE = "recipe.yaml"  # written first
LOG_FILE = "training.parquet"  # rewritten with every new row
EVALUATION_FILE = "evaluation.parquet"
ACCURACY_FILE = "accuracy.parquet"
BEST, BEST_FILE = "best", "best.json"  # folder of the model with the highest validation score; its step and score
MEAN = "mean of types"
BEST_ROW = ", best checkpoint"  # follows the name of a variant in a sweep's table, in the row of its best checkpoint
# columns beside a score in the log: `accuracy/count` has `accuracy_low/count` etc., `val_lm_loss` has `val_lm_loss_low`
SCORE_COLUMNS = ("low", "high", "chance", "n")


@dataclass(frozen=True)
class Checkpoint:
    """The model after `step` optimizer steps, stored as a plain transformers folder."""

    step: int
    folder: Path


def checkpoints(folder: Path) -> list[Checkpoint]:
    """Return the checkpoints in a training folder, in the order of their steps.

    An incomplete checkpoint is left out with a warning; it has no state file, which is written last.
    """
    complete = []
    for path in folder.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if not number.isdigit():
            continue
        if (path / "trainer_state.json").exists():
            complete.append(Checkpoint(int(number), path))
        else:
            log.warning("%s is incomplete and is skipped", path)
    return sorted(complete, key=lambda checkpoint: checkpoint.step)


def evaluation_of(folder: Path) -> pd.DataFrame:
    """Read the answers to the validation questions, or the losses on the validation conversations, one row each.

    Raises:
        RunError: the file is missing or damaged.
    """
    return read_table(folder / EVALUATION_FILE)


def read_table(file: Path) -> pd.DataFrame:
    """Read a table of a finished run.

    Raises:
        RunError: the file is missing or damaged.
    """
    if not file.exists():
        raise RunError(f"{file} is not there: expected a table of a finished run")
    try:
        return pd.read_parquet(file)
    except (OSError, ValueError) as error:
        raise RunError(f"{file} cannot be read ({one_line(error, 100)}): expected a table of a finished run") from error


def best_of(folder: Path) -> dict[str, float]:
    """Return {"step": step, "score": validation score} of the model in `best/`, {} if there is none.

    Raises:
        RunError: the file with these values is damaged.
    """
    file = folder / BEST / BEST_FILE
    try:
        content = json.loads(file.read_text()) if file.exists() else {}
        return {key: float(content[key]) for key in ("step", "score")} if content else {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{file} is damaged ({one_line(error)}): expected the step and score of the best model"
        ) from error


def training_record(folder: Path) -> TrainingRecord:
    """Read the record of a finished training: its recipe, fingerprints and environment.

    Raises:
        RunError: `folder` has no finished training, or the record is damaged.
    """
    if not (folder / RECORD_FILE).exists():
        near = "" if folder.is_dir() else did_you_mean(str(folder))
        raise RunError(
            f"{folder} is not the folder of a finished training: expected a {RECORD_FILE} there, which `python -m"
            f" trainer` writes last{near}"
        )
    try:
        record = read_training_record(folder / RECORD_FILE)
        record["recipe"] = current_recipe(record["recipe"])
        for origin in record.get("origins", ()):
            origin["part"] = origin["part"].replace("vision tower", "vision encoder")  # the old name
        assert isinstance(record["recipe"]["alignment"], dict)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise RunError(
            f"{folder / RECORD_FILE} is damaged ({one_line(error)}): expected the record of a finished training"
        ) from error
    return record


def trained_at(folder: Path) -> str:
    """Return when the training in a folder was finished, UTC, "" if there is no readable record of one."""
    try:
        return str(json.loads((folder / RECORD_FILE).read_text()).get("created", ""))
    except (OSError, ValueError, AttributeError):
        return ""


def training_recipe(folder: Path) -> dict[str, Any]:
    """Return the recipe of a training, finished or not; {} if it is missing or cannot be read."""
    import yaml

    try:
        if (folder / RECORD_FILE).exists():  # JSON is read faster than YAML
            recipe = json.loads((folder / RECORD_FILE).read_text())["recipe"]
        else:
            recipe = yaml.safe_load((folder / RECIPE_FILE).read_text())
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return {}
    return current_recipe(recipe) if isinstance(recipe, dict) else {}


def training_steps(folder: Path) -> int | None:
    """Return the number of steps in the recipe of a training, finished or not; None if it is not known."""
    optim = training_recipe(folder).get("optim")
    return optim.get("steps") if isinstance(optim, dict) else None


def evaluated_on(recipe: Mapping[str, Any]) -> str:
    """Return the spec of the data set of a training's final evaluation."""
    data = recipe["data"]
    return str(data.get("test") or data["val"])


def alignment_words(settings: Mapping[str, Any]) -> str:
    """Describe the alignment of a training in a few words: `alignment_parts`, or that there is none."""
    return ", ".join(alignment_parts(settings)) or "none"


def alignment_parts(settings: Mapping[str, Any]) -> list[str]:
    """Describe the alignment of a training: target, layer, weight, then every other non-default setting.

    Args:
        settings: the section `alignment` of its recipe; a key that it lacks, because it is older, had its default.
    """
    layer, vfm = (", ".join(map(str, settings[key])) for key in ("layer", "vfm"))
    words = []
    if settings["objective"] != "none":
        target = {"vfm": vfm, "encoder": "own encoder", "projector": "own projector"}[settings.get("target", "vfm")]
        words = [target, f"layer {layer}", f"weight {settings['weight']}"]
        defaults = {
            "objective": "cosine",
            "schedule": "constant",
            "final_weight": None,
            "warmup": 0,
            "heads": "each",
            "where": "output",
            "mask": 0.0,
            "final_norm": False,
        }
        changed = [key for key, default in defaults.items() if settings.get(key, default) != default]
        words += [_setting(key, settings[key]) for key in changed]
        if settings.get("where") == "heads":
            chosen = settings["selection"]
            words.append(f"the {chosen['heads']} least aligned by {chosen['k']} neighbors on {chosen['images']} images")
        controls = {
            "images": ("others", "control: shuffled targets"),
            "center": (True, "control: centered targets"),
        }
        words += [text for key, (value, text) in controls.items() if settings.get(key) == value]
        if settings.get("target", "vfm") == "vfm" and settings.get("teacher_norm", "own") != "own":
            words.append("CLIP-normalized")
    if settings.get("residual", "none") != "none":
        words.append(f"residual {settings['residual']}" + (f", layer {layer}" if not words else ""))
    return words


def _setting(key: str, value: Any) -> str:
    """Return a setting in words: `final_norm` True as "final norm", `warmup` 5 as "warmup 5"."""
    words = key.replace("_", " ")
    return words if value is True else f"{words} {value}"


def training_log(folder: Path) -> pd.DataFrame:
    """Read the losses on the training batches; each row is the mean over the steps since the row before.

    Returns:
        Columns step, lm_loss, alignment_loss (NaN without alignment).

    Raises:
        RunError: the log is missing or damaged.
    """
    if not (folder / LOG_FILE).exists():
        raise RunError(f"{folder} has no training log: expected a {LOG_FILE} there, which `python -m trainer` writes")
    try:
        table = pd.read_parquet(folder / LOG_FILE)
        losses = table.reindex(columns=["step", "lm_loss", "alignment_loss"])[table["lm_loss"].notna()]
    except (OSError, ValueError, KeyError) as error:
        raise RunError(
            f"{folder / LOG_FILE} is not a training log ({one_line(error)}): expected the table that `python -m"
            " trainer` writes"
        ) from error
    return losses.drop_duplicates("step", keep="last").sort_values("step", ignore_index=True)  # type: ignore[no-any-return]


def score_log(log: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Return a validation measure, an accuracy or `val_lm_loss`, at every step at which it was evaluated.

    Returns:
        Columns step, score, low, high (95 %, over images or conversations), chance, n (questions or answer tokens); all
        but step and score are NaN in older logs, which do not have them.
    """
    kind, slash, name = measure.partition("/")
    sources = {"step": "step", "score": measure, **{key: f"{kind}_{key}{slash}{name}" for key in SCORE_COLUMNS}}
    evaluated = log[log[measure].notna()].drop_duplicates("step").reindex(columns=list(sources.values()))
    return evaluated.set_axis(list(sources), axis=1).replace([np.inf, -np.inf], np.nan)


def cknna_log(folder: Path) -> pd.DataFrame:
    """Read the CKNNA of the aligned layers that was measured while training.

    Returns:
        Columns of (layer and VFM, such as "layer 3, dinov2-small"), step, score, low, high (interval over images),
        null_mean, null_q95 (permutation null), n, k, n_images; no rows if CKNNA was not measured.
    """
    table = pd.read_parquet(folder / LOG_FILE)
    parts = []
    for column in table.columns:
        if column.startswith("cknna/"):
            name = column.removeprefix("cknna/")
            measured = table[table[column].notna()]
            sources = {
                "score": column,
                **{key: f"cknna_{key}/{name}" for key in ("low", "high", "null_mean", "null_q95")},
            }
            sources |= {"n": "cknna_n", "k": "cknna_k", "n_images": "cknna_images", "step": "step"}
            layer, _, vfm = name.partition("/")
            part = pd.DataFrame({key: measured[source] for key, source in sources.items()})
            parts.append(part.assign(of=f"{layer.replace('_', ' ')}, {vfm}"))
    columns = ["of", "step", "score", "low", "high", "null_mean", "null_q95", "n", "k", "n_images"]
    if not parts:
        return pd.DataFrame(columns=columns)
    return pd.concat(parts).drop_duplicates(["of", "step"], keep="last")[columns]
