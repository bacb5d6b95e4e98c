"""A stored ledger as people read it: on the page, in the report."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pandas as pd

from workbench import runs
from workbench.claims.verdicts import VERDICTS, ours
from workbench.runs import Run

TITLE = "Claims ledger: what the paper says, and what stored runs say of it"
EXPLAINED = (
    "A rule was written before the runs that it judges, and a verdict is refused where that is not seen. One number a"
    " training seed, Student's t over the seeds, Holm's correction over all rules; intervals are 95 %, over seeds, and"
    " not corrected. Not shown does not say that there is nothing, and all of this is about small models on synthetic"
    " data, not about the paper's 7B models."
)


def newest(root: Path) -> Run | None:
    """The ledger that was stored last below a runs folder, if there is one.

    Raises:
        RunError: it is damaged.
    """
    table = runs.index(root)
    folders = table.loc[table["analysis"] == "claims", "folder"]
    return runs.load(folders.iloc[0]) if len(folders) else None


def counted(table: pd.DataFrame) -> str:
    """How many claims have which verdict, in words."""
    counts = Counter(table["verdict"])
    return f"{len(table)} claims: {', '.join(f'{counts[name]} {name}' for name in VERDICTS if counts[name])}"


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """The columns that a reader needs, those with a verdict first."""
    order = table["verdict"].map({name: number for number, name in enumerate(VERDICTS)})
    table = table.assign(order=order).sort_values("order", kind="stable")
    words = {
        "claim": "claim",
        "verdict": "verdict",
        "paper": "the paper",
        "p_holm": "p (Holm)",
        "reason": "why",
        "note": "note",
        "origin": "asked by",
        "id": "id",
    }
    figures = [ours(row) for row in table.to_dict("records")]
    found = table[list(words)].rename(columns=words)
    found.insert(3, "here, 95 % over seeds", figures)
    return found.reset_index(drop=True)
