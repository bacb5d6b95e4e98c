"""Speed of CKNNA over many layers and VFMs against the dense definition computed anew for each pair, alternating in one
run.

python -m benchmarks.sweep                # 33 layers x 4 VFMs x 2 models at n = 2048; 100 images x 33 layers x 4 VFMs
                                          at n = 576
python -m benchmarks.sweep --width 4096   # of the model; 1024 by default
python -m benchmarks.sweep --small        # seconds, to see that it works

The dense computation is timed on a few pairs and scaled to all of them, and so is ours within images on a few images;
the output says on how many.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from benchmarks.cknna import dense_cknna
from workbench.metrics import METRICS

K, VFM_WIDTH = 10, 768
T = TypeVar("T")


def representations(n: int, width: int, layers: int, vfms: int, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Layers that drift away from one another, and VFMs that share something with them."""
    generator = torch.Generator().manual_seed(seed)
    hidden = [torch.randn(n, width, generator=generator)]
    while len(hidden) < layers:
        hidden.append(hidden[-1] + 0.3 * torch.randn(n, width, generator=generator))
    shared = hidden[0][:, : min(width, VFM_WIDTH)]
    return hidden, [shared + torch.randn(*shared.shape, generator=generator) for _ in range(vfms)]


@dataclass
class Tally:
    """Wall and CPU seconds of both sides, how many pairs they are for, and the largest disagreement of a score."""

    ours: list[float] = field(default_factory=lambda: [0.0, 0.0])
    dense: list[float] = field(default_factory=lambda: [0.0, 0.0])
    ours_pairs: int = 0
    dense_pairs: int = 0
    apart: float = 0.0

    def report(self, title: str, pairs: int) -> None:
        """Print both sides scaled to `pairs`; CPU seconds of all threads are what a busy machine leaves comparable."""
        ours = [seconds / self.ours_pairs * pairs for seconds in self.ours]
        dense = [seconds / self.dense_pairs * pairs for seconds in self.dense]
        print(f"{title}\n                wall        CPU")
        print(f"  ours  {ours[0]:10.1f} {ours[1]:10.1f} s, timed on {self.ours_pairs:,} of {pairs:,} pairs")
        print(
            f"  dense {dense[0]:10.1f} {dense[1]:10.1f} s, timed on {self.dense_pairs:,} of {pairs:,} pairs and scaled"
        )
        print(
            f"  ratio {dense[0] / ours[0]:10.1f} {dense[1] / ours[1]:10.1f}, largest difference of a score"
            f" {self.apart:.1e}",
            flush=True,
        )


def timed(seconds: list[float], function: Callable[[], T]) -> T:
    """Call `function` and add its wall and CPU time."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = function()
    seconds[0], seconds[1] = seconds[0] + time.perf_counter() - wall, seconds[1] + time.process_time() - cpu
    return found


def measure(tally: Tally, hidden: list[Tensor], patches: list[Tensor], block: int = 8) -> None:
    """Score every layer against every VFM (image, n, d), and after each block of layers one pair of the first image by
    the dense computation."""
    metric = METRICS.get("cknna")
    near = timed(tally.ours, lambda: [metric.prepare(y, K, "y") for y in patches])
    for start in range(0, len(hidden), block):
        layers = hidden[start : start + block]
        table = timed(
            tally.ours,
            lambda own=layers: [[metric.score(x, y) for y in near] for x in (metric.prepare(v, K, "x") for v in own)],
        )
        vfm = (start // block) % len(patches)
        direct = timed(tally.dense, lambda x=layers[-1][0], y=patches[vfm][0]: dense_cknna(x, y, K))
        tally.dense_pairs += 1
        tally.apart = max(tally.apart, abs(direct - float(table[-1][vfm][0])))
    tally.ours_pairs += len(hidden[0]) * len(hidden) * len(patches)


def compare(title: str, *, n: int, width: int, batches: int, images: int, layers: int, vfms: int, total: int) -> None:
    """Measure `batches` of so many images each, of `total` that the report is scaled to."""
    tally = Tally()
    warm = representations(n, width, 1, 1, seed=0)
    dense_cknna(warm[0][0], warm[1][0], K)
    for batch in range(batches):
        samples = [representations(n, width, layers, vfms, seed=batch * images + number) for number in range(images)]
        hidden, patches = (
            [torch.stack(side) for side in zip(*sides, strict=True)] for sides in zip(*samples, strict=True)
        )
        del samples
        measure(tally, hidden, patches)
    tally.report(f"{title}, n = {n}, d = {width} and {min(width, VFM_WIDTH)}", total * layers * vfms)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024, help="of the model's hidden states")
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    print(f"threads {torch.get_num_threads()}, k = {K}")
    if given.small:
        compare("4 layers x 2 VFMs x 2 models", n=256, width=64, batches=2, images=1, layers=4, vfms=2, total=2)
        compare(
            "8 images x 4 layers x 2 VFMs within the image",
            n=64,
            width=64,
            batches=1,
            images=4,
            layers=4,
            vfms=2,
            total=8,
        )
        return
    compare("33 layers x 4 VFMs x 2 models", n=2048, width=given.width, batches=2, images=1, layers=33, vfms=4, total=2)
    compare(
        "100 images x 33 layers x 4 VFMs within the image",
        n=576,
        width=given.width,
        batches=2,
        images=8,
        layers=33,
        vfms=4,
        total=100,
    )


if __name__ == "__main__":
    main()
