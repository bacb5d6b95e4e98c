"""Gives a gray line of a chart its model's color while the pointer is on it."""

from __future__ import annotations

from typing import Any

import streamlit as st

# `figures.named_curves` writes the color of each gray line into the `meta` of its trace
JS = """
const charts = new WeakSet();

function watch(chart) {
  if (charts.has(chart) || !chart.on) return;
  charts.add(chart);
  const lines = trace => chart.querySelectorAll(`.scatterlayer .trace${trace.uid} path.js-line`);
  chart.on('plotly_hover', ({ points: [point] }) => {
    const trace = point.fullData;
    if (!trace.meta?.color) return;
    for (const line of lines(trace)) {
      line.dataset.before = line.getAttribute('style');
      line.style.stroke = trace.meta.color;
      line.style.strokeWidth = '3px';
      line.style.strokeOpacity = 1;
    }
  });
  chart.on('plotly_unhover', ({ points: [point] }) => {
    for (const line of lines(point.fullData)) {
      if (line.dataset.before) line.setAttribute('style', line.dataset.before);
      delete line.dataset.before;
    }
  });
}

export default function() {
  const entered = ({ target }) => {
    const chart = target.closest?.('.js-plotly-plot');
    if (chart) watch(chart);
  };
  document.addEventListener('pointerover', entered, true);
  return () => document.removeEventListener('pointerover', entered, true);
}
"""


def color_pointed_lines() -> None:
    """Put the listener into the page; it draws nothing."""
    _component()(key="pointed", height="content")


@st.cache_resource(show_spinner=False)
def _component() -> Any:
    return st.components.v2.component("pointed", js=JS)
