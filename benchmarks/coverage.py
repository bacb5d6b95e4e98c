"""Coverage and width of the 95 % intervals of workbench/intervals.py, compared with published ones in simulations.

python -m benchmarks.coverage            # every cell, 2000 draws each (about 10 minutes on one core)
python -m benchmarks.coverage --small    # a check that it works, in seconds
python -m benchmarks.coverage --output docs/results/coverage.md

A cell is one simulated situation. Answers about the same image are correlated: the image's chance of a right answer is
drawn from a beta distribution (beta-binomial; `rho` is the correlation of two answers about one image). With `uneven`,
images have 1 to 2 m - 1 questions, m on average. The other intervals are those of benchmarks/published.py; `ratio` is
our median width divided by that of the narrowest published interval that covers at least .93. `few` is the share of
draws in which our interval is marked as resting on too little (fewer than 10 images, or fewer than 5 wrong, right or
changed answers). The goal is a coverage of .93 to .97 and a ratio of at most 1.3 in cells where fewer than half of the
draws are so marked.
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
from workbench.intervals import FEW_EVENTS, FEW_UNITS, Kind, bounds_of, t_interval
from workbench.metrics import METRICS
from workbench.moments import Sums
from workbench.stats import half_splits, jackknife_ci, split_half_ci

DRAWS = 2000
GOAL, RATIO = (0.93, 0.97), 1.3
IMAGES, QUESTIONS, ACCURACIES = (5, 10, 20, 40, 100), (1, 5, 20), (0.5, 0.8, 0.9, 0.95, 0.98)


@dataclass(frozen=True)
class Cell:
    """A simulated situation.

    Attributes:
        family: the kind of quantity.
        named: the parameters of the situation, as columns of the table.
        truth: the true value.
        simulate: (random generator, number of draws) -> (our bounds, which are marked `few`, published intervals).
    """

    family: str
    named: dict[str, object]
    truth: float
    simulate: Callable[[np.random.Generator, int], tuple[Bounds, np.ndarray, dict[str, Bounds]]]


def chances(p: float, rho: float, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Draw the chance of each unit from a beta distribution with mean p; two answers of a unit have correlation rho."""
    return np.full(shape, p) if rho == 0 else rng.beta(p * (1 / rho - 1), (1 - p) * (1 / rho - 1), size=shape)


def ours(
    count: np.ndarray, total: np.ndarray, square: np.ndarray, size: np.ndarray, kind: Kind
) -> tuple[Bounds, np.ndarray]:
    """Return our interval of every draw and whether it is marked `few`, from arrays (stratum, draw, unit)."""
    m, bounds = bounds_of(
        Sums(*(np.moveaxis(array.astype(float), 1, 2) for array in (count, total, square, size))), kind
    )
    return bounds, (m.units < FEW_UNITS) | ((m.events < FEW_EVENTS) & (kind != "real"))


def sizes(images: int, questions: int, uneven: bool, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Return the number of questions of each image, (draw, image)."""
    return rng.integers(1, 2 * questions, size=(draws, images)) if uneven else np.full((draws, images), questions)


def accuracies() -> Iterator[Cell]:
    """Yield cells for the accuracy of questions that share images."""
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
    """Yield cells for the mean over four question types of unequal accuracy.

    Every image has one question of each type, and its answers are correlated across types.
    """
    for images, rho, p in product(IMAGES, (0.0, 0.3), (0.6, 0.8, 0.9, 0.95)):
        by_type = 1 - (1 - p) * np.array([0.2, 0.6, 1.2, 2.0])

        def simulate(rng: np.random.Generator, draws: int, images=images, rho=rho, by_type=by_type) -> tuple:  # type: ignore[no-untyped-def,type-arg]
            luck = chances(0.5, rho, (draws, images), rng)[None] if rho else 0.5
            right = (rng.random((4, draws, images)) < _tilted(by_type, luck, rng)).astype(float)
            count = np.ones_like(right)
            return *ours(count, right, right, right, "proportion"), published.means(
                right.mean(axis=0), rng, bounds=(0, 1)
            )

        yield Cell(
            "mean of types", {"images": images, "questions": 4, "rho": rho, "p": p}, float(by_type.mean()), simulate
        )


def _tilted(by_type: np.ndarray, luck: np.ndarray | float, rng: np.random.Generator) -> np.ndarray:
    """Return chances (type, draw, image) with mean `by_type`, higher for images with more luck (which has mean 1/2)."""
    room = np.minimum(by_type, 1 - by_type)[:, None, None]
    return by_type[:, None, None] + room * (2 * np.asarray(luck) - 1)


def drops() -> Iterator[Cell]:
    """Yield cells for the accuracy drop of an intervention: shares `lost` of answers become wrong, `gained` right."""
    changes = ((0.02, 0.0), (0.02, 0.01), (0.05, 0.01), (0.2, 0.05), (0.1, 0.1), (0.3, 0.1))
    for images, questions, rho, (lost, gained) in product(IMAGES, QUESTIONS, (0.0, 0.1, 0.3), changes):
        if questions == 1 and rho:
            continue

        def simulate(
            rng: np.random.Generator, draws: int, images=images, questions=questions, rho=rho, lost=lost, gained=gained
        ) -> tuple:  # type: ignore[no-untyped-def,type-arg]
            count = sizes(images, questions, False, draws, rng)
            changed = rng.binomial(count, chances(lost + gained, rho, count.shape, rng))
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
    """Yield cells for one real value per image, such as a similarity or an entropy.

    Lognormal values stand for the KL divergence of an intervention that matters for few images.
    """
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
    """Yield cells for the accuracy of a few seeds on the same questions; `rho` adds variance between seeds."""
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
    """Yield cells for CKNNA of pooled tokens of many images, with intervals from random halves.

    Both sides share planted features, which are correlated within an image, and have noise of their own.
    """
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

        # bounds minus the mean score over draws, which stands for the truth
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
    """Return a row: coverage and median width of our interval, and of the narrowest published one that covers."""
    (low, high), few, others = cell.simulate(rng, draws)
    row: dict[str, object] = {
        "family": cell.family,
        **cell.named,
        "few": float(few.mean()),
        **_covered(low, high, cell.truth),
    }
    published_rows = {name: _covered(*bounds, cell.truth) for name, bounds in others.items()}
    valid = {name: it for name, it in published_rows.items() if it["coverage"] >= GOAL[0] and it["width"] > 0}
    best = min(valid, key=lambda name: valid[name]["width"], default="none")
    row |= {"best": best, "best coverage": valid.get(best, {}).get("coverage", np.nan), "ratio": np.nan}
    if valid:
        row["ratio"] = float(row["width"]) / valid[best]["width"]  # type: ignore[arg-type]
    return row


def _covered(low: np.ndarray, high: np.ndarray, truth: float) -> dict[str, float]:
    slack = 1e-12
    return {
        "coverage": float(np.mean((low <= truth + slack) & (high >= truth - slack))),
        "width": float(np.median(high - low)),
    }


def flagged(table: pd.DataFrame) -> pd.Series:
    """Return how each row misses the goal: `low`; `high` and `wide` only if fewer than half of its draws are `few`."""
    enough = table["few"] < 0.5
    low = np.where(table["coverage"] < GOAL[0], "low ", "")
    high = np.where(enough & (table["coverage"] > GOAL[1]), "high ", "")
    wide = np.where(enough & (table["ratio"] > RATIO), "wide", "")
    words = ((low + high).astype(str) + wide).astype(str)
    return pd.Series(np.char.strip(words), index=table.index)


def report(table: pd.DataFrame) -> str:
    """Return a summary of the families and a table of the cells of each, as Markdown."""
    table = table.assign(flag=flagged(table))
    rows = []
    for family, part in table.groupby("family", sort=False):
        known = part[part["few"] < 0.5]
        inside = known["coverage"].between(*GOAL)
        rows.append(
            {
                "family": family,
                "cells": len(part),
                "with enough": len(known),
                ".93 to .97": int(inside.sum()),
                "below": int((known["coverage"] < GOAL[0]).sum()),
                "above": int((known["coverage"] > GOAL[1]).sum()),
                "lowest": part["coverage"].min(),
                "lowest with enough": known["coverage"].min(),
                "ratio <= 1.3": int((known["ratio"] <= RATIO).sum()),
                "median ratio": known["ratio"].median(),
                "largest ratio": known["ratio"].max(),
            }
        )
    text = [_markdown(pd.DataFrame(rows))]
    for family, part in table.groupby("family", sort=False):
        text.append(f"\n## {family}\n\n{_markdown(part.drop(columns='family').dropna(axis=1, how='all'))}")
    return "\n".join(text) + "\n"


def _markdown(table: pd.DataFrame) -> str:
    def shown(value: object) -> str:
        if value is None or value != value:  # NaN
            return ""
        return f"{value:.3f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(table.columns) + " |", "|" + "---|" * len(table.columns)]
    return "\n".join([*lines, *("| " + " | ".join(map(shown, row)) + " |" for row in table.itertuples(index=False))])


def main(argv: list[str]) -> None:
    """Simulate the cells, print the summary and the tables, and write them to the --output file."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.coverage", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="only a few cells of each family, with 200 draws")
    parser.add_argument("--output", type=Path, help="a Markdown file; its part after `<!-- table -->` is replaced")
    for name in FAMILIES:
        parser.add_argument(
            f"--{name.replace(' ', '_')}",
            action="append_const",
            dest="names",
            const=name,
            help=f"only the family {name!r} (can be combined with others)",
        )
    options = parser.parse_args(argv)
    small, names = options.small, options.names or list(FAMILIES)
    started, rows = time.perf_counter(), []
    for name in names:
        cells = list(FAMILIES[name]())
        for number, cell in enumerate(cells[:: max(1, len(cells) // 6)] if small else cells):
            rng = np.random.default_rng([list(FAMILIES).index(name), number])
            rows.append(measure(cell, 200 if small else DRAWS, rng))
    text = report(pd.DataFrame(rows))
    print(text)
    print(f"{len(rows)} cells in {time.perf_counter() - started:.0f} s")
    if (file := options.output) is not None:
        head = file.read_text().split("<!-- table -->")[0] if file.exists() else "# Coverage\n\n"
        file.write_text(f"{head}<!-- table -->\n\n{text}")


if __name__ == "__main__":
    main(sys.argv[1:])
