"""Command lines from frozen dataclasses: parsing, errors in one line, exit codes."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

from workbench.errors import ConfigError
from workbench.ranges import ranges
from workbench.yaml_config import check_kind, check_known, config_fields, flatten, plain, read_recipe

Config = TypeVar("Config")
# Commands show their own progress; transformers' bars and load reports would bury it. Read when transformers is
# imported, which is later.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


@dataclasses.dataclass(frozen=True)
class ConfigFile:
    """An option of commands whose options a file may have; a base class of their options."""

    config: Path | None = None
    """YAML file with any of these options, each under its name; an option on the command line overrides it."""


def parse_with_file(cls: type[Config], argv: Sequence[str], *, prog: str, description: str = "") -> Config:
    """`parse` for a subclass of `ConfigFile`: its defaults, then the file after `--config`, then the flags.

    Raises:
        ConfigError: as `parse`; or --config twice, without a file, or in the file itself.
    """
    words, files = [], []
    given = iter(argv)
    for word in given:
        name, equals, value = word.partition("=")
        if name != "--config":
            words.append(word)
        elif not (file := value if equals else next(given, "")) or file.startswith("--"):
            raise ConfigError(
                f"option '--config' has {f'the value {file!r}' if file else 'no value'}: expected --config FILE.yaml"
            )
        else:
            files.append(Path(file))
    if len(files) > 1:
        raise ConfigError(f"option '--config' is there with {files[0]} and {files[1]}: expected one file")
    asked: Any = parse(
        cls, words, prog=prog, description=description, recipe=files[0] if files else None, called="file"
    )
    if asked.config is not None:
        raise ConfigError(
            f"key 'config' in {files[0]} is {asked.config}: expected options, and --config on the command line alone"
        )
    return asked  # type: ignore[no-any-return]


def parse(
    cls: type[Config],
    argv: Sequence[str],
    *,
    prog: str,
    description: str = "",
    recipe: Path | None = None,
    called: str = "recipe",
) -> Config:
    """Build a `cls` from its defaults, then the YAML file `recipe`, then the flags in `argv`.

    Args:
        called: what errors call the file.

    Raises:
        ConfigError: an unknown key or option (with the nearest valid one) or a value of the wrong type.
        SystemExit: after `--help`, with code 0.
    """
    import tyro  # which only a command line needs

    known, renamed = dict(config_fields(cls)), getattr(cls, "RENAMED", {})
    flags: list[str] = []
    if recipe is not None:
        for key, value in flatten(read_recipe(recipe, called=called)):
            if any(name.startswith(f"{key}.") for name in known):
                raise ConfigError(
                    f"key '{key}' in {recipe} is {value}: expected keys and values below it, or no such key"
                )
            check_known(key, known, f"key '{key}' in {recipe}", renamed)
            check_kind(key, value, known[key], recipe)
            flags += as_flags(key, value)
    _check_no_stray_word(cls, argv, prog)
    for word in argv:
        if word.startswith("--") and word != "--help":
            key = word[2:].split("=")[0].replace("-", "_")
            positive = re.sub(r"(^|\.)no_", r"\1", key)  # --data.no-group
            check_known(
                positive if known.get(positive) is bool else key, known, f"option '{word.split('=')[0]}'", renamed
            )
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            return tyro.cli(
                cls,
                prog=prog,
                description=_with_commands(description),
                args=[*flags, *argv],
                use_underscores=True,
                config=(tyro.conf.AvoidSubcommands,),
                registry=_ranges_in_help(),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise ConfigError(_one_sentence(message.getvalue())) from None


def _ranges_in_help() -> Any:
    """Return a rule for tyro by which the help of an option shows the range that its field declares, before its
    default."""
    import tyro

    registry, asking = tyro.constructors.ConstructorRegistry(), False

    @registry.struct_rule
    def with_ranges(info: tyro.constructors.StructTypeInfo) -> tyro.constructors.StructConstructorSpec | None:
        nonlocal asking
        if asking or not dataclasses.is_dataclass(info.type):
            return None
        asking = True
        try:
            spec = registry.get_struct_spec(info)
        finally:
            asking = False
        if not isinstance(spec, tyro.constructors.StructConstructorSpec):
            return None
        shown = {name: partial("({}; default: {})".format, own) for name, own in ranges(info.type).items()}
        types: dict[str, Any] = {
            name: Annotated[own.type, tyro.conf.arg(help_behavior_hint=shown[name])]
            for own in spec.fields
            if (name := own.name) in shown
        }
        return dataclasses.replace(
            spec, fields=tuple(dataclasses.replace(own, type=types.get(own.name, own.type)) for own in spec.fields)
        )

    return registry


def _check_no_stray_word(cls: Any, argv: Sequence[str], prog: str) -> None:
    """Refuse a word before the first option, which would become one more value of the recipe's last list; some commands
    take such words."""
    if not argv or argv[0].startswith("-"):
        return
    import tyro

    if any(
        tyro.conf.Positional in getattr(hint, "__metadata__", ())
        for hint in get_type_hints(cls, include_extras=True).values()
    ):
        return
    raise ConfigError(
        f"'{argv[0]}' belongs to no option: expected --option VALUE after {prog}; --help lists the options"
    )


def _with_commands(description: str) -> str:
    """`description` with its commands indented, which keeps each on its line."""
    return re.sub(r"^(?=(?:python -m|accelerate launch) )", "    ", description, flags=re.MULTILINE)


def changed_flags(config: object) -> list[str]:
    """The words of a command line that make `config` from its defaults: none for a field that has its default.

    Raises:
        TypeError: a field with a default factory or a nested dataclass, which no analysis has.
    """
    words = []
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        if value != field.default:
            words += as_flags(field.name, plain(value))
    return words


def as_flags(key: str, value: Any) -> list[str]:
    """Return an option as words of a command line: `--key value`, or `--key` and `--no-key` of a switch."""
    if isinstance(value, bool):
        head, _, last = key.rpartition(".")
        return [f"--{key}" if value else f"--{head + '.' if head else ''}no-{last}"]
    values = value if isinstance(value, list) else [value]
    return [f"--{key}", *map(str, values)]


def _one_sentence(boxed: str) -> str:
    """The first statement of tyro's boxed message, without title and box, whose lines are those of what the terminal
    can show."""
    body: list[str] = []
    for line in [line.strip(" │") for line in boxed.splitlines()[1:]]:
        if body and set(line) <= set("─-╰╯"):
            break
        body += [line] if set(line) - set("─-") else []
    return " ".join(body) or "the arguments could not be read; see --help"


def command(main: Any) -> None:
    """Run `main(argv)` as a command: an error is one line on stderr and exit code 2, Ctrl-C is 130; `--debug` shows the
    traceback."""
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
        sys.stderr.write(
            f"error: {error.strerror}: {error.filename or 'disk'}\n"
            if error.strerror
            else f"error: {' '.join(str(error).split())}\n"
        )
        sys.exit(2)
