"""What the fields of a configuration declare: types, ranges, as in `steps: Annotated[int, Ge(1)] = 1200`, and texts.

`check_options` checks values against their types and ranges, since not all come from a command line; `--help` and the
forms of the dashboard show ranges and texts. None means that an option is not set, which every range allows. Every
value of a tuple must be in the range. Infinity and NaN are in no range.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Mapping
from itertools import pairwise
from math import inf, isfinite
from numbers import Integral, Real
from os import PathLike
from types import MappingProxyType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, GroupedMetadata, Gt, Le, Lt

from workbench.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`; `above` excludes `low` and `below` excludes `high`."""

    low: float = -inf
    high: float = inf
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        return (
            isfinite(value)
            and (self.low < value if self.above else self.low <= value)
            and (value < self.high if self.below else value <= self.high)
        )

    def __str__(self) -> str:
        """Return the range in words, such as `at least 1`, `0 to 1` or `at least 0 and below 1`."""
        low = f"{'above' if self.above else 'at least'} {self.low}"
        high = f"{'below' if self.below else 'at most'} {self.high}"
        if self.low == -inf or self.high == inf:
            return high if self.low == -inf else low
        return f"{low} and {high}" if self.above or self.below else f"{self.low} to {self.high}"


def range_of(hint: Any) -> Range | None:
    """Return the range that the type annotation of a field declares, or None."""
    if get_origin(hint) is not Annotated:
        return None
    ends: dict[str, Any] = {}
    for part in get_args(hint)[1:]:
        for end in part if isinstance(part, GroupedMetadata) else [part]:
            if isinstance(end, Ge | Gt):
                ends |= {"low": end.ge} if isinstance(end, Ge) else {"low": end.gt, "above": True}
            elif isinstance(end, Le | Lt):
                ends |= {"high": end.le} if isinstance(end, Le) else {"high": end.lt, "below": True}
    return Range(**ends) if ends else None


def ranges(cls: type) -> Mapping[str, Range]:
    """Return {name of the field: declared range} of a dataclass."""
    hints = get_type_hints(cls, include_extras=True)
    declared = {field.name: range_of(hints[field.name]) for field in dataclasses.fields(cls)}
    return MappingProxyType({name: allowed for name, allowed in declared.items() if allowed is not None})


def texts(cls: type) -> Mapping[str, str]:
    """Return {name of the field: the string literal below it} of a dataclass and its base classes, on one line each."""
    text_of: dict[str, str] = {}
    for base in reversed([base for base in cls.__mro__ if dataclasses.is_dataclass(base)]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        for field, below in pairwise(definition.body):
            match field, below:
                case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                    text_of[name] = " ".join(text.split())
    return MappingProxyType(text_of)


KINDS: Mapping[Any, tuple[Any, str]] = {  # {annotation: (type of its values, in words)}
    bool: (bool, "True or False"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: ((str, PathLike), "a text"),
    type(None): (type(None), "None"),
}


def check_options(config: Any, section: str = "") -> None:
    """Check every value of a configuration against the type and the range that its field declares.

    A list stands for a tuple, and a default fits in any case. Fields that are configurations themselves are not checked
    here.

    Args:
        section: the text before the name of a field in messages, such as `model.`.

    Raises:
        ConfigError: a value is of another type, none of the choices, or outside its range.
    """
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        if value is not field.default and not _fits(value, hint):
            raise ConfigError(f"{section}{field.name} is {value!r}: expected {_in_words(hint)}")
    for name, expected in ranges(type(config)).items():
        value = getattr(config, name)
        for number in value if isinstance(value, tuple | list) else [value]:
            if number is not None and number not in expected:
                raise ConfigError(
                    f"{section}{name} is {number}: expected {expected}{', and finite' * (not isfinite(number))}"
                )


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a value is of the type that a field declares; True for types that are not in use for options."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in parts)
    if origin is tuple and parts:
        values = value if isinstance(value, tuple | list) else None
        hints = parts[:1] * len(values or ()) if parts[-1] is Ellipsis else parts
        return values is not None and len(values) == len(hints) and all(map(_fits, values, hints))
    kind = KINDS.get(hint)
    return kind is None or (isinstance(value, kind[0]) and (hint is bool or not isinstance(value, bool)))


def _in_words(hint: Any) -> str:
    """Return what values of the type that a field declares are."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(map(_in_words, parts))
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if origin is tuple:
        return f"a list ({_in_words(parts[0])} each)"
    return KINDS[hint][1] if hint in KINDS else str(hint)


def refuse_unused(config: Any, *names: str, because: str, expected: str) -> None:
    """Check that options which would have no effect are at their defaults; a user who sets one expects an effect.

    Args:
        names: of the options.
        because: why they have no effect, in words.
        expected: what gives them one, in words.

    Raises:
        ConfigError: one of them has another value.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name in names:
        if (value := getattr(config, name)) != defaults[name]:
            raise ConfigError(f"{name} is {value}, but {because}: expected {expected}, or no {name}")
