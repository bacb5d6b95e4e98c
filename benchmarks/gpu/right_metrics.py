"""Metrics of tensors on the device against the same on the CPU in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.harness import Bench
from workbench.metrics import METRICS
from workbench.stats import null_scores, permutations

# absolute; in float32 a pair of nearly equal neighbors may change places
TOLERANCES = {"float64": 1e-9, "float32": 1e-3}


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    """Gaussian rows, and the same with noise."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return x, x + torch.randn(*shape, generator=generator, dtype=torch.float64)


def run(bench: Bench) -> None:
    """Scores and nulls of every metric, of one large problem and of many small ones."""
    shapes = {"n 3000": (3000, 64), "8 images of n 64": (8, 64, 48)}
    for size, shape in shapes.items():
        x, y = pair(*shape)
        orders = permutations(shape[-2], 8, (0,))
        orders = orders[:, None].expand(-1, shape[0], -1) if len(shape) == 3 else orders
        for name in METRICS:
            if name in ("rsa", "cka") and len(shape) == 2:
                continue  # n x n in float64, ranked on the CPU: the small problems show it
            with bench.guard(f"{name}, {size}"):
                wanted = _scores(name, x, y, orders)
                for setting, tolerance in TOLERANCES.items():
                    dtype = getattr(torch, setting)
                    with bench.guard(f"{name}, {size}", setting=setting):
                        found = _scores(name, x.to(bench.device, dtype), y.to(bench.device, dtype), orders)
                        for what, own, other in zip(
                            (f"{name}, {size}", f"{name}, {size}, null"), found, wanted, strict=True
                        ):
                            bench.error(what, float(np.abs(own - other).max()), tolerance, setting=setting)


def _scores(name: str, x: Tensor, y: Tensor, orders: Tensor) -> tuple[np.ndarray, np.ndarray]:
    metric = METRICS.get(name)
    prepare: Callable[[Tensor, str], Any] = lambda values, side: metric.prepare(values, 10, side)  # noqa: E731
    own, other = prepare(x, "x"), prepare(y, "y")
    return metric.score(own, other).cpu().numpy(), null_scores(metric, [own], other, orders)[:, 0]
