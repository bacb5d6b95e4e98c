"""Which lines get a fault: drawn from all areas of the product in equal shares."""

from __future__ import annotations

import random
from pathlib import Path

from benchmarks.planted_faults.faults import Fault, faults_in, is_valid

ROOT = Path(__file__).parents[2]
AREAS: dict[str, tuple[str, ...]] = {
    "capture": (
        "workbench/capture/*.py",
        "workbench/lens.py",
        "workbench/attention_heads.py",
        "workbench/spatial/*.py",
    ),
    "data": ("workbench/data/**/*.py", "workbench/benchmarks/*.py"),
    "models": ("workbench/mllm/**/*.py", "workbench/vfm/*.py", "workbench/weights/*.py"),
    "metrics": ("workbench/metrics/*.py",),
    "stats": ("workbench/stats.py", "workbench/paired.py", "workbench/intervals.py", "workbench/scoring/*.py"),
    "analyses": ("analyses/**/*.py",),
    "overview": ("workbench/overview/*.py", "workbench/figures/*.py", "workbench/claims/*.py"),
    "trainer": ("trainer/**/*.py",),
}
CHOSEN = {"arguments exchanged": 0.3}  # share that is used; most of them stop the program at once


def drawn(seed: int, count: int, areas: list[str]) -> list[tuple[str, Fault]]:
    """Draw `count` lines, in turn from each area, and one fault for each line.

    The draw is the same for the same commit, seed and areas.
    """
    rng, pools = random.Random(seed), {}
    for area in areas:
        files = sorted(
            file
            for pattern in AREAS[area]
            for file in ROOT.glob(pattern)
            if file.name not in ("__init__.py", "__main__.py")
        )
        lines: dict[tuple[str, int], list[Fault]] = {}
        for file in files:
            for fault in faults_in(file.read_text(), str(file.relative_to(ROOT))):
                lines.setdefault((fault.file, fault.line), []).append(fault)
        pools[area] = rng.sample(list(lines.values()), len(lines))
    chosen = []
    for number in range(count):
        area = areas[number % len(areas)]
        while True:
            fault = rng.choice(pools[area].pop(0))
            if rng.random() < CHOSEN.get(fault.kind, 1.0) and is_valid(fault, ROOT):
                break
        chosen.append((area, fault))
    return chosen
