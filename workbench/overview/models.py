"""The models of a runs folder: trainings, finished or not, and models known from stored analyses alone.

A model is named by its folder, relative to the runs folder, so that a link to it stays valid. Trainings whose recipes
differ in the seed alone are one variant.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

from workbench.errors import RunError, WorkbenchError, one_line
from workbench.files import leads_outside, parquet_columns
from workbench.overview.stored import NOT_FOLLOWED, Broken, Stored, StoredRun
from workbench.summary import NOT_OF_THE_MODEL
from workbench.training_folder import (
    ACCURACY_FILE,
    EVALUATION_FILE,
    LOG_FILE,
    RECIPE_FILE,
    RECORD_FILE,
    evaluated_on,
    training_recipe,
    training_record,
)

STAMPED = (RECORD_FILE, RECIPE_FILE, LOG_FILE, EVALUATION_FILE, ACCURACY_FILE)  # in the order of `Model.stamps`
READ = {"model": (), "data": ("train", "val"), "optim": ("steps",), "alignment": ("objective", "layer", "vfm")}
"""What the pages read of every recipe: keys by section."""
KINDS = {"seed": int, "start": str | None}
State = Literal["finished", "training", "damaged", "elsewhere"]


@dataclass(frozen=True)
class Model:
    """One model.

    Attributes:
        key: its folder relative to the runs folder, or the label of stored analyses if it has no folder there.
        folder: the training folder; None if only analyses of it are stored.
        state: "training" has no record yet; "damaged" has an unreadable file (`why`); "elsewhere" has no folder.
        recipe: its recipe, {} if that is not known.
        record: the record of the finished training, else {}.
        variant: the name of all trainings that differ from it in the seed alone.
        stamps: when each of STAMPED was changed last, in ns, 0 for a file that is not there.
    """

    key: str
    folder: Path | None = None
    state: State = "elsewhere"
    why: str = ""
    recipe: Mapping[str, Any] = field(default_factory=dict, repr=False)
    record: Mapping[str, Any] = field(default_factory=dict, repr=False)
    variant: str = ""
    stamps: tuple[int, ...] = ()

    @property
    def seed(self) -> int | None:
        """The seed of its training."""
        return self.recipe.get("seed")

    @property
    def aligned(self) -> bool:
        """Whether its training had an alignment loss."""
        return bool(self.recipe.get("alignment", {}).get("objective", "none") != "none")

    @property
    def control(self) -> bool:
        """Whether it is aligned with targets that are a control: those of other images, or centered ones."""
        settings = self.recipe.get("alignment", {})
        return self.aligned and (settings.get("images") == "others" or bool(settings.get("center")))

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that its alignment loss reads, () without one."""
        return tuple(self.recipe["alignment"]["layer"]) if self.aligned else ()

    @property
    def vfms(self) -> tuple[str, ...]:
        """The vision foundation models that it is aligned with."""
        settings = self.recipe.get("alignment", {})
        return tuple(settings["vfm"]) if self.aligned and settings.get("target", "vfm") == "vfm" else ()

    @property
    def test_data(self) -> str:
        """The spec of the data of its final evaluation, "" if that is not known."""
        return evaluated_on(self.recipe) if self.recipe else ""


def files_below(root: Path, *patterns: str) -> list[Path]:
    """Return the files below `root` whose names match any of `patterns`, sorted.

    Names that begin with a dot are skipped: they are still being written.
    """
    files = []
    for folder, folders, names in os.walk(root):  # unlike Path.glob, it continues if a folder is removed meanwhile
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [
            Path(folder, name)
            for name in names
            if not name.startswith(".") and any(fnmatch(name, pattern) for pattern in patterns)
        ]
    return sorted(files)


def _started_from(model: Model, other: Model) -> bool:
    """Return whether a training started from another one: from its folder, or from one of its name that is gone."""
    if model.folder is None or other.folder is None or not model.recipe.get("start"):
        return False
    start, key = Path(model.recipe["start"]), Path(other.key)
    from_output = os.path.relpath(start, model.recipe.get("output_dir") or model.folder)
    if other.folder.resolve() in (start.resolve(), (model.folder / from_output).resolve()):
        return True
    return not start.exists() and start.parts[-len(key.parts) :] == key.parts


@dataclass(frozen=True)
class Models:
    """All models of a runs folder by key, trainings first, the shallowest folders first."""

    by_key: Mapping[str, Model]

    @cached_property
    def variants(self) -> dict[str, list[Model]]:
        """{variant: its models by seed}; those without an alignment loss come first, controls last, each by name."""
        groups: dict[str, list[Model]] = {}
        for model in sorted(self.by_key.values(), key=lambda m: (m.seed is None, m.seed or 0, m.key)):
            groups.setdefault(model.variant, []).append(model)
        return {name: groups[name] for name in sorted(groups, key=lambda v: _rank(groups[v][0], v))}

    @cached_property
    def starts(self) -> set[str]:
        """The keys of models from which another one starts (stage 1)."""
        started = [model for model in self.by_key.values() if model.recipe.get("start")]
        return {key for key, other in self.by_key.items() if any(_started_from(model, other) for model in started)}

    def default(self) -> tuple[str, ...]:
        """Return the keys to show first: of the variants without an alignment loss and of those with it, one each.

        It is the one with the most finished seeds, of several the first. All its seeds are shown. Stage-1 models are
        left out. The first key is the baseline.
        """
        shown = {
            name: [m for m in of if m.state in ("finished", "training") and m.key not in self.starts]
            for name, of in self.variants.items()
        }
        shown = {name: models for name, models in shown.items() if models}
        first: dict[bool, str] = {}
        for name in sorted(shown, key=lambda name: -sum(m.state == "finished" for m in shown[name])):  # a stable sort
            first.setdefault(shown[name][0].aligned, name)
        names = [first[aligned] for aligned in sorted(first)] if len(first) == 2 else list(shown)[:2]
        keys = [model.key for name in names for model in shown[name]]
        return tuple(keys or list(self.by_key)[:2])


def read_models(root: Path, stored: Iterable[StoredRun] = ()) -> Models:
    """Return the models of a runs folder, and those that `stored` analyses name and that have no folder there.

    A training that is a link, or has one out of the runs folder, is damaged, and counts as one without a folder, so
    that no page reads it.
    """
    folders = sorted(
        {file.parent for file in files_below(root, LOG_FILE, RECORD_FILE)},
        key=lambda f: (len(f.parts), _natural(f.as_posix())),
    )
    models = {}
    for folder in folders:
        key = folder.relative_to(root).as_posix()
        stamps = tuple(_changed(folder / name) for name in STAMPED)
        linked = next((name for name in STAMPED if leads_outside(folder / name, root)), None)
        models[key] = (
            Model(key, state="damaged", why=f"{linked} {NOT_FOLLOWED}", variant=key, stamps=stamps)
            if linked
            else _read(folder, key, stamps)
        )
    for folder in sorted(root.glob("[!.]*")):
        if folder.is_symlink() and any((folder / name).exists() for name in (LOG_FILE, RECORD_FILE)):
            models[folder.name] = Model(folder.name, state="damaged", why=NOT_FOLLOWED, variant=folder.name)
    for run in stored:
        if run.model and run.model not in models:
            models[run.model] = Model(run.model, variant=run.model)
    names = _variant_names([model for model in models.values() if model.recipe])
    return Models({key: replace(model, variant=names[key]) if model.recipe else model for key, model in models.items()})


def unusable_of(models: Models, stored: Stored) -> list[Broken]:
    """Return what cannot be used: damaged trainings, damaged analyses, and those of a model that is no longer there."""
    return [
        *(Broken(model.key, model.why) for model in models.by_key.values() if model.state == "damaged"),
        *stored.broken,
        *(Broken(r.folder.name, f"{r.retrained} was trained anew after it") for r in stored.runs if r.stale),
    ]


def with_variants(stored: Stored, models: Models) -> Stored:
    """Return stored analyses in which the source of patching is also named by its variant, if it has its model's seed.

    Such runs of several seeds then ask the same (`Stored.of`), although each has another source.
    """
    return replace(stored, runs=tuple(_with_variant(run, models) if run.sources else run for run in stored.runs))


def _with_variant(run: StoredRun, models: Models) -> StoredRun:
    model, source = (models.by_key.get(key) for key in (run.model, run.sources[0]))
    if model is None or source is None or source.seed is None or source.seed != model.seed:
        return run
    return replace(run, sources=(*run.sources, f"{source.variant} of the same seed"))


def _changed(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0


@lru_cache(maxsize=4096)
def _read(folder: Path, key: str, stamps: tuple[int, ...]) -> Model:
    """Read a training folder; `stamps` are the times of its last changes, so that an unchanged one is read once."""
    recipe = training_recipe(folder)
    if why := _unlike_a_recipe(recipe):
        file = RECORD_FILE if (folder / RECORD_FILE).exists() else RECIPE_FILE
        why = f"{file} is damaged ({why}): expected a recipe of this workbench"
        return Model(key, folder, "damaged", why, {}, {}, key, stamps)
    columns = parquet_columns(folder / LOG_FILE)  # None while the first steps are still being written
    if columns is not None and "step" not in columns:
        why = f"{LOG_FILE} has no column step: expected the log of a training"
        return Model(key, folder, "damaged", why, recipe, {}, key, stamps)
    if not (folder / RECORD_FILE).exists():
        return Model(key, folder, "training", "", recipe, {}, key, stamps)
    try:
        record = training_record(folder)
    except RunError as error:
        return Model(key, folder, "damaged", _without(str(error), folder), recipe, {}, key, stamps)
    recipe = record["recipe"]
    try:
        why = "" if (folder / EVALUATION_FILE).exists() else f"{EVALUATION_FILE} is not there"
        if not why:
            _check_parquet(folder / EVALUATION_FILE)
        _check_parquet(folder / LOG_FILE)
        if (folder / ACCURACY_FILE).exists():
            _check_parquet(folder / ACCURACY_FILE)
    except (WorkbenchError, OSError) as error:
        why = _without(one_line(error, 200), folder)
    return Model(key, folder, "damaged" if why else "finished", why, recipe, record, key, stamps)


def _unlike_a_recipe(recipe: Mapping[str, Any]) -> str:
    """Return what a recipe lacks that the pages read of every recipe, "" for a good or an unknown one ({}).

    Files of other programs may have the same names.
    """
    if not recipe:
        return ""
    for section, keys in READ.items():
        content = recipe.get(section)
        if not isinstance(content, Mapping):
            return f"no section '{section}'"
        if missing := [key for key in keys if content.get(key) is None]:
            return f"no '{section}.{missing[0]}'"
    return next(
        (f"{key} is {recipe.get(key)}" for key, kinds in KINDS.items() if not isinstance(recipe.get(key), kinds)), ""
    )


def _without(text: str, folder: Path) -> str:
    """Return a message without the absolute path of the folder that its row already names."""
    return text.replace(f"{folder}/", "").replace(str(folder), folder.name)


def _check_parquet(file: Path) -> None:
    """Check that all of a parquet file can be read.

    Raises:
        RunError: it cannot.
    """
    if parquet_columns(file) is None:
        raise RunError(f"{file.name} is damaged: expected a parquet file")


# --- variants -------------------------------------------------------------------------------------


def _variant_names(models: Sequence[Model]) -> dict[str, str]:
    """Return {key: name of its variant}: the folder without the seed, for trainings that differ in the seed alone."""
    groups: dict[str, list[Model]] = {}
    for model in models:
        groups.setdefault(_identity(model.recipe), []).append(model)
    names: dict[str, str] = {}
    taken: set[str] = set()
    for group in sorted(groups.values(), key=lambda g: g[0].key):
        # their recipes say that they are seeds of one variant, so that any number at the end may be the seed
        stems = {re.sub(rf"(?i)[-_./]?(?:s|seed)?[-_=]?{model.seed}$", "", model.key) for model in group} - {""}
        if len(stems) > 1:
            stems = {_without_seed(model.key, model.seed) for model in group}
        name = min(stems, key=lambda s: (len(s), s)) if len(group) > 1 and stems else group[0].key
        if name in taken or any(name == model.key and model not in group for model in models):
            name = group[0].key
        taken.add(name)
        names |= {model.key: name for model in group}
    return names


def _identity(recipe: Mapping[str, Any]) -> str:
    """Return all of a recipe that makes a variant: not its seed, nor what does not change the model."""
    seed = recipe.get("seed")
    kept = {key: value for key, value in recipe.items() if key not in (*NOT_OF_THE_MODEL, "seed")}
    if isinstance(kept.get("start"), str):
        kept["start"] = _without_seed(kept["start"], seed)
    return repr(_sorted(kept))


def _sorted(value: Any) -> Any:
    if isinstance(value, Mapping):
        return [(key, _sorted(value[key])) for key in sorted(value)]
    return value


def _without_seed(name: str, seed: int | None) -> str:
    """Return a folder's name without its seed at the end: `viral-s10` of seed 10 is `viral`, `viral-10` stays."""
    return re.sub(rf"[-_./](?:s|seed[-_]?){seed}$", "", name) or name


def _rank(model: Model, variant: str) -> tuple[bool, bool, list[tuple[float, str]]]:
    return model.aligned, model.control, _natural(variant)


def _natural(name: str) -> list[tuple[float, str]]:
    """Return a key that sorts numbers within names, such as 0.25, by value."""
    parts = re.split(r"(\d+(?:\.\d+)?)", name)
    return [(float(part), part) if part[:1].isdecimal() else (-1, part) for part in parts]
