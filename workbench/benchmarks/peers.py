"""How others read answers: the rules of the benchmarks' own scripts, of lmms-eval, AdaptVis and the paper's authors.

They are here so that published numbers can be compared with ours; several have faults, which
docs/reference/benchmarks.md names. Each function takes what a model answered, and most return what the script makes of
it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

YES, NO, OTHER = "yes", "no", "other"


# --- yes or no ------------------------------------------------------------------------------------


def pope_official(answer: str) -> str:
    """POPE's own script: "no" if No, not or no is a word of the first sentence; anything else is a yes."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return NO if {"No", "not", "no"} & set(words) else YES


def pope_lmms(answer: str) -> str | None:
    """lmms-eval: the answer must be the word itself."""
    word = answer.lower().strip()
    return word if word in (YES, NO) else None


def pope_paper(answer: str) -> str | None:
    """The paper's script: the word yes anywhere, then the word no, then parts of words in the first sentence."""
    text = answer.lower()
    words = set(re.findall(r"\w+", text))
    if words & {YES, NO}:
        return YES if YES in words else NO
    sentence = text.split(".")[0]
    if any(part in sentence for part in (YES, "yeah", "correct", "right", "true", "indeed", "affirmative")):
        return YES
    return NO if any(part in sentence for part in (NO, "negative", "false")) else None


def mme_official(answer: str) -> str:
    """MME's own script: the word itself, else yes and then no within the first four characters."""
    return _within_four(answer.lower())


def mme_lmms(answer: str) -> str:
    """lmms-eval: as MME's own script, without surrounding space and full stops; a single y or n counts."""
    text = answer.lower().strip().replace(".", "")
    return {"y": YES, "n": NO}.get(text) or _within_four(text)


def _within_four(text: str) -> str:
    start = text[:4]
    return YES if YES in start else NO if NO in start else OTHER


# --- letters --------------------------------------------------------------------------------------


def cv_bench_lmms(answer: str) -> str:
    """lmms-eval: the first character, after brackets and space, if it is a letter at all."""
    start = answer.lstrip("( \t\n")[:1]
    return start.upper() if start.isascii() and start.isalpha() else ""


def cv_bench_paper(answer: str) -> str:
    """The paper's script compares the whole answer with the letter."""
    return answer.strip().upper()


def mmvp_lmms(answer: str) -> str:
    """lmms-eval: the first a or b at the start, after "answer is" or "option", or at the end of a word."""
    text = answer.strip()
    letter = r"\(?([ab])\)?"
    for pattern in (rf"{letter}\.?\s*$", rf"{letter}[.\s]"):
        if match := re.match(pattern, text, re.IGNORECASE):
            return match[1].upper()
    for pattern in (rf"answer\s+is\s+{letter}", rf"option\s+{letter}", rf"{letter}(?:\s|$)"):
        if match := re.search(pattern, text, re.IGNORECASE):
            return match[1].upper()
    return text[:1].upper() if text[:1].upper() in ("A", "B") else ""


def mmvp_paper(answer: str, options: Mapping[str, str]) -> str:
    """The paper's script: a or b as a word, then as a letter of the first sentence, then the options' texts.

    Args:
        options: {"a": text, "b": text}.

    Returns:
        "(a)", "(b)" or "unknown".
    """
    text = answer.lower()
    words = set(re.findall(r"\w+", text))
    for letters in (words, set(text.split(".")[0])):
        if len(letters & {"a", "b"}) == 1:
            return f"({(letters & {'a', 'b'}).pop()})"
    places = {letter: text.find(option.lower()) for letter, option in options.items()}
    named = {letter: place for letter, place in places.items() if place >= 0}
    if len(set(named.values())) == len(named) > 0:
        return f"({min(named, key=lambda letter: named[letter])})"
    for letter, phrases in {"a": ("first", "former", "a)", "a."), "b": ("second", "latter", "b)", "b.")}.items():
        if any(phrase in text for phrase in (*phrases, f"option {letter}", f"choice {letter}")):
            return f"({letter})"
    return "unknown"


def mmstar_official(answer: str, gold: str) -> bool:
    """MMStar's own script, which lmms-eval took over: whether the right letter is where it looks for one.

    That is the first character, or the one after "(", "option " or "the answer is ".
    """
    text = answer.lower().strip().replace("\n", " ")
    starts = [start for start in ("", "(", "option ", "the answer is ") if text.startswith(start)]
    return any(text[len(start) :].startswith(gold.lower()) for start in starts)


def mmstar_paper(answer: str) -> str | None:
    """The paper's script: the first of a, b, c, d, in this order, that is a word of the answer, the article too."""
    words = set(re.findall(r"\w+", answer.lower()))
    return next((letter.upper() for letter in "abcd" if letter in words), None)


# --- spatial relations ----------------------------------------------------------------------------


def whatsup_adaptvis(answer: str, gold: str) -> bool:
    """AdaptVis: whether the right word occurs anywhere in the answer, also as a part of another."""
    return gold.lower() in answer.lower()


def whatsup_paper(answer: str, gold: str) -> bool:
    """The paper's script: whether one occurs in the other, so that an empty answer is right."""
    return gold.lower() in answer.lower() or answer.lower() in gold.lower()
