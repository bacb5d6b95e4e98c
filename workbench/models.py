"""Models as they are named on a command line: folders and hub ids, their labels, and the nearest name of one that is
not there."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from workbench.errors import ConfigError, ModelError


def is_folder(model: str) -> bool:
    """Whether a model is a folder here rather than a hub id."""
    return bool(model) and Path(model).is_dir()


def split_name(word: str) -> tuple[str, str]:
    """`NAME=FOLDER_OR_HUB_ID` as both; a word without a name has the name "". A folder that is there may have = in its
    own name.

    Raises:
        ConfigError: nothing before or behind the =.
    """
    name, equals, model = word.partition("=")
    if not equals or Path(word).exists() or ("/" in name and Path(word).parent.is_dir()):
        return "", word
    if not name.strip() or not model:
        raise ConfigError(f"model '{word}': expected NAME=FOLDER_OR_HUB_ID, both of them")
    return name, model


def label_of(model: str) -> str:
    """A model's short name: the one it was given, or else the last part of its folder or hub id."""
    name, model = split_name(model)
    return name or _parts(model)[-1]


def named_models(words: Sequence[str]) -> dict[str, str]:
    """{label: folder or hub id} of models as a command names them, in order.

    A label is the name that was given (NAME=FOLDER), or the last part of the folder or hub id; where several have the
    same, the shortest end of their paths that tells them apart: runs/a/checkpoint-100 and runs/b/checkpoint-100 become
    a/checkpoint-100 and b/checkpoint-100. Seeds of one training (NAME-s0, NAME-s1) are lengthened together, so that
    they stay seeds of one name.

    Raises:
        ConfigError: no model, the same one twice, or two of one name.
    """
    if not words:
        raise ConfigError("no model given: expected --model FOLDER_OR_HUB_ID ...")
    given = [split_name(word) for word in words]
    _check_different([model for _, model in given])
    names = [name for name, _ in given if name]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"two models are called '{twice}': expected NAME=FOLDER with different names")
    parts = [() if name else _parts(model) for name, model in given]
    depth = dict.fromkeys(filter(None, map(_stem, parts)), 1)
    while True:
        labels = [name or "/".join(own[-depth[_stem(own)] :]) for (name, _), own in zip(given, parts, strict=True)]
        clash = {_stem(own) for own, label in zip(parts, labels, strict=True) if own and labels.count(label) > 1}
        growing = {stem for stem in clash if depth[stem] < max(len(own) for own in parts if own and _stem(own) == stem)}
        if not growing:
            break
        for stem in growing:
            depth[stem] += 1
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise ConfigError(f"two models are called '{twice}': expected NAME=FOLDER to give one another name")
    return dict(zip(labels, (model for _, model in given), strict=True))


def _check_different(models: Sequence[str]) -> None:
    places = [os.path.realpath(model) if is_folder(model) else model for model in models]
    for number, place in enumerate(places):
        if place in places[:number]:
            first = models[places.index(place)]
            same = "" if models[number] == first else f", which is {first} too"
            raise ConfigError(f"model {models[number]}{same} is given twice: expected each model once")


def _parts(model: str) -> tuple[str, ...]:
    """Of the absolute path of a folder, or of a hub id."""
    path = Path(os.path.abspath(model)) if is_folder(model) else Path(model)
    return path.parts or (model,)


def _stem(parts: tuple[str, ...]) -> str:
    """The last part without its seed."""
    return re.sub(r"-s\d+$", "", parts[-1]) if parts else ""


def check_revision(models: Mapping[str, str], revision: str | None) -> None:
    """Raise a ConfigError where a revision is asked for and no model is a hub id."""
    if revision is not None and all(map(is_folder, models.values())):
        raise ConfigError(
            f"revision is {revision}, and {next(iter(models.values()))} is a folder: expected a hub id, since a folder"
            " has no revisions"
        )


def check_there(model: str) -> None:
    """Raise a ModelError if `model` can only mean a folder, and is none: a path from the root, from here or from home,
    or one of three parts and more."""
    if is_folder(model):
        return
    if Path(model).is_file():
        raise ModelError(f"model '{model}' is a file: expected the folder that holds it, or a hub id")
    if not model or model.startswith(("/", ".", "~")) or model.count("/") > 1 or model.endswith("/"):
        raise ModelError(
            f"model '{model}' is neither a folder nor a hub id: expected the folder of a model, or an id such as"
            f" NAME/MODEL{did_you_mean(model)}"
        )


def did_you_mean(model: str) -> str:
    """`; did you mean 'FOLDER'?` with the folder nearest to one that is not there, "" if none is near."""
    path = Path(model).expanduser()
    if model.startswith("~") and path.is_dir():
        return f"; did you mean '{path}'?"
    known, wanted = path.parent, path.name
    missing = [part for part in path.parents if not part.exists()]
    if missing:  # a part above is wrong: look for that one
        known, wanted = missing[-1].parent, missing[-1].name
    try:
        names = [entry.name for entry in os.scandir(known) if entry.is_dir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(wanted, names, n=1)
    return f"; did you mean '{known / near[0]}'?" if near else ""
