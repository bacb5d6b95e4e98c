"""Our own parsers (scorer `own`): what a generated answer says, or None where it does not say one thing.

An answer that cannot be parsed counts as wrong, and is counted apart.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from string import ascii_lowercase, ascii_uppercase

_MARKUP = re.compile(r"[*_`\"']")  # of Markdown, and quotation marks
_WHOLE = re.compile(r"\(?\[?([A-Za-z])\]?\)?[.):]?")
_FIRST = re.compile(r"([A-Za-z])[.):](?!\w)")
_NAMED = re.compile(r"\b(?:[Aa]nswer|ANSWER|[Oo]ption|OPTION|[Cc]hoice|CHOICE)(?:\s+is|\s+IS)?\s*:?\s*[(\[]?([A-Z])\b")
_BRACKETED = re.compile(r"[(\[]\s*([A-Za-z])\s*[)\]]")
# another letter that is named in the same breath, as in "A or B", "A) or B)", "A/B" and "A, B"
_OR_ANOTHER = (
    r"[.)\]:]*(?:\s*(?:/|&|\bor\b|\band\b)\s*|\s*,\s*(?=[(\[]?[A-Z]\b\W*(?:$|and\b|or\b)))"
    r"[(\[]?([A-Z](?!\w)|[a-z](?=[)\]]))"
)
# a letter that is ruled out, as in "not (A)" and "isn't option B"; quotation marks are gone by then
_DENIED = re.compile(
    r"\b(?i:(?:not|isnt|neither|nor)\s+(?:the\s+)?(?:(?:answer|option|choice)\s+)?)(?:[(\[][A-Za-z][)\]]|[A-Z](?!\w))"
)
_ARTICLE = re.compile(r"^an?\s+", re.IGNORECASE)
_FRONT = re.compile(r"\bin[\s-]+front\b")
_ON_THE_SIDE = re.compile(r"\bon\s+(?:(?:its|the)\s+)?(?=left|right)")
_ON_THE_END = re.compile(r"\bon\s+(?:its|the)\s+(?=top|bottom)")


def parse_word(answer: str) -> str | None:
    """Return "yes" or "no" if that is the first word of the answer."""
    words = re.findall(r"\w+(?:['\u2019]\w+)?", answer.lower())
    return words[0] if words and words[0] in ("yes", "no") else None


def parse_letter(answer: str, options: Sequence[str], *, texts: bool = True) -> str | None:
    """Return the capital letter of the option that the answer names, and names alone.

    It is a letter that is the whole answer; or comes first, before `.`, `)` or `:`; or is a capital after "answer",
    "option" or "choice" (is); or is the only letter in brackets. Without a letter, it is the option whose text occurs
    in the answer, as whole words; of texts that contain one another, the longest. The article "a", letters within words
    and answers with two letters ("Option A or B") name none, nor does a letter after "not".

    Args:
        options: the texts of the options, in order.
        texts: whether to look for the texts of the options.
    """
    letters = ascii_uppercase[: len(options)]
    plain = _DENIED.sub("", _MARKUP.sub("", answer)).strip()
    if _may_be_article(plain, options):
        return None
    matches = {match[1] for match in [_WHOLE.fullmatch(plain), _FIRST.match(plain)] if match}
    matches |= set(_NAMED.findall(plain)) | set(_BRACKETED.findall(plain))
    named = {letter.upper() for letter in matches} & set(letters)
    named |= {
        other.upper() for letter in named for other in re.findall(rf"\b[{letter}{letter.lower()}]{_OR_ANOTHER}", plain)
    } & set(letters)
    if named:
        return named.pop() if len(named) == 1 else None
    option = parse_option(answer, options) if texts else None
    return None if option is None else letters[list(options).index(option)]


def _may_be_article(answer: str, options: Sequence[str]) -> bool:
    """Return whether a capital A may be a letter or an article: "Answer: A dog", where A is a cat and B a dog."""
    for match in _NAMED.finditer(answer):
        rest = " ".join(answer[match.end(1) :].lower().split())
        if match[1] == "A" and answer[match.end(1) :][:1].isspace():
            things = [" ".join(_ARTICLE.sub("", option).lower().split()) for option in options]
            named = [number for number, thing in enumerate(things) if re.match(rf"{re.escape(thing)}(?!\w)", rest)]
            if named and 0 not in named:
                return True
    return False


def parse_option(answer: str, options: Sequence[str]) -> str | None:
    """Return the option whose text is the only one in the answer, as whole words and in any case.

    Texts are looked for from the longest to the shortest, and what matches is taken out, so that "dark red" is not
    also "red". Two options with the same text name none. A text that is one letter must be more than a word of the
    sentence (`_letter`).
    """
    rest, named = f" {' '.join(answer.split())} ", list[str]()
    for option in sorted(options, key=len, reverse=True):
        text = " ".join(option.lower().split())
        if not text:
            continue
        # of numbers, the whole: not 2 in 2.5 or in 1,200
        whole = rf"(?i)(?<!\w)(?<!\d[.,]){re.escape(text)}(?!\w)(?![.,]\d)"
        rest, count = re.subn(_letter(option.strip()) if text in tuple(ascii_lowercase) else whole, " | ", rest)
        if count or any(text == " ".join(other.lower().split()) for other in named):
            named.append(option)
    return named[0] if len(named) == 1 else None


def _letter(option: str) -> str:
    """Return a pattern of an option that is one letter.

    It stands alone, in any case: not in "T-shirt", "E.g." or "it's". Of A and I, which are words too, a small letter
    counts only where it is the whole answer, comes first before `.` or `:`, or closes with a bracket, or if the option
    is a small letter; before a lower-case word they are the article and the pronoun, unless that word is and, or, is or
    because.
    """
    anywhere = rf"(?i:^\W*{option}(?:\W*$|[.:]\s)|(?<!\w){option}(?=\s*[)\]]))"
    word = r"(?!\s+(?!(?:and|or|is|because)\b)[a-z])" if option in "AaIi" else ""
    cases = option + option.upper() if option in "AaIi" else option.lower() + option.upper()
    return rf"{anywhere}|(?<!\w)(?<!\w['\u2019.-])[{cases}](?!['\u2019.-]?\w){word}"


def parse_relation(answer: str, options: Sequence[str]) -> str | None:
    """Return the spatial relation, one of the options, that the answer names alone.

    "On the left" is left, not on; "in-front" and "in front of" are front. "On the top" is on where top is no option.
    """
    plain = _ON_THE_SIDE.sub("", _FRONT.sub("front", answer.lower()))
    if "top" in options:
        plain = _ON_THE_END.sub("", plain)
    return parse_option(plain, options)


def question_alone(prompt: str) -> str:
    """Return the question of a prompt of AdaptVis, up to its question mark; "" if it has none."""
    question = re.search(r"(?:USER:\s*)?([^:]*?\?)", prompt)
    return question[1].strip() if question else ""
