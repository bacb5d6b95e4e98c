"""The one place that knows the runs folder, and the models in it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from workbench.errors import RunError


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


def default_models(models: list[str]) -> list[str]:
    """A baseline and an aligned model to begin with: the first of each kind, first stages left out."""
    kinds: dict[bool, str] = {}
    for name in models:
        file = below_root(name) / "training.json"
        recipe = json.loads(file.read_text())["recipe"] if file.exists() else None
        if recipe is not None and recipe["start"] is not None:
            kinds.setdefault(recipe["alignment"]["objective"] != "none", name)
    return [kinds[aligned] for aligned in sorted(kinds)] or models[:2]


def trained_models(finished: bool = False) -> list[str]:
    """Training folders below the runs folder, relative to it; with `finished`, those that hold a model."""
    root = runs_root()
    found = sorted((path.parent for path in root.glob("**/training.parquet")), key=lambda f: (len(f.parts), f))  # those of a sweep last
    return [str(f.relative_to(root)) for f in found if not finished or (f / "training.json").exists()]
