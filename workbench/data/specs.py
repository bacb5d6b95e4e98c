"""How a spec names a file or folder and its options: `PATH?option=value&option=value`.

A path may hold any character. Where a `?` could begin the options or belong to the path, what exists on the disk
decides; `%3F`, `%26` and other percent escapes say it outright, where no file of that very name exists. `~` is the home
folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote

from workbench.errors import UnknownNameError


def path_of(text: str) -> Path:
    """The path that a text names: as it stands, with the home folder for `~`, or with percent escapes where nothing of
    that name exists."""
    literal = Path(text).expanduser() if text.startswith("~") else Path(text)
    escaped = Path(unquote(text)).expanduser() if "%" in text else literal
    return escaped if not os.path.exists(literal) and os.path.exists(escaped) else literal


def spec_options(spec: str, known: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """Split `PATH?option=value&...` into the path and its options, with the defaults of `known`.

    Raises:
        UnknownNameError: an option that is not among them.
    """
    if os.path.exists(path_of(spec)):
        return str(path_of(spec)), dict(known)
    cuts = [match.start() for match in re.finditer(r"\?(?=\w+=|$)", spec)]
    there = [at for at in cuts if os.path.exists(path_of(spec[:at]))]
    if not cuts:
        return str(path_of(spec)), dict(known)
    at = (there or cuts)[-1]
    path = str(path_of(spec[:at]))
    return path, {**known, **_options(path, spec[at + 1 :], known)}


def _options(path: str, text: str, known: Mapping[str, str]) -> dict[str, str]:
    """Options by name; an `&` within a value that exists as a path belongs to it."""
    options: dict[str, str] = {}
    last = ""
    for part in re.split(r"&(?=\w+=)", text) if text else ():
        name, _, value = part.partition("=")
        if last and name not in known and os.path.exists(path_of(f"{options[last]}&{part}")):
            options[last] += f"&{part}"
        elif name not in known:
            raise UnknownNameError(f"option of {path}", name, known)
        else:
            last, options[name] = name, value
    return {name: str(path_of(value)) if value else value for name, value in options.items()}
