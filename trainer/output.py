"""A run's output folder: free or resumable, held by one process, and only ever continued with the recipe that began it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from trainer.config import Recipe
from workbench.config import as_mapping, parse
from workbench.errors import ConfigError, RunError
from workbench.files import atomic_file, locked
from workbench.training import RECORD_FILE, checkpoints

RECIPE_FILE = "recipe.yaml"


def check_same_recipe(folder: Path, recipe: Recipe) -> None:
    """See that the run in `folder` was started with `recipe`; a key that its recipe lacks, being older than the key, had the default.

    Raises:
        ConfigError: names the first key that differs.
    """
    written = parse(Recipe, [], prog=RECIPE_FILE, recipe=folder / RECIPE_FILE)  # one layer or one VFM was stored as a plain value once
    stored, own = _absolute_start(as_mapping(written)), _absolute_start(as_mapping(recipe))
    for key in sorted(set(own) - {"resume", "output_dir", "report_to", "keep_checkpoints", "push_to_hub"}):
        if stored.get(key) != own[key]:
            raise ConfigError(f"the run in {folder} was started with {key} {stored.get(key)}, and this recipe says {own[key]}: choose another output_dir")


def _absolute_start(recipe: dict[str, Any]) -> dict[str, Any]:
    return recipe | {"start": recipe["start"] and str(Path(recipe["start"]).resolve())}


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the lock of an output folder while training into it."""
    with locked(folder.parent / f".{folder.name}.lock") as ours:
        if not ours:
            raise RunError(f"another process is training in {folder}")
        yield


def check_output(folder: Path, recipe: Recipe) -> str | None:
    """See that output_dir is free, or find the checkpoint to resume from (None: the run stopped before its first one); writes nothing."""
    taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if not recipe.resume:
        if taken:
            raise RunError(f"output_dir {folder} is not empty: expected a new folder, or --resume to continue the run in it")
        return None
    if (folder / RECORD_FILE).exists():
        raise RunError(f"the run in {folder} is finished: nothing to resume")
    if not (folder / RECIPE_FILE).exists():
        raise RunError(f"no run in {folder}: expected the output_dir of an interrupted run; start it without --resume")
    check_same_recipe(folder, recipe)
    return _last_checkpoint(folder)


def _last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end."""
    whole = checkpoints(folder)
    return str(whole[-1].folder) if whole else None


def write_recipe(folder: Path, recipe: Recipe) -> None:
    """Store the recipe, which marks `folder` as a training run."""
    with atomic_file(folder / RECIPE_FILE) as partial:
        partial.write_text(yaml.safe_dump(as_mapping(recipe), sort_keys=False))
