"""The page about a finished draw."""

from __future__ import annotations

import json
from pathlib import Path


def write_table(records: Path) -> None:
    """Write the Markdown page next to the JSON lines: counts, and every fault that no test caught."""
    rows = sorted((json.loads(line) for line in records.read_text().splitlines()), key=lambda record: record["number"])
    if not rows:
        return
    seed, commit = rows[0]["seed"], rows[0]["commit"]
    outcomes = ("caught", "survived", "timeout", "not runnable")
    text = ["# Planted faults", ""]
    text += [
        (
            f"`python -m benchmarks.planted_faults --seed {seed} --count {len(rows)}` on commit `{commit[:12]}`: one"
            f" fault in each of {len(rows)} drawn lines."
        ),
        "",
    ]
    text += [
        (
            "`timeout`: no test had failed when the time limit was reached; `not runnable`: a test failed, but it could"
            " not be shown to pass without the fault."
        ),
        "",
    ]
    text += ["| area | " + " | ".join(outcomes) + " |", "|---|" + "---|" * len(outcomes)]
    for area in [*dict.fromkeys(record["area"] for record in rows), "all"]:
        counts = [
            sum(record["outcome"] == outcome and area in (record["area"], "all") for record in rows)
            for outcome in outcomes
        ]
        text.append(f"| {area} | " + " | ".join(map(str, counts)) + " |")
    text += [
        "",
        "## Not caught",
        "",
        "| line | fault | before | after | outcome | does it change a number? |",
        "|---|---|---|---|---|---|",
    ]
    for record in rows:
        if record["outcome"] != "caught":
            before, after = (record[key].replace("|", "\\|") for key in ("before", "after"))
            where, verdict = f"{record['file']}:{record['line']}", record["verdict"] or "not yet judged"
            text.append(f"| `{where}` | {record['kind']} | `{before}` | `{after}` | {record['outcome']} | {verdict} |")
    text += ["", "## Caught", "", "| line | fault | after | first test that fails |", "|---|---|---|---|"]
    for record in rows:
        if record["outcome"] == "caught":
            after = record["after"].replace("|", "\\|")
            text.append(f"| `{record['file']}:{record['line']}` | {record['kind']} | `{after}` | `{record['by']}` |")
    records.with_suffix(".md").write_text("\n".join(text) + "\n")
