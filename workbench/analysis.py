"""An analysis is declared once; its command line, its page, its cache key and its stored record follow from that.

    ANALYSIS = Analysis("cknna", "Alignment by layer", Config, run, figures, version=1)

`python -m analyses.<name> --model A B` then runs it on each model (or finds the stored run), and figures take {label: Run}, so comparing is plotting.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import pandas as pd
import plotly.graph_objects as go
from torch import Tensor
from tqdm import tqdm

from workbench import runs
from workbench.config import as_mapping, command, parse
from workbench.data import Dataset, load_data
from workbench.devices import check_device
from workbench.errors import ConfigError
from workbench.files import check_can_make
from workbench.mllm import MLLM
from workbench.models import check_revision, is_folder, label_of, named_models
from workbench.runs import Run

T = TypeVar("T")


@dataclass(frozen=True)
class DataOptions:
    """What every analysis is asked about. Subclass it for an analysis's own options."""

    data: str = "shapes:val"
    """Data set: shapes:val, folder:PATH, ..."""
    limit: int = 200
    """Images."""
    data_seed: int = 0
    """Which world, or which subset of a folder."""
    seed: int = 0
    """Of everything random in the analysis; it does not change the images."""


@dataclass(frozen=True)
class Where:
    """Which models, and where things go. A model is known by its content; what it is called, where it lies and in what batches it runs change no number."""

    model: tuple[str, ...] = ()
    """Folders or hub ids; NAME=FOLDER gives one a name of your own."""
    output_dir: Path = Path("runs")
    batch_size: int = 32
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    revision: str | None = None
    """Branch, tag or commit of the models that are hub ids."""
    trust_remote_code: bool = False
    """Run code that comes with a model; without it such a model is refused."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"batch_size is {self.batch_size}: expected at least 1")
        check_device(self.device)


@dataclass(frozen=True)
class Context:
    """What `run` is given besides its config."""

    mllm: MLLM
    data: Dataset
    batch_size: int
    label: str = ""

    def progress(self, items: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
        """A progress bar on stderr, shown once it has taken two seconds."""
        return tqdm(items, desc=f"{what} ({self.label or label_of(self.mllm.name)})", total=total, delay=2, file=sys.stderr)


@dataclass(frozen=True)
class Result:
    """What `run` returns: tables and tensors to store, values that belong in the record, and sentences about what could not be measured."""

    tables: dict[str, pd.DataFrame]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


Figures = Callable[[Mapping[str, Run]], dict[str, go.Figure]]


@dataclass(frozen=True)
class Analysis:
    """A declared analysis.

    Attributes:
        config: frozen dataclass, a subclass of `DataOptions`.
        run: (config, context) -> Result, for one model.
        figures: {label: run} -> {title: figure}.
        summary: {label: run} -> the table that the command prints.
        page: short title of its page where that is not its name; the module says it in a line `PAGE = "..."`, from which the navigation is made.
        version: raise it when the same config would give other numbers.
        uses: config -> {name: identity} of everything else that the numbers depend on, such as a VFM's weights.
        beside: (config, model as named) -> {name: identity} of what lies beside a model and that the numbers depend on, such as its checkpoints. It is
            called for every model before any is loaded, and raises where a model lacks it.
    """

    name: str
    title: str
    config: type[DataOptions]
    run: Callable[[Any, Context], Result]
    figures: Figures
    summary: Callable[[Mapping[str, Run]], pd.DataFrame]
    page: str = ""
    version: int = 1
    uses: Callable[[Any], Mapping[str, str]] = field(default=lambda config: {})
    beside: Callable[[Any, str], Mapping[str, str]] = field(default=lambda config, model: {})

    @property
    def heading(self) -> str:
        """Short title of its page."""
        return self.page or self.name.replace("_", " ").capitalize()


def execute(analysis: Analysis, config: DataOptions, where: Where, argv: list[str]) -> dict[str, Run]:
    """Run `analysis` on every model, or load the stored run of the same question; returns {label: run} in order.

    Raises:
        ConfigError: no model, one that is given twice, or two of one name.
    """
    models = named_models(where.model)
    check_revision(models, where.revision)
    beside = {name: dict(analysis.beside(config, name)) for name in models.values()}
    check_can_make(where.output_dir)
    data = load_data(config.data, limit=config.limit, seed=config.data_seed)
    found = {}
    for label, name in models.items():
        revision = None if is_folder(name) else where.revision
        mllm = MLLM.load(name, dtype=where.dtype, device=where.device, revision=revision, trust_remote_code=where.trust_remote_code)
        asked = as_mapping(config) | dict(analysis.uses(config)) | beside[name]
        key = runs.run_key(analysis.name, analysis.version, asked, mllm.fingerprint, data.fingerprint)
        folder = runs.folder_of(where.output_dir, analysis.name, key)
        if not folder.exists():
            started = time.monotonic()
            result = analysis.run(config, Context(mllm, data, where.batch_size, label))
            record = {
                "analysis": analysis.name,
                "version": analysis.version,
                "label": label,
                "model": name,
                "revision": revision,
                "commit": getattr(mllm.config, "_commit_hash", None),
                "model_fingerprint": mllm.fingerprint,
                "data": data.name,
                "data_fingerprint": data.fingerprint,
                "left_out": [*data.left_out, *result.left_out],
                "config": as_mapping(config),
                "seed": config.seed,
                "device": str(mllm.device),
                "seconds": round(time.monotonic() - started, 2),
                **result.record,
                **runs.environment(argv),
            }
            runs.save(Run(key, record, result.tables, result.tensors), where.output_dir)
        stored = runs.load(folder)
        found[label] = dataclasses.replace(stored, record=stored.record | {"label": label, "model": name})  # the same model may have had another name then
    return found


def main(analysis: Analysis) -> None:
    """The command line of one analysis."""
    command(lambda argv: _main(analysis, argv))


def _main(analysis: Analysis, argv: list[str]) -> None:
    both = dataclasses.make_dataclass("Command", [], bases=(analysis.config, Where), frozen=True)
    asked: Any = parse(both, argv, prog=f"python -m analyses.{analysis.name}", description=analysis.title)
    config, where = _part(asked, analysis.config), _part(asked, Where)
    found = execute(analysis, config, where, ["python", "-m", f"analyses.{analysis.name}", *argv])
    sys.stdout.write(analysis.summary(found).to_string(index=False, float_format="{:.3f}".format) + "\n")
    for label, run in found.items():
        for sentence in _named(run.record.get("left_out", ())):
            sys.stdout.write(f"{label}: left out {sentence}\n")
        sys.stdout.write(f"{label}: {runs.folder_of(where.output_dir, analysis.name, run.key)}\n")


def _named(left_out: Sequence[str], most: int = 5) -> list[str]:
    """The first sentences about what was left out, and how many more there are."""
    more = len(left_out) - most
    return [*left_out[:most], *([f"{more} more, which {runs.RUN_FILE} names"] if more > 0 else [])]


def _part(asked: Any, cls: type[T]) -> T:
    """The fields of `asked` that belong to the dataclass `cls`."""
    return cls(**{field.name: getattr(asked, field.name) for field in dataclasses.fields(cls)})  # type: ignore[arg-type]
