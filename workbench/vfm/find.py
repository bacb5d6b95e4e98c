"""Find and load a VFM by its name: from the catalogue, the hub (`hf:ID`), timm (`timm:NAME`), or a folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from workbench.errors import ConfigError, UnknownNameError, WeightsError
from workbench.models import did_you_mean
from workbench.vfm.base import CATALOGUE, VFM, TeacherNorm, VFMEntry
from workbench.vfm.hf_models import entry_from_folder as transformers_entry
from workbench.vfm.timm_models import entry_from_folder as timm_entry
from workbench.vfm.timm_models import entry_from_name
from workbench.weights.catalogue import CATALOGUE as WEIGHTS
from workbench.weights.catalogue import Weights
from workbench.weights.fetch import weights_folder
from workbench.weights.model_files import SAFETENSORS, check_folder, read_json, weight_files

OWN = "own"  # the model's own vision encoder, where an analysis names VFMs; not an entry of the catalogue


def vfm_label(name: str) -> str:
    """Return how figures and tables call what an analysis compares with: the name of a VFM, or "own encoder"."""
    return "own encoder" if name == OWN else name


def load_vfm(name: str, *, device: str = "cpu", teacher_norm: TeacherNorm = "own") -> VFM:
    """Load the VFM called `name` with real weights, checked against their fingerprint.

    Args:
        name: a catalogue entry, `hf:ID` or `hf:ID@REVISION`, `timm:NAME`, or a folder with config.json and
            model.safetensors.
        teacher_norm: `own`, or `student` to feed it pixels that are normalized for CLIP, as the official code of the
            paper does.

    Raises:
        UnknownNameError: there is no VFM of this name.
        ConfigError: the name is `own`, which is a model's encoder and no VFM.
        WeightsError: the weights are not available, or are not the pinned ones.
    """
    return VFM(find_vfm(name, teacher_norm=teacher_norm), device)


def find_vfms(names: Sequence[str]) -> dict[str, VFMEntry]:
    """Return {name: entry} of the VFMs of an analysis, without the model's own encoder (OWN), as `find_vfm` does."""
    return {name: find_vfm(name, also_known=(OWN,)) for name in names if name != OWN}


def find_vfm(name: str, *, teacher_norm: TeacherNorm = "own", also_known: Sequence[str] = ()) -> VFMEntry:
    """Return the entry that `name` means, without building the network; see `load_vfm`.

    An `hf:ID` is downloaded, because its architecture is in its config.json.

    Args:
        name, teacher_norm: as in `load_vfm`.
        also_known: names that are no VFM, but valid where `name` comes from; a message lists them, too.
    """
    if teacher_norm not in get_args(TeacherNorm):
        raise UnknownNameError("teacher_norm", teacher_norm, get_args(TeacherNorm))
    if name == OWN:
        raise ConfigError(
            "vfm is own, a model's own vision encoder, which an analysis reads together with the model: expected the"
            " name of a VFM here; a training aligns with the encoder by alignment.target: encoder"
        )
    if name in CATALOGUE:
        entry = CATALOGUE.get(name)
    elif match := re.fullmatch(r"hf:([\w.-]*\w[\w.-]*(?:/[\w.-]*\w[\w.-]*)?)(?:@([\w.-]+))?", name):
        _register(Weights(name, licence=f"see https://huggingface.co/{match[1]}", hub=match[1], revision=match[2]))
        entry = _from_folder(name, name)
    elif name.startswith("timm:"):
        entry = entry_from_name(name)
    elif name and Path(name).is_dir():
        folder = Path(name).resolve()
        _check_folder(folder)
        _register(Weights(str(folder), licence="that of the folder's owner", folder=folder))
        entry = _from_folder(name, str(folder))
    else:
        near = did_you_mean(name) if "/" in name and not name.startswith("hf:") else ""
        raise UnknownNameError("VFM", name, [*CATALOGUE, *also_known], also=f"hf:ID, timm:NAME or a folder{near}")
    return replace(entry, teacher_norm=teacher_norm)


def _register(weights: Weights) -> None:
    if weights.name not in WEIGHTS:
        WEIGHTS.add(weights.name, weights)


def _from_folder(name: str, weights: str) -> VFMEntry:
    """Return the entry of a folder: in timm's layout if its config has an `architecture`, else in transformers'."""
    folder = weights_folder(weights)
    config = read_json(folder / "config.json")
    if "architecture" in config:
        return timm_entry(name, weights, folder, config)
    return transformers_entry(name, weights, folder)


def _check_folder(folder: Path) -> None:
    """Check that a folder of the user has one complete model.safetensors beside its configuration.

    Raises:
        WeightsError: it has not.
    """
    check_folder(folder)
    files = weight_files(folder)
    if [file.name for file in files.files] != [SAFETENSORS]:
        how = "pickled" if files.pickled else "in shards"
        raise WeightsError(
            f"folder {folder} holds its weights {how} ({files.files[0].name}): expected one {SAFETENSORS}, as"
            " save_pretrained writes it"
        )
