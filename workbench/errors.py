"""The errors that a user can cause; each message is one sentence.

The sentence has the value, what was expected of what, and the nearest valid name.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LISTED = 150  # a message lists all valid names if they take at most this many characters


def one_line(error: object, most: int = 160) -> str:
    """Return the message of an error as one line of at most `most` characters, to put in brackets in a sentence."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else f"{text[: most - 3].rstrip()}..."


def listed(values: Iterable[object]) -> str:
    """Return values as a list in words, for a message: "1, 2", or "empty"."""
    return ", ".join(map(str, values)) or "empty"


class WorkbenchError(Exception):
    """Base of every error that a user can cause; commands print it as one line and exit with code 2."""


class UnknownNameError(WorkbenchError):
    """A name that is not in a list of valid names; the message lists these and names the nearest.

    Args:
        kind: what the name is the name of, such as "recipe".
        also: what else would be valid, such as "or the path of a YAML file".
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], *, also: str = "") -> None:
        self.name, self.known = name, sorted(set(known))  # a model and its variant may have one name
        near = difflib.get_close_matches(name, self.known, n=1, cutoff=0.5)
        nearest = f"; did you mean '{near[0]}'?" if near else ""
        listed = ", ".join(self.known) if self.known else "(none)"
        if len(listed) > LISTED:  # to keep the sentence short, name only the three nearest
            nearest_names = sorted(difflib.get_close_matches(name, self.known, n=3, cutoff=0.0))
            listed = f"{', '.join(nearest_names)}, ... ({len(self.known)} in all)"
        super().__init__(f"unknown {kind} '{name}': expected one of {listed}{', ' + also if also else ''}{nearest}")


class ConfigError(WorkbenchError):
    """A recipe, an option or an argument with a value outside its range."""


class DataError(WorkbenchError):
    """A data set, an image or an array that cannot be used for what was requested."""


class WeightsError(WorkbenchError):
    """Weights that are missing or corrupt, or whose hash is not the one in the catalogue."""


class PackageError(WorkbenchError):
    """A package that holds required files and cannot be downloaded."""


class PluginError(WorkbenchError):
    """A plugin, an entry point of another package, that cannot be loaded."""


class ModelError(WorkbenchError):
    """A model that is not supported, or that fails its validation when it is loaded."""


class RunError(WorkbenchError):
    """A stored run or an output folder that is missing, incomplete or already in use."""
