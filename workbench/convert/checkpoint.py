"""Tensors of checkpoints from other code: merge LoRA adapters into their base, compare names and shapes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from workbench.errors import WeightsError
from workbench.weights.model_files import count_and_names, find_part, read_json
from workbench.weights.tensor_files import Tensors, read_tensors

_LORA_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")
_LORA_PLAIN = {  # the values of plain LoRA, which is all that is read here
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "init_lora_weights": (True, False, "gaussian", None),
}
# settings that plain LoRA leaves empty
_LORA_EMPTY = ("rank_pattern", "alpha_pattern", "modules_to_save", "layer_replication")


def read_lora(folder: Path) -> tuple[Tensors, float]:
    """Return the tensors of a LoRA adapter, and the factor of B @ A: alpha / r, or alpha / sqrt(r) with rslora.

    Raises:
        WeightsError: there is no adapter, or it is of another kind than plain LoRA or rslora.
    """
    settings = read_json(folder / "adapter_config.json")
    special = [
        f"{key}={settings[key]!r}"
        for key, plain in _LORA_PLAIN.items()
        if key in settings and settings[key] not in plain
    ]
    special += [f"{key}={settings[key]!r}" for key in _LORA_EMPTY if settings.get(key)]
    if special:
        raise WeightsError(
            f"{folder / 'adapter_config.json'} asks for {', '.join(special)}: expected plain LoRA or rslora, with one"
            " rank"
        )
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise WeightsError(
            f"{folder / 'adapter_config.json'} has r={rank!r} and lora_alpha={alpha!r}: expected two numbers, r at"
            " least 1"
        )
    file = find_part(folder, "adapter_model")
    if file is None:
        raise WeightsError(
            f"folder {folder} holds no adapter_model.safetensors or adapter_model.bin beside its adapter_config.json"
        )
    adapter = read_tensors(file)
    if wrong := {
        name: tuple(value.shape) for name, value in adapter.items() if "lora_" in name and rank not in value.shape
    }:
        raise WeightsError(
            f"{file} holds tensors without the rank r={rank} of adapter_config.json: {count_and_names(wrong)}"
        )
    return adapter, alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def merge_lora(base: Tensors, adapter: Tensors, factor: float) -> None:
    """Replace each adapted matrix W of `base` by W + factor * B @ A, computed in float32 and cast back.

    Raises:
        WeightsError: A or B of a matrix is missing, the base lacks the matrix, or the shapes do not fit.
    """
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, value in adapter.items():
        match = _LORA_KEY.fullmatch(name)
        if match is None:
            raise WeightsError(
                f"adapter tensor '{name}' is not one of LoRA's: expected base_model.model.<matrix>.lora_A.weight or"
                " .lora_B.weight"
            )
        pairs.setdefault(f"{match[1]}.weight", {})[match[2]] = value
    if half := {name for name, pair in pairs.items() if len(pair) == 1}:
        raise WeightsError(f"the adapter holds only one of lora_A and lora_B for {count_and_names(half)}")
    if unknown := pairs.keys() - base.keys():
        raise WeightsError(f"the adapter changes {count_and_names(unknown)} that the base does not hold")
    for name, pair in pairs.items():
        weight, a, b = base[name], pair["A"].float(), pair["B"].float()
        if b.ndim != 2 or a.ndim != 2 or b.shape[1] != a.shape[0] or (b.shape[0], a.shape[1]) != tuple(weight.shape):
            raise WeightsError(
                f"the adapter's lora_B {tuple(b.shape)} times lora_A {tuple(a.shape)} does not fit '{name}' of shape"
                f" {tuple(weight.shape)}"
            )
        base[name] = (weight.float() + factor * (b @ a)).to(weight.dtype)


def check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, torch.Size], where: str) -> None:
    """Check the names and shapes of tensors, and that they are floating point.

    Args:
        where: they were read, for the error.

    Raises:
        WeightsError: tensors are missing, too many, of another shape or integers; the message counts them.
    """
    missing, extra = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    shapes = {
        name: f"{tuple(tensors[name].shape)} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    }
    faults = []
    if missing:
        faults.append(f"misses {count_and_names(missing)}")
    if extra:
        faults.append(f"has {count_and_names(extra)} too many")
    if shapes:
        first = next(iter(shapes))
        faults.append(f"has {count_and_names(shapes)} of another shape ('{first}' is {shapes[first]})")
    if integers := {name for name, value in tensors.items() if not value.is_floating_point()}:
        faults.append(f"has {count_and_names(integers)} that hold integers, as a quantized model does")
    if faults:
        raise WeightsError(f"{where} does not fit its config.json: it {', and it '.join(faults)}")
