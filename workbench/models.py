"""Models as commands name them: folders and hub ids, their labels, and the nearest folder to a mistyped one."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from workbench.errors import ConfigError, ModelError


def is_folder(model: str) -> bool:
    """Return whether a model is a folder on this machine rather than a hub id."""
    return bool(model) and Path(model).is_dir()


def split_name(word: str) -> tuple[str, str]:
    """Split `NAME=FOLDER_OR_HUB_ID` into name and model; without NAME the name is "".

    A word that is an existing path is not split, since the name of a folder may contain an equals sign. `~/` is the
    home folder, which shells leave in NAME=~/FOLDER.

    Raises:
        ConfigError: nothing before or after the equals sign.
    """
    name, equals, model = word.partition("=")
    if not equals or Path(word).exists() or ("/" in name and Path(word).parent.is_dir()):
        return "", os.path.expanduser(word)
    if not name.strip() or not model:
        raise ConfigError(f"model is '{word}': expected NAME=FOLDER_OR_HUB_ID, with text on both sides of the =")
    return name, os.path.expanduser(model)


def label_of(model: str) -> str:
    """Return a model's short name: the NAME of NAME=MODEL, or else the last part of its folder or hub id."""
    name, model = split_name(model)
    return name or _parts(model)[-1]


def named_models(words: Sequence[str]) -> dict[str, str]:
    """Return {label: folder or hub id} of the models of a command line, in order.

    A label is the NAME of NAME=FOLDER, or the last part of the folder or hub id. If several models have the same last
    part, their labels are the shortest ends of their paths that differ: runs/a/checkpoint-100 and runs/b/checkpoint-100
    become a/checkpoint-100 and b/checkpoint-100. The labels of several seeds of one training (NAME-s0, NAME-s1) get the
    same number of parts, so that they differ in the seed only.

    Raises:
        ConfigError: no model, the same model twice, or two models with the same label.
    """
    if not words:
        raise ConfigError("no model given: expected --model FOLDER_OR_HUB_ID ...")
    named = [split_name(word) for word in words]
    _check_different([model for _, model in named])
    names = [name for name, _ in named if name]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"two models are called '{twice}': expected NAME=FOLDER with different names")
    paths = [() if name else _parts(model) for name, model in named]
    depth = dict.fromkeys(filter(None, map(_stem, paths)), 1)  # number of parts in the label, by stem
    while True:
        labels = [name or "/".join(path[-depth[_stem(path)] :]) for (name, _), path in zip(named, paths, strict=True)]
        clash = {_stem(path) for path, label in zip(paths, labels, strict=True) if path and labels.count(label) > 1}
        longest = {stem: max(len(path) for path in paths if path and _stem(path) == stem) for stem in clash}
        growing = {stem for stem in clash if depth[stem] < longest[stem]}
        if not growing:
            break
        for stem in growing:
            depth[stem] += 1
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise ConfigError(f"two models are called '{twice}': expected NAME=FOLDER to give one another name")
    return dict(zip(labels, (model for _, model in named), strict=True))


def _check_different(models: Sequence[str]) -> None:
    """Raise a ConfigError if a model appears twice, also under two paths of the same folder."""
    places = [os.path.realpath(model) if is_folder(model) else model for model in models]
    for number, place in enumerate(places):
        if place in places[:number]:
            first = models[places.index(place)]
            same = "" if models[number] == first else f", which is {first} too"
            raise ConfigError(f"model {models[number]}{same} is given twice: expected each model once")


def _parts(model: str) -> tuple[str, ...]:
    """Return the parts of the absolute path of a folder, or of a hub id."""
    path = Path(os.path.abspath(model)) if is_folder(model) else Path(model)
    return path.parts or (model,)


def _stem(parts: tuple[str, ...]) -> str:
    """Return the last part without the seed at its end, "" if there are no parts."""
    return re.sub(r"-s\d+$", "", parts[-1]) if parts else ""


def check_revision(models: Mapping[str, str], revision: str | None) -> None:
    """Raise a ConfigError if a revision is given although no model is a hub id."""
    if revision is not None and all(map(is_folder, models.values())):
        raise ConfigError(
            f"revision is {revision}, and {next(iter(models.values()))} is a folder: expected a hub id, since a folder"
            " has no revisions"
        )


def check_there(model: str) -> None:
    """Raise a ModelError if `model` can only be a folder and is none.

    Such a model begins with /, . or ~, ends with a slash, has more than two parts, or is empty.
    """
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
    """Return `; did you mean 'FOLDER'?` with the name nearest to a folder that does not exist, "" if none is near."""
    path = Path(model).expanduser()
    if model.startswith("~") and path.is_dir():
        return f"; did you mean '{path}'?"
    parent, name = path.parent, path.name
    missing = [part for part in path.parents if not part.exists()]
    if missing:  # a folder above is mistyped: look for that one
        parent, name = missing[-1].parent, missing[-1].name
    try:
        names = [entry.name for entry in os.scandir(parent) if entry.is_dir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean '{parent / near[0]}'?" if near else ""
