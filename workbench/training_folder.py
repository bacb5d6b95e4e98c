"""A training folder as it is read afterwards: its record, its log and its checkpoints. `trainer` writes it."""

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
from workbench.stored_recipe import current_recipe

log = logging.getLogger(__name__)

RECORD_FILE = "training.json"  # written last: a folder without it is not a finished model
RECIPE_FILE = "recipe.yaml"  # written first
LOG_FILE = "training.parquet"  # written anew at every row
EVALUATION_FILE = "evaluation.parquet"
BEST, BEST_FILE = "best", "best.json"  # the model of the highest validation score, and its step and score
MEAN = "mean of types"
BEST_ROW = ", best checkpoint"  # after the name of a variant, in a row of its own of a sweep's table
# `accuracy/count` in the log has `accuracy_low/count` and so on; `val_lm_loss` has `val_lm_loss_low`
OF_A_SCORE = ("low", "high", "chance", "n")


@dataclass(frozen=True)
class Checkpoint:
    """A model as it was after `step` optimizer steps: a plain transformers folder."""

    step: int
    folder: Path


def checkpoints(folder: Path) -> list[Checkpoint]:
    """The checkpoints in a training folder by step; one that was not written to its end is left out (its state file
    comes last)."""
    found = []
    for path in folder.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if not number.isdigit():
            continue
        if (path / "trainer_state.json").exists():
            found.append(Checkpoint(int(number), path))
        else:
            log.warning("%s is only half written and is skipped", path)
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def evaluation_of(folder: Path) -> pd.DataFrame:
    """The answers to the validation questions, or the losses on the validation conversations, one row each.

    Raises:
        RunError: they are not there, or damaged.
    """
    return read_table(folder / EVALUATION_FILE)


def read_table(file: Path) -> pd.DataFrame:
    """A table of a finished run.

    Raises:
        RunError: it is not there, or damaged.
    """
    if not file.exists():
        raise RunError(f"{file} is not there: expected a table of a finished run")
    try:
        return pd.read_parquet(file)
    except (OSError, ValueError) as error:
        raise RunError(f"{file} cannot be read ({one_line(error, 100)}): expected a table of a finished run") from error


def best_of(folder: Path) -> dict[str, float]:
    """Step and validation score of the model in `best/`; nothing where there is none.

    Raises:
        RunError: its record is damaged.
    """
    file = folder / BEST / BEST_FILE
    try:
        content = json.loads(file.read_text()) if file.exists() else {}
        return {key: float(content[key]) for key in ("step", "score")} if content else {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{file} is damaged ({one_line(error)}): expected the step and score of the best model"
        ) from error


def training_record(folder: Path) -> dict[str, Any]:
    """What a finished training says of itself: its recipe, fingerprints and environment.

    Raises:
        RunError: no finished training, or a damaged record.
    """
    if not (folder / RECORD_FILE).exists():
        near = "" if folder.is_dir() else did_you_mean(str(folder))
        raise RunError(
            f"{folder} is not the folder of a finished training: expected a {RECORD_FILE} there, which `python -m"
            f" trainer` writes last{near}"
        )
    try:
        record: dict[str, Any] = json.loads((folder / RECORD_FILE).read_text())
        record["recipe"] = current_recipe(record["recipe"])
        for origin in record.get("origins", ()):
            origin["part"] = origin["part"].replace("vision tower", "vision encoder")  # as it was called once
        assert isinstance(record["recipe"]["alignment"], dict)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise RunError(f"{folder / RECORD_FILE} is damaged ({error})") from error
    return record


def training_recipe(folder: Path) -> dict[str, Any]:
    """The recipe of a training, finished or not, {} where there is none to be read."""
    import yaml

    try:
        if (folder / RECORD_FILE).exists():  # which reads faster
            found = json.loads((folder / RECORD_FILE).read_text())["recipe"]
        else:
            found = yaml.safe_load((folder / RECIPE_FILE).read_text())
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return {}
    return current_recipe(found) if isinstance(found, dict) else {}


def training_steps(folder: Path) -> int | None:
    """How many steps a training has, finished or not, None where that is not known."""
    optim = training_recipe(folder).get("optim")
    return optim.get("steps") if isinstance(optim, dict) else None


def evaluated_on(recipe: Mapping[str, Any]) -> str:
    """The data set of a training's final evaluation."""
    data = recipe["data"]
    return str(data.get("test") or data["val"])


def alignment_words(settings: Mapping[str, Any]) -> str:
    """What was aligned to what, in a few words, every departure from plain VIRAL among them; a record from before a key
    existed had its default."""
    layer, vfm = (", ".join(map(str, settings[key])) for key in ("layer", "vfm"))
    words = []
    if settings["objective"] != "none":
        target = {"vfm": vfm, "encoder": "own encoder", "projector": "own projector"}[settings.get("target", "vfm")]
        words = [target, f"layer {layer}", f"weight {settings['weight']}"]
        usual = {
            "objective": "cosine",
            "schedule": "constant",
            "final_weight": None,
            "warmup": 0,
            "heads": "each",
            "where": "output",
        }
        words += [
            f"{key.replace('_', ' ')} {settings[key]}"
            for key, value in usual.items()
            if settings.get(key, value) != value
        ]
        controls = {
            "images": ("others", "control: targets of other images"),
            "center": (True, "targets less their mean"),
        }
        words += [said for key, (value, said) in controls.items() if settings.get(key) == value]
        if settings.get("target", "vfm") == "vfm" and settings.get("teacher_norm", "own") != "own":
            words.append("CLIP-normalised")
    if settings.get("residual", "none") != "none":
        words.append(f"residual {settings['residual']}" + (f", layer {layer}" if not words else ""))
    return ", ".join(words) or "none"


def training_log(folder: Path) -> pd.DataFrame:
    """The losses of the training batches, means since the row before: columns step, lm_loss, alignment_loss (NaN
    without alignment).

    Raises:
        RunError: no log, or a damaged one.
    """
    if not (folder / LOG_FILE).exists():
        raise RunError(f"{folder} has no training log: expected a {LOG_FILE} there, which `python -m trainer` writes")
    try:
        table = pd.read_parquet(folder / LOG_FILE)
        found = table.reindex(columns=["step", "lm_loss", "alignment_loss"])[table["lm_loss"].notna()]
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"{folder / LOG_FILE} is not a training log ({error})") from error
    return found.drop_duplicates("step", keep="last").sort_values("step", ignore_index=True)  # type: ignore[no-any-return]


def score_log(log: pd.DataFrame, measure: str) -> pd.DataFrame:
    """An accuracy, or `val_lm_loss`, as it was measured while training; NaN where a log from before has no more than
    the score.

    Returns:
        Columns step, score, low, high (95 %, over images or conversations), chance, n (questions or answer tokens).
    """
    kind, slash, name = measure.partition("/")
    sources = {"step": "step", "score": measure, **{key: f"{kind}_{key}{slash}{name}" for key in OF_A_SCORE}}
    own = log[log[measure].notna()].drop_duplicates("step").reindex(columns=list(sources.values()))
    return own.set_axis(list(sources), axis=1).replace([np.inf, -np.inf], np.nan)


def cknna_log(folder: Path) -> pd.DataFrame:
    """CKNNA of the aligned layer as it was measured while training, with its interval over images and its permutation
    null; empty where it was not.

    Returns:
        Columns of (such as "layer 3, dinov2-small"), step, score, low, high, null_mean, null_q95, n, k, n_images.
    """
    table = pd.read_parquet(folder / LOG_FILE)
    parts = []
    for column in table.columns:
        if column.startswith("cknna/"):
            name = column.removeprefix("cknna/")
            own = table[table[column].notna()]
            sources = {
                "score": column,
                **{key: f"cknna_{key}/{name}" for key in ("low", "high", "null_mean", "null_q95")},
            }
            sources |= {"n": "cknna_n", "k": "cknna_k", "n_images": "cknna_images", "step": "step"}
            layer, _, vfm = name.partition("/")
            parts.append(
                pd.DataFrame({key: own[source] for key, source in sources.items()}).assign(
                    of=f"{layer.replace('_', ' ')}, {vfm}"
                )
            )
    columns = ["of", "step", "score", "low", "high", "null_mean", "null_q95", "n", "k", "n_images"]
    return (
        pd.concat(parts).drop_duplicates(["of", "step"], keep="last")[columns]
        if parts
        else pd.DataFrame(columns=columns)
    )
