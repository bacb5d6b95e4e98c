"""How a benchmark's question is put to a model: the text around it changes some models by ten points and more.

`plain` is the question alone, for models that know nothing else; `llava` the prompts of LLaVA-1.5, `lmms` those of
lmms-eval, `paper` those of the VIRAL authors' scripts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from string import ascii_uppercase

from workbench.benchmarks.parsers import question_alone
from workbench.data.base import Sample
from workbench.errors import ConfigError, DataError

STYLES = ("plain", "llava", "lmms", "paper")
ONE_WORD = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
YES_OR_NO = " Please answer yes or no."  # ends MME's questions
PAPER_LETTER = (
    "\nBase your answer on reasoning. Your final answer must be only the single capital letter corresponding to the"
    " correct choice."
)
PAPER_MMVP = "\nBase your answer on reasoning, but answer with the option's letter from the given choices directly."
PAPER_RELATIONS = {
    "whatsup coco_one": "Answer with a single word from left, right, top, or bottom.\n",
    "whatsup coco_two": "Answer with a single word from left, right, above, or below.\n",
}


@dataclass(frozen=True)
class Asked:
    """A question of a benchmark.

    Attributes:
        benchmark: the name of its data set, such as "pope"; "" for a data set that is no benchmark.
        sample: the question.
        text: the benchmark's own text of it with its options, "" if it has none.
    """

    benchmark: str
    sample: Sample
    text: str = ""

    @property
    def lettered(self) -> bool:
        """Whether the answer is the letter of an option."""
        return self.benchmark in ("cv_bench", "mmstar", "mmvp")


def prompt_of(style: str, asked: Asked) -> str:
    """Return the text that is put to a model.

    Raises:
        ConfigError: others have no such prompt for this benchmark; the message names those that there are.
        DataError: the prompt needs a text that the data do not have.
    """
    if style == "plain":
        return asked.sample.question
    known = {"llava": LLAVA, "lmms": LMMS, "paper": PAPER}[style]
    make = known.get(asked.benchmark) or (_llava if style == "llava" else None)
    if make is None:
        others = [name for name, makers in (("lmms", LMMS), ("paper", PAPER)) if asked.benchmark in makers]
        raise ConfigError(
            f"prompt is {style}, which {asked.benchmark or 'a data set that is no benchmark'} does not have: expected"
            f" {', '.join(['plain', 'llava', *others])}"
        )
    return make(asked)


def with_letters(asked: Asked) -> str:
    """Return the question with its options below it, each after its letter."""
    options = zip(ascii_uppercase, asked.sample.options, strict=False)
    return "\n".join([asked.sample.question, *(f"{letter}. {option}" for letter, option in options)])


def _own(asked: Asked) -> str:
    return asked.text or with_letters(asked)


def _llava(asked: Asked) -> str:
    if asked.lettered:
        return with_letters(asked) + LETTER
    return asked.sample.question.removesuffix(YES_OR_NO) + ONE_WORD


def _llava_relation(asked: Asked) -> str:
    *first, last = asked.sample.options
    return f"{asked.sample.question} Answer with {', '.join(first)} or {last}."


def _lmms_cv_bench(asked: Asked) -> str:
    letters = ", ".join(ascii_uppercase[: len(asked.sample.options)])
    note = f"Note: You only need to respond with {letters} without providing any additional information."
    return f"{note}\n\n{_own(asked)}"


def _paper_relation(asked: Asked) -> str:
    """Return AdaptVis's question up to its question mark, and the paper's suffix without a space between."""
    question = question_alone(asked.text)
    if not question:
        raise DataError(
            f"question {asked.sample.id} has no prompt of AdaptVis: expected prompts=FILE in the spec of the data"
        )
    return question + PAPER_RELATIONS[asked.benchmark]


RELATIONS = tuple(f"whatsup {name}" for name in ("a", "b", "coco_one", "coco_two", "vg_one", "vg_two"))
Makers = Mapping[str, Callable[[Asked], str]]
LLAVA: Makers = dict.fromkeys(RELATIONS, _llava_relation)
LMMS: Makers = {
    "cv_bench": _lmms_cv_bench,
    "mme": lambda asked: asked.sample.question.replace(YES_OR_NO, "") + ONE_WORD,
    "mmstar": lambda asked: _own(asked) + LETTER,
    "mmvp": lambda asked: with_letters(asked) + LETTER,
    "pope": lambda asked: asked.sample.question + ONE_WORD,
}
PAPER: Makers = {
    "cv_bench": lambda asked: _own(asked) + PAPER_LETTER,
    "mmstar": lambda asked: _own(asked) + PAPER_LETTER,
    "mmvp": lambda asked: with_letters(asked) + PAPER_MMVP,
    "pope": lambda asked: asked.sample.question + " Answer with only 'yes' or 'no'.",
    **dict.fromkeys(PAPER_RELATIONS, _paper_relation),
}
