"""Train several variants over several seeds, side by side, and compare them with paired intervals.

python -m trainer.sweep trainer/sweeps/shapes_seeds.yaml
python -m trainer.sweep trainer/sweeps/ablation_layer.yaml --seeds 0 1 2
python -m trainer.sweep trainer/sweeps/shapes_seeds.yaml --report      # the table of what is there, no training

A finished run is skipped and an interrupted one is resumed, so the command can be repeated until everything is there. A run that fails is named and the
others go on. SIGTERM and Ctrl-C stop the trainings. The result is `sweep-NAME.parquet` and `sweep-NAME.html` in the output folder, NAME being the file's.

Intervals are over seeds: Student's, for accuracies in the shape of Wilson's, which stays below 1. A difference is paired by seed; its p is that of all sign
flips, which with S seeds is at least 2 / 2^S, and p_holm is corrected for all variants of a question type.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pandas as pd

from trainer.config import Recipe
from trainer.output import RECIPE_FILE, check_same_recipe
from workbench.config import command, parse
from workbench.data import load_data
from workbench.errors import ConfigError, RunError, UnknownNameError, WorkbenchError
from workbench.files import atomic_file, make_folder
from workbench.stats import holm, sign_flip, t_interval
from workbench.training import MEAN, RECORD_FILE, evaluation_of, training_record


@dataclass(frozen=True)
class Job:
    """One training: its name in the table, and the words after `python -m trainer`."""

    name: str
    seed: int
    folder: Path
    arguments: list[str]

    def __str__(self) -> str:
        return self.folder.name

    @property
    def start(self) -> Path | None:
        """The folder that it starts from, if any."""
        return Path(self.arguments[self.arguments.index("--start") + 1]) if "--start" in self.arguments else None

    @property
    def finished(self) -> bool:
        return (self.folder / RECORD_FILE).exists()


@dataclass(frozen=True)
class Sweep:
    """Variants, and every point of a grid, x seeds."""

    output_dir: Path = Path("runs/sweep")
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    variants: tuple[str, ...] = ()
    """Each "name: RECIPE.yaml --section.key value ..."; {output_dir} and {seed} are filled in, and a run waits for its --start folder."""
    grid: tuple[str, ...] = ()
    """Each "section.key: value value ..."; every combination is a variant of `over`. A value such as 2,3,4 is a list."""
    over: str = ""
    """What the grid varies: "RECIPE.yaml --section.key value ..."."""
    first: str = ""
    """A run, written as in `variants`, that is trained once, in a folder of its name and with the first seed: a first stage that all share."""
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
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds are {', '.join(map(str, self.seeds)) or 'empty'}: expected one or more, none of them twice")
        if not self.suffix and len(self.seeds) > 1:
            raise ConfigError(f"{len(self.seeds)} seeds without a suffix would share their folders: expected one seed")
        for text in (*self.variants, *filter(None, [self.first])):
            if not re.match(r"[\w.+-]+:\s*\S", text):
                raise ConfigError(f"variant '{text}': expected 'name: RECIPE.yaml [--section.key value ...]'")
        for text in self.grid:
            if not re.match(r"[\w.]+:\s*\S", text) or text.startswith("seed:"):
                raise ConfigError(f"grid '{text}': expected 'section.key: value value ...', and seeds in `seeds`")
        if bool(self.grid) != bool(self.over):
            raise ConfigError(f"grid is {list(self.grid)} and over is '{self.over}': expected both or none, since a grid varies a recipe")
        names = [name for name, _ in self.named()]
        if self.against not in names:
            raise UnknownNameError("variant", self.against, names)
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"two variants are called '{twice[0]}': expected names that differ")

    def named(self) -> list[tuple[str, str]]:
        """The name and the words of every variant, those of the grid after those that are listed."""
        named = [(name, words) for name, words in (text.split(":", 1) for text in self.variants)]
        axes = [(key, values.split()) for key, values in (text.split(":", 1) for text in self.grid)]
        for point in product(*([(key, value) for value in values] for key, values in axes)) if axes else ():
            name = "_".join(f"{key.rpartition('.')[2]}-{re.sub(r'[^0-9A-Za-z.+-]+', '-', value.replace(',', '+'))}" for key, value in point)
            flags = " ".join(f"--{key} {shlex.join(value.split(','))}" for key, value in point)
            named.append((name, f"{self.over} {flags}"))
        return named

    def runs(self) -> Iterator[Job]:
        """Every run that is compared, variant by variant, so that a sweep cut short has whole variants."""
        for name, words in self.named():
            for seed in self.seeds:
                yield self._job(name, words, seed, self.output_dir / (f"{name}-s{seed}" if self.suffix else name))

    def jobs(self) -> list[Job]:
        """Every run that is trained."""
        name, _, words = self.first.partition(":")
        shared = [self._job(name, words, self.seeds[0], self.output_dir / name)] if self.first else []
        return [*shared, *self.runs()]

    def _job(self, name: str, words: str, seed: int, folder: Path) -> Job:
        try:
            words = words.format(output_dir=shlex.quote(str(self.output_dir)), seed=seed)
            given = [part for word in shlex.split(words) for part in (word.split("=", 1) if word.startswith("--start=") else [word])]
            return Job(name, seed, folder, [*given, "--seed", str(seed), "--output_dir", str(folder)])
        except (KeyError, IndexError, ValueError) as error:
            raise ConfigError(f"variant '{name}: {words.strip()}' cannot be read ({error}): expected {{output_dir}} and {{seed}} alone in braces") from None


# --- training ------------------------------------------------------------------------------------------------------------------------------


@dataclass
class Running:
    """A training that is under way, and the last lines that it said."""

    job: Job
    process: subprocess.Popen[str]
    said: deque[str]
    reader: Thread

    @classmethod
    def begin(cls, job: Job, threads: int) -> Running:
        resume = ["--resume"] if (job.folder / RECIPE_FILE).exists() else []
        words = [sys.executable, "-m", "trainer", *job.arguments, *resume]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
        said: deque[str] = deque(maxlen=20)
        reader = Thread(target=cls._relay, args=(process, said), daemon=True)
        reader.start()
        return cls(job, process, said, reader)

    @staticmethod
    def _relay(process: subprocess.Popen[str], said: deque[str]) -> None:
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line)
            sys.stderr.write(line)

    def why(self) -> str:
        """Why it ended: the sentence that it said last, or its exit code."""
        self.reader.join(timeout=5)
        last = next((line.strip() for line in reversed(self.said) if line.startswith("error: ")), "")
        return last.removeprefix("error: ") or f"exit code {self.process.returncode}"


def train_all(sweep: Sweep) -> dict[str, str]:
    """Run every training that is not finished, `processes` at a time, and return why some are not there: {run: reason}.

    Raises:
        KeyboardInterrupt, SystemExit: after SIGINT, or SIGTERM and SIGHUP, once the trainings have ended.
    """
    check(sweep)
    waiting = [job for job in sweep.jobs() if not job.finished]
    total, failed = len(waiting), {}
    cores = os.cpu_count() or 1  # shared alike whatever else is left to run, since other threads round otherwise; only `first` is always alone
    first = sweep.jobs()[0].folder if sweep.first else None
    running: list[Running] = []
    with _signals() as caught:
        try:
            while (running or any(map(_ready, waiting))) and not caught:
                while len(running) < sweep.processes and any(map(_ready, waiting)):
                    ready = [_ready(job) for job in waiting]
                    job = waiting.pop(ready.index(True))
                    running.append(Running.begin(job, threads=cores if job.folder == first else max(1, cores // sweep.processes)))
                for entry in [entry for entry in running if entry.process.poll() is not None]:
                    running.remove(entry)
                    if entry.process.returncode:
                        failed[str(entry.job)] = entry.why()
                    done = total - len(waiting) - len(running) - len(failed)
                    sys.stderr.write(f"sweep: {entry.job} {'failed' if str(entry.job) in failed else 'finished'}, {done} of {total} done\n")
                time.sleep(0.2)
        finally:
            _stop(running)
    if caught:
        raise KeyboardInterrupt if caught[0] == signal.SIGINT else SystemExit(128 + caught[0])
    return failed | {str(job): f"not started, since the run in {job.start} is not there" for job in waiting}


@contextmanager
def _signals() -> Iterator[list[int]]:
    """What asks the sweep to stop is only noted, so that no training begins unseen; a signal that is ignored (nohup) stays so."""
    caught: list[int] = []
    before: dict[int, Any] = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, lambda signum, _: caught.append(signum))
    try:
        yield caught
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _stop(running: list[Running]) -> None:
    """End the trainings and wait for them; one that does not listen is killed."""
    for entry in running:
        entry.process.terminate()
    for entry in running:
        try:
            entry.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            entry.process.kill()
            entry.process.wait()


def check(sweep: Sweep) -> None:
    """See that every recipe can be read, and that what is there was trained from the recipes of this sweep, so that no old run is compared with a new one."""
    if sweep.output_dir.exists() and not sweep.output_dir.is_dir():
        raise ConfigError(f"output_dir is {sweep.output_dir}, a file: expected a folder, or the name of a new one")
    folders = [job.folder for job in sweep.jobs()]
    if twice := next((folder for folder in folders if folders.count(folder) > 1), None):
        raise ConfigError(f"two runs of the sweep would be trained in {twice}: expected names that differ, that of `first` too")
    first = folders[0] if sweep.first else None
    for job in sweep.jobs():
        if not job.arguments or job.arguments[0].startswith("-"):
            raise ConfigError(f"variant '{job.name}': expected a recipe first, as in '{job.name}: RECIPE.yaml [--section.key value ...]'")
        try:
            recipe = replace(_recipe(*job.arguments[:-4]), seed=job.seed, output_dir=job.folder)
        except WorkbenchError as error:
            raise ConfigError(f"variant '{job.name}': {error}") from error
        if recipe.dry_run:
            raise ConfigError(f"variant '{job.name}' has --dry_run, which trains nothing: expected python -m trainer for that")
        if recipe.start is not None and recipe.start.suffix == ".yaml":
            raise ConfigError(f"variant '{job.name}' has the first stage {recipe.start}, which several runs would train at once: expected --start FOLDER there")
        if (job.folder / RECIPE_FILE).exists():
            check_same_recipe(job.folder, recipe)
        if recipe.model.released and not job.finished and job.folder != first and not _has_options(recipe.data.val, recipe.data.limit_val):
            raise ConfigError(f"variant '{job.name}' is validated on {recipe.data.val}, by the loss: {SCORED}")


@cache
def _has_options(spec: str, limit: int | None) -> bool:
    return any(sample.answer in sample.options for sample in load_data(spec, limit=limit, decode=False))


@cache
def _recipe(file: str, *words: str) -> Recipe:
    return parse(Recipe, words, prog="sweep", recipe=Path(file))


def _ready(job: Job) -> bool:
    """Whether the folder that a run starts from, if any, is finished."""
    return job.start is None or str(job.start) == "None" or (job.start / RECORD_FILE).exists()


# --- comparison ----------------------------------------------------------------------------------------------------------------------------


def accuracies(sweep: Sweep) -> pd.DataFrame:
    """Accuracy on the validation split of each finished run: columns variant, seed, category, accuracy, n, chance.

    Raises:
        RunError: nothing is finished, a run was evaluated by its loss, or two were not asked the same.
    """
    rows: list[pd.DataFrame] = []
    asked: dict[tuple[object, ...], Job] = {}
    alike: dict[tuple[str, str], tuple[Path, str]] = {}
    for job in sweep.runs():
        if job.finished:
            table = evaluation_of(job.folder)
            if "correct" not in table:
                raise RunError(f"{job.folder} was evaluated by its loss: {SCORED}")
            record = training_record(job.folder)
            asked.setdefault((record.get("val"), *table["id"], *table["category"]), job)
            for key, content in _contents(record, job.seed).items():
                before, known = alike.setdefault(key, (job.folder, content))
                if content != known:
                    raise RunError(f"{before} and {job.folder} name the same {key[0]}, whose content was {known} and {content}: expected the same in all runs")
            if len(asked) > 1:
                first, other = asked.values()
                raise RunError(f"{first.folder} and {other.folder} were asked other validation questions: expected the same data.val, limit_val and questions")
            types = table.groupby("category").agg(accuracy=("correct", "mean"), n=("correct", "size"), chance=("chance", "mean"))
            mean = pd.DataFrame({"accuracy": types["accuracy"].mean(), "n": len(table), "chance": types["chance"].mean()}, index=[MEAN])
            rows.append(pd.concat([types, mean]).rename_axis("category").reset_index().assign(variant=job.name, seed=job.seed))
    if not rows:
        raise RunError(f"no finished run in {sweep.output_dir}")
    return pd.concat(rows, ignore_index=True)[["variant", "seed", "category", "accuracy", "n", "chance"]]


def _contents(record: Mapping[str, Any], seed: int) -> dict[tuple[str, str], str]:
    """Fingerprints by what a run names: its training data, what it starts from, its VFMs and its pretrained parts."""
    recipe = record["recipe"]
    model = recipe.get("model", {})
    names = {"data": [recipe.get("data"), seed], "start": [recipe.get("start"), seed], "model": [model, seed], "vfm": record.get("vfm")}
    names |= {key: model.get(key) for key in ("tower", "language")} | {"processor": [recipe.get("data"), model]}
    names["vfm_settings"] = [record.get("vfm"), recipe.get("alignment", {}).get("teacher_norm")]
    prints = {"data": record.get("data")} | {key.removesuffix("_fingerprint"): value for key, value in record.items() if key.endswith("_fingerprint")}
    return {(key, json.dumps(names.get(key), sort_keys=True)): str(value) for key, value in prints.items() if value is not None}


def report(sweep: Sweep) -> pd.DataFrame:
    """Mean over seeds with its interval, and the paired difference to the variant `against` over the seeds both have, with Student's.

    Returns:
        Columns type, variant, accuracy, low, high, few (fewer than 5 wrong, or right, answers in all), min, seeds (which), n (questions of a run), chance,
        and against, pairs, difference, d_low, d_high, p, p_holm (over the variants of a type), NaN for the variant `against` itself and where no seed is
        shared. The interval of an accuracy has Student's width at Wilson's shape, which holds near 1 too; where all seeds answer equally many questions it
        is that of one seed's questions. One seed, and differences that are all equal, show no spread to judge by: their interval is infinite.
    """
    check(sweep)
    table = accuracies(sweep)
    if sweep.against not in set(table["variant"]):
        raise RunError(f"no run of '{sweep.against}' is finished: expected one, since differences are taken against it")
    rows = []
    for (category, variant), part in table.groupby(["category", "variant"], sort=False):
        own = t_interval(part["accuracy"].to_numpy(), bounds=(0, 1), trials=int(part["n"].mean()))
        low, high = (own.low, own.high) if own.n > 1 else (-np.inf, np.inf)
        row = {"type": category, "variant": variant, "accuracy": own.estimate, "low": low, "high": high, "few": own.few, "min": part["accuracy"].min()}
        row |= {"seeds": " ".join(map(str, part["seed"])), "n": int(part["n"].mean()), "chance": part["chance"].mean(), "against": sweep.against}
        both = table[(table["variant"] == sweep.against) & (table["category"] == category)].merge(part, on="seed", suffixes=("_a", "_b"))
        if variant != sweep.against and len(both):
            gain = (both["accuracy_b"] - both["accuracy_a"]).to_numpy()
            interval, p = t_interval(gain), sign_flip(gain[:, None])[0]
            low, high = (interval.low, interval.high) if np.ptp(gain) > SAME else (-np.inf, np.inf)
            row |= {"pairs": interval.n, "difference": interval.estimate, "d_low": low, "d_high": high, "p": p}
        rows.append(row)
    found = pd.DataFrame(rows).reindex(columns=COLUMNS).astype({"pairs": "Int64"})
    tested = found[found["p"].notna()]
    found["p_holm"] = tested.groupby("type", sort=False)["p"].transform(lambda p: holm(p.to_numpy()))
    return found


SAME = 1e-9  # accuracies are shares of at most some million questions: what differs by less is equal
SCORED = "expected validation questions with options, whose answers a sweep compares"
OF_A_VARIANT = ["type", "variant", "accuracy", "low", "high", "few", "min", "seeds", "n", "chance"]
COLUMNS = [*OF_A_VARIANT, "against", "pairs", "difference", "d_low", "d_high", "p", "p_holm"]


def write(sweep: Sweep, table: pd.DataFrame, name: str) -> Path:
    """Store the table as parquet, and with its figure as one HTML file that needs no network; return the latter."""
    from workbench.figures import sweep_points
    from workbench.report import figure_page

    folder = make_folder(sweep.output_dir)
    with atomic_file(folder / f"sweep-{name}.parquet") as partial:
        table.to_parquet(partial)
    seeds = [job.seed for job in sweep.runs() if job.finished]
    pairs = int(table["pairs"].max()) if table["pairs"].notna().any() else 0
    mean = table[table["type"] == MEAN]
    facts = {
        "what": f"accuracy on the validation split, mean of question types; n = {mean['n'].max()} questions a run; intervals are 95 %, over seeds "
        f"{', '.join(map(str, dict.fromkeys(seeds)))}",
        "chance": f"{mean['chance'].mean():.3f}",
        "differences": f"paired by seed, against {sweep.against}; the sign-flip p of {pairs} pairs is at least {2 / 2**pairs:.2g}, so read the intervals"
        if pairs
        else f"none: no seed is shared with {sweep.against}",
        **({"first stage": f"{sweep.first.split(':')[0]}, trained once: the seeds vary what comes after it"} if sweep.first else {}),
        "variants": "; ".join(f"{n}: {words.strip()}" for n, words in sweep.named()),
    }
    target = folder / f"sweep-{name}.html"
    figure_page(target, f"Sweep {name}", facts, sweep_points(mean), table)
    return target


def main(argv: list[str]) -> None:
    """Train what is missing, print and store the comparison; name the runs that failed."""
    prog = "python -m trainer.sweep SWEEP"
    if argv in (["--help"], ["-h"]):
        parse(Sweep, argv, prog=prog, description=__doc__ or "")
    if not argv or argv[0].startswith("-"):
        raise ConfigError("no sweep given: expected python -m trainer.sweep SWEEP.yaml")
    sweep = parse(Sweep, argv[1:], prog=prog, description=__doc__ or "", recipe=Path(argv[0]))
    failed = {} if sweep.report else train_all(sweep)
    try:
        table = report(sweep)
    except RunError as error:
        if failed:
            raise _failure(failed) from error
        raise
    target = write(sweep, table, Path(argv[0]).stem)
    sys.stdout.write(table.drop(columns="against").to_string(index=False, float_format="{:.3f}".format, na_rep="") + f"\n{target}\n")
    if failed:
        raise _failure(failed)


def _failure(failed: dict[str, str]) -> RunError:
    each = "; ".join(f"{name}: {why}" for name, why in failed.items())
    return RunError(f"{len(failed)} {'run is' if len(failed) == 1 else 'runs are'} missing ({each}); the same command tries them again")


if __name__ == "__main__":
    command(main)
