"""Run and compare analyses from Python, as their commands do.

run = run_analysis("cknna", "runs/viral", data="shapes:val", vfm=["dinov2-small"], limit=200)
run.tables["scores"]                        # a DataFrame
run.figures()                               # {title: plotly figure}
both = compare([run, run_analysis("cknna", "runs/baseline", vfm=["dinov2-small"])])
both.tables["scores"], both.figures()
"""

from __future__ import annotations

import dataclasses
import time
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
from workbench.analysis.execution import RequestedModel, question_of, record_of, stored_run
from workbench.data import Dataset, load_data
from workbench.errors import ConfigError, RunError
from workbench.figures import plain_name
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
    """Run an analysis on one model, or load its stored run.

    Args:
        name: name of the analysis; `python -m analyses` lists them.
        model: a hub id, a folder (NAME=FOLDER gives it a name), an `MLLM`, or a transformers model with its processor.
            A model in memory is hashed at each call, so that one that was changed is never taken for what it was.
        data: a spec such as "shapes:val", or a data set in memory, which is used in full, whatever `limit` is.
        output_dir: the folder in which the run is stored and looked up; by default it is neither.
        batch_size: images in one forward pass.
        device, dtype, device_map, load_in: options for a model that is loaded here; see `MLLM.load`.
        label: name of the model in figures and tables; by default the last part of its folder or hub id.
        options: options of the analysis, as `python -m analyses.NAME --help` lists them; a list for an option with
            several values.

    Raises:
        ConfigError: the analysis has no such option, or a value is not of its type, its choices or its range.
        UnknownNameError: there is no such analysis.
    """
    analysis = load_analysis(name)
    config = analysis.config(**_options(analysis, options, data))
    mllm = _loaded(model, device=device, dtype=dtype, device_map=device_map, load_in=load_in)
    dataset = data if isinstance(data, Dataset) else load_data(data, limit=config.limit, seed=config.data_seed)
    label = label or label_of(str(model) if isinstance(model, str | Path) else mllm.name)
    requested = RequestedModel(label, mllm.name, dict(analysis.beside(config, mllm.name)))
    argv = ["run_analysis", name]
    if output_dir is not None:
        return stored_run(analysis, config, Path(output_dir), batch_size, mllm, dataset, requested, Ranks.here(), argv)
    started = time.monotonic()
    result = analysis.run(config, Context(mllm, dataset, batch_size, label, Chunks()))
    question = question_of(analysis, config, requested)
    key = run_key(analysis.name, analysis.version, question, mllm.fingerprint, dataset.fingerprint)
    record = record_of(analysis, config, mllm, dataset, requested, result, argv)
    record["seconds"] = round(time.monotonic() - started, 2)
    return Run(key, record, result.tables, result.tensors)


def _options(analysis: Analysis, options: Mapping[str, Any], data: str | Dataset) -> dict[str, Any]:
    """Return the options as the config of the analysis takes them: lists as tuples, and the name of the data set.

    Raises:
        ConfigError: the analysis has no such option.
    """
    known = [field.name for field in dataclasses.fields(analysis.config)]
    for key in options:
        if key not in known:
            near = nearest_key(key, known)
            hint = f"did you mean {near!r}?" if near else "expected one of " + ", ".join(known)
            raise ConfigError(f"unknown option '{key}' of {analysis.name}: {hint}")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    return values | {"data": data.name if isinstance(data, Dataset) else data}


def _loaded(model: Model, **options: Any) -> MLLM:
    """Return `model` as an `MLLM`, loaded with `options` or wrapped if necessary."""
    if isinstance(model, MLLM):
        model.refresh()
        return model
    if isinstance(model, tuple):
        return MLLM.wrap(*model)
    return MLLM.load(split_name(str(model))[1], **options)


@dataclass(frozen=True)
class Comparison:
    """Runs of one analysis, by label."""

    runs: Mapping[str, Run]

    @cached_property
    def analysis(self) -> Analysis:
        """The declaration of the analysis."""
        declared: Analysis = load_analysis(next(iter(self.runs.values())).record["analysis"])
        return declared

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """The concatenated tables that all runs have, with the label of each run in the column `model`."""
        first = next(iter(self.runs.values()))
        names = [name for name in first.tables if all(name in run.tables for run in self.runs.values())]
        return {name: self._concatenated(name) for name in names}

    def _concatenated(self, name: str) -> pd.DataFrame:
        parts = [run.tables[name].assign(model=label) for label, run in self.runs.items()]
        return pd.concat(parts, ignore_index=True)

    @property
    def summary(self) -> pd.DataFrame:
        """The table that the command of the analysis prints."""
        return self.analysis.summary(self.runs)

    def figures(self) -> dict[str, go.Figure]:
        """Return {title: figure}; each figure shows all runs."""
        return self.analysis.figures({plain_name(label): run for label, run in self.runs.items()})


def compare(runs: Sequence[Run] | Mapping[str, Run]) -> Comparison:
    """Return a comparison of runs of one analysis; differences are to the first run.

    Args:
        runs: runs with different labels, or {label: run}.

    Raises:
        RunError: no run, runs of several analyses, or two runs with the same label.
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
