"""A button that copies the address of the page, which has all that is chosen on it."""

from __future__ import annotations

from typing import Any

import streamlit as st

LABEL = "Copy link"
HTML = f"<button>{LABEL}</button>"
CSS = """
button {
  font: inherit; font-family: var(--st-font); color: var(--st-text-color); background: var(--st-background-color);
  border: 1px solid var(--st-border-color, #8886); border-radius: 0.5rem; padding: 0.4rem 0.75rem; min-height: 2.5rem;
  cursor: pointer; white-space: nowrap; font-size: 0.875rem;
}
button:hover, button:focus-visible { border-color: var(--st-primary-color); color: var(--st-primary-color); }
"""
JS = """
export default function({ parentElement }) {
  const button = parentElement.querySelector('button');
  const label = button.textContent;
  button.onclick = async () => {
    if (navigator.clipboard) {
      await navigator.clipboard.writeText(location.href);
      button.textContent = 'Copied';
      setTimeout(() => { button.textContent = label; }, 1500);
    } else prompt('The address of this page', location.href); // browsers copy for this machine and https alone
  };
}
"""


def copy_link() -> None:
    """Draw the button."""
    _component()(key="copy-link", width="content", height="content")


@st.cache_resource(show_spinner=False)
def _component() -> Any:
    return st.components.v2.component("copy_link", html=HTML, css=CSS, js=JS)
