"""Evidence: the form of a new run, a field for each option of an analysis; the address has what is not a default.

The option `--limit` is `o-limit` in the address, and so on; the words of an option are repeated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import streamlit as st

from workbench.dashboard.site import complain, write_address

NUMBERS = {"int": int, "float": float}
STEPS = {"int": 1, "float": None}
SWITCH = {"yes": True, "no": False}  # how the address has what is on or off
Field = Mapping[str, Any]


def flags_of(analysis: str, fields: Sequence[Field]) -> list[list[str]]:
    """Draw the form, and return the words that each of its fields adds to the command, none at its default."""
    gone = [key for key in st.query_params if key.startswith("o-") and key[2:] not in {f["name"] for f in fields}]
    for key in gone:
        if st.query_params.get_all(key) != st.session_state.get(f"{key}-address"):  # not of the analysis before
            complain(key, "", "the form without it", f"the option {key[2:]}, which {analysis} does not have")
        write_address(key, [], shown=False)
    return [
        _flag(column, field, f"new-{analysis}-{field['name']}")
        for column, field in zip(st.columns(3) * len(fields), fields, strict=False)
    ]


def _flag(column: Any, field: Field, key: str) -> list[str]:
    """Draw one field, and return the words that it adds to the command."""
    name, kind, low, high = (field[part] for part in ("name", "kind", "low", "high"))
    _restore(field, key)
    more = {"key": key, "help": field["help"]}
    if kind == "bool":
        value: Any = column.checkbox(name, **more)
    elif kind in NUMBERS:
        low, high = (None if end is None else NUMBERS[kind](end) for end in (low, high))
        value = column.number_input(name, low, high, step=STEPS[kind], **more)
    elif kind == "choice":
        value = column.selectbox(name, field["choices"], **more)
    elif field["choices"] and kind == "words":
        known = list(dict.fromkeys([*field["default"], *field["choices"], *st.session_state[key]]))
        value = column.multiselect(name, known, accept_new_options=True, **more)
    elif field["choices"]:
        known = list(dict.fromkeys(filter(None, [field["default"], *field["choices"], st.session_state[key]])))
        value = column.selectbox(name, known, index=None, accept_new_options=True, **more)
    else:
        value = column.text_input(name, **more)
    words = _words(field, value)
    write_address(f"o-{name}", words or [""], shown=words is not None)
    st.session_state[f"{key}-words"] = words
    if words is None:
        return []
    if kind == "bool":
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", *words]


def _restore(field: Field, key: str) -> None:
    """Set a field before it is drawn: to what a new address names, else to the user's choice, else to its default."""
    state, name = st.session_state, f"o-{field['name']}"
    named: list[str] = st.query_params.get_all(name)
    words: list[str] | None = named
    if not named or named == state.get(f"{name}-address"):
        if key in state:
            return
        words = state.get(f"{key}-words")  # Streamlit forgets widgets when the page changes
    state[key] = _default(field)
    if words:
        try:
            state[key] = _value(field, words)
        except ValueError:
            shown = " ".join(_words(field, state[key], always=True) or [])
            complain(name, "", shown, f"{field['name']} {' '.join(words)}, which does not fit")


def _default(field: Field) -> Any:
    """Return the default of a field as its widget has it."""
    default, kind = field["default"], field["kind"]
    if kind in NUMBERS:
        return NUMBERS[kind](default)
    if kind == "words":
        return list(default) if field["choices"] else " ".join(map(str, default))
    if kind in ("bool", "choice"):
        return default
    return (default or None) if field["choices"] else "" if default is None else str(default)


def _words(field: Field, value: Any, *, always: bool = False) -> list[str] | None:
    """Return the words of a widget's value; None for the default, unless the words are wanted `always`."""
    if value is None or (value == _default(field) and not always):
        return None
    if isinstance(value, bool):
        return [next(word for word, on in SWITCH.items() if on is value)]
    if isinstance(value, list):
        return value
    return str(value).split() if field["kind"] == "words" else [str(value)]  # a path may contain spaces


def _value(field: Field, words: Sequence[str]) -> Any:
    """Return the value of a widget from the words of the address.

    Raises:
        ValueError: they do not fit the option.
    """
    kind, (first, *others) = field["kind"], words
    if kind == "words":
        names = [word for word in words if word]
        return names if field["choices"] else " ".join(names)
    if others or first not in {"bool": SWITCH, "choice": field["choices"]}.get(kind, [first]):
        raise ValueError(first)
    if kind == "bool":
        return SWITCH[first]
    if kind in NUMBERS:
        value = NUMBERS[kind](first)
        low, high = field["low"], field["high"]
        if not (low is None or value >= low) or not (high is None or value <= high):
            raise ValueError(first)
        return value
    return first
