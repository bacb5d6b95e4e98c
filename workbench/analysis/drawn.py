"""Draw the figures of stored runs, or describe an analysis, in a process of its own, which may import torch.

    echo '{"analysis": "cknna", "runs": {"viral": "runs/cknna-0123456789ab"}}' | python -m workbench.analysis.drawn

The dashboard asks for what its pages cannot know without importing an analysis, and stays small and quick itself. The
answer is one JSON object; an error is its sentence under "error".
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from math import isinf
from pathlib import Path
from typing import Any, get_type_hints

from workbench import figures, runs
from workbench.analysis.discover import load_analysis
from workbench.analysis.exported import caption_of
from workbench.errors import WorkbenchError
from workbench.options import Range, ranges, texts
from workbench.vfm import CATALOGUE as VFMS


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was asked: figures and summary of `runs` ({label: folder}), else the options of the analysis.

    Args:
        request: analysis; for figures also runs, and colors ({model: color}).
    """
    analysis = load_analysis(request["analysis"])
    if "runs" not in request:
        return {"options": options_of(analysis.config)}
    loaded = {label: runs.load(Path(folder)) for label, folder in request["runs"].items()}
    with figures.colored(request.get("colors", {})):
        drawn = {title: json.loads(figure.to_json()) for title, figure in analysis.figures(loaded).items()}
    summary = analysis.summary(loaded)
    captions = {title: dataclasses.asdict(caption_of(title, figure, loaded)) for title, figure in drawn.items()}
    return {"figures": drawn, "captions": captions, "summary": json.loads(summary.to_json(orient="split", index=False))}


def options_of(config: type[Any]) -> list[dict[str, Any]]:
    """Return the fields of a Config: name, kind (bool, int, float, choice, words or text), default, help and limits.

    The choices of a field are all that it accepts if its kind is choice, else names that are known to work.
    """
    hints, allowed, helps = get_type_hints(config), ranges(config), texts(config)
    fields = []
    for field in dataclasses.fields(config):
        hint, limits = hints[field.name], allowed.get(field.name, Range())
        choices = [str(option) for option in getattr(hint, "__args__", ()) if isinstance(option, str)]
        is_tuple = getattr(hint, "__origin__", None) is tuple
        kind = (
            hint.__name__
            if hint in (bool, int, float)
            else "choice"
            if choices and not is_tuple
            else "words"
            if isinstance(field.default, tuple)
            else "text"
        )
        if field.name == "vfm" and not choices:
            choices = VFMS.names()
        low, high = (None if isinf(end) else end for end in (limits.low, limits.high))
        fields.append(
            {
                "name": field.name,
                "kind": kind,
                "default": list(field.default) if isinstance(field.default, tuple) else field.default,
                "help": helps.get(field.name),
                "low": low,
                "high": high,
                "choices": choices,
            }
        )
    return fields


def main() -> None:
    """Answer the request on stdin."""
    try:
        content = answer(json.loads(sys.stdin.read()))
    except WorkbenchError as error:
        content = {"error": str(error)}
    sys.stdout.write(json.dumps(content, default=str))


if __name__ == "__main__":
    main()
