"""Progress of a command: bars on stderr for people, and events for a program that started the command.

Such a program sets the variable VIRAL_EVENTS to a file. The command then appends one JSON line for each event:
{"event": "progress", "what": TEXT, "done": N, "total": N or null} whenever a bar is drawn, {"event": "run", "analysis":
NAME, "key": KEY} for each stored run, and {"event": "error", "sentence": TEXT} if it ends with an error.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

EVENTS = "VIRAL_EVENTS"


def emit(event: str, **values: object) -> None:
    """Append an event to the file in $VIRAL_EVENTS, if that is set; a file that cannot be written is no error."""
    if file := os.environ.get(EVENTS):
        with contextlib.suppress(OSError), Path(file).open("a") as opened:
            opened.write(json.dumps({"event": event} | values) + "\n")


def read_events(file: Path) -> list[dict[str, Any]]:
    """Return the events in a file, without a line that is not yet complete."""
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines]


class Bar(tqdm):  # type: ignore[type-arg]
    """A progress bar that is also an event whenever it is drawn."""

    def display(self, msg: str | None = None, pos: int | None = None) -> bool | None:
        """Draw the bar."""
        emit("progress", what=self.desc.removesuffix(": "), done=self.n, total=self.total)
        drawn: bool | None = super().display(msg, pos)
        return drawn


def progress_bar(
    what: str,
    items: Iterable[Any] | None = None,
    *,
    total: int | None = None,
    unit: str = "it",
    leave: bool = True,
    disable: bool = False,
) -> Bar:
    """Return a bar that appears on stderr after two seconds: iterate over it, or call its `update`.

    Args:
        what: text before the bar.
        items: what to iterate over.
        total: number of steps; by default the length of `items`.
        leave: keep the bar on the screen when it is complete.
        disable: show nothing.
    """
    options: dict[str, Any] = {"total": total, "unit": unit, "leave": leave, "disable": disable}
    return Bar(items, desc=what, file=sys.stderr, mininterval=1, delay=2, **options)
