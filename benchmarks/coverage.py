"""What the 95 % intervals of workbench/intervals.py cover, and how wide they are beside those of the literature, in
simulated data sets.

python -m benchmarks.coverage            # every cell, 2000 draws each (about 10 minutes on one core)
python -m benchmarks.coverage --small    # seconds, to see that it works
python -m benchmarks.coverage --output docs/results/coverage.md

Answers of one image are alike: its chance of a right answer is drawn from a beta distribution (beta-binomial; `rho` is
the correlation of two answers of one image). With `uneven` images have 1 to 2 m - 1 questions. A cell's other intervals
are those of benchmarks/published.py; `ratio` is the median width over that of the narrowest published interval that
covers at least .93. `few` is the share of draws in which our interval says that there is too little to go by (fewer
than 10 images, or fewer than 5 wrong, right or changed answers). The goal is .93 to .97 and a ratio of at most 1.3
wherever that is rare.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from benchmarks import published
from benchmarks.published import Bounds
from workbench.intervals import FEW_EVENTS, FEW_UNITS, Kind, Sums, bounds_of, t_interval
from workbench.metrics import METRICS
from workbench.stats import half_splits, jackknife_ci, split_half_ci

DRAWS = 2000
GOAL, RATIO = (0.93, 0.97), 1.3
IMAGES, QUESTIONS, ACCURACIES = (5, 10, 20, 40, 100), (1, 5, 20), (0.5, 0.8, 0.9, 0.95, 0.98)


@dataclass(frozen=True)
class Cell:
    """A simulated situation: what it is, the true value, and draws of it as (ours, few, published intervals)."""

    family: str
    named: dict[str, object]
    truth: float
    simulate: Callable[[np.random.Generator, int], tuple[Bounds, np.ndarray, dict[str, Bounds]]]


def chances(p: float, rho: float, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Each unit's chance: beta with mean p, so that two answers of a unit are correlated by rho."""
    return np.full(shape, p) if rho == 0 else rng.beta(p * (1 / rho - 1), (1 - p) * (1 / rho - 1), size=shape)


def ours(
    count: np.ndarray, total: np.ndarray, square: np.ndarray, size: np.ndarray, kind: Kind
) -> tuple[Bounds, np.ndarray]:
    """Our interval of every draw from arrays (stratum, draw, unit), and whether it says that there is too little."""
    m, bounds = bounds_of(
        Sums(*(np.moveaxis(array.astype(float), 1, 2) for array in (count, total, square, size))), kind
    )
    return bounds, (m.units < FEW_UNITS) | ((m.events < FEW_EVENTS) & (kind != "real"))


def sizes(images: int, questions: int, uneven: bool, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Questions of each image, (draw, image)."""
    return rng.integers(1, 2 * questions, size=(draws, images)) if uneven else np.full((draws, images), questions)


def accuracies() -> Iterator[Cell]:
    """Accuracy of questions that share images."""
    for images, questions, rho, uneven, p in product(IMAGES, QUESTIONS, (0.0, 0.1, 0.3), (False, True), ACCURACIES):
        if questions == 1 and (rho or uneven):
            continue

        def simulate(
            rng: np.random.Generator, draws: int, images=images, questions=questions, rho=rho, uneven=uneven, p=p
        ) -> tuple:  # type: ignore[no-untyped-def,type-arg]
            count = sizes(images, questions, uneven, draws, rng)
            right = rng.binomial(count, chances(p, rho, count.shape, rng))
            return *ours(count[None], right[None], right[None], right[None], "proportion"), published.proportions(
                right, count, rng
            )

        yield Cell(
            "accuracy", {"images": images, "questions": questions, "rho": rho, "uneven": uneven, "p": p}, p, simulate
        )


def means_of_types() -> Iterator[Cell]:
    """Mean over four question types of unequal accuracy; every image has one question of each type, and its answers are
    alike across types."""
    for images, rho, p in product(IMAGES, (0.0, 0.3), (0.6, 0.8, 0.9, 0.95)):
        each = 1 - (1 - p) * np.array([0.2, 0.6, 1.2, 2.0])

        def simulate(rng: np.random.Generator, draws: int, images=images, rho=rho, each=each) -> tuple:  # type: ignore[no-untyped-def,type-arg]
            luck = chances(0.5, rho, (draws, images), rng)[None] if rho else 0.5
            right = (rng.random((4, draws, images)) < _tilted(each, luck, rng)).astype(float)
            count = np.ones_like(right)
            return *ours(count, right, right, right, "proportion"), published.means(
                right.mean(axis=0), rng, bounds=(0, 1)
            )

        yield Cell(
            "mean of types", {"images": images, "questions": 4, "rho": rho, "p": p}, float(each.mean()), simulate
        )


def _tilted(each: np.ndarray, luck: np.ndarray | float, rng: np.random.Generator) -> np.ndarray:
    """Chances of each type with mean `each`, better in images of more luck (of mean 1/2)."""
    room = np.minimum(each, 1 - each)[:, None, None]
    return each[:, None, None] + room * (2 * np.asarray(luck) - 1)


def drops() -> Iterator[Cell]:
    """Drop of accuracy by an intervention, paired by question: `lost` answers become wrong, `gained` ones right."""
    changes = ((0.02, 0.0), (0.02, 0.01), (0.05, 0.01), (0.2, 0.05), (0.1, 0.1), (0.3, 0.1))
    for images, questions, rho, (lost, gained) in product(IMAGES, QUESTIONS, (0.0, 0.1, 0.3), changes):
        if questions == 1 and rho:
            continue

        def simulate(
            rng: np.random.Generator, draws: int, images=images, questions=questions, rho=rho, lost=lost, gained=gained
        ) -> tuple:  # type: ignore[no-untyped-def,type-arg]
            count = sizes(images, questions, False, draws, rng)
            alike = chances(lost + gained, rho, count.shape, rng)
            changed = rng.binomial(count, alike)
            down = rng.binomial(changed, lost / (lost + gained))
            total = 2 * down - changed
            return *ours(count[None], total[None], changed[None], changed[None], "difference"), published.differences(
                down, changed - down, count, rng
            )

        yield Cell(
            "drop",
            {"images": images, "questions": questions, "rho": rho, "lost": lost, "gained": gained},
            lost - gained,
            simulate,
        )


def real_values() -> Iterator[Cell]:
    """One value for each image: a similarity, an entropy (lognormal: the KL of an intervention that matters for few
    images)."""
    kinds: dict[str, tuple[Callable[..., np.ndarray], float]] = {
        "normal": (lambda rng, shape: rng.normal(size=shape), 0.0),
        "beta(2,5)": (lambda rng, shape: rng.beta(2, 5, size=shape), 2 / 7),
        "exponential": (lambda rng, shape: rng.exponential(size=shape), 1.0),
        "lognormal": (lambda rng, shape: rng.lognormal(size=shape), float(np.exp(0.5))),
    }
    for images, (name, (draw, truth)) in product(IMAGES, kinds.items()):

        def simulate(rng: np.random.Generator, draws: int, images=images, draw=draw) -> tuple:  # type: ignore[no-untyped-def,type-arg]
            values = draw(rng, (draws, images))
            return *ours(
                np.ones_like(values)[None], values[None], values[None] ** 2, np.abs(values)[None], "real"
            ), published.means(values, rng)

        yield Cell("real", {"images": images, "values": name}, truth, simulate)


def seeds() -> Iterator[Cell]:
    """Accuracy of a few training seeds on the same questions; `rho` is the seeds' own spread beyond that of answers."""
    for n, trials, rho, p in product((3, 5, 10), (100, 400, 2000), (0.0, 0.005), (0.5, 0.9, 0.98, 0.995)):

        def simulate(rng: np.random.Generator, draws: int, n=n, trials=trials, rho=rho, p=p) -> tuple:  # type: ignore[no-untyped-def,type-arg]
            values = rng.binomial(trials, chances(p, rho, (draws, n), rng)) / trials
            each = [t_interval(row, bounds=(0, 1), trials=trials) for row in values]
            bounds = np.array([i.low for i in each]), np.array([i.high for i in each])
            return (
                bounds,
                ((1 - values).sum(axis=1) * trials < FEW_EVENTS),
                published.means(values, rng, bounds=(0, 1), resampled=False),
            )

        yield Cell("seeds", {"seeds": n, "trials": trials, "rho": rho, "p": p}, p, simulate)


def pooled_cknna() -> Iterator[Cell]:
    """CKNNA of tokens of many images: planted features that both sides share beside their own, alike within an image;
    intervals from random halves."""
    for images, tokens, k in ((40, 1, 5), (100, 1, 10), (40, 4, 10)):

        def simulate(rng: np.random.Generator, draws: int, images=images, tokens=tokens, k=k) -> tuple:  # type: ignore[no-untyped-def,type-arg]
            shared = rng.normal(size=(draws, images, 1, 12)) + rng.normal(size=(draws, images, tokens, 12))
            mixes = np.random.default_rng(1).normal(size=(2, 12, 24))  # the same in every draw
            sides = [shared @ mix + 2 * rng.normal(size=(draws, images, tokens, 24)) for mix in mixes]

            def score(chosen: np.ndarray) -> np.ndarray:
                metric = METRICS.get("cknna")
                parts = (torch.from_numpy(side[:, chosen].reshape(draws, -1, 24)).float() for side in sides)
                return np.asarray(
                    metric.score(*(metric.prepare(part, k, "tokens", number) for number, part in enumerate(parts)))
                )

            whole = score(np.arange(images))
            gaps = np.stack(
                [score((split == 1).nonzero()[0]) - score((split == 0).nonzero()[0]) for split in half_splits(images)]
            )
            halves = [split_half_ci(value, gap, images) for value, gap in zip(whole, gaps.T, strict=True)]
            left_out = np.stack([score((np.arange(images) % 10 != group).nonzero()[0]) for group in range(10)])
            jackknife = [jackknife_ci(value, parts, images) for value, parts in zip(whole, left_out.T, strict=True)]
            ours, theirs = (
                (np.array([i.low for i in each]) - whole.mean(), np.array([i.high for i in each]) - whole.mean())
                for each in (halves, jackknife)
            )
            return ours, np.zeros(draws), {"jackknife of 10 groups": theirs}

        # less the mean over draws, which stands for the truth
        yield Cell("pooled cknna", {"images": images, "tokens": tokens, "k": k}, 0.0, simulate)


FAMILIES = {
    "accuracy": accuracies,
    "mean of types": means_of_types,
    "drop": drops,
    "real": real_values,
    "seeds": seeds,
    "pooled cknna": pooled_cknna,
}


def measure(cell: Cell, draws: int, rng: np.random.Generator) -> dict[str, object]:
    """Coverage and median width of ours, and the narrowest published interval that covers."""
    (low, high), few, others = cell.simulate(rng, draws)
    row: dict[str, object] = {
        "family": cell.family,
        **cell.named,
        "few": float(few.mean()),
        **_covered(low, high, cell.truth),
    }
    holds = {
        name: own
        for name, bounds in others.items()
        if (own := _covered(*bounds, cell.truth))["coverage"] >= GOAL[0] and own["width"] > 0
    }
    best = min(holds, key=lambda name: holds[name]["width"], default="none")
    row |= {"best": best, "best coverage": holds.get(best, {}).get("coverage", np.nan), "ratio": np.nan}
    if holds:
        row["ratio"] = float(row["width"]) / holds[best]["width"]  # type: ignore[arg-type]
    return row


def _covered(low: np.ndarray, high: np.ndarray, truth: float) -> dict[str, float]:
    slack = 1e-12
    return {
        "coverage": float(np.mean((low <= truth + slack) & (high >= truth - slack))),
        "width": float(np.median(high - low)),
    }


def flagged(table: pd.DataFrame) -> pd.Series:
    """What misses the goal in words: `low` wherever coverage is below it; `high` and `wide` where too little is said in
    fewer than half of the draws."""
    enough = table["few"] < 0.5
    words = np.where(table["coverage"] < GOAL[0], "low ", "") + np.where(
        enough & (table["coverage"] > GOAL[1]), "high ", ""
    )
    return pd.Series(
        np.char.strip((words.astype(str) + np.where(enough & (table["ratio"] > RATIO), "wide", "")).astype(str)),
        index=table.index,
    )


def report(table: pd.DataFrame) -> str:
    """The summary of families and the cells of each, as markdown."""
    table = table.assign(flag=flagged(table))
    rows = []
    for family, part in table.groupby("family", sort=False):
        known = part[part["few"] < 0.5]
        inside = known["coverage"].between(*GOAL)
        rows.append(
            {
                **{"family": family, "cells": len(part), "with enough": len(known), ".93 to .97": int(inside.sum())},
                **{
                    "below": int((known["coverage"] < GOAL[0]).sum()),
                    "above": int((known["coverage"] > GOAL[1]).sum()),
                },
                **{
                    "lowest": part["coverage"].min(),
                    "lowest with enough": known["coverage"].min(),
                    "ratio <= 1.3": int((known["ratio"] <= RATIO).sum()),
                },
                **{"median ratio": known["ratio"].median(), "largest ratio": known["ratio"].max()},
            }
        )
    text = [_markdown(pd.DataFrame(rows))]
    for family, part in table.groupby("family", sort=False):
        text.append(f"\n## {family}\n\n{_markdown(part.drop(columns='family').dropna(axis=1, how='all'))}")
    return "\n".join(text) + "\n"


def _markdown(table: pd.DataFrame) -> str:
    def shown(value: object) -> str:
        return (
            ""
            if value is None or value != value
            else f"{value:.3f}".rstrip("0").rstrip(".")
            if isinstance(value, float)
            else str(value)
        )

    lines = ["| " + " | ".join(table.columns) + " |", "|" + "---|" * len(table.columns)]
    return "\n".join([*lines, *("| " + " | ".join(map(shown, row)) + " |" for row in table.itertuples(index=False))])


def main(argv: list[str]) -> None:
    """Simulate, print the summary and the table, and with --output store them."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.coverage", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="a few cells of each family with 200 draws")
    parser.add_argument("--output", type=Path, help="a Markdown file whose part after `<!-- table -->` is written anew")
    for name in FAMILIES:
        parser.add_argument(
            f"--{name.replace(' ', '_')}", action="append_const", dest="names", const=name, help=f"this family: {name}"
        )
    options = parser.parse_args(argv)
    small, names = options.small, options.names or list(FAMILIES)
    started, rows = time.perf_counter(), []
    for name in names:
        cells = list(FAMILIES[name]())
        for number, cell in enumerate(cells[:: max(1, len(cells) // 6)] if small else cells):
            rows.append(
                measure(cell, 200 if small else DRAWS, np.random.default_rng([list(FAMILIES).index(name), number]))
            )
    text = report(pd.DataFrame(rows))
    print(text)
    print(f"{len(rows)} cells in {time.perf_counter() - started:.0f} s")
    if (file := options.output) is not None:
        head = file.read_text().split("<!-- table -->")[0] if file.exists() else "# Coverage\n\n"
        file.write_text(f"{head}<!-- table -->\n\n{text}")


if __name__ == "__main__":
    main(sys.argv[1:])
