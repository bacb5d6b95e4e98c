"""What the commands of the analyses do, from Python.

run = run_analysis("cknna", "runs/viral", data="shapes:val", vfm=["dinov2-small"], limit=200)
run.tables["scores"]                        # a DataFrame
run.figures()                               # {title: plotly figure}
both = compare([run, run_analysis("cknna", "runs/baseline", vfm=["dinov2-small"])])
both.tables["scores"], both.figures()
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from transformers import PreTrainedModel

from workbench.analysis.chunks import Chunks
from workbench.analysis.declaration import Analysis, Context
from workbench.analysis.discover import load_analysis
from workbench.analysis.execution import Asked, question_of, record_of, stored_run
from workbench.data import Dataset, load_data
from workbench.errors import ConfigError, RunError
from workbench.mllm import MLLM
from workbench.models import label_of, split_name
from workbench.ranks import Ranks
from workbench.runs import Run, run_key
from workbench.yaml_config import nearest_key

if TYPE_CHECKING:
    import plotly.graph_objects as go

Model = str | Path | MLLM | tuple[PreTrainedModel, Any]


def run_analysis(
    name: str,
    model: Model,
    *,
    data: str | Dataset = "shapes:val",
    output_dir: str | Path | None = None,
    batch_size: int = 32,
    device: str = "auto",
    dtype: str = "auto",
    device_map: str | Mapping[str, Any] | None = None,
    load_in: str | None = None,
    label: str = "",
    **options: Any,
) -> Run:
    """Run an analysis on one model, or look its stored run up.

    Args:
        name: of the analysis, as `python -m analyses` lists them.
        model: a hub id, a folder (NAME=FOLDER gives it a name), an `MLLM`, or a transformers model with its processor.
        data: a spec such as "shapes:val", or a data set in memory, of which `limit` then takes nothing away.
        device, dtype, device_map, load_in: of a model that is loaded here; see `MLLM.load`.
        output_dir: where the run is stored, and looked up; by default it is kept in memory alone.
        label: what figures call the model.
        options: of the analysis, as `python -m analyses.NAME --help` lists them; lists for those that take several
            values.

    Raises:
        ConfigError: an option that the analysis does not have.
        UnknownNameError: no such analysis.
    """
    analysis = load_analysis(name)
    config = analysis.config(**_options(analysis, options, data))
    mllm = _loaded(model, device=device, dtype=dtype, device_map=device_map, load_in=load_in)
    dataset = data if isinstance(data, Dataset) else load_data(data, limit=config.limit, seed=config.data_seed)
    named = label or label_of(str(model) if isinstance(model, str | Path) else mllm.name)
    asked = Asked(named, mllm.name, dict(analysis.beside(config, mllm.name)))
    argv = ["run_analysis", name]
    if output_dir is not None:
        return stored_run(analysis, config, Path(output_dir), batch_size, mllm, dataset, asked, Ranks.here(), argv)
    result = analysis.run(config, Context(mllm, dataset, batch_size, asked.label, Chunks()))
    key = run_key(
        analysis.name, analysis.version, question_of(analysis, config, asked), mllm.fingerprint, dataset.fingerprint
    )
    return Run(key, record_of(analysis, config, mllm, dataset, asked, result, argv), result.tables, result.tensors)


def _options(analysis: Analysis, options: Mapping[str, Any], data: str | Dataset) -> dict[str, Any]:
    """Options as the analysis's config takes them: tuples for lists."""
    known = [own.name for own in dataclasses.fields(analysis.config)]
    for key in options:
        if key not in known:
            near = nearest_key(key, known)
            raise ConfigError(
                f"unknown option '{key}' of {analysis.name}:"
                f" {f'did you mean {near!r}?' if near else 'expected one of ' + ', '.join(known)}"
            )
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    return values | {"data": data.name if isinstance(data, Dataset) else data}


def _loaded(model: Model, **options: Any) -> MLLM:
    if isinstance(model, MLLM):
        return model
    if isinstance(model, tuple):
        return MLLM.wrap(*model)
    return MLLM.load(split_name(str(model))[1], **options)


@dataclass(frozen=True)
class Comparison:
    """Runs of one analysis side by side, by label."""

    runs: Mapping[str, Run]

    @cached_property
    def analysis(self) -> Analysis:
        declared: Analysis = load_analysis(next(iter(self.runs.values())).record["analysis"])
        return declared

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """Every table of the runs, one below another, with the label in the column `model`."""
        names = [
            name
            for name in next(iter(self.runs.values())).tables
            if all(name in run.tables for run in self.runs.values())
        ]
        return {
            name: pd.concat(
                [run.tables[name].assign(model=label) for label, run in self.runs.items()], ignore_index=True
            )
            for name in names
        }

    @property
    def summary(self) -> pd.DataFrame:
        """The table that the command prints."""
        return self.analysis.summary(self.runs)

    def figures(self) -> dict[str, go.Figure]:
        """{title: figure} of all runs together."""
        return self.analysis.figures(self.runs)


def compare(runs: Sequence[Run] | Mapping[str, Run]) -> Comparison:
    """Runs of one analysis side by side, under their labels or those that are given; differences are to the first.

    Raises:
        RunError: no run, runs of several analyses, or two of one label.
    """
    named = dict(runs) if isinstance(runs, Mapping) else {run.label: run for run in runs}
    if not named or len(named) < len(runs):
        raise RunError(
            f"{len(runs)} runs with labels {', '.join(named) or 'none'}: expected one or more of different labels, or a"
            " mapping of label to run"
        )
    kinds = {str(run.record["analysis"]) for run in named.values()}
    if len(kinds) > 1:
        raise RunError(f"runs of {', '.join(sorted(kinds))}: expected runs of one analysis")
    return Comparison(named)
