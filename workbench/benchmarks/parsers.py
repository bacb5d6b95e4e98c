"""Our own parsers (scorer `own`): what a generated answer says, or None where it does not say one thing.

An answer that cannot be parsed counts as wrong, and is counted apart.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from string import ascii_uppercase

_MARKUP = re.compile(r"[*_`\"']")  # of Markdown, and quotation marks
_WHOLE = re.compile(r"\(?\[?([A-Za-z])\]?\)?[.):]?")
_FIRST = re.compile(r"([A-Za-z])[.):](?!\w)")
_NAMED = re.compile(
    r"\b(?:[Aa]nswer|ANSWER|[Oo]ption|OPTION|[Cc]hoice|CHOICE)(?:\s+is|\s+IS)?\s*:?\s*[(\[]?([A-Z])(?![\w\u2019]|-\w|\.[A-Za-z]\b)"
)
_BRACKETED = re.compile(r"[(\[]\s*([A-Za-z])\s*[)\]]")
# another letter that is named in the same breath, as in "A or B", "A) or B)", "A/B" and "A, B"
_OR_ANOTHER = (
    r"[.)\]:]*(?:\s*(?:/|&|\b(?:or|and)\b(?:\s+(?:maybe|perhaps|possibly|probably)\b)?)\s*"
    r"|\s*,\s*(?=[(\[]?[A-Z]\b\W*(?:$|and\b|or\b)))"
    r"[(\[]?([A-Z](?!\w)|[a-z](?=[)\]]))"
)
_ONE_BEFORE = re.compile(r"(?<!\w)([A-Z])[.)\]:]*\s*(?:/|&|\bor\b|\band\b)\s*[(\[]?\s*$")  # as in "A or (b)"
# a letter that is ruled out, as in "not (A)", "isn't option B" and "C is wrong"; quotation marks are gone by then
_LETTER = r"(?:[(\[]([A-Za-z])[)\]]|([A-Z])(?!\w))"
_DENIED = re.compile(
    rf"\b(?i:(?:not|isn\u2019?t|neither|nor)\s+(?:the\s+)?(?:(?:answer|option|choice)\s+)?){_LETTER}"
    rf"|(?<!\w){_LETTER}\s+(?:is|was)(?:n\u2019?t|\s+(?:not|wrong|incorrect|false))\b"
)
_NOT_IN_A_WORD, _NOR_BEFORE_ONE = r"(?<!\w)(?<!\w['\u2019.-])", r"(?!['\u2019.-]?\w)"  # around a letter
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
    and answers with two letters ("Option A or B") name none, nor does a letter that is ruled out ("not A", "A is
    wrong") or the text of its option.

    Args:
        options: the texts of the options, in order.
        texts: whether to look for the texts of the options.
    """
    letters = ascii_uppercase[: len(options)]
    plain, denied = _without_denied(_MARKUP.sub("", answer), options)
    if _may_be_article(plain, options):
        return None
    matches = [match for match in (_WHOLE.fullmatch(plain), _FIRST.match(plain)) if match]
    matches += [*_NAMED.finditer(plain), *_BRACKETED.finditer(plain)]
    before = [other[1] for match in matches if (other := _ONE_BEFORE.search(plain[: match.start(1)]))]
    named = {letter.upper() for letter in (*(match[1] for match in matches), *before)} & set(letters)
    named |= {
        other.upper() for letter in named for other in re.findall(rf"\b[{letter}{letter.lower()}]{_OR_ANOTHER}", plain)
    } & set(letters)
    if named:
        return named.pop() if len(named) == 1 else None
    option = parse_option(answer, options) if texts else None
    letter = None if option is None else letters[list(options).index(option)]
    return None if letter in denied else letter


def _without_denied(answer: str, options: Sequence[str]) -> tuple[str, set[str]]:
    """Return an answer without the letters that it rules out, and these letters.

    A letter before the text of its own option is not ruled out: "(B) is not visible", where B is that text.
    """
    denied = set[str]()

    def without(match: re.Match[str]) -> str:
        group = match.lastindex or 0
        letter = match[group].upper()
        number, rest = ascii_uppercase.index(letter), re.sub(r"^\W+", "", answer[match.end(group) :]).lower()
        text = options[number].strip().lower() if number < len(options) else ""
        is_before = group > 2  # what rules it out
        if is_before and text and re.match(rf"{re.escape(text)}(?!\w)", rest):
            return match[0]
        denied.add(letter)
        return ""

    return _DENIED.sub(without, answer).strip(), denied


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
    also "red". Two options with the same text name none. A text that is one letter counts where it is a letter, not
    a word or a part of one (`_letter`).
    """
    rest, named = f" {' '.join(answer.split())} ", list[str]()
    for option in sorted(options, key=len, reverse=True):
        text = " ".join(option.lower().split())
        if not text:
            continue
        # of numbers, the whole: not 2 in 2.5 or in 1,200
        whole = rf"(?i)(?<!\w)(?<!\d[.,]){re.escape(text)}(?!\w)(?![.,]\d)"
        rest, count = re.subn(_letter(text) if re.fullmatch("[a-z]", text) else whole, " | ", rest)
        if count or any(text == " ".join(other.lower().split()) for other in named):
            named.append(option)
    return named[0] if len(named) == 1 else None


def _letter(letter: str) -> str:
    """Return a pattern of an option that is one letter, given as a small one.

    It stands alone, in any case: not in "T-shirt", "E.g." or "it's". A and I are words too. They do not count before
    another word (the capital: before one in lower case) unless that is and, or, is or because, or they come first
    before `.` or `:`, or before a bracket.
    """
    if letter not in "ai":
        return rf"(?i){_NOT_IN_A_WORD}{letter}{_NOR_BEFORE_ONE}"
    marked = rf"(?i:^\W*{letter}[.:]\s|(?<!\w){letter}(?=\s*[)\]]))"
    small, capital = (
        rf"{_NOT_IN_A_WORD}{form}{_NOR_BEFORE_ONE}(?!\s+(?!(?:and|or|is|because)\b){word})"
        for form, word in ((letter, r"\w"), (letter.upper(), "[a-z]"))
    )
    return rf"{marked}|{small}|{capital}"


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
