"""Speed and memory of CKNNA compared with its dense definition, in one run.

python -m benchmarks.cknna            # n = 100,000 for memory, then n = 8192 against dense (about 5 minutes on 2 cores)
python -m benchmarks.cknna --small    # a check that it works, in seconds
"""

from __future__ import annotations

import resource
import sys
import time

import torch
from torch import Tensor

from workbench.metrics import cknna


def dense_cknna(x: Tensor, y: Tensor, k: int) -> float:
    """Compute CKNNA by its definition, with n x n kernels, masks and matrix products: the reference."""
    n = len(x)
    kernels = [rows @ rows.T for rows in (torch.nn.functional.normalize(v, dim=-1) for v in (x, y))]
    masks = []
    for kernel in kernels:
        nearest = kernel.clone().fill_diagonal_(-torch.inf).topk(k, dim=1).indices
        masks.append(torch.zeros_like(kernel).scatter_(1, nearest, 1.0))

    def hsic(a: Tensor, b: Tensor) -> Tensor:
        return ((a * b.T).sum() + a.sum() * b.sum() / ((n - 1) * (n - 2)) - 2 * (a @ b).sum() / (n - 2)) / (n * (n - 3))

    both = masks[0] * masks[1]
    self_terms = [hsic(mask * kernel, mask * kernel) for mask, kernel in zip(masks, kernels, strict=True)]
    return float(hsic(both * kernels[0], both * kernels[1]) / (self_terms[0] * self_terms[1]).sqrt())


def pair(n: int, d: int) -> tuple[Tensor, Tensor]:
    """Return n Gaussian rows of width d, and the same rows with noise."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator)
    return x, x + torch.randn(n, d, generator=generator)


def main(argv: list[str]) -> None:
    """Measure and print memory and speed."""
    n, d, k, large = (512, 64, 10, 4096) if "--small" in argv else (8192, 768, 10, 100_000)
    x, y = pair(large, d)
    start = time.perf_counter()
    score = cknna(x, y, k=k)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # before the dense reference is built
    print(f"threads {torch.get_num_threads()}, d = {d}, k = {k}")
    print(
        f"n = {large:,}: {seconds:.1f} s, peak memory of the process {peak:.2f} GiB (inputs {2 * x.nbytes / 2**30:.2f}"
        f" GiB), score {score:.4f}"
    )
    x, y = pair(n, d)
    times, scores = {}, {}
    for name, function, repeats in (("ours", lambda: cknna(x, y, k=k), 3), ("dense", lambda: dense_cknna(x, y, k), 1)):
        if name == "ours":
            function()  # warms up
        start = time.perf_counter()
        for _ in range(repeats):
            scores[name] = function()
        times[name] = (time.perf_counter() - start) / repeats
    ratio = times["dense"] / times["ours"]
    print(
        f"n = {n:,}: ours {times['ours']:.2f} s, dense {times['dense']:.2f} s, ratio {ratio:.1f}, difference"
        f" {abs(scores['ours'] - scores['dense']):.1e}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
