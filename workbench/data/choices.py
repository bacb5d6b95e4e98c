"""The options of a row, and its answer as the text of one of them.

Data sets write an answer as a text, as the index of an option (from 0) or as the letter of an option. An answer that
can be read in only one way is read in that way. If two readings give different options (`1`, where one option is the
text `1` and another has index 1), the row is refused until the spec has `answer=text`, `answer=index` or
`answer=letter`.
"""

from __future__ import annotations

import ast
import io
import json
import math
import re
import tokenize
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from string import ascii_uppercase
from typing import Any

from workbench.data.turns import MARK, check_characters, is_empty
from workbench.errors import DataError

READINGS = ("auto", "text", "index", "letter")
OPTION_KEYS = ("options", "choices")
LETTER_COLUMNS = ("A", "B", "C", "D", "E", "F", "G", "H", "I", "J")  # columns of options, as MMBench has them
LETTER = re.compile(r"\(([A-Za-z])\)\.?|([A-Z])[.:)]?")


@dataclass(frozen=True)
class Options:
    """The options of a question.

    Attributes:
        texts: the text of each option.
        letters: the letter of each option.
    """

    texts: tuple[str, ...] = ()
    letters: tuple[str, ...] = ()


def options_of(where: str, row: Mapping[str, Any]) -> Options:
    """Return the options of a row, in any of the common layouts.

    Under `options` or `choices` there may be a list, a text that spells a list, a mapping from letters to options, or a
    mapping with the lists `text` and `label`. Otherwise each option may be in a column named by its letter (A, B, ...).

    Args:
        where: the row, in messages.
        row: {column: value}.

    Raises:
        DataError: options in another layout, two different lists, or an option that is neither a text nor a number.
    """
    cells = {
        key: row[key] for key in OPTION_KEYS if not is_empty(row.get(key)) and str(row[key]).strip() not in ("", "[]")
    }
    read = {key: _options(f"{where}: its `{key}`", value) for key, value in cells.items()}
    if len(set(read.values())) > 1:
        raise DataError(f"{where} has {' and '.join(f'`{key}`' for key in read)} that differ: expected one of them")
    if read:
        return next(iter(read.values()))
    columns = [key for key in LETTER_COLUMNS if not is_empty(row.get(key))]
    if len(columns) > 1 and columns == list(LETTER_COLUMNS[: len(columns)]):
        return Options(tuple(plain_text(f"{where}: option {key}", row[key]) for key in columns), tuple(columns))
    return Options()


def answer_of(where: str, value: Any, options: Options, reading: str = "auto") -> str:
    """Return the answer of a row as a text; it is one of the options, if there are any.

    Args:
        where: the row, in messages.
        value: the answer's cell.
        options: the row's options.
        reading: one of READINGS.

    Raises:
        DataError: an answer that is empty, several, none of the options, or can be read in two ways.
    """
    if isinstance(value, str) and value.strip() not in options.texts:
        spelled = _list(value)
        # a list of numbers, such as [0.1, 0.2, 0.5, 0.6], is a box and stays a text
        if spelled and all(isinstance(item, str) for item in spelled):
            value = spelled
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        if len({json.dumps(one, default=str) for one in value}) > 1:
            raise DataError(f"{where} has {len(value)} answers, {str(list(value))[:60]}: expected one")
        value = value[0] if value else None
    if is_empty(value) or (isinstance(value, str) and not value.strip()):
        raise DataError(f"{where} has an empty answer: expected a text")
    text = plain_text(f"{where}: its answer", value)
    if not options.texts:
        if reading in ("index", "letter"):
            raise DataError(f"{where} has no options: expected some, since the spec has answer={reading}")
        return text
    readings = _readings(value, text, options, reading)
    if reading != "auto":
        readings = {name: option for name, option in readings.items() if name == reading}
    if not readings:
        expected = {
            "auto": "one of them, its index from 0 or its letter" + _named_reading(value, text, options),
            "index": "an index from 0",
            "letter": "a letter",
        }.get(reading, "one of them")
        raise DataError(
            f"{where} has the answer {text[:40]!r} to the options {_listed(options.texts)}: expected {expected}"
        )
    if len(set(readings.values())) > 1:
        meanings = " and ".join(f"{option[:30]!r} ({name})" for name, option in readings.items())
        raise DataError(
            f"{where}: its answer {text[:30]!r} can mean {meanings}: expected answer={' or answer='.join(readings)} in"
            " the spec of the data"
        )
    return next(iter(readings.values()))


def plain_text(what: str, value: Any) -> str:
    """Return a text, or a number as it is written: 3 is `3`, 1.5 is `1.5`.

    Args:
        what: the value, in messages.
        value: the value.

    Raises:
        DataError: a truth value, since its words are unknown; a number that is not finite; or any other type.
    """
    is_text_or_number = isinstance(value, str | int | float) and not isinstance(value, bool)
    if not is_text_or_number or (isinstance(value, float) and not math.isfinite(value)):
        raise DataError(f"{what} is {str(value)[:40]!r} ({type(value).__name__}): expected a text or a number")
    text = str(value).strip()
    check_characters(what, text)
    return text


def _named_reading(value: Any, text: str, options: Options) -> str:
    """Return how the spec must name the reading of an answer that is read in one way only if named; "" if in none."""
    ways = [name for name in ("index", "letter") if name in _readings(value, text, options, name)]
    return f"; answer={ways[0]} in the spec of the data reads it as the {ways[0]}" if ways else ""


def _readings(value: Any, text: str, options: Options, reading: str) -> dict[str, str]:
    """Return {reading: option} of each reading that the answer allows.

    Args:
        value: the answer's cell.
        text: the answer as a text.
        options: the row's options.
        reading: one of READINGS; with "index" an index may also be a text (as in CSV), with "letter" a small letter.
    """
    readings = {}
    if text in options.texts:
        readings["text"] = text
    if (isinstance(value, int) or (reading == "index" and text.isdecimal())) and 0 <= int(text) < len(options.texts):
        readings["index"] = options.texts[int(text)]
    # a label that is a number, as some rows of ARC have
    if not text.isalpha() and text in options.letters:
        readings["letter"] = options.texts[options.letters.index(text)]
    if isinstance(value, str) and (letter := LETTER.fullmatch(text.upper() if reading == "letter" else text)):
        name = (letter[1] or letter[2]).upper()
        if name in options.letters:
            readings["letter"] = options.texts[options.letters.index(name)]
    # the letter and the option, such as "B. left"
    elif isinstance(value, str) and "text" not in readings and (named := re.match(r"\(?([A-Z])[).:]\s*(.+)", text)):
        whole = dict(zip(options.letters, options.texts, strict=False)).get(named[1])
        if whole is not None and whole == named[2].strip():
            readings["letter"] = whole
    return readings


def _options(where: str, value: Any) -> Options:
    letters: tuple[str, ...] = ()
    if isinstance(value, str):
        if (read := _list(value)) is None:
            raise DataError(f"{where} is the text {value[:60]!r}: expected a list of texts, such as ['left', 'right']")
        value = read
    if isinstance(value, Mapping):
        by_key = {str(key): item for key, item in value.items() if item is not None}
        if (
            by_key.keys() == {"text", "label"}
            and all(isinstance(column, Sequence) for column in by_key.values())
            and len(by_key["text"]) == len(by_key["label"])
        ):
            value, letters = by_key["text"], tuple(str(label).upper() for label in by_key["label"])
        else:
            value, letters = list(by_key.values()), tuple(key.upper() for key in by_key)
            if letters != tuple(ascii_uppercase[: len(letters)]):
                raise DataError(f"{where} has the keys {', '.join(by_key)[:60]}: expected A, B, ..., or a list")
    if not isinstance(value, Sequence) or not value:
        raise DataError(f"{where} is {str(value)[:60]!r}: expected a list of texts")
    texts = tuple(plain_text(f"{where}, option {number}", one) for number, one in enumerate(value, start=1))
    if empty := next((number for number, text in enumerate(texts, start=1) if not text), None):
        raise DataError(f"{where} has an empty option {empty}: expected a text")
    if marked := next((text for text in texts if MARK.fullmatch(text)), None):
        raise DataError(f"{where} has the option {marked}, which stands for an image, a video or audio: expected texts")
    return Options(texts, letters or tuple(ascii_uppercase[: len(texts)]))


def _list(text: str) -> list[Any] | None:
    """Return the list that a text spells, in JSON or as Python or numpy prints it; None if it spells none.

    numpy puts no commas between texts, which Python would read as one text.
    """
    text = text.strip()
    if not text.startswith(("[", "(", "'", '"')):
        return None
    for read in (json.loads, _printed):
        try:
            value = read(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, tokenize.TokenError):
            continue
        if isinstance(value, list | tuple):
            return list(value)
    return None


def _printed(text: str) -> Any:
    """Return the value that Python or numpy printed as a text.

    Raises:
        SyntaxError, ValueError, TokenError: the text is no such value.
    """
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    texts = [token.string for token in tokens if token.type == tokenize.STRING]
    marks = [token.string for token in tokens if token.type == tokenize.OP]
    if len(texts) > 1 and marks == ["[", "]"]:
        return [ast.literal_eval(one) for one in texts]
    if any(a.type == b.type == tokenize.STRING for a, b in pairwise(t for t in tokens if t.type != tokenize.NL)):
        raise ValueError("two texts without a comma between them")
    return ast.literal_eval(text)


def _listed(texts: Sequence[str]) -> str:
    return ", ".join(text[:30] for text in texts[:5]) + (", ..." if len(texts) > 5 else "")
