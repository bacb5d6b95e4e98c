"""Start commands of this package as child processes that run the same code, whatever the current folder holds."""

from __future__ import annotations

import os
import site
import sys
from collections.abc import Sequence
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent  # the checkout, or the folder into which the package was installed


def python(words: Sequence[str]) -> list[str]:
    """Return the command line that runs this Python interpreter with the arguments `words`.

    The option -P keeps the interpreter from importing, for example, a package `trainer` in the current folder.
    """
    return [sys.executable, "-P", *words]


def environment(**variables: str) -> dict[str, str]:
    """Return the environment for such a process: this process's, with our packages first, and `variables`."""
    installed = {str(Path(folder).resolve()) for folder in [*site.getsitepackages(), site.getusersitepackages()]}
    paths = os.environ.get("PYTHONPATH", "")
    # packages in site-packages are importable already, and must not come before the standard library
    ours = [] if str(HOME) in installed else [str(HOME)]
    return os.environ | {"PYTHONPATH": os.pathsep.join([*ours, *filter(None, [paths])])} | variables


def cores() -> int:
    """Return how many CPU cores this process may use: those of a Slurm job, say, rather than the whole node's."""
    if hasattr(os, "sched_getaffinity"):  # Linux alone has it
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
