"""The answer of a row and the options it is one of, as texts: data sets write the answer as a text, as a number of an
option or as its letter.

An answer that can be read in one way is read so. One that can be read in two that differ (`1`, where an option is the
text `1` and another one is number 1) is refused, until the spec says which is meant: `answer=text`, `answer=index`
(from 0) or `answer=letter`.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from workbench.data.turns import MARK, check_characters, is_empty
from workbench.errors import DataError

READINGS = ("auto", "text", "index", "letter")
OPTION_KEYS = ("options", "choices")
LETTERED = ("A", "B", "C", "D", "E", "F", "G", "H", "I", "J")  # columns of options, as MMBench has them
LETTER = re.compile(r"\(([A-Za-z])\)\.?|([A-Z])[.:)]?")


@dataclass(frozen=True)
class Options:
    """The options of a question.

    Attributes:
        texts: each option.
        letters: what each is called.
    """

    texts: tuple[str, ...] = ()
    letters: tuple[str, ...] = ()


def options_of(where: str, row: Mapping[str, Any]) -> Options:
    """The options of a row: under `options` or `choices`, a list, the text of a list, letters with their options, or
    `text` beside `label`; or under A, B, ...

    Raises:
        DataError: options that are none of these, two different lists, or an option that is no text or number.
    """
    given = {
        key: row[key] for key in OPTION_KEYS if not is_empty(row.get(key)) and str(row[key]).strip() not in ("", "[]")
    }
    read = {key: _options(f"{where}: its `{key}`", value) for key, value in given.items()}
    if len(set(read.values())) > 1:
        raise DataError(f"{where} has {' and '.join(f'`{key}`' for key in read)} that differ: expected one of them")
    if read:
        return next(iter(read.values()))
    columns = [key for key in LETTERED if not is_empty(row.get(key))]
    if len(columns) > 1 and columns == list(LETTERED[: len(columns)]):
        return Options(tuple(plain_text(f"{where}: option {key}", row[key]) for key in columns), tuple(columns))
    return Options()


def answer_of(where: str, value: Any, options: Options, reading: str = "auto") -> str:
    """The answer of a row as a text: one of its options, where it has any.

    Args:
        reading: one of READINGS.

    Raises:
        DataError: an answer that is empty, several, none of the options, or can be read in two ways.
    """
    if (
        isinstance(value, str)
        and value.strip() not in options.texts
        and (several := _list(value))
        and all(isinstance(one, str) for one in several)
    ):
        value = several  # not so [0.1, 0.2, 0.5, 0.6], which is how a box is written
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len({json.dumps(one, default=str) for one in value}) > 1:
            raise DataError(f"{where} has {len(value)} answers, {str(list(value))[:60]}: expected one")
        value = value[0] if value else None
    if is_empty(value) or (isinstance(value, str) and not value.strip()):
        raise DataError(f"{where} has an empty answer: expected a text")
    text = plain_text(f"{where}: its answer", value)
    if not options.texts:
        if reading in ("index", "letter"):
            raise DataError(f"{where} has no options: expected some, since answer={reading} is said")
        return text
    readings = _readings(value, text, options, explicit=reading == "index")
    if reading != "auto":
        readings = {name: own for name, own in readings.items() if name == reading}
    if not readings:
        meant = {
            "auto": "one of them, its index from 0 or its letter",
            "index": "an index from 0",
            "letter": "a letter",
        }.get(reading, "one of them")
        raise DataError(
            f"{where} has the answer {text[:40]!r} to the options {_listed(options.texts)}: expected {meant}"
        )
    if len(set(readings.values())) > 1:
        said = " and ".join(f"{own[:30]!r} ({name})" for name, own in readings.items())
        raise DataError(
            f"{where}: its answer {text[:30]!r} can mean {said}: expected answer={' or answer='.join(readings)} in the"
            " spec of the data"
        )
    return next(iter(readings.values()))


def plain_text(what: str, value: Any) -> str:
    """A text, or a number as it is written: 3 is `3`, 1.5 is `1.5`.

    Raises:
        DataError: yes or no as a truth value, whose words are unknown; a number that is none; or anything else.
    """
    if (
        isinstance(value, bool)
        or not isinstance(value, str | int | float)
        or (isinstance(value, float) and not math.isfinite(value))
    ):
        raise DataError(f"{what} is {str(value)[:40]!r} ({type(value).__name__}): expected a text or a number")
    text = str(value).strip()
    check_characters(what, text)
    return text


def _readings(value: Any, text: str, options: Options, *, explicit: bool) -> dict[str, str]:
    """What an answer can mean, by way of reading.

    Args:
        explicit: an index may be a text too (of a CSV, say), since the spec says that it is one.
    """
    found = {}
    if text in options.texts:
        found["text"] = text
    if (isinstance(value, int) or (explicit and text.isdecimal())) and 0 <= int(text) < len(options.texts):
        found["index"] = options.texts[int(text)]
    if isinstance(value, str) and (letter := LETTER.fullmatch(text)):
        name = (letter[1] or letter[2]).upper()
        if name in options.letters:
            found["letter"] = options.texts[options.letters.index(name)]
    # the letter and the option
    elif isinstance(value, str) and "text" not in found and (named := re.match(r"\(?([A-Z])[).:]\s*(.+)", text)):
        whole = dict(zip(options.letters, options.texts, strict=False)).get(named[1])
        if whole is not None and whole == named[2].strip():
            found["letter"] = whole
    return found


def _options(where: str, value: Any) -> Options:
    letters: tuple[str, ...] = ()
    if isinstance(value, str):
        if (read := _list(value)) is None:
            raise DataError(f"{where} is the text {value[:60]!r}: expected a list of texts, such as ['left', 'right']")
        value = read
    if isinstance(value, Mapping):
        own = {str(key): one for key, one in value.items() if one is not None}
        if (
            own.keys() == {"text", "label"}
            and isinstance(own["text"], Sequence)
            and len(own["text"]) == len(own["label"])
        ):
            value, letters = own["text"], tuple(str(label).upper() for label in own["label"])
        else:
            value, letters = list(own.values()), tuple(key.upper() for key in own)
            if letters != tuple(ascii_uppercase[: len(letters)]):
                raise DataError(f"{where} has the keys {', '.join(own)[:60]}: expected A, B, ..., or a list")
    if not isinstance(value, Sequence) or not value:
        raise DataError(f"{where} is {str(value)[:60]!r}: expected a list of texts")
    texts = tuple(plain_text(f"{where}, option {number}", one) for number, one in enumerate(value, start=1))
    if empty := next((number for number, text in enumerate(texts, start=1) if not text), None):
        raise DataError(f"{where} has an empty option {empty}: expected a text")
    if marked := next((text for text in texts if MARK.fullmatch(text)), None):
        raise DataError(f"{where} has the option {marked}, which is no text: expected texts")
    return Options(texts, letters or tuple(ascii_uppercase[: len(texts)]))


def _list(text: str) -> list[Any] | None:
    """The list that a text spells, in JSON or as Python prints it; None where it spells none."""
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        if isinstance(value, list | tuple):
            return list(value)
    return None


def _listed(texts: Sequence[str]) -> str:
    return ", ".join(text[:30] for text in texts[:5]) + (", ..." if len(texts) > 5 else "")
