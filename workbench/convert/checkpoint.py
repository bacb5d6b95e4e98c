"""Reading checkpoints that others wrote: safetensors, pickles of plain tensors, shards, hub ids, and LoRA adapters merged into their base.

Nothing here runs code from a file: a pickle is read with `weights_only=True` and refused if it needs more. Tensors stay mapped from disk until they are used.
"""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from workbench.errors import WeightsError

Tensors = dict[str, Tensor]
_FORMATS = (("model", "safetensors"), ("pytorch_model", "bin"))
_SMALL_FILES = ["*.json", "*.txt", "tokenizer.model"]
_LORA_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")
_LORA_PLAIN = {"peft_type": ("LORA",), "use_dora": (False, None), "fan_in_fan_out": (False, None), "init_lora_weights": (True, False, "gaussian", None)}
_LORA_EMPTY = ("rank_pattern", "alpha_pattern", "modules_to_save", "layer_replication")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        WeightsError: no such file, or something else in it.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise WeightsError(f"folder {path.parent} holds no {path.name}") from error
    except ValueError as error:
        raise WeightsError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds {type(content).__name__}, expected an object with keys and values")
    return content


def read_tensors(path: Path) -> Tensors:
    """Map the tensors of one safetensors file or pickle (`.bin`) into memory.

    Raises:
        WeightsError: the file is damaged, is not what its name says, or holds anything but named tensors.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise WeightsError(f"{path} is not a safetensors file ({error}); a file of another kind under this name is not opened") from error
    try:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            found = torch.load(path, map_location="cpu", weights_only=True)  # the format before torch 1.6 cannot be mapped
    except pickle.UnpicklingError as error:
        raise WeightsError(f"{path} was refused: it holds more than plain tensors, and opening it could run code; expected a state dict") from error
    except FileNotFoundError as error:
        raise WeightsError(f"folder {path.parent} holds no {path.name}") from error
    except Exception as error:  # torch raises many unrelated types on damaged files
        raise WeightsError(f"{path} could not be read ({type(error).__name__}); expected a state dict written by torch.save") from error
    if not isinstance(found, Mapping) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items()):
        raise WeightsError(f"{path} was refused: expected a state dict of names and tensors")
    return dict(found)


def find_part(folder: Path, stem: str) -> Path | None:
    """`stem.safetensors` or else `stem.bin` in `folder`, or None."""
    return next((file for file in (folder / f"{stem}.safetensors", folder / f"{stem}.bin") if file.exists()), None)


def has_model(folder: Path) -> bool:
    """Whether `folder` holds a whole model's weights, in one file or in shards."""
    return any((folder / f"{stem}.{suffix}{end}").exists() for stem, suffix in _FORMATS for end in ("", ".index.json"))


def read_model(folder: Path) -> Tensors:
    """The tensors of a model folder; safetensors are preferred to pickles, and shards are joined by their index.

    Raises:
        WeightsError: no weights, a missing shard, or a tensor that the index names and its shard lacks.
    """
    for stem, suffix in _FORMATS:
        whole, index = folder / f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
        if whole.exists():
            return read_tensors(whole)
        if index.exists():
            return _read_shards(index)
    raise WeightsError(f"folder {folder} holds no weights: expected model.safetensors or pytorch_model.bin, whole or in shards with an index")


def _read_shards(index: Path) -> Tensors:
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(file, str) and Path(file).name == file for file in named.values()):
        raise WeightsError(f"{index} is not an index of shards: expected a weight_map from tensor names to files beside it")
    found: Tensors = {}
    for file in sorted(set(named.values())):
        if not (index.parent / file).exists():
            raise WeightsError(f"shard {index.parent / file} is missing: {index.name} says that it holds {sum(f == file for f in named.values())} tensors")
        found |= read_tensors(index.parent / file)
    if absent := named.keys() - found.keys():
        raise WeightsError(f"{index} names {listed(absent)} that its shards do not hold")
    return found


def locate(name: str, what: str, option: str) -> Path:
    """The folder of `name`: a local one, or a hub id's snapshot (pickles are fetched only where there are no safetensors).

    Raises:
        WeightsError: neither; says how to give a local folder.
    """
    if not name:
        raise WeightsError(f"the folder does not say which {what} it belongs to: give a folder or hub id with {option}")
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=[*_SMALL_FILES, "model*.safetensors"]))
        if not has_model(folder):
            folder = Path(snapshot_download(name, allow_patterns=[*_SMALL_FILES, "pytorch_model*.bin"]))
    except Exception as error:  # the hub client raises many unrelated types when it is offline
        raise WeightsError(
            f"{what} '{name}' is neither a folder nor a hub id within reach ({type(error).__name__}); give a local folder with {option}"
        ) from error
    return folder


def read_lora(folder: Path) -> tuple[Tensors, float]:
    """The adapter's tensors, and the factor before B @ A: alpha / r, or alpha / sqrt(r) with rslora.

    Raises:
        WeightsError: no adapter, or a variant other than plain LoRA and rslora.
    """
    settings = read_json(folder / "adapter_config.json")
    odd = [f"{key}={settings[key]!r}" for key, plain in _LORA_PLAIN.items() if key in settings and settings[key] not in plain]
    odd += [f"{key}={settings[key]!r}" for key in _LORA_EMPTY if settings.get(key)]
    if odd:
        raise WeightsError(f"{folder / 'adapter_config.json'} asks for {', '.join(odd)}: expected plain LoRA or rslora, with one rank")
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise WeightsError(f"{folder / 'adapter_config.json'} has r={rank!r} and lora_alpha={alpha!r}: expected two numbers, r from 1")
    file = find_part(folder, "adapter_model")
    if file is None:
        raise WeightsError(f"folder {folder} holds no adapter_model.safetensors or adapter_model.bin beside its adapter_config.json")
    adapter = read_tensors(file)
    if wrong := {name: tuple(value.shape) for name, value in adapter.items() if "lora_" in name and rank not in value.shape}:
        raise WeightsError(f"{file} holds tensors without the rank r={rank} of adapter_config.json: {listed(wrong)}")
    return adapter, alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def merge_lora(base: Tensors, adapter: Tensors, factor: float) -> None:
    """Replace each adapted matrix of `base` by W + factor * B @ A, computed in float32 and cast back.

    Raises:
        WeightsError: a factor without its partner, without a matrix to change, or with shapes that do not fit.
    """
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, value in adapter.items():
        match = _LORA_KEY.fullmatch(name)
        if match is None:
            raise WeightsError(f"adapter tensor '{name}' is not one of LoRA's: expected base_model.model.<matrix>.lora_A.weight or .lora_B.weight")
        pairs.setdefault(f"{match[1]}.weight", {})[match[2]] = value
    if half := {name for name, pair in pairs.items() if len(pair) == 1}:
        raise WeightsError(f"the adapter holds only one of lora_A and lora_B for {listed(half)}")
    if unknown := pairs.keys() - base.keys():
        raise WeightsError(f"the adapter changes {listed(unknown)} that the base does not hold")
    for name, pair in pairs.items():
        weight, a, b = base[name], pair["A"].float(), pair["B"].float()
        if b.ndim != 2 or a.ndim != 2 or b.shape[1] != a.shape[0] or (b.shape[0], a.shape[1]) != tuple(weight.shape):
            raise WeightsError(f"the adapter's lora_B {tuple(b.shape)} times lora_A {tuple(a.shape)} does not fit '{name}' of shape {tuple(weight.shape)}")
        base[name] = (weight.float() + factor * (b @ a)).to(weight.dtype)


def check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, torch.Size], where: str) -> None:
    """Compare names and shapes.

    Raises:
        WeightsError: tensors are missing, extra or of another shape; one sentence with the first names and the counts.
    """
    missing, extra = expected.keys() - found.keys(), found.keys() - expected.keys()
    shapes = {name: f"{tuple(found[name].shape)} instead of {tuple(shape)}" for name, shape in expected.items() if name in found and found[name].shape != shape}
    wrong = [f"misses {listed(missing)}"] * bool(missing) + [f"has {listed(extra)} too many"] * bool(extra)
    if shapes:
        first = next(iter(shapes))
        wrong.append(f"has {listed(shapes)} of another shape ('{first}' is {shapes[first]})")
    if numbers := {name for name, value in found.items() if not value.is_floating_point()}:
        wrong.append(f"has {listed(numbers)} that hold integers, as a quantised model does")
    if wrong:
        raise WeightsError(f"{where} does not fit its config.json: it {', and it '.join(wrong)}")


def listed(names: Set[str] | Mapping[str, object]) -> str:
    """The count and the first three names, such as "5 tensors (a, b, c, ...)"."""
    first = ", ".join(sorted(names)[:3])
    return f"{len(names)} tensor{'s' * (len(names) != 1)} ({first}{', ...' * (len(names) > 3)})"
