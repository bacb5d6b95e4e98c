"""The questions of a data set as they are put to a model: text and options in the words of a prompt."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from string import ascii_uppercase
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge

from workbench.analysis.declaration import DataOptions
from workbench.benchmarks.prompts import ONE_WORD, Asked, prompt_of
from workbench.benchmarks.scorers import scorers_of
from workbench.data import Dataset
from workbench.data.base import Sample
from workbench.data.benchmark_rows import BenchmarkDataset
from workbench.data.conversations import ConversationDataset
from workbench.errors import DataError, UnknownNameError
from workbench.mllm.texts import ModelTexts
from workbench.scoring.options import options_alike
from workbench.scoring.questions import questions_of

PUNCTUATION = ".,:;?!'\"()"
ALIKE = 10  # so many questions of a type do not have the same answer by chance
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptOptions(DataOptions):
    """How questions are worded."""

    ADDED: ClassVar[tuple[str, ...]] = ("prompt",)

    prompt: Literal["auto", "plain", "llava", "lmms", "paper"] = "auto"
    """Text around a question: none (plain), or that of LLaVA-1.5, lmms-eval or the paper's scripts. auto is llava for a
    benchmark and plain for any other data set, or if the model does not know the words that llava adds."""


@dataclass(frozen=True)
class QuestionOptions(PromptOptions):
    """Which questions are asked, and how they are worded."""

    types: tuple[str, ...] = ()
    """Question types to ask; all by default."""
    questions: Annotated[int, Ge(0)] = 1
    """Questions of each type about an image; 0 for all."""


@dataclass(frozen=True)
class Asking:
    """Questions with options, and the same ones in the words of a prompt.

    Attributes:
        benchmark: its name, "" if the data set is none.
        style: the prompt, one of `prompts.STYLES`.
        scenes: the questions as the data set has them, by image.
        texts: the benchmark's own text of each question, by id.
        left_out: sentences about what is not asked, and about words that the model does not know.
    """

    benchmark: str
    style: str
    scenes: list[list[Sample]]
    texts: Mapping[str, str]
    left_out: list[str] = field(default_factory=list)

    @property
    def record(self) -> dict[str, str]:
        """What the record of a run says about it."""
        return {"benchmark": self.benchmark, "prompt": self.style}

    @cached_property
    def worded(self) -> list[list[Sample]]:
        """The scenes with the prompt as the question, and options and answer as the prompt asks for them.

        These are letters where the prompt lists options by letter. Answers in a word begin with a capital letter after
        the prompt of LLaVA-1.5, as in its training data.
        """
        return [[self._worded(sample) for sample in scene] for scene in self.scenes]

    @cached_property
    def originals(self) -> dict[str, Sample]:
        """The questions as the data set has them, by id."""
        return {sample.id: sample for scene in self.scenes for sample in scene}

    def rotated(self) -> list[Asking]:
        """Return the questions once for each place that the right option can have: with their options rotated.

        The prompts list the options themselves, since a benchmark's own text has them in one order. A question with
        fewer options than others is not in the last ones.
        """
        most = max(len(sample.options) for sample in self.originals.values())
        every = []
        for by in range(most):
            scenes = [[_rotated(sample, by) for sample in scene if by < len(sample.options)] for scene in self.scenes]
            every.append(replace(self, scenes=[scene for scene in scenes if scene], texts={}))
        return every

    def check_scorer(self, name: str, *, besides: Sequence[str] = ()) -> None:
        """Check that the benchmark has a scorer.

        Args:
            name: the scorer.
            besides: names that the caller takes too.

        Raises:
            UnknownNameError: it has none of that name.
        """
        known = [*besides, *scorers_of(self.benchmark, self.scenes[0][0])]
        if name not in known:
            raise UnknownNameError("scorer", name, known)

    def is_right(self, question: str, answer: str, scorer: str) -> bool:
        """Return whether a scorer takes the generated answer to a question (its id) as right."""
        sample = self.originals[question]
        return scorers_of(self.benchmark, sample)[scorer](sample, answer).correct

    def _worded(self, sample: Sample) -> Sample:
        asked = Asked(self.benchmark, sample, self.texts.get(sample.id, ""))
        prompt, options = prompt_of(self.style, asked), sample.options
        if asked.lettered and self.style != "plain":
            options = tuple(ascii_uppercase[: len(sample.options)])
        elif prompt.endswith(ONE_WORD):
            options = tuple(option[:1].upper() + option[1:] for option in sample.options)
        return replace(sample, question=prompt, options=options, answer=options[sample.options.index(sample.answer)])


def _rotated(sample: Sample, by: int) -> Sample:
    return replace(sample, options=sample.options[by:] + sample.options[:by])


def ask(
    config: PromptOptions,
    model: ModelTexts,
    data: Dataset,
    *,
    types: Sequence[str] = (),
    each: int = 0,
    generated: bool = False,
) -> Asking:
    """Choose the questions to ask, and how.

    Where the options are to be scored, a question with two options that have the same tokens is left out.

    Args:
        config: the wording.
        model: who is asked.
        data: whose questions.
        types, each: which questions, as in `scoring.questions.questions_of`.
        generated: whether the model writes its answers, instead of scoring the options.

    Raises:
        ConfigError: the benchmark has no prompt of that style.
        DataError: no question has options and an answer, or the model cannot tell the options of any question apart.
        UnknownNameError: a type that no question with options has.
    """
    scenes = questions_of(data.scenes, types=types, each=each)
    benchmark = data.benchmark if isinstance(data, BenchmarkDataset) else ""
    texts = data.prompts if isinstance(data, BenchmarkDataset) else {}
    style = config.prompt if config.prompt != "auto" else "llava" if benchmark else "plain"
    asking, left_out = Asking(benchmark, style, scenes, texts), list[str]()
    if config.prompt == "auto" and benchmark:
        plain = replace(asking, style="plain")
        if added := _added_words(model, asking, plain):
            left_out.append(
                f"prompt llava has words that {model.name} does not know, such as {', '.join(added)[:100]}: the"
                " questions are asked plain"
            )
            asking = plain
    if not generated:
        asking, of_tokens = _told_apart(model, asking)
        left_out += of_tokens
    strange = _strange_words(model, asking)
    if isinstance(data, ConversationDataset) and (rest := len(data.conversations) - len(data)):
        left_out.append(f"{rest} of {len(data.conversations)} rows are not about one image: not asked")
    left_out += _one_sided(data, asking) if each else []
    if unscored := sum(sample.answer not in sample.options for sample in data):
        left_out.append(f"{unscored} of {len(data)} questions have no options with the answer among them: not asked")
    if strange:
        words = ", ".join(dict.fromkeys(word for of_question in strange for word in of_question))
        left_out.append(
            f"{len(strange)} of {len(asking.originals)} questions have words that {model.name} does not know, such as"
            f" {words[:100]}"
        )
    for sentence in left_out:
        log.warning("%s", sentence)
    return replace(asking, left_out=left_out)


def _one_sided(data: Dataset, asking: Asking) -> list[str]:
    """Return a sentence for each type whose first questions about the images all have one answer, and later ones not.

    POPE and MME ask about each image in turn what is answered yes and what is answered no.
    """
    asked: dict[str, list[str]] = {}
    every: dict[str, set[str]] = {}
    for sample in asking.originals.values():
        asked.setdefault(sample.category, []).append(sample.answer)
    for sample in data:
        if sample.answer in sample.options:
            every.setdefault(sample.category, set()).add(sample.answer)
    sentences = []
    for name, answers in asked.items():
        if len(answers) >= ALIKE and len(set(answers)) == 1 < len(every[name]):
            which = f"{len(answers)} questions" + (f" of type {name}" if name else "")
            sentences.append(
                f"all {which} that are asked have the answer {answers[0]}, others have not: --questions 0 asks all"
            )
    return sentences


def _told_apart(model: ModelTexts, asking: Asking) -> tuple[Asking, list[str]]:
    """Return the questions without those with two options of the same tokens, and a sentence about these if any."""
    every = {sample.options for scene in asking.worded for sample in scene}
    alike = {options: options_alike(model, options) for options in every}
    of = {sample.id: alike[sample.options] for scene in asking.worded for sample in scene}
    if not (some := next(filter(None, of.values()), None)):
        return asking, []
    count = f"{sum(map(bool, of.values()))} of {len(of)} questions"
    words = f"have two options with the same tokens in {model.name}, such as {some[0]!r} and {some[1]!r}"
    scenes = [[sample for sample in scene if of[sample.id] is None] for scene in asking.scenes]
    if not any(scenes):
        raise DataError(f"{count} {words}: expected options that the model can tell apart")
    return replace(asking, scenes=[scene for scene in scenes if scene]), [f"{count} {words}: not asked"]


def _added_words(model: ModelTexts, asking: Asking, plain: Asking) -> list[str]:
    """Return the words that a prompt adds to the plain questions and that the model does not know.

    Questions or options with unknown words have them in any prompt, so these do not count.
    """
    of_prompt, of_data = (
        {word.strip(PUNCTUATION): None for words in _strange_words(model, asked) for word in words}
        for asked in (asking, plain)
    )
    return [word for word in of_prompt if word not in of_data]


def _strange_words(model: ModelTexts, asking: Asking) -> list[list[str]]:
    """Return the words of each question that the tokenizer replaces by its token for unknown words, if any."""
    tokenizer = model.processor.tokenizer
    unknown = tokenizer.unk_token_id
    if unknown is None:
        return []
    known: dict[str, bool] = {}

    def is_known(word: str) -> bool:
        if word not in known:
            known[word] = unknown not in tokenizer(word, add_special_tokens=False)["input_ids"]
        return known[word]

    questions = [
        [word for word in f"{sample.question} {' '.join(sample.options)}".split() if not is_known(word)]
        for scene in asking.worded
        for sample in scene
    ]
    return [words for words in questions if words]
