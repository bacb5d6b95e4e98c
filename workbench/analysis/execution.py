"""Running an analysis on models and data, and storing what comes out."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from workbench import runs
from workbench.analysis.chunks import Chunks, RunStoredError
from workbench.analysis.declaration import Analysis, Context, DataOptions, Where
from workbench.data import Dataset, load_data
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
    for label, name in models.items():
        mllm = MLLM.load(
            name, dtype=where.dtype, device=_device(where.device, ranks), revision=revision_of(name, where), trust_remote_code=where.trust_remote_code
        )
        stored = _stored(analysis, config, where, mllm, data, Asked(label, name, beside[name]), ranks, argv)
        found[label] = dataclasses.replace(stored, record=stored.record | {"label": label, "model": name})  # the same model may have had another name then
    return found


@dataclass(frozen=True)
class Asked:
    """One of the models that a command names: its label, its name, and what of it lies beside its folder (`Analysis.beside`)."""

    label: str
    name: str
    beside: Mapping[str, str]


def _stored(analysis: Analysis, config: DataOptions, where: Where, mllm: MLLM, data: Dataset, asked: Asked, ranks: Ranks, argv: list[str]) -> Run:
    """The stored run of one model, computed first if it is not there."""
    question = as_mapping(config) | dict(analysis.uses(config)) | dict(asked.beside)
    key = runs.run_key(analysis.name, analysis.version, question, mllm.fingerprint, data.fingerprint)
    folder = runs.folder_of(where.output_dir, analysis.name, key)
    if not folder.exists():
        part = {name: value for name, value in question.items() if name != "limit"}
        parts = [analysis.name, analysis.version, part, mllm.fingerprint, libraries()]
        chunks = Chunks(where.output_dir / CHUNKS / analysis.name, parts, ranks, folder.exists)
        started = time.monotonic()
        try:
            result = analysis.run(config, Context(mllm, data, where.batch_size, asked.label, chunks))
        except RunStoredError:
            return runs.load(folder)
        record = {
            "analysis": analysis.name,
            "version": analysis.version,
            "label": asked.label,
            "model": asked.name,
            "revision": revision_of(asked.name, where),
            "commit": getattr(mllm.config, "_commit_hash", None),
            "model_fingerprint": mllm.fingerprint,
            "data": data.name,
            "data_fingerprint": data.fingerprint,
            "left_out": [*data.left_out, *result.left_out],
            "config": as_mapping(config),
            "seed": config.seed,
            "device": str(mllm.device),
            "processes": ranks.count,
            "seconds": round(time.monotonic() - started, 2),
            **result.record,
            **runs.environment(argv),
        }
        runs.save(Run(key, record, result.tables, result.tensors), where.output_dir)
        chunks.clean()
    return runs.load(folder)


def revision_of(name: str, where: Where) -> str | None:
    """The revision of a model, which a folder has none of."""
    return None if is_folder(name) else where.revision


def _device(name: str, ranks: Ranks) -> str:
    """The device of this rank: each takes a GPU of its machine where they are to share them."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return f"cuda:{ranks.local % gpus}" if ranks.count > 1 and gpus and name in ("auto", "cuda") else name
