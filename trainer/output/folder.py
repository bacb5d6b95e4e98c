"""A run's output folder: free or resumable, held by one process, and only ever continued with the recipe that began
it."""

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
    unreadable_file,
    whole_checkpoints,
)
from trainer.recipe import Recipe
from workbench.errors import ConfigError, RunError
from workbench.files import atomic_file, locked, partial_files, remove_partial
from workbench.stored_recipe import current_recipe
from workbench.training_folder import LOG_FILE, RECIPE_FILE, RECORD_FILE
from workbench.yaml_config import as_mapping, check_known, config_fields, flatten, merge, read_recipe

FINAL = "final"  # the trained model, until each of its files is moved to where it is found
TABLES = ("evaluation.parquet", "accuracy.parquet")
# under another name first
WRITTEN = (RECIPE_FILE, RECORD_FILE, LOG_FILE, "README.md", *TABLES, "not_finite-step-*", FINAL)


def check_same_recipe(folder: Path, recipe: Recipe) -> None:
    """Check that the run in `folder` was started with `recipe`; a key that its recipe lacks, being older than the key,
    had the default.

    Raises:
        ConfigError: names the first key that differs, or one that no recipe has.
    """
    written = current_recipe(read_recipe(folder / RECIPE_FILE))
    known = dict(config_fields(Recipe))
    for key, _ in flatten(written):
        check_known(key, known, f"key '{key}' in {folder / RECIPE_FILE}")
    check_same_values(folder, written, recipe)


def check_same_values(
    place: Path, values: Mapping[str, Any], recipe: Recipe, advice: str = "choose another output_dir"
) -> None:
    """See that a run was started with `recipe`; `values` are those of its own, without keys that are younger than it.

    Args:
        place: where the run is, or is told of.

    Raises:
        ConfigError: names the first key that differs.
    """
    stored, own = _keys(merge(as_mapping(Recipe()), values)), _keys(as_mapping(recipe))
    if recipe.resume:
        stored |= {
            key: own[key]
            for key in own
            if key in stored and _may_differ(key, stored[key], own[key], repaired=recipe.repaired)
        }
    for key in sorted(
        set(own) - {"resume", "repaired", "dry_run", "output_dir", "report_to", "keep_checkpoints", "push_to_hub"}
    ):
        if stored.get(key) != own[key]:
            raise ConfigError(
                f"the run in {place} was started with {key} {stored.get(key)}, and this recipe says {own[key]}:"
                f" {advice}"
            )


def _may_differ(key: str, stored: Any, own: Any, *, repaired: bool) -> bool:
    """Whether a run may go on with another value: a larger max_length, or another spec of the same data where it says
    that they are repaired."""
    if key == "data.max_length":
        return stored is not None and (own is None or own > stored)
    if key not in ("data.train", "data.val", "data.test") or not repaired:
        return False
    before, now = (
        [str(spec).partition("?")[0] for spec in (value if isinstance(value, list | tuple) else [value])]
        for value in (stored, own)
    )
    return before == now


def _keys(recipe: Mapping[str, Any], section: str = "") -> dict[str, Any]:
    """The values of a recipe by `section.key`, with an absolute `start`."""
    found: dict[str, Any] = {}
    for key, value in recipe.items():
        found |= _keys(value, f"{section}{key}.") if isinstance(value, Mapping) else {f"{section}{key}": value}
    return found if section else found | {"start": recipe["start"] and str(Path(recipe["start"]).resolve())}


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the lock of an output folder while training into it: one run has it, whose main process takes it.

    Raises:
        RunError: another run has it.
    """
    with ExitStack() as held:
        distributed.together(lambda: _lock(folder, held) if distributed.is_main() else None)
        yield


def _lock(folder: Path, held: ExitStack) -> None:
    if not held.enter_context(locked(folder.parent / f".{folder.name}.lock")):
        raise RunError(f"another process is training in {folder}")


def check_output(folder: Path, recipe: Recipe) -> Path | None:
    """Check that output_dir is free, or find the checkpoint to resume from (None: the run stopped before its first
    one); writes nothing.

    Raises:
        RunError: the folder is taken, has nothing to resume, or is of a run in another number of processes or with its
            model divided otherwise.
    """
    taken = folder.exists() and (
        not folder.is_dir()
        or bool(set(folder.iterdir()) - {file for name in WRITTEN for file in partial_files(folder, name)})
    )
    if not recipe.resume:
        if taken:
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
        if why := unreadable_file(checkpoint.folder):
            log.warning(DAMAGED, checkpoint.folder, why)
            continue
        check_same_launch(checkpoint.folder)
        return checkpoint.folder
    return None


def write_recipe(folder: Path, recipe: Recipe) -> None:
    """Store the recipe, which marks `folder` as a training run, and clear what a killed run left half written; under
    the lock of `alone`."""
    keep_newest(folder, recipe.keep_checkpoints)
    for left in (folder / UNFINISHED, folder / FINAL):
        shutil.rmtree(left, ignore_errors=True)
    for name in WRITTEN:
        remove_partial(folder, name)
    with atomic_file(folder / RECIPE_FILE) as partial:
        partial.write_text(yaml.safe_dump(as_mapping(recipe), sort_keys=False))
