"""The words of the pages: one list, shown in a popover and as help of widgets and columns."""

from __future__ import annotations

from functools import cache
from importlib import resources

import streamlit as st


@cache
def glossary() -> dict[str, str]:
    """Return {word: what it means}."""
    import yaml

    text = (resources.files("workbench.dashboard") / "glossary.yaml").read_text(encoding="utf-8")
    words: dict[str, str] = yaml.safe_load(text)
    return words


def meaning(word: str) -> str:
    """Return what a word means, for `help=`."""
    return glossary()[word]


def glossary_popover() -> None:
    """Draw a button that opens the list of words."""
    with st.popover("What do the words mean?", width="stretch"):
        st.markdown("\n".join(f"**{word}**: {text}  " for word, text in glossary().items()))
