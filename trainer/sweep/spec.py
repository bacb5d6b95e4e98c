"""The specification of a sweep: variants, grid and seeds, the jobs that they make, and checks before the first one."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Literal

from trainer.output.folder import check_same_recipe
from trainer.recipe import Recipe
from workbench.cli import parse
from workbench.data import load_data
from workbench.errors import ConfigError, UnknownNameError, WorkbenchError
from workbench.package_files import RECIPES
from workbench.training_folder import BEST, BEST_ROW, RECIPE_FILE, RECORD_FILE

SCORED = "expected questions with options, whose answers a sweep compares"

Point = tuple[tuple[str, str], ...]
"""One combination of a grid's values: pairs of a recipe key and its value, as written in the sweep."""


@dataclass(frozen=True)
class Setting:
    """A training without its seed.

    Attributes:
        variant: name of the variant.
        words: recipe and options.
        point: point of a grid over all variants; empty for a grid over one recipe.
        tag: point of either grid, as a part of a folder's name.
    """

    variant: str
    words: str
    point: Point = ()
    tag: str = ""

    @property
    def name(self) -> str:
        """Variant and point of the grid."""
        return f"{self.variant}{self.tag}" if self.point else self.variant


@dataclass(frozen=True)
class Job:
    """One training of a sweep.

    Attributes:
        setting: what is trained.
        seed: of the training.
        folder: its output folder.
        arguments: what follows `python -m trainer` on its command line.
    """

    setting: Setting
    seed: int
    folder: Path
    arguments: list[str]

    def __str__(self) -> str:
        return self.folder.name

    @property
    def name(self) -> str:
        """Name of the setting."""
        return self.setting.name

    @property
    def start(self) -> Path | None:
        """The folder of the training that this one starts from, if any: of --start, or a --model.name of this sweep.

        Where that is best/ or a checkpoint of a training of this sweep, it is that training's.
        """
        for option in ("--start", "--model.name"):
            if option in self.arguments:
                named = Path(self.arguments[self.arguments.index(option) + 1]).expanduser()
                training = named.parent if re.fullmatch(rf"{BEST}|checkpoint-\d+", named.name) else named
                if training.parent == self.folder.parent:
                    return training
                return named if option == "--start" and str(named) != "None" else None
        return None

    @property
    def finished(self) -> bool:
        """Whether the training is finished."""
        return (self.folder / RECORD_FILE).exists()

    def recipe(self) -> Recipe:
        """Return the recipe of the training.

        Raises:
            ConfigError: the recipe cannot be read.
        """
        try:
            return replace(_recipe(*self.arguments[:-4]), seed=self.seed, output_dir=self.folder)
        except WorkbenchError as error:
            raise ConfigError(f"variant '{self.name}': {error}") from error


@dataclass(frozen=True)
class Sweep:
    """A sweep: every variant at every point of a grid, with every seed."""

    output_dir: Path = Path("runs/sweep")
    """Folder of the runs and of the comparison."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds that every variant is trained with."""
    variants: tuple[str, ...] = ()
    """Variants, each as "NAME: RECIPE --section.key value ..."; {output_dir}, {seed} and {point} (of the grid, such as
    _limit_train-300) are filled in. A run whose --start or --model.name is the folder of another run, or its best or
    a checkpoint, waits until that one is finished."""
    grid: tuple[str, ...] = ()
    """Axes of a grid, each as "section.key: value value ..."; a value such as 2,3,4 is a list. Every combination is
    trained for every variant or, with `over`, is itself a variant of that recipe."""
    over: str = ""
    """A recipe that the grid varies, instead of all variants: "RECIPE --section.key value ..."."""
    first: str = ""
    """A run, written as in `variants`, that is trained once before the others, with the first seed, in a folder of its
    name: such as a stage 1 that all variants start from."""
    against: str = "baseline"
    """The variant that differences are taken against, at the same point of a grid over all variants."""
    processes: int = 2
    """Number of trainings at a time; they share the cores."""
    suffix: bool = True
    """Name folders NAME-sSEED; without it NAME alone, which is possible for a single seed."""
    best: tuple[str, ...] = ()
    """Variants whose checkpoint with the best validation score (early stopping) gets a row of its own, "NAME, best
    checkpoint". Their recipes need `keep_best` and `data.test`."""
    report: bool = False
    """Train nothing, print the comparison of the finished runs."""
    export: Path | None = None
    """Train nothing, write a small JSON file for each finished run into this folder, which has all that the comparison
    needs."""
    exported: Path | None = None
    """With `report`: compare the runs that were exported to this folder, when the runs themselves are deleted."""
    figures: Path | None = None
    """Write the figure of the comparison into this folder as files for a paper: SVG, PDF, PNG, CSV of the drawn points,
    LaTeX, caption, Python."""
    launcher: Literal["local", "submitit"] = "local"
    """Where trainings run: on this machine, `processes` at a time, or each as a Slurm job, submitted through
    submitit."""
    slurm: tuple[str, ...] = ()
    """With `launcher submitit`: parameters of sbatch, each as NAME=VALUE, such as partition=gpu gpus_per_node=4
    time=240 (minutes)."""
    dry_run: bool = False
    """Train nothing, print the commands of the trainings or, with `launcher submitit`, their batch scripts."""

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise ConfigError(f"processes is {self.processes}: expected at least 1")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(
                f"seeds are {', '.join(map(str, self.seeds)) or 'empty'}: expected one or more, none of them twice"
            )
        if not self.suffix and len(self.seeds) > 1:
            raise ConfigError(
                f"suffix is no, so {len(self.seeds)} seeds would share their folders: expected one seed, or suffix yes"
            )
        for text in (*self.variants, *filter(None, [self.first])):
            if not re.match(r"[\w.+-]+:\s*\S", text):
                raise ConfigError(f"variant '{text}': expected 'name: RECIPE [--section.key value ...]'")
        if self.exported is not None and (self.export is not None or not self.report):
            raise ConfigError(
                f"exported is {self.exported}: expected it with --report and without --export, since it is read instead"
                " of the runs"
            )
        if self.slurm and self.launcher != "submitit":
            raise ConfigError(f"slurm is {', '.join(self.slurm)}: expected it with --launcher submitit")
        self._check_grid()
        variants = list(dict.fromkeys(setting.variant for setting in self.settings()))
        for name in self.best:
            if name not in variants:
                raise UnknownNameError("variant", name, variants)
        variants += [f"{name}{BEST_ROW}" for name in self.best]
        if self.against not in variants:
            raise UnknownNameError("variant", self.against, variants)
        names = [setting.name for setting in self.settings()]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ConfigError(f"two variants are called '{twice}': expected different names")

    def _check_grid(self) -> None:
        """Check `grid` and `over`."""
        for text in self.grid:
            if not re.match(r"[\w.]+:\s*\S", text) or text.startswith("seed:"):
                raise ConfigError(f"grid '{text}': expected 'section.key: value value ...', and seeds in `seeds`")
        if self.over and not self.grid:
            raise ConfigError(
                f"over is '{self.over}' without a grid: expected a grid that varies it, or the recipe in `variants`"
            )
        if self.grid and not self.over and not self.variants:
            raise ConfigError(
                f"grid is {list(self.grid)} without a recipe: expected `variants`, or `over` for a grid of one recipe"
            )
        for text in self.grid:
            written = text.partition(":")[2].split()
            values = [grid_value(value) for value in written]
            for number, value in enumerate(values):
                if value in values[:number] and (first := written[values.index(value)]) != written[number]:
                    raise ConfigError(f"grid '{text}' has {first} again as {written[number]}: expected each value once")
        names = [last(text.partition(":")[0]) for text in self.grid]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ConfigError(
                f"the grid has two keys that end in '{twice}': expected keys with different last parts, which name"
                " folders and columns"
            )

    @property
    def keys(self) -> list[str]:
        """The keys of a grid over all variants, each of which is a column of the table."""
        return [] if self.over else [text.partition(":")[0] for text in self.grid]

    def settings(self) -> list[Setting]:
        """Return every training without its seed.

        For a grid over all variants, they are ordered by its points. Otherwise the variants are followed by the points
        of the grid over one recipe.
        """
        variants = [(name, words.strip()) for name, words in (text.split(":", 1) for text in self.variants)]
        axes = [(key, values.split()) for key, values in (text.split(":", 1) for text in self.grid)]
        points: list[Point] = []
        if axes:
            points = [tuple(point) for point in product(*([(key, value) for value in values] for key, values in axes))]
        if points and not self.over:
            return [
                Setting(name, f"{words} {_flags(point)}", point, _tag(point))
                for point in points
                for name, words in variants
            ]
        listed = [Setting(name, words) for name, words in variants]
        return listed + [
            Setting(_tag(point)[1:], f"{self.over.strip()} {_flags(point)}", tag=_tag(point)) for point in points
        ]

    def runs(self) -> Iterator[Job]:
        """Yield every run that is compared; all seeds of a setting follow one another, so it is soon complete."""
        for setting in self.settings():
            for seed in self.seeds:
                name = f"{setting.name}-s{seed}" if self.suffix else setting.name
                yield self._job(setting, seed, self.output_dir / name)

    def jobs(self) -> list[Job]:
        """Return every run that is trained: `first`, if there is one, and those of `runs`."""
        name, _, words = self.first.partition(":")
        shared = [self._job(Setting(name, words.strip()), self.seeds[0], self.output_dir / name)] if self.first else []
        return [*shared, *self.runs()]

    def _job(self, setting: Setting, seed: int, folder: Path) -> Job:
        """Return the job of a setting and a seed, with {output_dir}, {point} and {seed} filled in."""
        try:
            words = setting.words.format(output_dir=shlex.quote(str(self.output_dir)), seed=seed, point=setting.tag)
            arguments = [
                part
                for word in shlex.split(words)
                for part in (word.split("=", 1) if word.startswith(("--start=", "--model.name=")) else [word])
            ]
        except (KeyError, IndexError, ValueError) as error:
            raise ConfigError(
                f"variant '{setting.name}: {setting.words}' cannot be read ({error}): expected {{output_dir}},"
                " {point} and {seed} alone in braces"
            ) from None
        options = [word[2:].split("=")[0].replace("-", "_") for word in arguments if word.startswith("--")]
        if twice := next((key for key, _ in setting.point if options.count(key) > 1), None):
            raise ConfigError(
                f"variant '{setting.variant}' has --{twice}, which the grid varies: expected it in the grid or in the"
                " variant, not in both"
            )
        return Job(setting, seed, folder, [*arguments, "--seed", str(seed), "--output_dir", str(folder)])


def last(key: str) -> str:
    """Return the last part of a key, by which folders and columns name it: `limit_train` for `data.limit_train`."""
    return key.rpartition(".")[2]


def grid_value(text: str) -> float | str:
    """Return a value of a grid as a number if it is one, otherwise (a list or a name) as it is."""
    try:
        return int(text) if text.lstrip("-").isdigit() else float(text)
    except ValueError:
        return text


def _tag(point: Point) -> str:
    """Return a point of the grid as a part of a folder's name, such as `_limit_train-300`."""
    return "".join(f"_{last(key)}-{re.sub(r'[^0-9A-Za-z.+-]+', '-', value.replace(',', '+'))}" for key, value in point)


def _flags(point: Point) -> str:
    """Return a point of the grid as command line options, such as `--data.limit_train 300`."""
    return " ".join(f"--{key} {shlex.join(value.split(','))}" for key, value in point)


def check(sweep: Sweep) -> None:
    """Check that every recipe can be read, and that existing runs were trained from the recipes of this sweep.

    This prevents the comparison of an old run with a new one.

    Raises:
        ConfigError: names the variant or the folder that is wrong.
    """
    if sweep.output_dir.exists() and not sweep.output_dir.is_dir():
        raise ConfigError(f"output_dir is {sweep.output_dir}, a file: expected a folder, or the name of a new one")
    folders = [job.folder for job in sweep.jobs()]
    if twice := next((folder for folder in folders if folders.count(folder) > 1), None):
        raise ConfigError(
            f"two runs of the sweep would be trained in {twice}: expected different names, also from that of `first`"
        )
    first = folders[0] if sweep.first else None
    for job in sweep.jobs():
        if not job.arguments or job.arguments[0].startswith("-"):
            raise ConfigError(
                f"variant '{job.name}': expected a recipe first, as in '{job.name}: RECIPE [--section.key value ...]'"
            )
        recipe = job.recipe()
        if recipe.dry_run:
            raise ConfigError(
                f"variant '{job.name}' has --dry_run, which trains nothing: expected python -m trainer for that"
            )
        if recipe.stage1 is not None:
            raise ConfigError(
                f"variant '{job.name}' has stage1 {recipe.stage1}, which several runs would train at once: expected"
                " --start FOLDER instead, with a stage 1 that is trained before"
            )
        if job.setting.variant in sweep.best and (recipe.data.test is None or not recipe.keep_best):
            raise ConfigError(
                f"variant '{job.name}' has keep_best {recipe.keep_best} and data.test {recipe.data.test}: expected both"
                " for a row of its best checkpoint, whose score on data.val, by which it was chosen, is too high"
            )
        if (job.folder / RECIPE_FILE).exists():
            check_same_recipe(job.folder, recipe)
        if (
            recipe.model.kind != "toy"
            and not job.finished
            and job.folder != first
            and not _has_options(*(compared := _compared(recipe)))
        ):
            raise ConfigError(f"variant '{job.name}' is evaluated on {compared[0]}, by the loss: {SCORED}")


def _compared(recipe: Recipe) -> tuple[str, int | None]:
    """Return the data set whose answers a sweep compares, and the limit of its images."""
    data = recipe.data
    return (data.val, data.limit_val) if data.test is None else (data.test, data.limit_test)


@cache
def _has_options(spec: str, limit: int | None) -> bool:
    """Return whether a data set has questions with options."""
    return any(sample.answer in sample.options for sample in load_data(spec, limit=limit, decode=False))


@cache
def _recipe(file: str, *words: str) -> Recipe:
    """Return the recipe that a name or path and options describe."""
    return parse(Recipe, words, prog="sweep", recipe=RECIPES.find(file))
