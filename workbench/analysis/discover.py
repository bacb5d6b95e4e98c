"""Which analyses there are, without importing them: that would take seconds."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from workbench.errors import UnknownNameError


def load_analysis(name: str) -> Any:
    """The declaration of an analysis, an `Analysis`.

    Raises:
        UnknownNameError: there is none of this name.
    """
    if name not in analysis_files():
        raise UnknownNameError("analysis", name, list(analysis_files()))
    return import_module(f"analyses.{name}").ANALYSIS


def analysis_files() -> dict[str, Path]:
    """{name: file} of every analysis. Each is one file in `analyses`; a folder there, such as `analyses/all`, is a command about all of them."""
    places = [Path(path) for path in import_module("analyses").__path__]
    names = [module.name for module in iter_modules(map(str, places)) if not module.ispkg and not module.name.startswith("_")]
    return {name: next(place / f"{name}.py" for place in places if (place / f"{name}.py").exists()) for name in names}
