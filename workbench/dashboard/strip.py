"""The images of a data set in a row, to choose one by looking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import streamlit as st

from workbench.dashboard.thumbnails import thumbnail
from workbench.data import Sample

BESIDE = 24  # images in the row at once
CSS = """
.strip { display: flex; gap: .35rem; overflow-x: auto; padding: 3px; align-items: center; scrollbar-width: thin; }
.strip button {
  flex: none; height: 62px; min-width: 32px; padding: 0; border: 2px solid transparent; border-radius: .35rem;
  background: var(--st-secondary-background-color); color: inherit; font: inherit; cursor: pointer; overflow: hidden;
}
.strip button.more { padding: 0 .5rem; font-size: .85rem; }
.strip img { height: 100%; display: block; }
.strip button[aria-pressed=true] { border-color: var(--st-primary-color); }
.strip button:focus-visible { outline: 2px solid var(--st-primary-color); }
"""
JS = """
export default function({ data, parentElement, setTriggerValue }) {
  parentElement.querySelector('.strip')?.remove();
  const strip = document.createElement('div');
  strip.className = 'strip';
  strip.setAttribute('role', 'group');
  strip.setAttribute('aria-label', 'Images of the data set');
  const button = (name, label, url) => {
    const made = document.createElement('button');
    made.type = 'button';
    made.title = name;
    made.setAttribute('aria-label', label);
    if (url) made.append(Object.assign(document.createElement('img'), { src: url, alt: '' }));
    else made.textContent = label;
    made.onclick = () => setTriggerValue('chosen', name);
    strip.append(made);
    return made;
  };
  if (data.before) button(data.before[0], data.before[1]).className = 'more';
  let shown = null;
  for (const [name, url] of data.images) {
    const made = button(name, url ? `image ${name}` : name, url);
    made.setAttribute('aria-pressed', String(name === data.chosen));
    if (name === data.chosen) shown = made;
  }
  if (data.after) button(data.after[0], data.after[1]).className = 'more';
  parentElement.append(strip);
  if (shown) strip.scrollLeft = shown.offsetLeft - strip.offsetLeft - (strip.clientWidth - shown.offsetWidth) / 2;
}
"""


def strip(spec: str, scenes: Mapping[str, Sequence[Sample]], chosen: str, key: str) -> None:
    """Draw the images around the chosen one; a click sets the widget `key` to the image's id.

    Args:
        spec: the data set.
        scenes: {image id: its questions}.
        chosen: id of the image that is shown.
        key: the widget that holds the chosen id.
    """
    names = list(scenes)
    start = names.index(chosen) // BESIDE * BESIDE
    beside = names[start : start + BESIDE]
    data: dict[str, Any] = {
        "chosen": chosen,
        "images": [[name, thumbnail(spec, scenes[name][0])] for name in beside],
    }
    if start:
        data["before"] = [names[start - 1], f"← {start} before"]
    if rest := len(names) - start - len(beside):
        data["after"] = [names[start + BESIDE], f"{rest} more →"]
    _component()(key="strip", data=data, on_chosen_change=partial(_choose, key))


def _choose(key: str) -> None:
    st.session_state[key] = st.session_state["strip"]["chosen"]


@st.cache_resource(show_spinner=False)
def _component() -> Any:
    return st.components.v2.component("image_strip", js=JS, css=CSS)
