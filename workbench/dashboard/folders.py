"""The runs folder and the models in it; no other module of the dashboard knows where that folder is."""

from __future__ import annotations

import os
import sys
from fnmatch import fnmatch
from pathlib import Path

from workbench.errors import RunError
from workbench.training_folder import LOG_FILE, training_recipe


def runs_root() -> Path:
    """Return the folder of the option `--runs`, by default ./runs."""
    words = sys.argv[1:]
    folder = words[words.index("--runs") + 1] if "--runs" in words[:-1] else "runs"
    return Path(folder).resolve()


def below_root(path: str | Path) -> Path:
    """Resolve `path` inside the runs folder.

    Raises:
        RunError: the path leads outside the folder, be it by links or dots.
    """
    root = runs_root()
    resolved = (root / path).resolve()
    if not resolved.is_relative_to(root):
        raise RunError(f"'{path}' is not below the runs folder: expected a path inside {root}")
    return resolved


def files_below(root: Path, *patterns: str) -> list[Path]:
    """Return the files below `root` whose names match any of `patterns`, sorted.

    Names that begin with a dot are skipped: they are still being written.
    """
    files = []
    for folder, folders, names in os.walk(root):  # unlike Path.glob, it continues if a folder is removed meanwhile
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [
            Path(folder, name)
            for name in names
            if not name.startswith(".") and any(fnmatch(name, pattern) for pattern in patterns)
        ]
    return sorted(files)


def default_models(models: list[str]) -> list[str]:
    """Return the models to show first: the first baseline and the first aligned one, finished or not.

    Pre-trained models from which another of `models` starts (stage 1) are left out.
    """
    kinds: dict[bool, str] = {}
    recipes = {name: training_recipe(below_root(name)) for name in models}
    starts = {Path(recipe["start"]).name for recipe in recipes.values() if recipe.get("start")}
    for name, recipe in recipes.items():
        if recipe and Path(name).name not in starts:
            kinds.setdefault(recipe.get("alignment", {}).get("objective", "none") != "none", name)
    return [kinds[aligned] for aligned in sorted(kinds)] or models[:2]


def trained_models(finished: bool = False) -> list[str]:
    """Return the training folders below the runs folder, relative to it; with `finished`, only those with a model."""
    root = runs_root()
    # the shallowest first, so that the trainings of sweeps come last
    folders = sorted((file.parent for file in files_below(root, LOG_FILE)), key=lambda f: (len(f.parts), f))
    return [str(f.relative_to(root)) for f in folders if not finished or (f / "training.json").exists()]
