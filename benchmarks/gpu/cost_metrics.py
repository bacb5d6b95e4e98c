"""Time and memory of CKNNA for many layers and VFMs, and for a pair of up to a million rows.

The reference is the dense definition, where its n x n kernels fit into memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.cknna import dense_cknna
from benchmarks.gpu.cost_reading import extra_memory, seconds
from benchmarks.gpu.harness import Bench
from workbench.metrics import METRICS, cknna

K, LAYERS, VFMS, MODELS = 10, 33, 4, 2
WIDTHS = 4096, 768


def run(bench: Bench) -> None:
    """Measure the sweep over layers, VFMs and models, and single pairs of growing size."""
    with bench.guard("CKNNA, layers x VFMs x models"):
        _sweep(bench)
    rows = (1_000, 2_000) if bench.toy else (20_000, 100_000, 1_000_000)
    rate = 0.0
    for n in rows:
        expected = n * n * rate
        setting = f"n {n:,}, d 1024"
        if bench.time_for("CKNNA of one pair", 1.1 * expected + 5 * (not bench.toy), setting):
            with bench.guard("CKNNA of one pair", setting=setting):
                rate = _pair(bench, n, setting) / (n * n)


def _pair(bench: Bench, n: int, setting: str) -> float:
    generator = torch.Generator(bench.device).manual_seed(0)
    x = torch.randn(n, 1024, generator=generator, device=bench.device)
    y = x + torch.randn(n, 1024, generator=generator, device=bench.device)
    cknna(x[:2000], y[:2000], k=K)
    score = 0.0

    def once() -> None:
        nonlocal score
        score = cknna(x, y, k=K)

    if bench.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    taken = seconds(bench, once)
    figures = {"s": taken, "score": score}
    if bench.device == "cuda":
        figures["extra GB"] = (torch.cuda.max_memory_allocated() - before) / 1e9
    figures["input GB"] = 2 * x.nbytes / 1e9
    if n <= 20_000:
        dense = 0.0

        def reference() -> None:
            nonlocal dense
            dense = dense_cknna(x, y, K)

        figures["dense s"] = seconds(bench, reference)
        if bench.device == "cuda":
            figures["dense extra GB"] = extra_memory(reference)
        bench.error("CKNNA of one pair against the dense definition", abs(score - dense), 1e-5, setting=setting)
    bench.add("CKNNA of one pair", figures, setting=setting)
    return taken


def _sweep(bench: Bench) -> None:
    """Time CKNNA of every layer of every model with every VFM."""
    n, layers = (256, 4) if bench.toy else (2048, LAYERS)
    generator = torch.Generator(bench.device).manual_seed(0)
    metric = METRICS.get("cknna")

    def rows(width: int) -> Tensor:
        return torch.randn(n, width, generator=generator, device=bench.device)

    hidden = [[rows(WIDTHS[0]) for _ in range(layers)] for _ in range(MODELS)]
    patches = [rows(WIDTHS[1]) for _ in range(VFMS)]

    def ours() -> list[float]:
        near = [metric.prepare(y, K, "y", 1) for y in patches]
        prepared = (metric.prepare(layer, K, "x", 0) for layers_of_model in hidden for layer in layers_of_model)
        return [float(metric.score(x, y)) for x in prepared for y in near]

    def dense(pairs: int) -> list[float]:
        all_pairs = [(x, y) for layers_of_model in hidden for x in layers_of_model for y in patches]
        return [dense_cknna(x, y, K) for x, y in all_pairs[:pairs]]

    some, pairs = 8, layers * VFMS * MODELS
    scores, wanted = ours(), dense(some)
    figures = {"s": seconds(bench, ours), "dense s": seconds(bench, lambda: dense(some)) * pairs / some}
    figures |= {"difference": max(abs(a - b) for a, b in zip(scores, wanted, strict=False))}
    passed = figures["difference"] <= 1e-5
    bench.add(
        f"CKNNA, {layers} layers x {VFMS} VFMs x {MODELS} models",
        figures,
        setting=f"n {n}",
        tolerance="difference <= 1e-05",
        passed=passed,
    )
