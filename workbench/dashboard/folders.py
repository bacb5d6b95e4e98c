"""The runs folder; no other module of the dashboard knows where it is."""

from __future__ import annotations

import sys
from pathlib import Path

from workbench.errors import RunError


def runs_root() -> Path:
    """Return the folder of the option `--runs`, by default ./runs."""
    folder, words = "runs", sys.argv[1:]
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name == "--runs":
            folder = (value if equals else following) or folder
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
