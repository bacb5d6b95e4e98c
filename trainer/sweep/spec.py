"""What a sweep trains: its variants and its grid as jobs, and what is refused before the first of them."""

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
from workbench.training_folder import BEST_ROW, RECIPE_FILE, RECORD_FILE

SCORED = "expected questions with options, whose answers a sweep compares"

Point = tuple[tuple[str, str], ...]
"""One combination of a grid's values: (key of the recipe, value as it is written)."""


@dataclass(frozen=True)
class Setting:
    """A training but for its seed.

    Attributes:
        point: where on the grid, if the grid is over all variants.
        tag: the same, or the point of a grid over one recipe, as a part of a folder's name.
        words: recipe and options.
    """

    variant: str
    words: str
    point: Point = ()
    tag: str = ""

    @property
    def name(self) -> str:
        return f"{self.variant}{self.tag}" if self.point else self.variant


@dataclass(frozen=True)
class Job:
    """One training: what it is in the table, and the words after `python -m trainer`."""

    setting: Setting
    seed: int
    folder: Path
    arguments: list[str]

    def __str__(self) -> str:
        return self.folder.name

    @property
    def name(self) -> str:
        return self.setting.name

    @property
    def start(self) -> Path | None:
        """The folder that it starts from, if any."""
        return Path(self.arguments[self.arguments.index("--start") + 1]) if "--start" in self.arguments else None

    @property
    def finished(self) -> bool:
        return (self.folder / RECORD_FILE).exists()

    def recipe(self) -> Recipe:
        """What it is trained with.

        Raises:
            ConfigError: the recipe cannot be read.
        """
        try:
            return replace(_recipe(*self.arguments[:-4]), seed=self.seed, output_dir=self.folder)
        except WorkbenchError as error:
            raise ConfigError(f"variant '{self.name}': {error}") from error


@dataclass(frozen=True)
class Sweep:
    """Variants and the points of a grid, x seeds."""

    output_dir: Path = Path("runs/sweep")
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    variants: tuple[str, ...] = ()
    """Each "name: RECIPE --section.key value ..."; {output_dir}, {point} (of the grid, such as _limit_train-300) and
    {seed} are filled in, and a run waits for its --start folder."""
    grid: tuple[str, ...] = ()
    """Each "section.key: value value ..."; every combination is trained for every variant or, with `over`, is a variant
    of that recipe. A value such as 2,3,4 is a list."""
    over: str = ""
    """A recipe that the grid varies, instead of all variants: "RECIPE --section.key value ..."."""
    first: str = ""
    """A run, written as in `variants`, that is trained once, in a folder of its name and with the first seed: a first
    stage that all share."""
    against: str = "baseline"
    """The variant that differences are taken against, at the same point of a grid over all variants."""
    processes: int = 2
    """Trainings at a time; they share the cores."""
    suffix: bool = True
    """Name folders NAME-sSEED; without it NAME alone, for a single seed."""
    best: tuple[str, ...] = ()
    """Variants whose best checkpoint by validation score is a row of its own, "NAME, best checkpoint": stopped early.
    Needs `keep_best` and `data.test`."""
    report: bool = False
    """Print the table of the finished runs and train nothing."""
    export: Path | None = None
    """Write a small JSON file for each finished run into this folder, all that the table needs, and train nothing."""
    exported: Path | None = None
    """With `report`: make the table from such a folder, when the runs themselves are gone."""
    launcher: Literal["local", "submitit"] = "local"
    """Where trainings run: on this machine, `processes` at a time, or each as a Slurm job, submitted through submitit
    (extra `slurm`)."""
    slurm: tuple[str, ...] = ()
    """With `launcher submitit`: parameters of sbatch, each NAME=VALUE, such as partition=gpu gpus_per_node=4 time=240
    (minutes)."""
    dry_run: bool = False
    """Print what would be trained, with `launcher submitit` the batch scripts, and start nothing."""

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise ConfigError(f"processes is {self.processes}: expected at least 1")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(
                f"seeds are {', '.join(map(str, self.seeds)) or 'empty'}: expected one or more, none of them twice"
            )
        if not self.suffix and len(self.seeds) > 1:
            raise ConfigError(f"{len(self.seeds)} seeds without a suffix would share their folders: expected one seed")
        for text in (*self.variants, *filter(None, [self.first])):
            if not re.match(r"[\w.+-]+:\s*\S", text):
                raise ConfigError(f"variant '{text}': expected 'name: RECIPE [--section.key value ...]'")
        if self.exported is not None and (self.export is not None or not self.report):
            raise ConfigError(
                f"exported is {self.exported}: expected it with --report, and without --export, since it is read in"
                " place of the runs"
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
            raise ConfigError(f"two variants are called '{twice}': expected names that differ")

    def _check_grid(self) -> None:
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
        keys = [text.partition(":")[0] for text in self.grid]
        short = [last(key) for key in keys]
        if twice := next((name for name in short if short.count(name) > 1), None):
            raise ConfigError(
                f"the grid has two keys that end in '{twice}': expected names that differ, for folders and columns are"
                " called by them"
            )

    @property
    def keys(self) -> list[str]:
        """The keys of a grid over all variants, each a column of the table."""
        return [] if self.over else [text.partition(":")[0] for text in self.grid]

    def settings(self) -> list[Setting]:
        """Every training but for its seed: point by point, or the listed variants and then the grid over one recipe."""
        listed = [(name, words.strip()) for name, words in (text.split(":", 1) for text in self.variants)]
        axes = [(key, values.split()) for key, values in (text.split(":", 1) for text in self.grid)]
        points = (
            [tuple(point) for point in product(*([(key, value) for value in values] for key, values in axes))]
            if axes
            else []
        )
        if points and not self.over:
            return [
                Setting(name, f"{words} {_flags(point)}", point, _tag(point))
                for point in points
                for name, words in listed
            ]
        alone = [Setting(name, words) for name, words in listed]
        return alone + [
            Setting(_tag(point)[1:], f"{self.over.strip()} {_flags(point)}", tag=_tag(point)) for point in points
        ]

    def runs(self) -> Iterator[Job]:
        """Every run that is compared, all seeds of a setting together, so that a sweep cut short has whole ones."""
        for setting in self.settings():
            for seed in self.seeds:
                yield self._job(
                    setting, seed, self.output_dir / (f"{setting.name}-s{seed}" if self.suffix else setting.name)
                )

    def jobs(self) -> list[Job]:
        """Every run that is trained."""
        name, _, words = self.first.partition(":")
        shared = [self._job(Setting(name, words.strip()), self.seeds[0], self.output_dir / name)] if self.first else []
        return [*shared, *self.runs()]

    def _job(self, setting: Setting, seed: int, folder: Path) -> Job:
        try:
            words = setting.words.format(output_dir=shlex.quote(str(self.output_dir)), seed=seed, point=setting.tag)
            arguments = [
                part
                for word in shlex.split(words)
                for part in (word.split("=", 1) if word.startswith("--start=") else [word])
            ]
        except (KeyError, IndexError, ValueError) as error:
            raise ConfigError(
                f"variant '{setting.name}: {setting.words}' cannot be read ({error}): expected {{output_dir}},"
                " {point} and {seed} alone in braces"
            ) from None
        options = [word[2:].split("=")[0].replace("-", "_") for word in arguments if word.startswith("--")]
        if twice := next((key for key, _ in setting.point if options.count(key) > 1), None):
            raise ConfigError(
                f"variant '{setting.variant}' has --{twice}, which the grid varies: expected it in one of the two"
            )
        return Job(setting, seed, folder, [*arguments, "--seed", str(seed), "--output_dir", str(folder)])


def last(key: str) -> str:
    """What folders and columns call a key: `limit_train` of `data.limit_train`."""
    return key.rpartition(".")[2]


def _tag(point: Point) -> str:
    return "".join(f"_{last(key)}-{re.sub(r'[^0-9A-Za-z.+-]+', '-', value.replace(',', '+'))}" for key, value in point)


def _flags(point: Point) -> str:
    return " ".join(f"--{key} {shlex.join(value.split(','))}" for key, value in point)


def check(sweep: Sweep) -> None:
    """See that every recipe can be read, and that what is there was trained from the recipes of this sweep, so that no
    old run is compared with a new one."""
    if sweep.output_dir.exists() and not sweep.output_dir.is_dir():
        raise ConfigError(f"output_dir is {sweep.output_dir}, a file: expected a folder, or the name of a new one")
    folders = [job.folder for job in sweep.jobs()]
    if twice := next((folder for folder in folders if folders.count(folder) > 1), None):
        raise ConfigError(
            f"two runs of the sweep would be trained in {twice}: expected names that differ, that of `first` too"
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
                f"variant '{job.name}' has the first stage {recipe.stage1}, which several runs would train at once:"
                " expected --start FOLDER there"
            )
        if job.setting.variant in sweep.best and (recipe.data.test is None or not recipe.keep_best):
            raise ConfigError(
                f"variant '{job.name}' has keep_best {recipe.keep_best} and data.test {recipe.data.test}: expected both"
                " for a row of its best checkpoint, since on data.val, which chose it, it looks too good"
            )
        if (job.folder / RECIPE_FILE).exists():
            check_same_recipe(job.folder, recipe)
        if (
            recipe.model.kind != "toy"
            and not job.finished
            and job.folder != first
            and not _has_options(recipe.data.val, recipe.data.limit_val)
        ):
            raise ConfigError(f"variant '{job.name}' is validated on {recipe.data.val}, by the loss: {SCORED}")


@cache
def _has_options(spec: str, limit: int | None) -> bool:
    return any(sample.answer in sample.options for sample in load_data(spec, limit=limit, decode=False))


@cache
def _recipe(file: str, *words: str) -> Recipe:
    return parse(Recipe, words, prog="sweep", recipe=RECIPES.find(file))
