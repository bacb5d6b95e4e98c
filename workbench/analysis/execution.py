"""Running an analysis on models and data, and storing what comes out."""

from __future__ import annotations

import dataclasses
import time

from workbench import runs
from workbench.analysis.declaration import Analysis, Context, DataOptions, Where
from workbench.data import load_data
from workbench.files import check_can_make
from workbench.mllm import MLLM
from workbench.models import check_revision, is_folder, named_models
from workbench.runs import Run
from workbench.yaml_config import as_mapping


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
