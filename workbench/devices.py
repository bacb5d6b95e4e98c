"""Check the name of a device before anything is loaded."""

from __future__ import annotations

import difflib
import re

import torch

from workbench.errors import ConfigError

NICKNAMES = {"gpu": "cuda", "nvidia": "cuda", "metal": "mps", "apple": "mps"}


def check_device(name: str) -> str:
    """Return the name of the torch device that `name` means; `auto` is the GPU if there is one, else the CPU.

    Raises:
        ConfigError: torch has no device of this name, or this machine has none of its kind.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return "cuda" if gpus else "cpu"
    if name in ("cpu", "cpu:0") or (name == "cuda" and gpus):  # accelerate numbers the CPU too
        return name
    kind, number = name.partition(":")[::2]
    if kind == "cuda" and re.fullmatch(r"cuda(:\d+)?", name):
        if not gpus:
            raise ConfigError(f"device is {name}: expected cpu, since no GPU is visible here")
        if int(number) >= gpus:
            raise ConfigError(
                f"device is {name}: expected {'cuda:0' if gpus == 1 else f'cuda:0 to cuda:{gpus - 1}'}, since {gpus}"
                " GPUs are visible here"
            )
        return name
    if re.fullmatch(r"mps(:0)?|xpu(:\d+)?", name):
        if not (torch.backends.mps.is_available() if kind == "mps" else torch.xpu.is_available()):
            raise ConfigError(
                f"device is {name}: expected {'cuda' if gpus else 'cpu'}, since there is no {kind} on this machine"
            )
        return name
    near = NICKNAMES.get(name.lower()) or next(
        iter(difflib.get_close_matches(name.lower(), ("auto", "cpu", "cuda", "mps", "xpu"), n=1)), None
    )
    raise ConfigError(
        f"unknown device '{name}': expected auto, cpu, cuda, cuda:NUMBER, mps or"
        f" xpu{f'; did you mean {near!r}?' if near else ''}"
    )
