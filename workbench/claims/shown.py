"""How a stored ledger is shown to readers, on the dashboard's page and in the report."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pandas as pd

from workbench import runs
from workbench.claims.verdicts import VERDICTS, ours
from workbench.runs import Run

TITLE = "Claims ledger: the claims of the paper and of its rivals, judged by stored runs"
EXPLAINED = (
    "Every rule was written before the runs that it judges; a verdict is refused where the repository does not show"
    " this. Each training seed gives one number; the test is Student's t over the seeds, with Holm's correction over"
    " all rules. Intervals are 95 %, over seeds, and not corrected. Not shown does not mean that there is no effect."
    " All of this is about small models on synthetic data, not about the paper's 7B models."
)


def newest(root: Path) -> Run | None:
    """Return the ledger that was stored last in a runs folder; None if there is none.

    Raises:
        RunError: the stored ledger is damaged.
    """
    table = runs.index(root)
    folders = table.loc[table["analysis"] == "claims", "folder"]
    return runs.load(folders.iloc[0]) if len(folders) else None


def count_verdicts(table: pd.DataFrame) -> str:
    """Return how many claims have which verdict, in words."""
    counts = Counter(table["verdict"])
    return f"{len(table)} claims: {', '.join(f'{counts[name]} {name}' for name in VERDICTS if counts[name])}"


def display_table(table: pd.DataFrame) -> pd.DataFrame:
    """Return the columns that a reader needs with readable names, sorted by verdict."""
    order = table["verdict"].map({name: number for number, name in enumerate(VERDICTS)})
    table = table.assign(order=order).sort_values("order", kind="stable")
    headings = {
        "claim": "claim",
        "verdict": "verdict",
        "paper": "the paper",
        "p_holm": "p (Holm)",
        "reason": "why",
        "note": "note",
        "origin": "asked by",
        "id": "id",
    }
    numbers = [ours(row) for row in table.to_dict("records")]
    displayed = table[list(headings)].rename(columns=headings)
    displayed.insert(3, "here, 95 % over seeds", numbers)
    return displayed.reset_index(drop=True)
