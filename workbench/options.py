"""What the fields of a configuration declare: ranges, as in `steps: Annotated[int, Ge(1)] = 1200`, and texts.

`check_ranges` checks values against their ranges; `--help` and the forms of the dashboard show ranges and texts. None
means that an option is not set, which every range allows. Every value of a tuple must be in the range. Infinity and
NaN are in no range.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Mapping
from itertools import pairwise
from math import inf, isfinite
from types import MappingProxyType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

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


def check_ranges(config: Any, section: str = "") -> None:
    """Check every value of a configuration against the range that its field declares.

    Fields that are configurations themselves are not checked here.

    Args:
        section: the text before the name of a field in messages, such as `model.`.

    Raises:
        ConfigError: a value is outside its range.
    """
    for name, expected in ranges(type(config)).items():
        value = getattr(config, name)
        for number in value if isinstance(value, tuple) else [value]:
            if number is not None and number not in expected:
                raise ConfigError(
                    f"{section}{name} is {number}: expected {expected}{', and finite' * (not isfinite(number))}"
                )


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
