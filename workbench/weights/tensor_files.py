"""Tensors of a checkpoint, and their shapes without reading them."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from workbench.errors import WeightsError, one_line
from workbench.weights.model_files import (
    INDEX,
    PICKLE,
    SAFETENSORS,
    WeightFiles,
    count_and_names,
    shards_of,
    tensor_entries,
    weight_files,
)

Tensors = dict[str, Tensor]
_DTYPES = {  # by their names in safetensors
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "BOOL": torch.bool,
    **{f"I{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": getattr(torch, f"uint{bits}") for bits in (8, 16, 32, 64)},
}


def read_tensors(path: Path) -> Tensors:
    """Return the tensors of one safetensors file or pickle (`.bin`), mapped from the disk where the format allows it.

    Raises:
        WeightsError: the file is damaged, is not what its name says, or holds anything but named tensors.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise WeightsError(
                f"{path} is not a safetensors file ({one_line(error, 80)}) and was not opened: expected what its name"
                " says"
            ) from error
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            # the format before torch 1.6 cannot be mapped
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} was refused: it holds more than plain tensors, and opening it could run code; expected a state"
            " dict"
        ) from error
    except FileNotFoundError as error:
        raise WeightsError(f"folder {path.parent} holds no {path.name}: expected that file in it") from error
    except Exception as error:  # torch raises many unrelated types on damaged files
        raise WeightsError(
            f"{path} could not be read ({type(error).__name__}): expected a state dict written by torch.save"
        ) from error
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise WeightsError(f"{path} was refused: expected a state dict of names and tensors")
    return dict(content)


def shapes_of(weights: WeightFiles) -> Tensors:
    """Return every tensor of a model on the meta device: names, shapes and dtypes without the values.

    They come from the headers of safetensors files, or from the pickles.

    Raises:
        WeightsError: a file is not what its name says.
    """
    tensors: Tensors = {}
    for file in weights.files:
        if weights.pickled:
            tensors |= {name: value.to("meta") for name, value in read_tensors(file).items()}
            continue
        for name, entry in tensor_entries(file).items():
            if entry["dtype"] not in _DTYPES:
                raise WeightsError(
                    f"{file} holds '{name}' in the dtype {entry['dtype']}: expected one of {', '.join(_DTYPES)}"
                )
            tensors[name] = torch.empty(entry["shape"], dtype=_DTYPES[entry["dtype"]], device="meta")
    return tensors


def read_model(folder: Path) -> Tensors:
    """Return the tensors of a model folder; safetensors are preferred to pickles, and shards are joined.

    Raises:
        WeightsError: there are no weights, a shard is missing, or a shard lacks a tensor that the index names.
    """
    weights = weight_files(folder)
    tensors: Tensors = {}
    for file in weights.files:
        tensors |= read_tensors(file)
    whole = folder / (PICKLE if weights.pickled else SAFETENSORS)
    index = folder / f"{whole.name}{INDEX}"
    if not whole.exists() and (missing := shards_of(index).keys() - tensors.keys()):
        raise WeightsError(f"{index} names {count_and_names(missing)} that its shards do not hold: download them again")
    return tensors
