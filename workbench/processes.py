"""Commands of this package as processes: whatever the current folder holds, they run the code that started them."""

from __future__ import annotations

import os
import site
import sys
from collections.abc import Sequence
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent  # the checkout, or the folder that the package was installed into


def python(words: Sequence[str]) -> list[str]:
    """The command that gives `words` to this interpreter; a package `trainer` in the current folder is not taken for
    ours."""
    return [sys.executable, "-P", *words]


def environment(**variables: str) -> dict[str, str]:
    """The environment of such a process: this one's, with our packages first on its path, and `variables`."""
    installed = {str(Path(folder).resolve()) for folder in [*site.getsitepackages(), site.getusersitepackages()]}
    paths = os.environ.get("PYTHONPATH", "")
    # an environment's own folder stays behind the standard library
    ours = [] if str(HOME) in installed else [str(HOME)]
    return os.environ | {"PYTHONPATH": os.pathsep.join([*ours, *filter(None, [paths])])} | variables
