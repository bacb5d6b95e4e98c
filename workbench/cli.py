"""Command lines made from frozen dataclasses: parsing, one-line errors and exit codes."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import itertools
import os
import re
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from workbench.errors import ConfigError, UnknownNameError
from workbench.options import ranges
from workbench.progress import emit
from workbench.yaml_config import check_kind, check_known, config_fields, flatten, plain, read_recipe

# tyro's message about a value that is none of an option's choices
CHOICE = re.compile(r"invalid choice '(.*)' for argument '(--[\w.]+)'\. Expected one of \((.*)\)\.?", re.IGNORECASE)

# and its messages about one of another type, or that is missing
VALUE = re.compile(r"(?:Error parsing |Missing value for argument ')(--[\w.]+)(?:: |'\.)")
KINDS = {int: "a whole number", float: "a number", type(None): "None", Path: "a path", str: "a text"}

Config = TypeVar("Config")
# The commands show their own progress, which transformers' progress bars and load reports would bury. transformers
# reads these variables when it is imported, which happens after this module is imported.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def number_text(value: float) -> str:
    """Return a number of a printed table with three decimals, or with one digit where these would all be 0.

    So no p-value is 0, and a small difference has a sign. What is smaller than a rounding error is 0.
    """
    if abs(value) < 1e-15:
        return "0.000"
    text = f"{value:.3f}"
    return text if float(text) else f"{value:.1g}"


@dataclasses.dataclass(frozen=True)
class ConfigFile:
    """Base class for the options of commands that can read them from a file; adds `--config FILE`."""

    config: Path | None = None
    """YAML file with values for any of these options, by name; the command line overrides the file."""


def parse_with_file(cls: type[Config], argv: Sequence[str], *, prog: str, description: str = "") -> Config:
    """Parse a subclass of `ConfigFile`: its defaults, then the file after `--config`, then the flags.

    Raises:
        ConfigError: as in `parse`; or `--config` appears twice, without a file, or in the file itself.
    """
    words, files = [], []
    remaining = iter(argv)
    for word in remaining:
        name, equals, value = word.partition("=")
        if name != "--config":
            words.append(word)
        elif not (file := value if equals else next(remaining, "")) or file.startswith("--"):
            raise ConfigError(
                f"option '--config' has {f'the value {file!r}' if file else 'no value'}: expected --config FILE.yaml"
            )
        else:
            files.append(Path(file))
    if len(files) > 1:
        raise ConfigError(f"option '--config' appears twice, with {files[0]} and {files[1]}: expected one file")
    file_or_none = files[0] if files else None
    options: Any = parse(cls, words, prog=prog, description=description, recipe=file_or_none, called="file")
    if options.config is not None:
        raise ConfigError(
            f"key 'config' in {files[0]} is {options.config}: expected other options there, since --config is allowed"
            " on the command line only"
        )
    return options  # type: ignore[no-any-return]


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
        called: the word for the file in error messages.

    Raises:
        ConfigError: an unknown key or option (the message names the nearest valid one), or a value of the wrong type.
        SystemExit: after `--help`, with code 0.
    """
    import tyro  # imported here because only command lines need it

    known, renamed = dict(config_fields(cls)), getattr(cls, "RENAMED", {})
    flags: list[str] = []
    if recipe is not None:
        for key, value in flatten(read_recipe(recipe, called=called)):
            if any(name.startswith(f"{key}.") for name in known):
                raise ConfigError(
                    f"key '{key}' in {recipe} is {value}: expected a section with keys and values, or leave the key out"
                )
            check_known(key, known, f"key '{key}' in {recipe}", renamed)
            check_kind(key, value, known[key], recipe)
            flags += as_flags(key, value)
    _check_no_stray_word(cls, argv, prog)
    for word in argv:
        if word.startswith("--") and word != "--help":
            key = word[2:].split("=")[0].replace("-", "_")
            positive = re.sub(r"(^|\.)no_", r"\1", key)  # data.group for --data.no-group
            name = positive if known.get(positive) is bool else key
            check_known(name, known | {"help": bool}, f"option '{word.split('=')[0]}'", renamed, prefix="--")
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            return tyro.cli(
                cls,
                prog=prog,
                description=_with_commands(description),
                args=[*map(_from_home, flags), *map(_from_home, _null_as_none(argv, known))],
                use_underscores=True,
                config=(tyro.conf.AvoidSubcommands,),
                registry=_ranges_in_help(),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        sentence = _one_sentence(message.getvalue())
        if about := VALUE.match(sentence):
            sentence = _no_such_value(about[1], argv, known)
        raise ConfigError(sentence) from None


def _ranges_in_help() -> Any:
    """Return a tyro registry that makes `--help` show the declared range of an option before its default."""
    import tyro

    # `get_struct_spec` calls this rule again for the same class, which `asking` detects
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
        hints = {name: partial("({}; default: {})".format, allowed) for name, allowed in ranges(info.type).items()}
        types: dict[str, Any] = {
            name: Annotated[field.type, tyro.conf.arg(help_behavior_hint=hints[name])]
            for field in spec.fields
            if (name := field.name) in hints
        }
        fields = (dataclasses.replace(field, type=types.get(field.name, field.type)) for field in spec.fields)
        return dataclasses.replace(spec, fields=tuple(fields))

    return registry


def _check_no_stray_word(cls: Any, argv: Sequence[str], prog: str) -> None:
    """Refuse a word before the first option, unless the command takes positional arguments.

    tyro would append such a word to the last list of the recipe, whose flags come before those of the command line.
    """
    if not argv or argv[0].startswith("-"):
        return
    import tyro

    hints = get_type_hints(cls, include_extras=True).values()
    if any(tyro.conf.Positional in getattr(hint, "__metadata__", ()) for hint in hints):
        return
    raise ConfigError(
        f"'{argv[0]}' does not follow an option: expected --OPTION VALUE after {prog}; --help lists the options"
    )


def _with_commands(description: str) -> str:
    """Return `description` with its example commands indented, so that the help keeps each on a line of its own."""
    return re.sub(r"^(?=(?:python -m|accelerate launch) )", "    ", description, flags=re.MULTILINE)


def changed_flags(config: object) -> list[str]:
    """Return the command-line words that turn a default configuration into `config`.

    A field that has its default value contributes no words.

    Raises:
        TypeError: a field has a default factory or is a nested dataclass; no analysis has such a field.
    """
    words = []
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        if value != field.default:
            words += as_flags(field.name, plain(value))
    return words


def _from_home(word: str) -> str:
    """Return a word with the home folder for `~/`, which shells leave in `--option=~/FOLDER`, and YAML everywhere."""
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return f"{option}{equals}{os.path.expanduser(value)}" if value.startswith("~/") else word


def _null_as_none(argv: Sequence[str], known: Mapping[str, Any]) -> list[str]:
    """Return the words with YAML's null as None, which is what command lines call it, for options that can be None."""
    words: list[str] = []
    for word in argv:
        option, equals, value = word.rpartition("=")
        if not equals and words:
            option = words[-1]
        if value == "null" and type(None) in get_args(known.get(option[2:].replace("-", "_"))):
            word = f"{option}=None" if equals else "None"
        words.append(word)
    return words


def as_flags(key: str, value: Any) -> list[str]:
    """Return a key and its value as command-line words, such as `--k 10`, `--layers 1 2` or `--data.no-group`."""
    if isinstance(value, bool):
        head, _, last = key.rpartition(".")
        return [f"--{key}" if value else f"--{head + '.' if head else ''}no-{last}"]
    values = value if isinstance(value, list) else [value]
    return [f"--{key}", *map(str, values)]


def _one_sentence(message: str) -> str:
    """Return the first statement of tyro's boxed error message, without the title and the box.

    tyro draws the box with Unicode or, where the terminal cannot show these, with ASCII characters.
    """
    statement: list[str] = []
    for line in [line.strip(" │") for line in message.splitlines()[1:]]:
        if statement and set(line) <= set("─-╰╯"):
            break
        statement += [line] if set(line) - set("─-") else []
    sentence = " ".join(statement)
    if choice := CHOICE.fullmatch(sentence):
        value, option, listed = choice.groups()
        known = sorted(set(re.findall(r"'([^']*)'", listed)) - {"None"})
        return str(UnknownNameError(f"value of {option}", value, known))
    return sentence or "the arguments could not be read; see --help"


def _no_such_value(option: str, argv: Sequence[str], known: Mapping[str, Any]) -> str:
    """Return a sentence about the words after an option, which are none of its values or are missing."""
    expected = _expected(known.get(option[2:].replace("-", "_")))
    said = ""
    for at, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name.replace("-", "_") == option.replace("-", "_"):
            following = itertools.takewhile(lambda next_word: not next_word.startswith("--"), argv[at + 1 :])
            said = value if equals else " ".join(following)
    if not said:
        return f"{option} has no value: expected {expected}"
    names = {word.lower(): word for word in re.split(r", | or ", expected) if " " not in word}
    names |= {"null": "None"} if "none" in names else {}
    near = difflib.get_close_matches(said.lower(), names, n=1, cutoff=0.5)
    return f"{option} is {said[:60]}: expected {expected}" + (f"; did you mean '{names[near[0]]}'?" if near else "")


def _expected(hint: Any) -> str:
    """Return what the values of a type are, such as "a whole number or None"."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _expected(args[0])
    if origin is Literal:
        return ", ".join(map(str, args))
    if origin is tuple:
        return f"{_expected(args[0]).removeprefix('a ')}s"
    if args:
        return " or ".join(_expected(arg) for arg in sorted(args, key=lambda arg: arg is type(None)))
    return KINDS.get(hint, "another value; see --help")


def command(main: Any) -> None:
    """Run `main(argv)` as a command: an error prints one line on stderr and exits with code 2, Ctrl-C with 130.

    `--debug` shows the traceback of an error instead.
    """
    from workbench.errors import WorkbenchError

    argv = [word for word in sys.argv[1:] if word != "--debug"]
    try:
        main(argv)
    except WorkbenchError as error:
        if "--debug" in sys.argv:
            raise
        _exit_with(str(error))
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
    except BrokenPipeError:  # whoever reads the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if "--debug" in sys.argv:
            raise
        _exit_with(f"{error.strerror}: {error.filename or 'disk'}" if error.strerror else " ".join(str(error).split()))


def _exit_with(sentence: str) -> NoReturn:
    """End the command with an error of one sentence."""
    emit("error", sentence=sentence)
    sys.stderr.write(f"error: {sentence}\n")
    sys.exit(2)
