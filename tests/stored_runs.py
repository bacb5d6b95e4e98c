"""Folders as finished trainings leave them, with answers that a test chooses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

RECORD: dict[str, Any] = {
    "recipe": {
        "alignment": {"layer": 1, "vfm": "dinov2-small"},
        "optim": {"steps": 40},
        "output_dir": "/a/machine/out",
        "resume": True,
    },
    "seconds": 12.345,
    "git": "0123456789abcdef",
    "dirty": False,
    "packages": {"torch": "2"},
    "platform": "Linux",
    "created": "2026-11-26T00:00:00+00:00",
    "val": "v0",
}


def answers(right: int, prefix: str = "") -> pd.DataFrame:
    """So many of ten questions of both types are right."""
    rows = [
        {"id": f"{prefix}{kind}{i}", "category": kind, "correct": i < right, "chance": 0.5}
        for kind in ("a", "b")
        for i in range(10)
    ]
    return pd.DataFrame(rows)


def store_run(place: Path, right: int, *, best: int | None = None, **record: Any) -> None:
    """One finished run, with a best checkpoint of step 20 if `best` says how many it has right."""
    place.mkdir(parents=True)
    answers(right).to_parquet(place / "evaluation.parquet")
    log = pd.DataFrame(
        {"step": [20, 20, 40, 40], "lm_loss": [1.5, None, 0.25, None], "accuracy/mean": [None, 0.5, None, right / 10]}
    )
    log.assign(val_lm_loss=[None, 2.5, None, 1 / 3]).to_parquet(place / "training.parquet")
    if best is not None:
        (place / "best").mkdir()
        answers(best).to_parquet(place / "best" / "evaluation.parquet")
        (place / "best" / "best.json").write_text(json.dumps({"step": 20, "score": 0.5}))
    (place / "training.json").write_text(json.dumps(RECORD | record))


def store(folder: Path, right: Mapping[str, Sequence[int]], first_seed: int = 0) -> None:
    """Runs `{name}-s{seed}` that have so many right, a number for each seed."""
    for name, counts in right.items():
        for seed, count in enumerate(counts, start=first_seed):
            store_run(folder / f"{name}-s{seed}", count)
