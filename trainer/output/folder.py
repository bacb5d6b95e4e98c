"""A run's output folder: free or resumable, locked by one run, and resumed only with the recipe that began it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml

from trainer import distributed
from trainer.output.checkpoints import (
    DAMAGED,
    UNFINISHED,
    check_same_launch,
    keep_newest,
    log,
    set_aside_later,
    unreadable_file,
    whole_checkpoints,
)
from trainer.recipe import Recipe
from workbench.errors import ConfigError, RunError
from workbench.files import atomic_file, locked, partial_files, remove_partial
from workbench.stored_recipe import current_recipe
from workbench.training_folder import LOG_FILE, RECIPE_FILE, RECORD_FILE
from workbench.yaml_config import as_mapping, check_known, config_fields, flatten, merge, read_recipe

FINAL = "final"  # folder that the trained model is written to, before its files are moved into the output folder
TABLES = ("evaluation.parquet", "accuracy.parquet")
# what is first written under a temporary name, which a killed run may leave behind
WRITTEN = (RECIPE_FILE, RECORD_FILE, LOG_FILE, "README.md", *TABLES, "not_finite-step-*", FINAL)


def check_same_recipe(folder: Path, recipe: Recipe) -> None:
    """Check that the run in `folder` was started with `recipe`.

    A key that the stored recipe lacks, because it is older than the key, counts as the default.

    Raises:
        ConfigError: a value differs, or the stored recipe has an unknown key; names the first one.
    """
    stored = current_recipe(read_recipe(folder / RECIPE_FILE))
    known = dict(config_fields(Recipe))
    for key, _ in flatten(stored):
        check_known(key, known, f"key '{key}' in {folder / RECIPE_FILE}")
    check_same_values(folder, stored, recipe)


def check_same_values(
    place: Path, values: Mapping[str, Any], recipe: Recipe, advice: str = "choose another output_dir"
) -> None:
    """Check that a run was started with `recipe`.

    Args:
        place: folder of the run, or file that describes it; for the message.
        values: the run's own recipe. A key that it lacks, because it is older than the key, counts as the default.
        advice: what to do if they differ; for the message.

    Raises:
        ConfigError: a value differs; names the first one.
    """
    stored, wanted = _flat_values(merge(as_mapping(Recipe()), values)), _flat_values(as_mapping(recipe))
    if recipe.resume:
        stored |= {
            key: wanted[key]
            for key in wanted
            if key in stored and _may_differ(key, stored[key], wanted[key], repaired=recipe.repaired)
        }
    ignored = {"resume", "repaired", "dry_run", "output_dir", "report_to", "keep_checkpoints", "push_to_hub"}
    for key in sorted(set(wanted) - ignored):
        if stored.get(key) != wanted[key]:
            raise ConfigError(
                f"the run in {place} was started with {key} {stored.get(key)}, and this recipe says {wanted[key]}:"
                f" {advice}"
            )


def _may_differ(key: str, stored: Any, wanted: Any, *, repaired: bool) -> bool:
    """Return whether a run may be resumed with another value of a key.

    That holds for a larger `data.max_length` and, with `repaired`, for other options (after `?`) of the same data set.
    """
    if key == "data.max_length":
        return stored is not None and (wanted is None or wanted > stored)
    if key not in ("data.train", "data.val", "data.test") or not repaired:
        return False
    stored_sets, wanted_sets = (
        [str(spec).partition("?")[0] for spec in (value if isinstance(value, list | tuple) else [value])]
        for value in (stored, wanted)
    )
    return stored_sets == wanted_sets


def _flat_values(recipe: Mapping[str, Any], section: str = "") -> dict[str, Any]:
    """Return the values of a recipe by `section.key`, with `start` as an absolute path."""
    values: dict[str, Any] = {}
    for key, value in recipe.items():
        name = f"{section}{key}"
        values |= _flat_values(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return values if section else values | {"start": recipe["start"] and str(Path(recipe["start"]).resolve())}


@contextmanager
def output_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of an output folder, so that no other run trains into it; rank 0 holds it for all ranks.

    Raises:
        RunError: another run holds the lock.
    """
    with ExitStack() as locks:
        distributed.together(lambda: _lock(folder, locks) if distributed.is_main() else None)
        yield


def _lock(folder: Path, locks: ExitStack) -> None:
    if not locks.enter_context(locked(folder.parent / f".{folder.name}.lock")):
        raise RunError(f"another process is training in {folder}: wait until it ends, or choose another output_dir")


def check_output(folder: Path, recipe: Recipe) -> Path | None:
    """Check that the output folder is free or, with `resume`, find the checkpoint to resume from; write nothing.

    Returns:
        The checkpoint; None for a new run, or if the run to resume stopped before its first checkpoint.

    Raises:
        RunError: the folder is not empty, or holds nothing that can be resumed, or its run had another number of ranks
            or another launch file.
        ConfigError: the run in it was started with another recipe.
    """
    if not recipe.resume:
        if _is_taken(folder):
            raise RunError(
                f"output_dir {folder} is not empty: expected a new folder, or --resume to continue the run in it"
            )
        return None
    if (folder / RECORD_FILE).exists():
        raise RunError(f"the run in {folder} is finished: nothing to resume")
    if not (folder / RECIPE_FILE).exists():
        raise RunError(f"no run in {folder}: expected the output_dir of an interrupted run; start it without --resume")
    check_same_recipe(folder, recipe)
    for checkpoint in reversed(whole_checkpoints(folder)):
        if reason := unreadable_file(checkpoint.folder):
            log.warning(DAMAGED, checkpoint.folder, reason)
            continue
        check_same_launch(checkpoint.folder)
        return checkpoint.folder
    return None


def _is_taken(folder: Path) -> bool:
    """Return whether `folder` holds more than files that a killed run had not finished writing."""
    if not folder.exists():
        return False
    if not folder.is_dir():
        return True
    unfinished = {file for name in WRITTEN for file in partial_files(folder, name)}
    return bool(set(folder.iterdir()) - unfinished)


def write_recipe(folder: Path, recipe: Recipe, checkpoint: Path | None) -> None:
    """Store the recipe, which marks `folder` as a training run, and remove unfinished files of a killed run.

    The caller must hold the `output_lock` of the folder.

    Args:
        checkpoint: the one that the run is resumed from, if any. Later ones cannot be read (`check_output`), and are
            set aside: they would count among the newest, in whose place good ones would be removed.
    """
    set_aside_later(folder, checkpoint)
    keep_newest(folder, recipe.keep_checkpoints)
    for unfinished in (folder / UNFINISHED, folder / FINAL):
        shutil.rmtree(unfinished, ignore_errors=True)
    for name in WRITTEN:
        remove_partial(folder, name)
    with atomic_file(folder / RECIPE_FILE) as partial:
        partial.write_text(yaml.safe_dump(as_mapping(recipe), sort_keys=False))
