"""One mechanism for every command: a frozen dataclass becomes flags (`--alignment.layer 4`), and a YAML file is flags in a file."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml

from workbench.errors import ConfigError

Config = TypeVar("Config")

# Commands show their own progress; transformers' bars and load reports would bury it. Read when transformers is imported, which is later.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def parse(cls: type[Config], argv: Sequence[str], *, prog: str, description: str = "", recipe: Path | None = None) -> Config:
    """Build a `cls` from its defaults, then the YAML file `recipe`, then the flags in `argv`.

    Raises:
        ConfigError: an unknown key or option (with the nearest valid one) or a value of the wrong type.
        SystemExit: after `--help`, with code 0.
    """
    import tyro  # which only a command line needs

    known = dict(_fields(cls))
    flags: list[str] = []
    if recipe is not None:
        for key, value in _flatten(read_recipe(recipe)):
            if any(name.startswith(f"{key}.") for name in known):
                raise ConfigError(f"key '{key}' in {recipe} is {value}: expected keys and values below it, or no such key")
            _check_known(key, known, f"key '{key}' in {recipe}")
            _check_kind(key, value, known[key], recipe)
            flags += _as_flags(key, value)
    _check_no_stray_word(cls, argv, prog)
    for word in argv:
        if word.startswith("--") and word != "--help":
            key = word[2:].split("=")[0].replace("-", "_")
            positive = re.sub(r"(^|\.)no_", r"\1", key)  # --data.no-group
            _check_known(positive if known.get(positive) is bool else key, known, f"option '{word.split('=')[0]}'")
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            return tyro.cli(
                cls, prog=prog, description=_with_commands(description), args=[*flags, *argv], use_underscores=True, config=(tyro.conf.AvoidSubcommands,)
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise ConfigError(_one_sentence(message.getvalue())) from None


def _check_no_stray_word(cls: Any, argv: Sequence[str], prog: str) -> None:
    """Refuse a word before the first option, which would become one more value of the recipe's last list; some commands take such words."""
    if not argv or argv[0].startswith("-"):
        return
    import tyro

    if any(tyro.conf.Positional in getattr(hint, "__metadata__", ()) for hint in get_type_hints(cls, include_extras=True).values()):
        return
    raise ConfigError(f"'{argv[0]}' belongs to no option: expected --option VALUE after {prog}; --help lists the options")


def _check_kind(key: str, value: Any, hint: Any, recipe: Path) -> None:
    """See that a value of a YAML file is of a kind that a flag can say, before it becomes one."""
    kinds = [hint, *get_args(hint)]
    if value is None and type(None) not in kinds:
        raise ConfigError(f"key '{key}' in {recipe} is null: expected a value")
    if isinstance(value, bool) != (hint is bool):
        said = "yes or no" if hint is bool else "another value (a word such as on, off, yes or no stands in quotes in YAML)"
        raise ConfigError(f"key '{key}' in {recipe} is {value}: expected {said}")
    if isinstance(value, list) and not any(get_origin(kind) is tuple for kind in kinds):
        raise ConfigError(f"key '{key}' in {recipe} is {value}: expected one value")
    for part in value if isinstance(value, list) else [value]:
        if isinstance(part, list | Mapping) or (isinstance(part, str) and re.match("-+[A-Za-z]", part)):
            raise ConfigError(f"key '{key}' in {recipe} has {part}: expected a plain value")


def _with_commands(description: str) -> str:
    """`description` with its commands indented, which keeps each on its line."""
    return re.sub(r"^(?=(?:python -m|accelerate launch) )", "    ", description, flags=re.MULTILINE)


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


def read_recipe(path: Path, extending: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a YAML mapping; its key `base` names another recipe, relative to this one, that it extends.

    Args:
        extending: the recipes that have this one for their base.

    Raises:
        ConfigError: no such file (with the nearest name in its folder), not a mapping, a key that is there twice, or a base that extends itself.
    """
    if not path.is_file():
        names = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, names, n=1)
        raise ConfigError(f"no recipe {path}: expected a YAML file" + (f"; did you mean '{path.parent / near[0]}'?" if near else ""))
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), UniqueKeyLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {path} is not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"recipe {path} holds {type(content).__name__}, expected a mapping of keys to values")
    own = _nested(content, path)
    base = own.pop("base", None)
    if base is None:
        return own
    if not isinstance(base, str):
        raise ConfigError(f"key 'base' in {path} is {base}: expected the name of a recipe beside it")
    extending = (*extending, path.resolve())
    if (path.parent / base).resolve() in extending:
        raise ConfigError(f"recipe {path} has the base {base}, which extends it in turn: expected a recipe that stands by itself")
    return merge(read_recipe(path.parent / base, extending), own)


def _nested(content: Mapping[Any, Any], path: Path) -> dict[str, Any]:
    """The mapping with its dotted keys (`optim.steps: 8`) as sections, so that a recipe's own value replaces its base's however it is written."""
    own: dict[str, Any] = {}
    for name, value in content.items():
        *sections, last = str(name).split(".")
        place = own
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise ConfigError(f"key '{name}' in {path} is below '{section}', which has a value of its own: expected one of the two")
        value = _nested(value, path) if isinstance(value, Mapping) else value
        if last in place and not (isinstance(place[last], dict) and isinstance(value, dict) and not place[last].keys() & value.keys()):
            raise ConfigError(f"key '{name}' is twice in {path}: expected one value")
        place[last] = {**place[last], **value} if last in place else value
    return own


def as_mapping(config: object) -> dict[str, Any]:
    """A dataclass as nested plain values, for JSON and YAML."""
    return {key: _plain(value) for key, value in dataclasses.asdict(config).items()}  # type: ignore[call-overload]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def changed_flags(config: object) -> list[str]:
    """The words of a command line that make `config` from its defaults: none for a field that has its default.

    Raises:
        TypeError: a field with a default factory or a nested dataclass, which no analysis has.
    """
    words = []
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        if value != field.default:
            words += _as_flags(field.name, _plain(value))
    return words


def merge(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `own` put in, section by section."""
    merged = dict(base)
    for key, value in own.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if nested else value
    return merged


def _fields(cls: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _fields(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, hints[field.name]


def _flatten(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _check_known(key: str, known: Mapping[str, Any], called: str) -> None:
    if key in known:
        return
    listed = ", ".join(known)
    near = nearest_key(key, known)
    hint = f"did you mean '{near}'?" if near else f"expected one of {listed if len(listed) < 160 else f'the {len(known)} that --help lists'}"
    raise ConfigError(f"unknown {called}: {hint}")


def nearest_key(key: str, known: Iterable[str]) -> str | None:
    """The key that `key` may stand for, by its last part: the same one in another section, one that it abbreviates (`optim.lr`), or one spelled alike."""

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


def _as_flags(key: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        head, _, last = key.rpartition(".")
        return [f"--{key}" if value else f"--{head + '.' if head else ''}no-{last}"]
    values = value if isinstance(value, list) else [value]
    return [f"--{key}", *map(str, values)]


def _one_sentence(boxed: str) -> str:
    """The first statement of tyro's boxed message, without title and box, whose lines are those of what the terminal can show."""
    body: list[str] = []
    for line in [line.strip(" │") for line in boxed.splitlines()[1:]]:
        if body and set(line) <= set("─-╰╯"):
            break
        body += [line] if set(line) - set("─-") else []
    return " ".join(body) or "the arguments could not be read; see --help"


def command(main: Any) -> None:
    """Run `main(argv)` as a command: an error is one line on stderr and exit code 2, Ctrl-C is 130; `--debug` shows the traceback."""
    from workbench.errors import WorkbenchError

    argv = [word for word in sys.argv[1:] if word != "--debug"]
    try:
        main(argv)
    except WorkbenchError as error:
        if "--debug" in sys.argv:
            raise
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
    except OSError as error:
        if "--debug" in sys.argv:
            raise
        sys.stderr.write(f"error: {error.strerror}: {error.filename or 'disk'}\n" if error.strerror else f"error: {' '.join(str(error).split())}\n")
        sys.exit(2)
