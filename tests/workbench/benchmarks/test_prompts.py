"""The prompts of a benchmark, as LLaVA-1.5, lmms-eval and the paper's scripts write them."""

from __future__ import annotations

from typing import Any

import pytest

from workbench.benchmarks.prompts import Asked, prompt_of
from workbench.data.base import Sample
from workbench.errors import ConfigError, DataError


def asked(benchmark: str, question: str, options: tuple[str, ...] = ("yes", "no"), own: str = "") -> Asked:
    nothing: Any = None
    return Asked(benchmark, Sample("7", "i", nothing, question, options[0], options), own)


POPE = asked("pope", "Is there a dog in the image?")
MME = asked("mme", "Is this a dog? Please answer yes or no.")
MMVP = asked("mmvp", "Is it open?", ("Open", "Closed"))
CV_BENCH = asked("cv_bench", "How many?", ("2", "1"), "How many? Select from the following choices.\n(A) 2\n(B) 1")
MMSTAR = asked("mmstar", "Which?", ("x", "y"), "Which?\nOptions: A: x, B: y")
ONE = asked("whatsup coco_one", "Where in the image is the dog?", ("left", "right"))
ADAPTVIS = asked("whatsup coco_one", "-", ("left",), "<image>\nUSER: Where is the dog? Answer with left,..\nASSISTANT:")
MC = "\nAnswer with the option's letter from the given choices directly."
WORD = "\nAnswer the question using a single word or phrase."


@pytest.mark.parametrize(
    ("style", "question", "prompt"),
    [
        ("plain", MME, "Is this a dog? Please answer yes or no."),
        ("llava", POPE, f"Is there a dog in the image?{WORD}"),
        ("llava", MME, f"Is this a dog?{WORD}"),
        ("llava", MMVP, f"Is it open?\nA. Open\nB. Closed{MC}"),
        ("llava", ONE, "Where in the image is the dog? Answer with left or right."),
        ("llava", asked("", "any dog ?"), f"any dog ?{WORD}"),
        ("lmms", MME, f"Is this a dog?{WORD}"),
        ("lmms", MMSTAR, f"Which?\nOptions: A: x, B: y{MC}"),
        ("paper", POPE, "Is there a dog in the image? Answer with only 'yes' or 'no'."),
        ("paper", ADAPTVIS, "Where is the dog?Answer with a single word from left, right, top, or bottom.\n"),
    ],
)
def test_prompts(style: str, question: Asked, prompt: str) -> None:
    assert prompt_of(style, question) == prompt


def test_prompts_with_the_benchmarks_own_text() -> None:
    lmms = prompt_of("lmms", CV_BENCH)
    assert lmms.startswith("Note: You only need to respond with A, B without providing any additional information.\n\n")
    assert lmms.endswith("(A) 2\n(B) 1")
    for question in (CV_BENCH, MMSTAR):
        paper = prompt_of("paper", question)
        assert paper.startswith(question.text)
        assert paper.endswith("must be only the single capital letter corresponding to the correct choice.")
    assert prompt_of("paper", MMVP).startswith("Is it open?\nA. Open\nB. Closed\nBase your answer on reasoning, but")


def test_prompts_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ConfigError, match="prompt is paper, which mme does not have: expected plain, llava, lmms"):
        prompt_of("paper", MME)
    with pytest.raises(DataError, match="question 7 has no prompt of AdaptVis: expected prompts=FILE"):
        prompt_of("paper", ONE)
