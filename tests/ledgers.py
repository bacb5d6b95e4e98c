"""Hand-made runs for the claims ledger: training folders and stored analyses whose numbers are known, and a repository
that has the rules."""

from __future__ import annotations

import copy
import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from workbench import runs
from workbench.claims.rules import FILE
from workbench.runs import Run

EARLY, LATE = "2026-11-26T04:00:00+00:00", "2026-11-26T05:00:00+00:00"
RECIPE: dict[str, Any] = {
    "seed": 0,
    "output_dir": "somewhere",
    "data": {"train": ["shapes:train"], "limit_train": 300, "test": "shapes:test"},
    "optim": {"steps": 100, "weight_decay": 0.05},
    "alignment": {"objective": "none", "layer": [3], "vfm": ["efficientnet-lite0"]},
}
SEEDS = (1, 2, 3, 4, 5, 6)
HEAD = """
seeds: [1, 2, 3, 4, 5, 6]
level: 0.05
measures: {answers: 1, stored: 1, slope: 1, share: 1, log_at: 1, steps_to: 1}
trainings:
  a:
    {folder: "a-s{seed}", sweep: abc.yaml, runs: runs/abc,
     recipe: {data.train: [shapes:train], alignment.objective: none}}
  b:
    {folder: "b-s{seed}", sweep: abc.yaml, runs: runs/abc, like: a, but: [alignment],
     recipe: {alignment.objective: cosine}}
  best: {folder: "a-s{seed}", checkpoint: best, sweep: abc.yaml, runs: runs/abc, like: a, but: []}
analyses:
  cknna: python -m analyses.cknna --model {models} --data shapes:test --limit 9 --output_dir {runs}
  patching: python -m analyses.patching --model {models} --source {source} --layers 3 --data shapes:test --limit 9
    --output_dir {runs}
claims:
"""


def ledger(*claims: str) -> str:
    """A ledger of some claims, each a mapping in YAML's braces."""
    return HEAD + "".join(f"  - {claim}\n" for claim in claims)


def answers(**right: int) -> pd.DataFrame:
    """100 answers to each question type, so many of them right; chance .25."""
    rows = [
        (f"{name}-{n}", f"image-{n % 10}", name, "yes", n < count, 0.25)
        for name, count in right.items()
        for n in range(100)
    ]
    return pd.DataFrame(rows, columns=["id", "image_id", "category", "answer", "correct", "chance"])


def commit(repository: Path, text: str | None) -> str:
    """Commit a ledger (None: no ledger) to a repository, which is made if it is not there; returns the commit."""
    file = repository / FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    (repository / "anything").write_text(str(text))
    if text is None:
        file.unlink(missing_ok=True)
    else:
        file.write_text(text)
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "-A"], [*who, "commit", "-q", "--allow-empty", "-m", "rules"]):
        subprocess.run(["git", *words], cwd=repository, check=True)
    return subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=repository, check=True, capture_output=True, text=True
    ).stdout.strip()


def train(
    folder: Path,
    evaluation: pd.DataFrame,
    *,
    git: str,
    best: pd.DataFrame | None = None,
    log: Mapping[int, float] | None = None,
    recipe: Mapping[str, Any] = {},
    **record: Any,
) -> Path:
    """A training folder; NAME-sSEED says its seed, a `recipe` of dotted keys what differs from RECIPE, `log` the
    validation scores by step."""
    folder.mkdir(parents=True, exist_ok=True)
    own = copy.deepcopy(RECIPE) | {"seed": int(folder.name.rpartition("-s")[2])}
    for key, value in recipe.items():
        section, _, name = key.rpartition(".")
        (own[section] if section else own)[name] = value
    facts = {
        "git": git,
        "dirty": False,
        "created": EARLY,
        "data": "fingerprint of 300",
        "val": "of val",
        "test": "of test",
    }
    (folder / "training.json").write_text(json.dumps({"recipe": own} | facts | record))
    evaluation.to_parquet(folder / "evaluation.parquet")
    if best is not None:
        (folder / "best").mkdir(exist_ok=True)
        best.to_parquet(folder / "best" / "evaluation.parquet")
    scores = {25: 0.2, 50: 0.4, 100: 0.6} if log is None else log
    rows = {
        "step": list(scores),
        "accuracy/mean": list(scores.values()),
        "accuracy_n/mean": 800,
        "accuracy_chance/mean": 0.25,
    }
    pd.DataFrame(rows).to_parquet(folder / "training.parquet")
    return folder


def pairs(root: Path, gains: Sequence[int], *, git: str, recipe: Mapping[str, Any] = {}, **more: Any) -> None:
    """Trainings a and b of every seed: a has .40 in both types and b so many hundredths more in each, both plus the
    seed's own hundredths."""
    for seed, gain in zip(SEEDS, gains, strict=False):
        train(root / f"a-s{seed}", answers(count=40 + seed, exist=40 + seed), git=git, recipe=recipe, **more)
        aligned = {**recipe, "alignment.objective": "cosine"}
        train(
            root / f"b-s{seed}",
            answers(count=40 + seed + gain, exist=40 + seed + gain),
            git=git,
            recipe=aligned,
            **more,
        )


def analyzed(
    root: Path, model: Path, scores: pd.DataFrame, *, name: str = "cknna", created: str = LATE, **more: Any
) -> Path:
    """A stored analysis of a model with one table, `scores`."""
    config = {"data": "shapes:test", "limit": 9, "seed": 0, "data_seed": 0} | more.pop("config", {})
    record = {
        "analysis": name,
        "version": 3,
        "label": model.name,
        "model": str(model),
        "data": "shapes:test",
        "data_fingerprint": "of test",
    }
    record |= {"config": config, "seconds": 1.0, "created": created} | more
    key = runs.run_key(name, 3, {**config, "created": created}, model.name, "of test")
    return runs.save(Run(key, record, {"scores": scores}), root)


def layers(values: Sequence[float]) -> pd.DataFrame:
    """A table of scores by layer, from layer 1."""
    return pd.DataFrame(
        {"layer": np.arange(1, len(values) + 1), "vfm": "dino", "score": values, "null_mean": 0.1, "n_images": 9}
    )
