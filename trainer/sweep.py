"""Train several variants over several seeds, side by side, and compare them with paired intervals.

    python -m trainer.sweep trainer/sweeps/shapes_seeds.yaml
    python -m trainer.sweep trainer/sweeps/shapes_seeds.yaml --report      # the table of what is there, no training

A finished run is skipped and an interrupted one is resumed, so the command can be repeated until everything is there.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from trainer.config import Recipe
from trainer.output import RECIPE_FILE, check_same_recipe
from workbench.config import command, parse
from workbench.errors import ConfigError, RunError, UnknownNameError
from workbench.stats import paired_test, t_interval
from workbench.training import RECORD_FILE


@dataclass(frozen=True)
class Sweep:
    """Variants x seeds."""

    output_dir: Path = Path("runs/sweep")
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    variants: tuple[str, ...] = ()
    """Each "name: RECIPE.yaml --section.key value ..."; {output_dir} and {seed} are filled in, and a run waits for its --start folder."""
    against: str = "baseline"
    """The variant that differences are taken against."""
    processes: int = 2
    """Trainings at a time; they share the cores."""
    suffix: bool = True
    """Name folders NAME-sSEED; without it NAME alone, for a single seed."""
    report: bool = False
    """Print the table of the finished runs and train nothing."""

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise ConfigError(f"processes is {self.processes}: expected at least 1")
        if not self.suffix and len(self.seeds) > 1:
            raise ConfigError(f"{len(self.seeds)} seeds without a suffix would share their folders: expected one seed")
        for text in self.variants:
            if ":" not in text:
                raise ConfigError(f"variant '{text}': expected 'name: RECIPE.yaml [--section.key value ...]'")

    def runs(self) -> Iterator[tuple[str, int, list[str]]]:
        """Name, seed and trainer arguments of every run, variant by variant, so that a sweep cut short has whole variants."""
        for text in self.variants:
            for seed in self.seeds:
                name, words = text.split(":", 1)
                words = words.format(output_dir=self.output_dir, seed=seed)
                yield name, seed, [*shlex.split(words), "--seed", str(seed), "--output_dir", str(self.folder(name, seed))]

    def folder(self, name: str, seed: int) -> Path:
        return self.output_dir / (f"{name}-s{seed}" if self.suffix else name)


def train_all(sweep: Sweep) -> None:
    """Run every training that is not finished, `processes` at a time; the first failure stops the sweep."""
    _check_finished(sweep)
    waiting = [arguments for name, seed, arguments in sweep.runs() if not (sweep.folder(name, seed) / RECORD_FILE).exists()]
    running: list[tuple[subprocess.Popen[bytes], list[str]]] = []
    try:
        while waiting or running:
            if not running and not any(map(_ready, waiting)):
                raise RunError(f"no run can start: {shlex.join(waiting[0])} waits for a --start folder that no variant trains")
            while len(running) < sweep.processes and any(map(_ready, waiting)):
                ready = [_ready(w) for w in waiting]
                threads = max(1, (os.cpu_count() or 1) // min(sweep.processes, len(running) + sum(ready)))
                arguments = waiting.pop(ready.index(True))
                environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
                resume = ["--resume"] if (Path(arguments[-1]) / RECIPE_FILE).exists() else []
                running.append(
                    (subprocess.Popen([sys.executable, "-m", "trainer", *arguments, *resume], env=environment, stdout=subprocess.DEVNULL), arguments)
                )
            for entry in [entry for entry in running if entry[0].poll() is not None]:
                running.remove(entry)
                if entry[0].returncode:
                    raise RunError(f"training failed: python -m trainer {shlex.join(entry[1])}")
            time.sleep(0.2)
    finally:
        for process, _ in running:
            process.terminate()


def _check_finished(sweep: Sweep) -> None:
    """See that the runs that are there were trained from the recipes of this sweep, so that no old one is compared with a new one."""
    for name, seed, arguments in sweep.runs():
        if (sweep.folder(name, seed) / RECIPE_FILE).exists():
            check_same_recipe(sweep.folder(name, seed), parse(Recipe, arguments[1:], prog="sweep", recipe=Path(arguments[0])))


def _ready(arguments: list[str]) -> bool:
    """Whether the folder that a run starts from, if any, is finished."""
    return "--start" not in arguments or (Path(arguments[arguments.index("--start") + 1]) / RECORD_FILE).exists()


def accuracies(sweep: Sweep) -> pd.DataFrame:
    """Accuracy on the validation split of each finished run: columns variant, seed, category, accuracy, n, chance."""
    rows = []
    for name, seed, _ in sweep.runs():
        path = sweep.folder(name, seed) / "evaluation.parquet"
        if path.exists():
            table = pd.read_parquet(path)
            for category, part in table.groupby("category"):
                rows.append((name, seed, category, part["correct"].mean(), len(part), part["chance"].mean()))
            rows.append(
                (name, seed, "mean of types", table.groupby("category")["correct"].mean().mean(), len(table), table.groupby("category")["chance"].mean().mean())
            )
    if not rows:
        raise RunError(f"no finished run in {sweep.output_dir}")
    return pd.DataFrame(rows, columns=["variant", "seed", "category", "accuracy", "n", "chance"])


def report(sweep: Sweep) -> pd.DataFrame:
    """Mean over seeds with Student's interval, and the paired difference to the variant `against` over the seeds both have."""
    _check_finished(sweep)
    table = accuracies(sweep)
    first = sweep.against
    if first not in set(table["variant"]):
        raise UnknownNameError("variant", first, set(table["variant"]))
    rows = []
    for (category, variant), part in table.groupby(["category", "variant"], sort=False):
        own = t_interval(part["accuracy"].to_numpy())
        row = {"type": category, "variant": variant, "accuracy": own.estimate, "low": own.low, "high": own.high, "min": part["accuracy"].min()}
        row |= {"seeds": own.n, "n": int(part["n"].mean()), "chance": part["chance"].mean()}
        base = table[(table["variant"] == first) & (table["category"] == category)]
        both = base.merge(part, on="seed", suffixes=("_a", "_b"))
        if variant != first and len(both):
            paired = paired_test(both["accuracy_a"].to_numpy(), both["accuracy_b"].to_numpy())
            row |= {"difference": paired.difference, "d_low": paired.low, "d_high": paired.high, "p": paired.p}
        rows.append(row)
    return pd.DataFrame(rows)


def main(argv: list[str]) -> None:
    """Train what is missing and print the comparison."""
    if not argv or argv[0].startswith("-"):
        raise ConfigError("no sweep given: expected python -m trainer.sweep SWEEP.yaml")
    sweep = parse(Sweep, argv[1:], prog="python -m trainer.sweep SWEEP", description=__doc__ or "", recipe=Path(argv[0]))
    if not sweep.report:
        train_all(sweep)
    sys.stdout.write(report(sweep).to_string(index=False, float_format="{:.3f}".format, na_rep="") + "\n")


if __name__ == "__main__":
    command(main)
