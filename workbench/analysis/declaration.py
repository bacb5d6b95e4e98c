"""What an analysis declares: options, run, figures, summary."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import pandas as pd
import plotly.graph_objects as go
from torch import Tensor
from tqdm import tqdm

from workbench.analysis.chunks import Chunk, Chunks, Part, chunked, identity, origin_of
from workbench.data import Dataset
from workbench.devices import check_device
from workbench.errors import ConfigError
from workbench.mllm import MLLM
from workbench.models import label_of
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
    """Which models, and where things go. A model is known by its content; what it is called, where it lies and in what
    batches it runs change no number."""

    model: tuple[str, ...] = ()
    """Folders or hub ids; NAME=FOLDER gives one a name of your own."""
    output_dir: Path = Path("runs")
    batch_size: int = 32
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = None
    """Spread a model over the GPUs of this machine, as transformers does; in place of `device`, and in one process."""
    load_in: Literal["8bit", "4bit"] | None = None
    """Quantize the weights while they are loaded (extra `quantized`); the run is that of another model."""
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
    chunks: Chunks = field(default_factory=Chunks)

    def map(
        self,
        what: str,
        items: Sequence[T],
        fn: Callable[[Chunk[T]], Part],
        *,
        size: int | None = None,
        depends: object = (),
        keep: bool = True,
    ) -> list[Part]:
        """`fn` of every chunk of `items`, in order: the loop of an analysis. A chunk is stored when it is done and not
        computed twice (see `chunks`).

        Args:
            what: beside the progress bar; no two maps of an analysis have the same.
            fn: its result may depend on the chunk, the config, the model, and on `depends`, nothing else.
            size: items of a chunk; by default 32, or the next multiple of the batch size.
            depends: what else the result depends on, such as the fingerprint of all data.
            keep: False for parts so large that they are removed when the run is stored, so that a larger `limit`
                computes them again.
        """
        bar = f"{what} ({self.label or label_of(self.mllm.name)})"
        return self.chunks.map(
            what, chunked(items, self.batch_size, size), fn, (origin_of(self.data), identity(depends)), keep, bar
        )

    def progress(self, items: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
        """A progress bar on stderr, shown once it has taken two seconds, for what follows the maps."""
        disable = not self.chunks.ranks.main
        return tqdm(
            items,
            desc=f"{what} ({self.label or label_of(self.mllm.name)})",
            total=total,
            delay=2,
            file=sys.stderr,
            disable=disable,
        )


@dataclass(frozen=True)
class Result:
    """What `run` returns: tables and tensors to store, values that belong in the record, and sentences about what could
    not be measured."""

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
        page: short title of its page where that is not its name; the module says it in a line `PAGE = "..."`, from
            which the navigation is made.
        version: raise it when the same config would give other numbers.
        uses: config -> {name: identity} of everything else that the numbers depend on, such as a VFM's weights.
        beside: (config, model as named) -> {name: identity} of what lies beside a model and that the numbers depend on,
            such as its checkpoints. It is called for every model before any is loaded, and raises where a model lacks
            it.
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
