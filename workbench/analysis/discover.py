"""List and load the analyses of this project and of plugins; listing does not import them, which takes seconds."""

from __future__ import annotations

import ast
import logging
import re
from collections.abc import Iterable
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from threading import Lock
from typing import Any

from workbench.errors import PluginError, UnknownNameError
from workbench.plugins import plugins

log = logging.getLogger(__name__)
GROUP = "analyses"
_PARSING = Lock()  # Python 3.11 counts the depth of a syntax tree for all threads together, and raises SystemError
COMMANDS = ("all", "claims")  # packages in `analyses` that are no analysis, but commands about all of them


def analysis_files() -> dict[str, Path]:
    """Return {name: file} of the analyses of this project: the module, or the `__init__.py` of its package."""
    files = {}
    for folder in map(Path, import_module("analyses").__path__):
        for module in iter_modules([str(folder)]):
            if module.name not in COMMANDS and not module.name.startswith("_"):
                files[module.name] = folder / (f"{module.name}/__init__.py" if module.ispkg else f"{module.name}.py")
    return files


def analysis_commands() -> list[str]:
    """Return the names of the commands about all analyses: `python -m analyses.NAME`."""
    return list(COMMANDS)


def analysis_names() -> list[str]:
    """Return the names of all analyses, those of plugins last, whether they can be loaded or not."""
    return [*analysis_files(), *(name for name in plugins(GROUP) if name not in analysis_files())]


def opening(name: str) -> list[str]:
    """Return the paragraphs of an analysis's docstring (see `paragraphs`) without importing it; [] for a plugin."""
    file = analysis_files().get(name)
    return paragraphs(_docstring(file)) if file is not None else []


@cache
def _docstring(file: Path) -> str:
    with _PARSING:
        return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""


def paragraphs(text: str) -> list[str]:
    """Return the paragraphs of a docstring without its example commands; formulas stay indented."""
    parts = [part.strip("\n") for part in re.split(r"\n\s*\n", text)]
    return [
        part if part.startswith("    ") else " ".join(part.split())
        for part in parts
        if part.strip() and not part.strip().startswith("python -m")
    ]


def examples(text: str) -> list[str]:
    """Return the example commands of a docstring, a line each."""
    parts = [part for part in re.split(r"\n\s*\n", text) if part.strip().startswith("python -m")]
    return [" ".join(command.split()) for part in parts for command in re.split(r"\n(?=\s*python -m)", part)]


def load_analysis(name: str) -> Any:
    """Return the declaration (an `Analysis`) of the analysis called `name`.

    Raises:
        UnknownNameError: there is no such analysis.
        PluginError: the analysis is a plugin that cannot be loaded.
    """
    if name in analysis_files():
        return import_module(f"analyses.{name}").ANALYSIS
    if name not in plugins(GROUP):
        raise UnknownNameError("analysis", name, analysis_names())
    return plugins(GROUP)[name].load(import_module("workbench.analysis.declaration").Analysis)


def load_analyses(names: Iterable[str] | None = None) -> dict[str, Any]:
    """Return {name: analysis} of some analyses, by default of all.

    A plugin that cannot be loaded is left out with a warning.
    """
    loaded = {}
    for name in analysis_names() if names is None else names:
        try:
            loaded[name] = load_analysis(name)
        except PluginError as error:
            log.warning("%s", error)
    return loaded


def words_of(name: str) -> list[str]:
    """Return the command that runs an analysis: `python -m analyses.NAME`, for a plugin `python -m analyses NAME`."""
    return ["python", "-m", f"analyses.{name}"] if name in analysis_files() else ["python", "-m", "analyses", name]
