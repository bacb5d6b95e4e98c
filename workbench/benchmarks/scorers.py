"""Scorers by benchmark: each says of an answer what it was read as, and whether that is right.

`own` is ours; `official` is that of the benchmark's authors, `lmms` that of lmms-eval, `adaptvis` that of AdaptVis, and
`paper` that of the VIRAL authors' scripts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_lowercase, ascii_uppercase

from workbench.benchmarks import peers
from workbench.benchmarks.parsers import parse_letter, parse_option, parse_relation, parse_word
from workbench.data.base import Sample

LETTERED = ("cv_bench", "mmstar", "mmvp")
YES_NO = ("yes", "no")


@dataclass(frozen=True)
class Judged:
    """What an answer was read as, None if the scorer could not read it, and whether it is right."""

    parsed: str | None
    correct: bool


Scorer = Callable[[Sample, str], Judged]


def scorers_of(benchmark: str, sample: Sample) -> Mapping[str, Scorer]:
    """Return the scorers of a benchmark, ours first; for other data sets it depends on the options of a question."""
    if benchmark in LETTERED:
        ours: Scorer = _own_letter
    elif benchmark.startswith("whatsup"):
        ours = _read(lambda sample, answer: parse_relation(answer, sample.options))
    elif {option.lower() for option in sample.options} == set(YES_NO):
        ours = _read(lambda sample, answer: parse_word(answer))
    else:
        ours = _read(lambda sample, answer: parse_option(answer, sample.options))
    return {"own": ours, **PEERS.get(benchmark.split()[0] if benchmark else "", {})}


def by_likelihood(
    benchmark: str, sample: Sample, logprobs: Sequence[float], tokens: Sequence[int]
) -> dict[str, Judged]:
    """Return the likeliest option by the sum of the log-probabilities of its tokens, and by their mean.

    Args:
        benchmark: its name.
        sample: the question.
        logprobs: of each option, summed over its tokens.
        tokens: number of tokens of each option.
    """
    judged = {}
    for name, values in (("sum", logprobs), ("mean", [s / n for s, n in zip(logprobs, tokens, strict=True)])):
        number = max(range(len(values)), key=values.__getitem__)
        option = sample.options[number]
        parsed = ascii_uppercase[number] if benchmark in LETTERED else option.lower()
        judged[name] = Judged(parsed, option == sample.answer)
    return judged


def reads_letters(benchmark: str, scorer: str) -> bool:
    """Return whether a scorer says which letter an answer is read as, and not only whether the answer is right."""
    return benchmark in LETTERED and not isinstance(PEERS[benchmark].get(scorer), Against)


def letter_of(sample: Sample) -> str:
    """Return the letter of the right option, the first one if two have the same text."""
    return letters_of(sample)[0]


def letters_of(sample: Sample) -> str:
    """Return the letters of the right options: of all that have the text of the answer."""
    options = zip(ascii_uppercase, sample.options, strict=False)
    return "".join(letter for letter, option in options if option == sample.answer)


def _read(parse: Callable[[Sample, str], str | None]) -> Scorer:
    """Return a scorer that compares what an answer is read as with the right option, in any case."""

    def judge(sample: Sample, answer: str) -> Judged:
        parsed = parse(sample, answer)
        if parsed == peers.OTHER:
            parsed = None
        return Judged(parsed, parsed is not None and parsed.lower() == sample.answer.lower())

    return judge


def _letter(parse: Callable[[Sample, str], str | None]) -> Scorer:
    """Return a scorer that compares what an answer is read as with the letter of the right option (`letters_of`)."""

    def judge(sample: Sample, answer: str) -> Judged:
        parsed = parse(sample, answer)
        return Judged(parsed if parsed in tuple(ascii_uppercase) else None, parsed in tuple(letters_of(sample)))

    return judge


@dataclass(frozen=True)
class Against:
    """The scorer of a rule that only says whether an answer is right: (answer, right answer) -> bool."""

    judge: Callable[[str, str], bool]
    gold: Callable[[Sample], str]

    def __call__(self, sample: Sample, answer: str) -> Judged:
        """Return the right answer, or "another"."""
        right = self.judge(answer, self.gold(sample))
        return Judged(self.gold(sample) if right else "another", right)


def _own_letter(sample: Sample, answer: str) -> Judged:
    return _letter(lambda sample, answer: parse_letter(answer, sample.options))(sample, answer)


def _mmvp_paper(sample: Sample, answer: str) -> str:
    options = dict(zip(ascii_lowercase, sample.options, strict=False))
    return peers.mmvp_paper(answer, options).strip("()").upper()


def _mmstar_official(answer: str, letters: str) -> bool:
    return any(peers.mmstar_official(answer, letter) for letter in letters)


PEERS: Mapping[str, Mapping[str, Scorer]] = {
    "cv_bench": {
        "lmms": _letter(lambda _, answer: peers.cv_bench_lmms(answer)),
        "paper": _letter(lambda _, answer: peers.cv_bench_paper(answer)),
    },
    "mme": {
        "official": _read(lambda _, answer: peers.mme_official(answer)),
        "lmms": _read(lambda _, answer: peers.mme_lmms(answer)),
    },
    "mmstar": {
        "official": Against(_mmstar_official, letters_of),
        "paper": _letter(lambda _, answer: peers.mmstar_paper(answer)),
    },
    "mmvp": {"lmms": _letter(lambda _, answer: peers.mmvp_lmms(answer)), "paper": _letter(_mmvp_paper)},
    "pope": {
        "official": _read(lambda _, answer: peers.pope_official(answer)),
        "lmms": _read(lambda _, answer: peers.pope_lmms(answer)),
        "paper": _read(lambda _, answer: peers.pope_paper(answer)),
    },
    "whatsup": {
        "adaptvis": Against(peers.whatsup_adaptvis, lambda sample: sample.answer),
        "paper": Against(peers.whatsup_paper, lambda sample: sample.answer),
    },
}
