"""Read YAML configurations that extend others by `base`, check their keys, and turn configurations into mappings."""

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
    """Check that a value of a YAML file can be passed on as the value of a flag.

    Args:
        hint: the type of the key.
        recipe: the file, for error messages.

    Raises:
        ConfigError: the value is null, a boolean, a list or a mapping where the type does not allow it, or is a word
            that would be read as a flag.
    """
    kinds = [hint, *get_args(hint)]
    if value is None and type(None) not in kinds:
        raise ConfigError(f"key '{key}' in {recipe} is null: expected a value")
    if isinstance(value, bool) != (hint is bool):
        not_bool = "another value (in YAML, put words such as on, off, yes or no in quotes)"
        raise ConfigError(f"key '{key}' in {recipe} is {value}: expected {'yes or no' if hint is bool else not_bool}")
    if isinstance(value, list) and not any(get_origin(kind) is tuple for kind in kinds):
        raise ConfigError(f"key '{key}' in {recipe} is {value}: expected one value")
    for part in value if isinstance(value, list) else [value]:
        if isinstance(part, list | Mapping) or (isinstance(part, str) and re.match("-+[A-Za-z]", part)):
            raise ConfigError(
                f"key '{key}' in {recipe} has {part}: expected a number, or a word that does not begin with a dash"
            )


class UniqueKeyLoader(yaml.SafeLoader):
    """A loader that refuses duplicate keys, of which PyYAML's own loader silently drops the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping of a node, or raise a MarkedYAMLError for a duplicate or nested key."""
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key is a list or a mapping", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"key '{key.value}' appears twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_recipe(path: Path, extending: tuple[Path, ...] = (), called: str = "recipe") -> dict[str, Any]:
    """Read a YAML mapping; its key `base` names another file, relative to this one, that it extends.

    Args:
        extending: the files that extend this one, directly or indirectly.
        called: the word for the file in error messages.

    Raises:
        ConfigError: there is no such file (the message has the nearest name in its folder), it is not a mapping, a key
            appears twice, or the file extends itself.
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
        raise ConfigError(f"{called} {path} holds {type(content).__name__}: expected a mapping of keys to values")
    values = _nested(content, path)
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ConfigError(f"key 'base' in {path} is {base}: expected the name of a {called} beside it")
    extending = (*extending, path.resolve())
    if (path.parent / base).resolve() in extending:
        raise ConfigError(
            f"{called} {path} has the base {base}, which extends it in turn: expected a base that does not extend it"
        )
    return merge(read_recipe(path.parent / base, extending, called), values)


def _nested(content: Mapping[Any, Any], path: Path) -> dict[str, Any]:
    """Return the mapping with dotted keys (`optim.steps: 8`) as nested sections.

    A value then replaces that of the base in whichever of the two ways they are written.
    """
    nested: dict[str, Any] = {}
    for name, value in content.items():
        *sections, last = str(name).split(".")
        parent = nested
        for section in sections:
            parent = parent.setdefault(section, {})
            if not isinstance(parent, dict):
                raise ConfigError(
                    f"key '{name}' in {path} is below '{section}', which has a value itself: expected one of the two"
                )
        value = _nested(value, path) if isinstance(value, Mapping) else value
        if last in parent:
            before = parent[last]
            if not (isinstance(before, dict) and isinstance(value, dict)) or before.keys() & value.keys():
                raise ConfigError(f"key '{name}' appears twice in {path}: expected one value")
            value = {**before, **value}
        parent[last] = value
    return nested


def as_mapping(config: object) -> dict[str, Any]:
    """Return a dataclass as a mapping of nested plain values, for JSON and YAML."""
    return {key: plain(value) for key, value in dataclasses.asdict(config).items()}  # type: ignore[call-overload]


def plain(value: Any) -> Any:
    """Return `value` as JSON and YAML can store it: tuples as lists, paths as text."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with the values of `changes` in place of its own, section by section."""
    merged = dict(base)
    for key, value in changes.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if nested else value
    return merged


def config_fields(cls: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (key, type) of every field of a configuration; keys of nested configurations have dots."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from config_fields(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, hints[field.name]


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (key, value) of a nested mapping; keys below a section have dots."""
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def check_known(
    key: str,
    known: Mapping[str, Any],
    called: str,
    renamed: Mapping[str, str] = MappingProxyType({}),
    *,
    prefix: str = "",
) -> None:
    """Raise a ConfigError if a key is not in `known`; the message names the nearest known key.

    Args:
        called: what the error message calls the key.
        renamed: {old name: current name} of renamed keys.
        prefix: what precedes a key where it is written, such as "--".
    """
    if key in known:
        return
    if key in renamed:
        raise ConfigError(f"unknown {called}: it is called '{prefix}{renamed[key]}' now")
    if near := nearest_key(key, known):
        raise ConfigError(f"unknown {called}: did you mean '{prefix}{near}'?")
    names = ", ".join(known)
    expected = names if len(names) < 160 else f"the {len(known)} that --help lists"
    raise ConfigError(f"unknown {called}: expected one of {expected}")


def nearest_key(key: str, known: Iterable[str]) -> str | None:
    """Return the known key that an unknown one most likely means, or None.

    The last parts of the keys are compared: they are equal, one abbreviates the other (`optim.lr`), or they are spelled
    similarly. A key in the same section is preferred.
    """
    section, last = _split_key(key)

    def similarity(name: str) -> float:
        other = _split_key(name)[1]
        if len(last) > 1 and last == "".join(word[:1] for word in other.split("_")):
            return 0.95
        if last in other.split("_") or other in last.split("_"):
            return 0.9
        return difflib.SequenceMatcher(None, last, other).ratio()

    near = [
        (similarity(name) + 0.1 * (_split_key(name)[0] == section), name) for name in known if similarity(name) >= 0.6
    ]
    return max(near)[1] if near else None


def _split_key(key: str) -> tuple[str, str]:
    """Return section and last part of a key."""
    section, _, last = key.rpartition(".")
    return section, last
