"""Compare metrics of tensors on the device with the same metrics on the CPU in float64."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.harness import Bench
from workbench.metrics import METRICS
from workbench.stats import null_scores, permutations

# absolute errors; in float32 two nearly equal neighbors may be exchanged
TOLERANCES = {"float64": 1e-9, "float32": 1e-3}


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    """Return Gaussian rows of a shape, and the same rows with noise."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return x, x + torch.randn(*shape, generator=generator, dtype=torch.float64)


def run(bench: Bench) -> None:
    """Compare scores and nulls of every metric, on one large problem and on many small ones."""
    shapes = {"n 3000": (3000, 64), "8 images of n 64": (8, 64, 48)}
    for size, shape in shapes.items():
        x, y = pair(*shape)
        orders = permutations(shape[-2], 8, (0,))
        orders = orders[:, None].expand(-1, shape[0], -1) if len(shape) == 3 else orders
        for name in METRICS:
            if name in ("rsa", "cka") and len(shape) == 2:
                continue  # n x n in float64, ranked on the CPU: too large; the small problems suffice
            with bench.guard(f"{name}, {size}"):
                wanted = _scores(name, x, y, orders)
                for setting, tolerance in TOLERANCES.items():
                    dtype = getattr(torch, setting)
                    with bench.guard(f"{name}, {size}", setting=setting):
                        results = _scores(name, x.to(bench.device, dtype), y.to(bench.device, dtype), orders)
                        titles = (f"{name}, {size}", f"{name}, {size}, null")
                        for what, result, expected in zip(titles, results, wanted, strict=True):
                            bench.error(what, float(np.abs(result - expected).max()), tolerance, setting=setting)


def _scores(name: str, x: Tensor, y: Tensor, orders: Tensor) -> tuple[np.ndarray, np.ndarray]:
    metric = METRICS.get(name)
    one, other = metric.prepare(x, 10, "x", 0), metric.prepare(y, 10, "y", 1)
    return metric.score(one, other).cpu().numpy(), null_scores(metric, [one], other, orders)[:, 0]
