"""Errors are part of the interface: one sentence with the value, what was expected and the nearest valid name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LISTED = 150  # characters of names in a sentence


def one_line(error: object, most: int = 160) -> str:
    """What went wrong, in one line of at most `most` characters, for the brackets of a sentence."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else f"{text[: most - 3].rstrip()}..."


class WorkbenchError(Exception):
    """Base of every error a user can cause; the command line prints it as one line and exits with 2."""


class UnknownNameError(WorkbenchError):
    """A name that is not in a closed list: says what exists, what `also` would do, and which name is nearest."""

    def __init__(self, kind: str, name: str, known: Iterable[str], *, also: str = "") -> None:
        self.name, self.known = name, sorted(known)
        near = difflib.get_close_matches(name, self.known, n=1, cutoff=0.5)
        nearest = f"; did you mean '{near[0]}'?" if near else ""
        listed = ", ".join(self.known) if self.known else "(none)"
        if len(listed) > LISTED:  # a sentence stays one: the nearest names stand for the rest
            shown = sorted(difflib.get_close_matches(name, self.known, n=3, cutoff=0.0))
            listed = f"{', '.join(shown)}, ... ({len(self.known)} in all)"
        super().__init__(f"unknown {kind} '{name}': expected one of {listed}{', ' + also if also else ''}{nearest}")


class ConfigError(WorkbenchError):
    """A recipe, an option or an argument with a value outside its range."""


class DataError(WorkbenchError):
    """A data set, an image or an array that cannot be used as asked."""


class WeightsError(WorkbenchError):
    """Weights that are missing, corrupt, or not the ones their catalogue entry pins."""


class PackageError(WorkbenchError):
    """A package that carries files we need and cannot be downloaded."""


class PluginError(WorkbenchError):
    """Something that another package adds by an entry point, and that cannot be loaded."""


class ModelError(WorkbenchError):
    """A model that is unsupported, or that fails its validation at load."""


class RunError(WorkbenchError):
    """A stored run or an output folder that is missing, half written or already taken."""
