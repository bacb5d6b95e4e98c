"""Running an analysis on models and data, and storing what comes out."""

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
from workbench.errors import ConfigError
from workbench.files import check_can_make
from workbench.hashing import libraries
from workbench.mllm import MLLM
from workbench.models import check_revision, is_folder, named_models
from workbench.ranks import Ranks
from workbench.runs import Run
from workbench.yaml_config import as_mapping

CHUNKS = ".chunks"  # in the runs folder


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
    ranks, found = Ranks.here(), {}
    if where.device_map is not None and ranks.count > 1:
        raise ConfigError(
            f"device_map is {where.device_map} in {ranks.count} processes, which would share the same GPUs: expected"
            " one process, or --device"
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
        asked = Asked(label, name, beside[name], revision)
        stored = stored_run(analysis, config, where.output_dir, where.batch_size, mllm, data, asked, ranks, argv)
        # the same model may have had another name then
        found[label] = dataclasses.replace(stored, record=stored.record | {"label": label, "model": name})
    return found


@dataclass(frozen=True)
class Asked:
    """One of the models that are asked: its label, its name and revision, and what of it lies beside its folder
    (`Analysis.beside`)."""

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
    asked: Asked,
    ranks: Ranks,
    argv: list[str],
) -> Run:
    """The run of one model that is stored below `root`, computed first if it is not there."""
    question = question_of(analysis, config, asked)
    key = runs.run_key(analysis.name, analysis.version, question, mllm.fingerprint, data.fingerprint)
    folder = runs.folder_of(root, analysis.name, key)
    if not folder.exists():
        without_limit = {name: value for name, value in question.items() if name != "limit"}
        parts = [analysis.name, analysis.version, without_limit, mllm.fingerprint, libraries()]
        chunks = Chunks(root / CHUNKS / analysis.name, parts, ranks, folder.exists)
        started = time.monotonic()
        try:
            result = analysis.run(config, Context(mllm, data, batch_size, asked.label, chunks))
        except RunStoredError:
            return runs.load(folder)
        record = record_of(analysis, config, mllm, data, asked, result, argv)
        record |= {"processes": ranks.count, "seconds": round(time.monotonic() - started, 2)}
        runs.save(Run(key, record, result.tables, result.tensors), root)
        chunks.clean()
    return runs.load(folder)


def question_of(analysis: Analysis, config: DataOptions, asked: Asked) -> dict[str, Any]:
    """What the numbers of a run depend on besides model, data and libraries."""
    return as_mapping(config) | dict(analysis.uses(config)) | dict(asked.beside)


def record_of(
    analysis: Analysis, config: DataOptions, mllm: MLLM, data: Dataset, asked: Asked, result: Result, argv: list[str]
) -> dict[str, Any]:
    """What is stored beside the tables of a run: all that its numbers depend on, what was left out, and where it was
    computed."""
    return {
        "analysis": analysis.name,
        "version": analysis.version,
        "label": asked.label,
        "model": asked.name,
        "revision": asked.revision,
        "commit": getattr(mllm.config, "_commit_hash", None),
        "model_fingerprint": mllm.fingerprint,
        "data": data.name,
        "data_fingerprint": data.fingerprint,
        "left_out": [*data.left_out, *result.left_out],
        "config": as_mapping(config),
        "seed": config.seed,
        "device": str(mllm.device),
        "processes": 1,
        **result.record,
        **runs.environment(argv),
    }


def _device(name: str, ranks: Ranks) -> str:
    """The device of this rank: each takes a GPU of its machine where they are to share them."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return f"cuda:{ranks.local % gpus}" if ranks.count > 1 and gpus and name in ("auto", "cuda") else name
