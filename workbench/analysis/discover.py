"""Which analyses there are, ours and those of plugins; listing them imports none, which would take seconds."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from workbench.errors import PluginError, UnknownNameError
from workbench.plugins import plugins

log = logging.getLogger(__name__)
GROUP = "analyses"


def analysis_files() -> dict[str, Path]:
    """{name: file} of every analysis of ours. Each is one file in `analyses`; a folder there, such as `analyses/all`,
    is a command about all of them."""
    places = [Path(path) for path in import_module("analyses").__path__]
    names = [
        module.name for module in iter_modules(map(str, places)) if not module.ispkg and not module.name.startswith("_")
    ]
    return {name: next(place / f"{name}.py" for place in places if (place / f"{name}.py").exists()) for name in names}


def analysis_commands() -> list[str]:
    """The folders in `analyses`: commands about all analyses, `python -m analyses.NAME`."""
    return [module.name for module in iter_modules(import_module("analyses").__path__) if module.ispkg]


def analysis_names() -> list[str]:
    """Every analysis, those of plugins last, whether they can be loaded or not."""
    return [*analysis_files(), *(name for name in plugins(GROUP) if name not in analysis_files())]


def load_analysis(name: str) -> Any:
    """The declaration of the analysis called `name`, an `Analysis`.

    Raises:
        UnknownNameError: no such analysis.
        PluginError: it is a plugin that cannot be loaded.
    """
    if name in analysis_files():
        return import_module(f"analyses.{name}").ANALYSIS
    if name not in plugins(GROUP):
        raise UnknownNameError("analysis", name, analysis_names())
    return plugins(GROUP)[name].load(import_module("workbench.analysis.declaration").Analysis)


def load_analyses(names: Iterable[str] | None = None) -> dict[str, Any]:
    """{name: analysis} of some, all by default; a plugin that cannot be loaded is left out, with a warning."""
    loaded = {}
    for name in analysis_names() if names is None else names:
        try:
            loaded[name] = load_analysis(name)
        except PluginError as error:
            log.warning("%s", error)
    return loaded


def words_of(name: str) -> list[str]:
    """The command of an analysis, `python -m analyses.NAME`; one of a plugin, which is no module there, is `python -m
    analyses NAME`."""
    return ["python", "-m", f"analyses.{name}"] if name in analysis_files() else ["python", "-m", "analyses", name]
