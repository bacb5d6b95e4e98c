"""The one place that knows the runs folder, and the models in it."""

from __future__ import annotations

import os
import sys
from fnmatch import fnmatch
from pathlib import Path

from workbench.errors import RunError
from workbench.training_folder import LOG_FILE, training_recipe


def runs_root() -> Path:
    """The folder given with `--runs`, by default ./runs."""
    words = sys.argv[1:]
    given = words[words.index("--runs") + 1] if "--runs" in words[:-1] else "runs"
    return Path(given).resolve()


def below_root(path: str | Path) -> Path:
    """Resolve `path` inside the runs folder.

    Raises:
        RunError: it lies outside, whatever links or dots it uses.
    """
    root = runs_root()
    resolved = (root / path).resolve()
    if not resolved.is_relative_to(root):
        raise RunError(f"'{path}' is not below the runs folder")
    return resolved


def files_below(root: Path, *patterns: str) -> list[Path]:
    """Files below `root` whose names match, sorted; what begins with a dot is being written, and a folder may be gone
    before it is looked into."""
    found = []
    for folder, folders, names in os.walk(root):  # unlike Path.glob, it goes on where a folder has gone
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(folder, name)
            for name in names
            if not name.startswith(".") and any(fnmatch(name, pattern) for pattern in patterns)
        ]
    return sorted(found)


def default_models(models: list[str]) -> list[str]:
    """A baseline and an aligned model to begin with, finished or not: the first of each kind, first stages left out."""
    kinds: dict[bool, str] = {}
    recipes = {name: training_recipe(below_root(name)) for name in models}
    starts = {Path(recipe["start"]).name for recipe in recipes.values() if recipe.get("start")}
    for name, recipe in recipes.items():
        if recipe and Path(name).name not in starts:
            kinds.setdefault(recipe.get("alignment", {}).get("objective", "none") != "none", name)
    return [kinds[aligned] for aligned in sorted(kinds)] or models[:2]


def trained_models(finished: bool = False) -> list[str]:
    """Training folders below the runs folder, relative to it; with `finished`, those that hold a model."""
    root = runs_root()
    # those of a sweep last
    found = sorted((file.parent for file in files_below(root, LOG_FILE)), key=lambda f: (len(f.parts), f))
    return [str(f.relative_to(root)) for f in found if not finished or (f / "training.json").exists()]
