"""One row per model, or per variant over its seeds: accuracy, difference to the baseline, alignment, state."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from workbench.errors import RunError, one_line
from workbench.intervals import t_interval, t_test
from workbench.overview.answers import answered, content_asked
from workbench.overview.differences import Pair, one_per_seed
from workbench.overview.models import Model, Models
from workbench.paired import holm
from workbench.training_folder import (
    ACCURACY_FILE,
    LOG_FILE,
    MEAN,
    alignment_parts,
    cknna_log,
    read_table,
    training_steps,
)

SETTINGS = ("target", "layer", "weight", "objective", "steps", "data")  # of a training, in tables
POINTS = 40  # of a curve in a table


def model_rows(models: Models, baseline: str) -> pd.DataFrame:
    """Return one row per model.

    Returns:
        Columns key, variant, seed, SETTINGS, accuracy, low, high, chance, difference, d_low, d_high (to the baseline,
        in the same units, over images), p_holm (corrected over the models), CKNNA (during training, at the end), curve
        (accuracy, or training loss, over training), state, why.
    """
    rows = [_row(model, models.by_key.get(baseline)) for model in models.by_key.values()]
    tested = [number for number, row in enumerate(rows) if np.isfinite(row["p"])]
    for number, p_holm in zip(tested, holm([rows[n]["p"] for n in tested]) if tested else [], strict=True):
        rows[number]["p_holm"] = p_holm
    return pd.DataFrame(rows).drop(columns="p", errors="ignore")


def variant_rows(models: Models, baseline: str) -> pd.DataFrame:
    """Return one row per variant with finished trainings: means over seeds, intervals and p-values over seeds.

    Returns:
        Columns variant, seeds (that were `asked_alike`), SETTINGS, accuracy, low, high, chance, difference, d_low,
        d_high, p_holm, CKNNA, why (some seeds are left out). A single seed has no interval.
    """
    first = tuple(models.variants.get(models.by_key[baseline].variant, ())) if baseline in models.by_key else ()
    rows: list[dict[str, Any]] = []
    tests: list[tuple[int, float]] = []
    for variant, group in models.variants.items():
        alike, why = asked_alike(group)
        known = [row for row in (_row(model, None) for model in alike) if np.isfinite(row["accuracy"])]
        if not known:
            continue
        interval = t_interval([row["accuracy"] for row in known], bounds=(0.0, 1.0))
        row: dict[str, Any] = {"variant": variant, "seeds": len(known), "why": why}
        row |= {name: known[0][name] for name in SETTINGS}
        row |= {"accuracy": interval.estimate, "chance": known[0]["chance"]}
        if len(known) > 1:
            row |= {"low": interval.low, "high": interval.high}
        aligned = [each["CKNNA"] for each in known if np.isfinite(each["CKNNA"])]
        changes = _changes(first, alike) if first and first[0].variant != variant else []
        row["CKNNA"] = float(np.mean(aligned)) if aligned else np.nan
        if len(changes) > 1:
            over = t_interval(changes, bounds=(-1.0, 1.0))
            row |= {"difference": over.estimate, "d_low": over.low, "d_high": over.high}
            tests.append((len(rows), t_test(changes)))
        elif changes:
            row["difference"] = changes[0]
        rows.append(row)
    columns = ["variant", "seeds", *SETTINGS, "accuracy", "low", "high", "chance"]
    table = pd.DataFrame(rows).reindex(columns=[*columns, "difference", "d_low", "d_high", "p_holm", "CKNNA", "why"])
    if tests:
        table.loc[[number for number, _ in tests], "p_holm"] = holm([p for _, p in tests])
    return table


def _changes(first: Sequence[Model], group: Sequence[Model]) -> list[float]:
    """Return the differences in accuracy of trainings with the same seed that were asked the same questions."""
    before, after = (one_per_seed(model for model in models if accuracy_of(model)) for models in (first, group))
    return [
        accuracy_of(after[seed])["accuracy"] - accuracy_of(before[seed])["accuracy"]
        for seed in before
        if seed in after and _asked(before[seed]) == _asked(after[seed])
    ]


def asked_alike(models: Iterable[Model]) -> tuple[list[Model], str]:
    """Return the trainings of a variant whose accuracies have a mean, one per seed, and who is left out, in words.

    They were asked the same questions: those that the most seeds were asked, of several those of the first.
    """
    groups: dict[tuple[object, ...], list[Model]] = {}
    for model in models:
        if len(accuracies_of(model)):
            groups.setdefault(_asked(model), []).append(model)
    by_seed = [one_per_seed(group) for group in groups.values()]
    most = max(by_seed, key=len, default={})
    alike = list(most.values())
    others = [model.key for group in by_seed for seed, model in group.items() if seed not in most]
    return alike, f"without {', '.join(others)}, asked other questions than {alike[0].key}" if others else ""


def _asked(model: Model) -> tuple[object, ...]:
    """Return what decides the questions of a model's stored accuracy: their data and its content, and their types."""
    table = accuracies_of(model)
    types = table[[name for name in ("category", "n") if name in table]].itertuples(index=False, name=None)
    return model.test_data, content_asked(model), *types


def _row(model: Model, baseline: Model | None) -> dict[str, Any]:
    row: dict[str, Any] = {"key": model.key, "variant": model.variant, "seed": model.seed, **_alignment(model)}
    row |= {"steps": model.recipe.get("optim", {}).get("steps"), "data": model.test_data}
    scored = accuracy_of(model)
    row |= {name: scored.get(name, np.nan) for name in ("accuracy", "low", "high", "chance")}
    row |= dict.fromkeys(("difference", "d_low", "d_high", "p_holm", "p"), np.nan)
    if baseline is not None and baseline.key != model.key and scored:
        row |= _against(baseline, model)
    log = log_of(model)
    row |= {"CKNNA": _last_cknna(model), "curve": _curve(log)}
    return row | {"state": state_words(model, log), "why": model.why}


def _alignment(model: Model) -> dict[str, Any]:
    """Return what a model is aligned with, in which layers and how strongly, and the objective with other settings."""
    settings = model.recipe.get("alignment")
    if not settings:
        return {"target": "not known", "layer": None, "weight": None, "objective": None}
    parts = alignment_parts(settings)
    if not model.aligned:
        return {"target": "none", "layer": None, "weight": None, "objective": ", ".join(parts) or None}
    others = [part for part in parts[3:] if not part.startswith("objective ")]
    return {
        "target": parts[0],
        "layer": ", ".join(map(str, settings["layer"])),
        "weight": settings["weight"],
        "objective": ", ".join([settings["objective"], *others]),
    }


def _against(baseline: Model, model: Model) -> dict[str, float]:
    try:
        answers = answered(Pair((baseline,), (model,)))
    except RunError:
        return {}
    difference = answers.by_type.set_index("category").loc[MEAN]
    scored = {"difference": difference["score"], "d_low": difference["low"], "d_high": difference["high"]}
    return scored | {"p": answers.p}


def accuracy_of(model: Model) -> dict[str, float]:
    """Return the stored accuracy of a model, the mean of types, with low, high and chance; {} if there is none."""
    table = _table(model, ACCURACY_FILE)
    if "accuracy" not in table:
        return {}
    rows = table[table["category"] == MEAN]
    return {name: float(rows[name].iloc[0]) for name in ("accuracy", "low", "high", "chance")} if len(rows) else {}


def accuracies_of(model: Model) -> pd.DataFrame:
    """Return the stored accuracies of a model by question type, or no rows."""
    table = _table(model, ACCURACY_FILE)
    return table if "accuracy" in table else table[:0]


def variant_accuracies(models: Sequence[Model]) -> pd.DataFrame:
    """Return the accuracies of one variant by question type: means and intervals over its seeds.

    Args:
        models: trainings of the variant, of which those that were `asked_alike` count.

    Returns:
        Columns category, accuracy, low, high (NaN for a single seed), n_images, chance, over; no rows if nothing is
        stored.
    """
    alike, _ = asked_alike(models)
    if not alike:
        return pd.DataFrame()
    rows = []
    for category, part in pd.concat(map(accuracies_of, alike)).groupby("category", sort=False):
        seeds = len(part)
        interval = t_interval(part["accuracy"].tolist(), bounds=(0.0, 1.0))
        low, high = (interval.low, interval.high) if seeds > 1 else (np.nan, np.nan)
        over = f"{seeds} seeds" if seeds > 1 else "one seed, so no interval"
        row = {"category": category, "accuracy": interval.estimate, "low": low, "high": high, "over": over}
        rows.append(row | {name: part[name].iloc[0] for name in ("n_images", "chance")})
    return pd.DataFrame(rows)


def log_of(model: Model) -> pd.DataFrame:
    """Return the training log of a model; an empty table if there is none, or if it is damaged."""
    return _table(model, LOG_FILE)


def _table(model: Model, name: str) -> pd.DataFrame:
    file = model.folder / name if model.folder is not None else None
    if file is None or not file.exists():
        return pd.DataFrame()
    return _read(file, file.stat().st_mtime_ns)


@lru_cache(maxsize=256)
def _read(file: Path, changed: int) -> pd.DataFrame:
    del changed
    try:
        return read_table(file)
    except RunError:
        return pd.DataFrame()  # `Model.why` says so


def _last_cknna(model: Model) -> float:
    """Return the CKNNA that was measured last during training, the mean of the aligned layers; NaN without one."""
    if log_of(model).empty or model.folder is None:
        return float("nan")
    table = cknna_log(model.folder)
    return float(table["score"][table["step"] == table["step"].max()].mean()) if len(table) else float("nan")


def _curve(log: pd.DataFrame) -> list[float]:
    for measure in ("accuracy/mean", "val_lm_loss", "lm_loss"):
        if measure in log and log[measure].notna().any():
            values = log[measure].dropna().tolist()
            step = max(1, len(values) // POINTS)
            return [float(value) for value in values[::-step][::-1]]  # the last one is always among them
    return []


def state_words(model: Model, log: pd.DataFrame) -> str:
    """Return the state of a training in words."""
    if model.state == "training":
        steps = training_steps(model.folder) if model.folder is not None else None
        last = f"{log['step'].max():.0f}" if len(log) else "0"
        return f"at step {last}" + (f" of {steps}" if steps else "")
    return {"finished": "finished", "damaged": f"damaged: {one_line(model.why, 120)}"}.get(model.state, "analyses only")
