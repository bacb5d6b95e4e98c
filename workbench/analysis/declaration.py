"""The classes with which an analysis is declared: options, context, result, and the declaration itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import pandas as pd
import plotly.graph_objects as go
from annotated_types import Ge
from torch import Tensor

from workbench.analysis.chunks import Chunk, Chunks, Part, chunked, identity, origin_of
from workbench.analysis.discover import examples, paragraphs
from workbench.data import Dataset
from workbench.devices import check_device
from workbench.mllm import MLLM
from workbench.models import label_of
from workbench.options import check_options
from workbench.progress import progress_bar
from workbench.runs import Run
from workbench.vfm import find_vfms

T = TypeVar("T")


@dataclass(frozen=True)
class DataOptions:
    """Options that every analysis has; an analysis adds its own options in a subclass.

    Attributes:
        ADDED: names of options whose default is what runs were stored with before the option existed. At its default
            such an option is neither in the key nor in the record of a run, so that those runs are still found.
    """

    ADDED: ClassVar[tuple[str, ...]] = ()

    data: str = "shapes:val"
    """Data set, as NAME:SPLIT or NAME:PATH, such as shapes:val or folder:PATH."""
    limit: Annotated[int, Ge(1)] = 200
    """Number of images."""
    data_seed: Annotated[int, Ge(0)] = 0
    """Seed of the images: of their composition in a synthetic data set, of their selection in any other."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of everything random in the analysis itself; it does not change the images."""

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class Where:
    """Options that say which models are analyzed, how they run and where results are stored.

    Results are stored by the content of a model; its name, its folder and the batch size do not change them.
    """

    model: tuple[str, ...] = ()
    """Folders or hub ids of one or more models; NAME=FOLDER gives a model the name NAME."""
    output_dir: Path = Path("runs")
    """Folder in which results are stored; a stored result is not computed again."""
    ids: Path | None = None
    """File with ids of questions, one a line, such as the dashboard's Examples page writes; only these are asked."""
    export: Path | None = None
    """Folder for the figures as files for a paper: SVG, PDF, PNG, CSV of the drawn points, LaTeX, caption, Python."""
    export_columns: Literal[1, 2] | None = None
    """Columns of a page that an exported figure is as wide as: 1 or 2; by default as many as it needs."""
    batch_size: Annotated[int, Ge(1)] = 32
    """Number of images in one forward pass."""
    device: str = "auto"
    """Device: auto (the GPU if there is one, else the CPU), cpu, cuda, cuda:NUMBER, mps or xpu."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format in which models run; auto is the one that a model was saved in."""
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = None
    """Let transformers spread each model over the GPUs of this machine, in one process; use it without --device."""
    load_in: Literal["8bit", "4bit"] | None = None
    """Quantize the weights while loading them (needs the extra `quantized`); this makes it another model in results."""
    revision: str | None = None
    """Branch, tag or commit of the models that are hub ids; by default their main branch."""
    trust_remote_code: bool = False
    """Run code that comes with a model; without this option, such a model is refused."""

    def __post_init__(self) -> None:
        check_options(self)
        check_device(self.device)


@dataclass(frozen=True)
class Context:
    """What the function `run` of an analysis gets besides its config: model, data, and the loop over items."""

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
        """Return the result of `fn` for every chunk of `items`, in order; this is the loop of an analysis.

        A chunk is stored when it is done and is not computed again (see `workbench.analysis.chunks`).

        Args:
            what: text before the progress bar; the maps of an analysis must differ in it.
            fn: computes the result of a chunk, which may depend on the chunk, the config, the model, and on `depends`,
                and on nothing else.
            size: number of items in a chunk; by default 32, rounded up to a multiple of the batch size.
            depends: what else the result depends on, such as the fingerprint of all data.
            keep: False removes the chunks when the run is stored, because they are large; a larger `limit` then
                computes them again.
        """
        bar = f"{what} ({self.label or label_of(self.mllm.name)})"
        all_depends = (origin_of(self.data), identity(depends))
        return self.chunks.map(what, chunked(items, self.batch_size, size), fn, all_depends, keep, bar)

    def progress(self, items: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
        """Return `items` with a progress bar on stderr after two seconds, for loops other than `map`."""
        label = self.label or label_of(self.mllm.name)
        return progress_bar(f"{what} ({label})", items, total=total, disable=not self.chunks.ranks.main)


@dataclass(frozen=True)
class Result:
    """What the function `run` of an analysis returns.

    Attributes:
        tables, tensors: results to store.
        record: values to add to the record of the run.
        left_out: sentences about what could not be measured.
    """

    tables: dict[str, pd.DataFrame]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def vfm_inputs(config: Any) -> dict[str, str]:
    """Return the identity of every VFM in `config.vfm`; the attribute `uses` of analyses that have this option.

    Other weights under the name of a VFM then make another run. The model's own encoder belongs to the model's key.
    """
    return {f"vfm {name}": entry.identity() for name, entry in find_vfms(config.vfm).items()}


Figures = Callable[[Mapping[str, Run]], dict[str, go.Figure]]


@dataclass(frozen=True)
class Analysis:
    """The declaration of an analysis.

    Attributes:
        name: its name in commands, files and stored runs.
        title: its title in help texts, pages and reports.
        config: its options, a frozen dataclass that is a subclass of `DataOptions`.
        run: (config, context) -> Result, for one model.
        figures: {label: run} -> {title: figure}.
        summary: {label: run} -> the table that the command prints.
        benchmarks: whether it is meant for benchmarks; `analyses.all` runs it on other data sets only by name.
        version: increase it when the same config gives other numbers than before.
        uses: config -> {name: identity} of everything else that the numbers depend on, such as a VFM's weights.
        beside: (config, model as named) -> {name: identity} of files beside the model that the numbers depend on, such
            as its checkpoints. It is called for every model before any model is loaded, and raises an error if a model
            lacks these files.
    """

    name: str
    title: str
    config: type[DataOptions]
    run: Callable[[Any, Context], Result]
    figures: Figures
    summary: Callable[[Mapping[str, Run]], pd.DataFrame]
    benchmarks: bool = False
    version: int = 1
    uses: Callable[[Any], Mapping[str, str]] = field(default=lambda config: {})
    beside: Callable[[Any, str], Mapping[str, str]] = field(default=lambda config, model: {})

    @property
    def explanation(self) -> list[str]:
        """The paragraphs of its module's docstring, without the example commands: what its numbers are, and are not.

        The first one is the question that the analysis answers. Formulas stay indented.
        """
        return paragraphs(self._docstring)

    @property
    def examples(self) -> list[str]:
        """The example commands of its module's docstring."""
        return examples(self._docstring)

    @property
    def _docstring(self) -> str:
        return inspect.getdoc(import_module(self.run.__module__)) or self.title
