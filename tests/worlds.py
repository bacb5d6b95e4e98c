"""What every data set of questions is held to: the same in every process, and nothing to be learnt from the text
alone."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

import pytest
from scipy.stats import chisquare

from tests.conftest import ROOT
from workbench.data import Dataset, Sample, load_data
from workbench.errors import DataError
from workbench.stats import bootstrap_ci

HASH = """
import sys
from workbench.data import load_data
from workbench.data.base import content_hash
scenes = load_data(sys.argv[1], limit=5).scenes
texts = [s.id + s.question + s.answer for scene in scenes for s in scene]
print(content_hash(*[scene[0].image.tobytes() for scene in scenes], *texts))
"""


def load_or_skip(spec: str, **options: Any) -> Dataset:
    """The data set; skips where the package that carries it cannot be had, which CI does not let pass."""
    try:
        return load_data(spec, **options)
    except DataError as error:
        assert not os.environ.get("CI"), str(error)
        pytest.skip(str(error))


def hashes_in_fresh_processes(spec: str) -> set[str]:
    """A hash of the first five scenes, from two processes with different hash seeds."""
    return {
        subprocess.run(
            [sys.executable, "-c", HASH, spec],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "7")
    }


def answer_p_value(samples: Iterable[Sample], category: str) -> float:
    """Chi-square over the answers of one type against as many of each option that occurs."""
    asked = [s for s in samples if s.category == category]
    answers = Counter(s.answer for s in asked)
    assert set(answers) == {option for s in asked for option in s.options}
    return float(chisquare(list(answers.values())).pvalue)


def text_only(train: Iterable[Sample], asked: list[Sample]) -> list[bool]:
    """Whether the best text-only model is right: a table from question text to its most frequent answer in `train`; on
    a text it has not seen, wrong."""
    table: dict[str, Counter[str]] = defaultdict(Counter)
    for sample in train:
        table[sample.question][sample.answer] += 1
    return [s.question in table and table[s.question].most_common(1)[0][0] == s.answer for s in asked]


def assert_at_chance(train: Iterable[Sample], test: Iterable[Sample], category: str) -> None:
    """See that a text-only model's 99.9 % interval over images does not lie above one over the options."""
    asked = [s for s in test if s.category == category]
    interval = bootstrap_ci(text_only(train, asked), groups=[s.image_id for s in asked], level=0.999)
    chance = 1 / len(asked[0].options)
    assert interval.low <= chance, f"{category}: {interval}, chance {chance}"
