"""Specs of files and folders with options: `PATH?option=value&option=value`.

A path may contain any character. If a `?` could begin the options or belong to the path, the path that exists on disk
decides. Percent escapes (`%3F` for `?`, `%26` for `&`) are decoded if no file has the name as written. `~` is the home
folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import unquote

from workbench.errors import ConfigError, UnknownNameError

CUT = re.compile(r"\?(?=\w+=|$)")  # where the options may begin
OPTION = re.compile(r"&(?=\w+=)")  # between two options


def path_of(text: str) -> Path:
    """Return the path that a text names, with `~` for the home folder.

    Percent escapes are decoded only if nothing of the literal name exists.
    """
    literal = Path(text).expanduser() if text.startswith("~") else Path(text)
    escaped = Path(unquote(text)).expanduser() if "%" in text else literal
    return escaped if not os.path.exists(literal) and os.path.exists(escaped) else literal


def spec_options(spec: str, known: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """Split `PATH?option=value&...` into the path and its options.

    Args:
        spec: the spec.
        known: {option: default}.

    Raises:
        ConfigError: an option that is given twice.
        UnknownNameError: an option that is not in `known`.
    """
    path, text = _split(spec)
    return path, {**known, **_options(path, text, known)}


def paths_in(spec: str) -> list[Path]:
    """Return every path that a loader may take from `PATH?option=value&...`: that of `spec_options` first."""
    path, text = _split(spec)
    shorter = [spec[: cut.start()] for cut in CUT.finditer(spec)]  # where a loader knows one option alone
    return [Path(path), *map(path_of, filter(None, (*shorter, *_values(text))))]


def _split(spec: str) -> tuple[str, str]:
    """Return the path of a spec, and the text of its options."""
    cuts = [match.start() for match in CUT.finditer(spec)]
    if os.path.exists(path_of(spec)) or not cuts:
        return str(path_of(spec)), ""
    at = next((at for at in reversed(cuts) if os.path.exists(path_of(spec[:at]))), cuts[-1])
    return str(path_of(spec[:at])), spec[at + 1 :]


def _values(text: str) -> Iterator[str]:
    """Yield what may be the value of an option: with what follows an `&` where that is an existing path."""
    parts = OPTION.split(text)
    for number, part in enumerate(parts, start=1):
        value = part.partition("=")[2]
        yield value
        for more in parts[number:]:
            value = f"{value}&{more}"
            if not os.path.exists(path_of(value)):
                break
            yield value


def _options(path: str, text: str, known: Mapping[str, str]) -> dict[str, str]:
    """Return the options by name; an `&` stays part of a value if the value with it is an existing path."""
    options: dict[str, str] = {}
    last = ""
    for part in OPTION.split(text) if text else ():
        name, _, value = part.partition("=")
        if last and name not in known and os.path.exists(path_of(f"{options[last]}&{part}")):
            options[last] += f"&{part}"
        elif name not in known:
            raise UnknownNameError(f"option of {path}", name, known)
        elif name in options:
            raise ConfigError(f"{path} has the option {name} twice, {options[name]} and {value}: expected it once")
        else:
            last, options[name] = name, value
    return {name: str(path_of(value)) if value else value for name, value in options.items()}
