"""A Markdown page made from the results file: what was measured on which card, when, and whether it passed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.harness import PARTS, number, read_results
from workbench.files import atomic_file

TITLE = "# On a GPU\n\nMade by `python -m benchmarks.gpu --report` from {file}; do not edit.\n"
NOT_RUN = "Not run yet.\n"
LIMITS = (40, 80)  # GB, the memory of common cards


def write_report(file: Path) -> Path:
    """Write the page next to `file`, with the same name, and return its path."""
    page = file.with_suffix(".md")
    page.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(page) as partial:
        partial.write_text(report(read_results(file), file.name), encoding="utf-8")
    return page


def report(entries: Sequence[Mapping[str, Any]], file: str) -> str:
    """Return the page, GPUs first, with the newest result of each measurement."""
    latest: dict[tuple[object, ...], Mapping[str, Any]] = {}
    for entry in entries:
        key = (entry["card"], entry["size"], entry["part"], entry["what"], entry["setting"])
        latest.pop(key, None)
        latest[key] = entry
    text = TITLE.format(file=file)
    places = sorted({(entry["device"] != "cuda", entry["card"], entry["size"]) for entry in latest.values()})
    if not any(device == "cuda" for device in (entry["device"] for entry in latest.values())):
        text += f"\n{NOT_RUN}"
    for cpu, card, size in places:
        here = [entry for entry in latest.values() if (entry["card"], entry["size"]) == (card, size)]
        text += f"\n## {card}, {size} size\n\n{_origin(here)}\n"
        for part in PARTS:
            rows = [entry for entry in here if entry["part"] == part.name]
            if rows or not cpu:
                text += f"\n### {part.name}: {part.title}\n\n{_table(rows) if rows else NOT_RUN}"
            if part.name == "memory" and not cpu:
                text += _largest_batches(rows)
    return text


def _origin(entries: Sequence[Mapping[str, Any]]) -> str:
    dates = sorted({entry["time"][:10] for entry in entries})
    versions = {name: value for entry in entries for name, value in entry["versions"].items()}
    driver = next((f", driver {entry['driver']}" for entry in entries if entry["driver"]), "")
    judged = [entry["passed"] for entry in entries if entry["passed"] is not None]
    origin = (
        f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}{driver};"
        f" {', '.join(f'{name} {value}' for name, value in versions.items())}."
    )
    return f"{origin} {sum(judged)} of {len(judged)} results with a tolerance or a goal are within it."


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| what | setting | figures | tolerance | passed |", "|---|---|---|---|---|"]
    for entry in rows:
        figures = ", ".join(f"{name} {number(value)}" for name, value in entry["figures"].items())
        tolerance = "" if entry["tolerance"] is None else number(entry["tolerance"])
        cells = (
            entry["what"],
            entry["setting"],
            figures,
            tolerance,
            {True: "yes", False: "**no**", None: ""}[entry["passed"]],
        )
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _largest_batches(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of the largest micro-batches below 40 and 80 GB, as measured and by the dry run's estimate."""
    peaks: dict[str, dict[int, Mapping[str, Any]]] = {}
    too_large = set()
    for entry in rows:
        base, _, rest = entry["setting"].partition(", batch ")
        batch, _, checkpointing = rest.partition(", ")
        if "GB" in entry["figures"]:
            peaks.setdefault(f"{base}, {checkpointing}", {})[int(batch)] = entry["figures"]
        if "out of memory" in entry["figures"]:
            too_large.add(f"{base}, {checkpointing}")
    columns = [(limit, name) for limit in LIMITS for name in ("GB", "dry run's GB")]
    titles = [f"below {limit} GB{'' if name == 'GB' else ', by the dry run'}" for limit, name in columns]
    lines = [f"| largest micro-batch | {' | '.join(titles)} |", f"|{'---|' * (1 + len(titles))}"]
    for setting, figures in peaks.items():
        cells = [_largest(figures, limit, name, more=setting not in too_large) for limit, name in columns]
        lines.append(f"| {setting} | {' | '.join(cells)} |")
    return "\n" + "\n".join(lines) + "\n" if peaks else ""


def _largest(figures: Mapping[int, Mapping[str, Any]], limit: int, name: str, *, more: bool) -> str:
    """Return the largest batch whose figure is below the limit, with "or more" if no larger one was tried."""
    known = {batch: values[name] for batch, values in figures.items() if name in values}
    fitting = [batch for batch, size in known.items() if size < limit]
    if not fitting:
        return "none" if known else ""
    return f"{max(fitting)}{' or more' if more and max(fitting) == max(known) else ''}"
