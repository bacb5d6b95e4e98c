"""Run an analysis on models and data, and store the results."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from workbench import runs
from workbench.analysis.chunks import Chunks, RunStoredError
from workbench.analysis.declaration import Analysis, Context, DataOptions, Result, Where
from workbench.data import Dataset, load_data
from workbench.data.base import read_ids
from workbench.errors import ConfigError
from workbench.files import check_can_make
from workbench.hashing import libraries
from workbench.mllm import MLLM
from workbench.models import check_revision, is_folder, named_models
from workbench.plugins import identities
from workbench.ranks import Ranks
from workbench.records import RunRecord
from workbench.runs import Run
from workbench.training_folder import trained_at
from workbench.yaml_config import as_mapping

CHUNKS = ".chunks"  # in the runs folder


def execute(analysis: Analysis, config: DataOptions, where: Where, argv: list[str]) -> dict[str, Run]:
    """Run `analysis` on every model, or load its stored run, and return {label: run} in the order of the models.

    Raises:
        ConfigError: no model, the same model twice, or two models with the same name.
    """
    models = named_models(where.model)
    check_revision(models, where.revision)
    beside = {name: dict(analysis.beside(config, name)) for name in models.values()}
    check_can_make(where.output_dir)
    data = chosen_data(config.data, config.limit, config.data_seed, where.ids)
    ranks, results = Ranks.here(), {}
    if where.device_map is not None and ranks.count > 1:
        raise ConfigError(
            f"device_map is {where.device_map} in {ranks.count} processes, which would share the same GPUs: expected"
            " one process, or --device instead of --device_map"
        )
    for label, name in models.items():
        revision = None if is_folder(name) else where.revision
        mllm = MLLM.load(
            name,
            dtype=where.dtype,
            device=_device(where.device, ranks),
            revision=revision,
            trust_remote_code=where.trust_remote_code,
            device_map=where.device_map,
            load_in=where.load_in,
        )
        requested = RequestedModel(label, name, beside[name], revision)
        stored = stored_run(analysis, config, where.output_dir, where.batch_size, mllm, data, requested, ranks, argv)
        # the model may have had another name when the run was stored
        results[label] = dataclasses.replace(stored, record=stored.record | {"label": label, "model": name})
    return results


def chosen_data(spec: str, limit: int | None, seed: int, ids: Path | None = None) -> Dataset:
    """Load a data set, or the questions of it that a file with ids names, about at most `limit` images."""
    if ids is None:
        return load_data(spec, limit=limit, seed=seed)
    return load_data(spec, seed=seed).only(read_ids(ids), limit)


@dataclass(frozen=True)
class RequestedModel:
    """One of the models to analyze.

    Attributes:
        label: its name in figures and tables.
        name: its folder or hub id.
        beside: identities of files beside the model that the numbers depend on (`Analysis.beside`).
        revision: its revision on the hub.
    """

    label: str
    name: str
    beside: Mapping[str, str]
    revision: str | None = None


def stored_run(
    analysis: Analysis,
    config: DataOptions,
    root: Path,
    batch_size: int,
    mllm: MLLM,
    data: Dataset,
    requested: RequestedModel,
    ranks: Ranks,
    argv: list[str],
) -> Run:
    """Return the run of one model from the folder `root`; compute and store it first if it is not there."""
    question = question_of(analysis, config, requested)
    key = runs.run_key(analysis.name, analysis.version, question, mllm.fingerprint, data.fingerprint)
    folder = runs.folder_of(root, analysis.name, key)
    if not folder.exists():
        without_limit = {name: value for name, value in question.items() if name != "limit"}
        depends: list[Any] = [analysis.name, analysis.version, without_limit, mllm.fingerprint, libraries()]
        if used_plugins := identities(analysis.name, question):
            depends.append(used_plugins)
        chunks = Chunks(root / CHUNKS / analysis.name, depends, ranks, folder.exists)
        started = time.monotonic()
        try:
            result = analysis.run(config, Context(mllm, data, batch_size, requested.label, chunks))
        except RunStoredError:
            return runs.load(folder)
        record = record_of(analysis, config, mllm, data, requested, result, argv)
        record |= {"processes": ranks.count, "seconds": round(time.monotonic() - started, 2)}
        runs.save(Run(key, record, result.tables, result.tensors), root)
        chunks.clean()
    return runs.load(folder)


def question_of(analysis: Analysis, config: DataOptions, requested: RequestedModel) -> dict[str, Any]:
    """Return what the numbers of a run depend on besides model, data and libraries."""
    return recorded_options(config) | dict(analysis.uses(config)) | dict(requested.beside)


def recorded_options(config: DataOptions) -> dict[str, Any]:
    """Return the options as a run records them: all but those of `DataOptions.ADDED` that have their default."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    at_default = {name for name in config.ADDED if getattr(config, name) == defaults[name]}
    return {name: value for name, value in as_mapping(config).items() if name not in at_default}


def record_of(
    analysis: Analysis,
    config: DataOptions,
    mllm: MLLM,
    data: Dataset,
    requested: RequestedModel,
    result: Result,
    argv: list[str],
) -> RunRecord:
    """Return the record of a run: all that its numbers depend on, what was left out, and where it was computed."""
    return {
        "analysis": analysis.name,
        "version": analysis.version,
        "label": requested.label,
        "model": requested.name,
        "revision": requested.revision,
        "commit": getattr(mllm.config, "_commit_hash", None),
        "model_fingerprint": mllm.fingerprint,
        "trained": trained_at(Path(requested.name)),
        "data": data.name,
        "data_fingerprint": data.fingerprint,
        "left_out": [*data.left_out, *result.left_out],
        "config": recorded_options(config),
        "seed": config.seed,
        "device": str(mllm.device),
        "processes": 1,
        **runs.environment(argv),
        **result.record,  # type: ignore[typeddict-item]
    }


def _device(name: str, ranks: Ranks) -> str:
    """Return the device of this rank; the ranks of a machine share its GPUs in turn."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return f"cuda:{ranks.local % gpus}" if ranks.count > 1 and gpus and name in ("auto", "cuda") else name
