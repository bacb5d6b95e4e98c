"""The options of questions as tokens, and their log-probabilities after the prompt.

The log-probability of an option is the sum over all its tokens, each after the prompt and the option's tokens before
it. The first token alone would not do: in Llama's tokenizer all digits begin with the same one. Where the tokens of an
option begin another option of the question ("1" and "10"), the end of the answer counts as one more token of each of
its options; the longer one could never be the likelier one otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.data.base import Sample
from workbench.errors import DataError
from workbench.mllm.base import MLLM
from workbench.mllm.conversation import end_tokens
from workbench.mllm.texts import ModelTexts
from workbench.mllm.validate import not_finite

Tokens = tuple[int, ...]
END = -1  # stands for the end of an answer, whichever token the model ends it with


@dataclass(frozen=True)
class Continuation:
    """A prompt continued by the beginning of an option, so that one pass scores every option that begins so.

    Attributes:
        question: number of the question.
        tokens: what follows its prompt; () scores options of one token.
    """

    question: int
    tokens: Tokens


class Options:
    """The options of some questions, and what the model must read to score them.

    Args:
        mllm: the model.
        samples: the questions.

    Attributes:
        tokens: of each option of each question; END stands for the end of the answer.
        continuations: the prompts to run, in the order of the questions.

    Raises:
        DataError: two options of a question have the same tokens.
        ModelError: the end of an answer must be scored, but the model's tokenizer has no end token.
    """

    def __init__(self, mllm: MLLM, samples: Sequence[Sample]) -> None:
        self._mllm = mllm
        tokens_of = {options: _tokens(mllm, options) for options in {sample.options for sample in samples}}
        self.tokens = [tokens_of[sample.options] for sample in samples]
        self.continuations = [
            Continuation(number, tokens)
            for number, options in enumerate(self.tokens)
            for tokens in _beginnings(options)
        ]
        self._ends = mllm.processor.tokenizer.convert_tokens_to_ids(end_tokens(mllm)) if self._has_ends else []
        # (continuation, position in it, token, question, option) of every token that is scored
        self._scored = torch.tensor(list(self._scored_tokens()))

    @property
    def _has_ends(self) -> bool:
        return any(END in option for options in self.tokens for option in options)

    @property
    def lengths(self) -> Int[Tensor, "question option"]:
        """Number of scored tokens of each option, 0 where a question has fewer options."""
        counts = [torch.tensor([len(tokens) for tokens in options]) for options in self.tokens]
        return torch.nn.utils.rnn.pad_sequence(counts, batch_first=True)

    def empty(self) -> Float[Tensor, "question option"]:
        """Return sums of log-probabilities before the first token: 0, and -inf where a question has fewer options."""
        return torch.zeros(self.lengths.shape).masked_fill(self.lengths == 0, -torch.inf)

    def add(
        self, sums: Float[Tensor, "question option"], first: int, logits: Float[Tensor, "row position vocab"]
    ) -> None:
        """Add the log-probabilities of the tokens that some continuations score to `sums`, in place.

        Args:
            sums: as `empty` returns it.
            first: number of the first continuation.
            logits: at the last positions of each continuation; the last one is that of its last token.

        Raises:
            ModelError: a log-probability is not finite; the first option would seem to be the likeliest.
        """
        rows, positions, tokens, questions, options = self._scored[
            (self._scored[:, 0] >= first) & (self._scored[:, 0] < first + len(logits))
        ].T
        lengths = torch.tensor([len(c.tokens) for c in self.continuations[first : first + len(logits)]])
        at = rows - first, logits.shape[1] - 1 - lengths[rows - first] + positions
        logprobs = logits.float().log_softmax(-1)
        values = logprobs[(*at, tokens.clamp(min=0))]
        if len(self._ends):
            values = torch.where(tokens == END, logprobs[..., self._ends].logsumexp(-1)[at], values)
        if values.isnan().any():
            raise not_finite(self._mllm)
        sums.index_put_((questions, options), values.to(sums), accumulate=True)

    def _scored_tokens(self) -> Iterator[tuple[int, int, int, int, int]]:
        row_of = {(c.question, c.tokens): row for row, c in enumerate(self.continuations)}
        for question, options in enumerate(self.tokens):
            beginnings = _beginnings(options)
            for number, tokens in enumerate(options):
                beginning = next(b for b in beginnings if b[: len(tokens) - 1] == tokens[:-1])
                for position, token in enumerate(tokens):
                    yield row_of[question, beginning], position, token, question, number


def options_alike(model: ModelTexts, options: Sequence[str]) -> tuple[str, str] | None:
    """Return the first two options of a question that have the same tokens, so that no model can choose; else None."""
    first: dict[Tokens, str] = {}
    for option in options:
        tokens = tuple(model.answer_ids(option))
        if tokens in first:
            return first[tokens], option
        first[tokens] = option
    return None


def _tokens(mllm: MLLM, options: tuple[str, ...]) -> list[Tokens]:
    """Return the tokens of each option of a question, with the end of the answer where that is needed.

    Raises:
        DataError: two options have the same tokens.
    """
    if alike := options_alike(mllm, options):
        raise DataError(
            f"the options {' and '.join(alike)} of a question have the same tokens in {mllm.name}: expected options"
            " that the model can tell apart"
        )
    tokens = [tuple(mllm.answer_ids(option)) for option in options]
    if any(a != b and b[: len(a)] == a for a in tokens for b in tokens):
        return [(*option, END) for option in tokens]
    return tokens


def _beginnings(options: Sequence[Tokens]) -> list[Tokens]:
    """Return what must follow a prompt so that every token of its options is predicted.

    These are the options without their last token; one that begins another one is not needed.
    """
    all_but_last = list(dict.fromkeys(option[:-1] for option in options))
    return [b for b in all_but_last if not any(other != b and other[: len(b)] == b for other in all_but_last)]
