"""YAML configurations: reading with `base`, writing back, and the keys that they may have."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from workbench.errors import ConfigError


def check_kind(key: str, value: Any, hint: Any, recipe: Path) -> None:
    """See that a value of a YAML file is of a kind that a flag can say, before it becomes one."""
    kinds = [hint, *get_args(hint)]
    if value is None and type(None) not in kinds:
        raise ConfigError(f"key '{key}' in {recipe} is null: expected a value")
    if isinstance(value, bool) != (hint is bool):
        said = (
            "yes or no"
            if hint is bool
            else "another value (a word such as on, off, yes or no stands in quotes in YAML)"
        )
        raise ConfigError(f"key '{key}' in {recipe} is {value}: expected {said}")
    if isinstance(value, list) and not any(get_origin(kind) is tuple for kind in kinds):
        raise ConfigError(f"key '{key}' in {recipe} is {value}: expected one value")
    for part in value if isinstance(value, list) else [value]:
        if isinstance(part, list | Mapping) or (isinstance(part, str) and re.match("-+[A-Za-z]", part)):
            raise ConfigError(f"key '{key}' in {recipe} has {part}: expected a plain value")


class UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML's own loader drops the first in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key is a list or a mapping", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"key '{key.value}' is there twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_recipe(path: Path, extending: tuple[Path, ...] = (), called: str = "recipe") -> dict[str, Any]:
    """Read a YAML mapping; its key `base` names another recipe, relative to this one, that it extends.

    Args:
        extending: the recipes that have this one for their base.
        called: what errors call it.

    Raises:
        ConfigError: no such file (with the nearest name in its folder), not a mapping, a key that is there twice, or a
            base that extends itself.
    """
    if not path.is_file():
        names = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, names, n=1)
        raise ConfigError(
            f"no {called} {path}: expected a YAML file" + (f"; did you mean '{path.parent / near[0]}'?" if near else "")
        )
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), UniqueKeyLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{called} {path} is not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"{called} {path} holds {type(content).__name__}, expected a mapping of keys to values")
    own = _nested(content, path)
    base = own.pop("base", None)
    if base is None:
        return own
    if not isinstance(base, str):
        raise ConfigError(f"key 'base' in {path} is {base}: expected the name of a {called} beside it")
    extending = (*extending, path.resolve())
    if (path.parent / base).resolve() in extending:
        raise ConfigError(
            f"{called} {path} has the base {base}, which extends it in turn: expected one that stands by itself"
        )
    return merge(read_recipe(path.parent / base, extending, called), own)


def _nested(content: Mapping[Any, Any], path: Path) -> dict[str, Any]:
    """The mapping with its dotted keys (`optim.steps: 8`) as sections, so that a recipe's own value replaces its base's
    however it is written."""
    own: dict[str, Any] = {}
    for name, value in content.items():
        *sections, last = str(name).split(".")
        place = own
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise ConfigError(
                    f"key '{name}' in {path} is below '{section}', which has a value of its own: expected one of"
                    " the two"
                )
        value = _nested(value, path) if isinstance(value, Mapping) else value
        if last in place and not (
            isinstance(place[last], dict) and isinstance(value, dict) and not place[last].keys() & value.keys()
        ):
            raise ConfigError(f"key '{name}' is twice in {path}: expected one value")
        place[last] = {**place[last], **value} if last in place else value
    return own


def as_mapping(config: object) -> dict[str, Any]:
    """A dataclass as nested plain values, for JSON and YAML."""
    return {key: plain(value) for key, value in dataclasses.asdict(config).items()}  # type: ignore[call-overload]


def plain(value: Any) -> Any:
    """`value` as YAML can hold it."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def merge(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `own` put in, section by section."""
    merged = dict(base)
    for key, value in own.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if nested else value
    return merged


def config_fields(cls: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The keys of a configuration with their types, nested ones with dots."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from config_fields(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, hints[field.name]


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a nested mapping by key with dots."""
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def check_known(
    key: str, known: Mapping[str, Any], called: str, renamed: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Refuse a key that is not in `known`, with the nearest one that is.

    Args:
        called: what the key is named in the error.
        renamed: the new names of keys by their old ones.
    """
    if key in known:
        return
    if key in renamed:
        raise ConfigError(f"unknown {called}: it is called '{renamed[key]}' now")
    listed = ", ".join(known)
    near = nearest_key(key, known)
    hint = (
        f"did you mean '{near}'?"
        if near
        else f"expected one of {listed if len(listed) < 160 else f'the {len(known)} that --help lists'}"
    )
    raise ConfigError(f"unknown {called}: {hint}")


def nearest_key(key: str, known: Iterable[str]) -> str | None:
    """The key that `key` may stand for, by its last part: the same one in another section, one that it abbreviates
    (`optim.lr`), or one spelled alike."""

    section, last = _split_key(key)

    def likeness(name: str) -> float:
        own = _split_key(name)[1]
        if len(last) > 1 and last == "".join(word[:1] for word in own.split("_")):
            return 0.95
        if last in own.split("_") or own in last.split("_"):
            return 0.9
        return difflib.SequenceMatcher(None, last, own).ratio()

    near = [(likeness(name) + 0.1 * (_split_key(name)[0] == section), name) for name in known if likeness(name) >= 0.6]
    return max(near)[1] if near else None


def _split_key(key: str) -> tuple[str, str]:
    section, _, last = key.rpartition(".")
    return section, last
