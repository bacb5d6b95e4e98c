"""Ranges and texts that the fields of a configuration declare."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import re
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import numpy as np
import pytest
from annotated_types import Ge, Gt, Interval, Le, Lt

from trainer.alignment_config import AlignmentConfig, SelectionConfig
from trainer.model_config import LoraConfig, ModelConfig
from trainer.recipe import DataConfig, MonitorConfig, OptimConfig, Recipe
from workbench.analysis.command import run as command_of_analysis
from workbench.analysis.declaration import Where
from workbench.analysis.discover import analysis_files, load_analyses, load_analysis
from workbench.cli import parse
from workbench.commands import COMMANDS
from workbench.errors import ConfigError
from workbench.options import Range, check_options, range_of, ranges, texts
from workbench.yaml_config import config_fields


@dataclass(frozen=True)
class Few:
    """Numbers."""

    count: Annotated[int, Ge(1)] = 1
    """How many."""
    share: Annotated[float, Ge(0), Lt(1)] = 0.0
    optional: Annotated[int | None, Gt(0), Le(3)] = None
    many: Annotated[tuple[int, ...], Interval(ge=1, le=5)] = (1, 2)
    word: str = "a"
    side: Literal["left", "right"] | None = None
    unset: int = None  # type: ignore[assignment]
    several: tuple = ()  # type: ignore[type-arg]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "few.count is 0: expected at least 1"),
        ({"share": 1.0}, "few.share is 1.0: expected at least 0 and below 1"),
        ({"share": -0.1}, "few.share is -0.1: expected at least 0 and below 1"),
        ({"share": math.nan}, "few.share is nan: expected at least 0 and below 1, and finite"),
        ({"count": math.inf}, "few.count is inf: expected a whole number"),
        ({"optional": 0}, "few.optional is 0: expected above 0 and at most 3"),
        ({"optional": 4}, "few.optional is 4: expected above 0 and at most 3"),
        ({"many": (5, 6)}, "few.many is 6: expected 1 to 5"),
        ({"many": 3}, "few.many is 3: expected a list (a whole number each)"),
        ({"many": "12"}, "few.many is '12': expected a list (a whole number each)"),
        ({"many": [1, "2"]}, "few.many is [1, '2']: expected a list (a whole number each)"),
        ({"count": "1"}, "few.count is '1': expected a whole number"),
        ({"count": 1.5}, "few.count is 1.5: expected a whole number"),
        ({"count": True}, "few.count is True: expected a whole number"),
        ({"optional": "a"}, "few.optional is 'a': expected a whole number or None"),
        ({"word": 1}, "few.word is 1: expected a text"),
        ({"word": None}, "few.word is None: expected a text"),
        ({"side": "lefft"}, "few.side is 'lefft': expected 'left' or 'right' or None"),
    ],
)
def test_a_value_of_another_type_or_outside_its_range_is_one_sentence(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_options(Few(**values), "few.")
    assert str(error.value) == message


def test_the_ends_of_a_range() -> None:
    for values in (
        {},
        {"count": 1},
        {"share": 0.0},
        {"share": 0.999},
        {"optional": 3},
        {"optional": 1},
        {"many": (1, 5)},
        {"many": ()},
        {"many": [1, np.int64(5)]},
        {"share": 0},
        {"share": np.float32(0.5)},
        {"word": Path("a")},
        {"side": "left"},
        {"several": (1, "a")},
    ):
        check_options(Few(**values))  # type: ignore[arg-type]
    assert ranges(Few) == {
        "count": Range(1),
        "share": Range(0, 1, below=True),
        "optional": Range(0, 3, above=True),
        "many": Range(1, 5),
    }
    assert [str(range_of(Annotated[int, end])) for end in (Lt(2), Le(2), Gt(2))] == ["below 2", "at most 2", "above 2"]
    assert range_of(int) is range_of(Annotated[int, "a word"]) is None


def test_help_shows_ranges_with_defaults() -> None:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
        parse(Few, ["--help"], prog="few")
    text = " ".join(shown.getvalue().replace("│", " ").split())
    assert "How many. (at least 1; default: 1)" in text
    assert "(at least 0 and below 1; default: 0.0)" in text
    assert "(default: a)" in text
    assert parse(Few, ["--count", "3", "--many", "4", "5"], prog="few") == Few(count=3, many=(4, 5))


SECTIONS = (LoraConfig, ModelConfig, DataConfig, OptimConfig, SelectionConfig, AlignmentConfig, MonitorConfig, Recipe)
COMMAND_OPTIONS = [command.options.partition(":")[::2] for command in COMMANDS.values() if command.options]
OPTIONS = [
    *(getattr(import_module(module), name) for module, name in COMMAND_OPTIONS),
    *(analysis.config for analysis in load_analyses().values()),
    Where,
    *SECTIONS,
]


@pytest.mark.parametrize("cls", dict.fromkeys(OPTIONS), ids=lambda cls: f"{cls.__module__}.{cls.__name__}")
def test_every_option_has_a_text(cls: type) -> None:
    sections = {name for name, hint in get_type_hints(cls).items() if hint in SECTIONS}
    assert {field.name for field in dataclasses.fields(cls)} - sections == texts(cls).keys() - sections


@pytest.mark.parametrize("cls", [Where, OptimConfig, *(analysis.config for analysis in load_analyses().values())])
def test_every_number_has_a_range(cls: type) -> None:
    assert {name for name, kind in config_fields(cls) if kind in (int, float)} <= ranges(cls).keys()


@pytest.mark.parametrize("cls", dict.fromkeys(OPTIONS), ids=lambda cls: f"{cls.__module__}.{cls.__name__}")
def test_a_number_out_of_its_range_is_refused_where_it_is_set(cls: type) -> None:
    for name, expected in ranges(cls).items():
        if math.isfinite(expected.low):
            below = expected.low - 1
            listed = isinstance(getattr(cls, name, None), tuple)
            with pytest.raises(ConfigError, match=rf"\b{name} is {below}"):
                cls(**{name: (below,) if listed else below})


def test_texts_are_on_one_line_and_include_those_of_base_classes() -> None:
    assert texts(Few) == {"count": "How many."}
    text_of = texts(load_analyses()["cknna"].config)
    assert text_of["limit"] == "Number of images."
    assert text_of["pooling"].endswith("pooled: one mean token per image.")


@dataclass(frozen=True)
class Kinds:
    """One field of each kind."""

    count: int = 1
    share: float = 0.5
    kept: Annotated[int | None, Ge(1)] = 2
    layers: tuple[int, ...] = ()
    device: Literal["auto", "cpu"] | int = "auto"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--count", "x"], "--count is x: expected a whole number"),
        (["--count=1.5"], "--count is 1.5: expected a whole number"),
        (["--share", "half"], "--share is half: expected a number"),
        (["--kept", "nul"], "--kept is nul: expected a whole number or None; did you mean 'None'?"),
        (["--kept", "Non"], "--kept is Non: expected a whole number or None; did you mean 'None'?"),
        (["--layers", "1", "b", "--count", "2"], "--layers is 1 b: expected whole numbers"),
        (["--device", "cpus"], "--device is cpus: expected auto, cpu or a whole number; did you mean 'cpu'?"),
        (["--share"], "--share has no value: expected a number"),
    ],
)
def test_a_value_of_another_type_is_named_with_what_was_expected(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse(Kinds, words, prog="test")
    assert str(refusal.value) == message


@pytest.mark.parametrize(
    ("name", "unused", "used", "message"),
    [
        ("permutation", {"scorer": "paper"}, {"answers": "generated"}, "scorer is paper, but answers by likelihood"),
        ("benchmark", {"temperature": 0.7}, {"decoding": "sample"}, "temperature is 0.7, but decoding is greedy"),
        ("benchmark", {"draws": 3}, {"decoding": "sample"}, "draws is 3, but decoding is greedy, which draws no"),
        ("dynamics", {"decoding": "likelihood"}, {"benchmarks": ("mme:a",)}, "decoding is likelihood, but no bench"),
        ("attention", {"localise": False, "objects": 2}, {"localise": True}, "objects is 2, but without localise no"),
    ],
)
def test_an_option_without_an_effect_is_refused(
    name: str, unused: dict[str, Any], used: dict[str, Any], message: str
) -> None:
    config = load_analysis(name).config
    with pytest.raises(ConfigError, match=message):
        config(**unused)
    config(**unused | used)


@pytest.mark.parametrize("name", sorted(analysis_files()))
def test_the_help_of_an_analysis_has_its_examples(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line each, before the explanation, with options that the analysis has."""
    monkeypatch.setenv("COLUMNS", "240")
    analysis = load_analysis(name)
    with pytest.raises(SystemExit):
        command_of_analysis(analysis, ["--help"])
    text = capsys.readouterr().out
    lines = [line.rstrip() for line in text.splitlines()]
    examples = [line for line in lines if line.startswith("    python -m ")]
    assert examples == [f"    {example}" for example in analysis.examples]
    assert examples
    assert lines.index(examples[-1]) < next(n for n, line in enumerate(lines) if analysis.explanation[0][:40] in line)
    for example in examples:
        _, *words = example.split(f"python -m analyses.{name} ")
        options = [word for word in " ".join(words).split() if word.startswith("--")]
        assert options
        assert all(re.search(rf"^\W+{option}\b", text, re.M) for option in options)
