"""What only an analysis itself knows: its figures, its summary and its options, asked of a process of its own."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from typing import Any

import pandas as pd
import streamlit as st

from workbench.errors import RunError, one_line
from workbench.figures.caption import Caption
from workbench.processes import environment, python

PATIENCE = 300.0  # seconds


def drawn(
    analysis: str, runs: Mapping[str, str], colors: Mapping[str, str], stamps: tuple[object, ...]
) -> tuple[dict[str, Any], dict[str, Caption], pd.DataFrame]:
    """Return the figures ({title: plotly's JSON}), their captions and the summary of stored runs.

    Args:
        runs: {label: folder}.
        colors: {label: color}.
        stamps: what changes when one of the runs is stored anew.

    Raises:
        RunError: they cannot be drawn.
    """
    content = _asked({"analysis": analysis, "runs": dict(runs), "colors": dict(colors)}, stamps)
    captions = {title: Caption(**parts) for title, parts in content["captions"].items()}
    return content["figures"], captions, pd.DataFrame(**content["summary"])


def options(analysis: str) -> list[dict[str, Any]]:
    """Return the options of an analysis (`workbench.analysis.drawn.options_of`)."""
    fields: list[dict[str, Any]] = _asked({"analysis": analysis})["options"]
    return fields


@st.cache_data(max_entries=24, show_spinner="Drawing; the first time takes some seconds")
def _asked(request: Mapping[str, Any], stamps: tuple[object, ...] = ()) -> dict[str, Any]:
    lines: list[str] = []
    try:
        done = subprocess.run(
            python(["-m", "workbench.analysis.drawn"]),
            input=json.dumps(request),
            capture_output=True,
            text=True,
            env=environment(),
            timeout=PATIENCE,
            check=False,
        )
        lines = done.stderr.strip().splitlines()
        content: dict[str, Any] = json.loads(done.stdout)
    except subprocess.TimeoutExpired as error:
        raise RunError(f"{request['analysis']} was not drawn within {PATIENCE:.0f} s") from error
    except (OSError, ValueError) as error:
        raise RunError(
            f"{request['analysis']} cannot be drawn: {one_line(lines[-1] if lines else str(error), 200)}"
        ) from error
    if "error" in content:
        raise RunError(content["error"])
    return content
