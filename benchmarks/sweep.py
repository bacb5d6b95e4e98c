"""Speed of CKNNA over many layers and VFMs, compared with the dense definition for each pair, alternating in one run.

python -m benchmarks.sweep                # 33 layers x 4 VFMs x 2 models at n = 2048; 100 images x 33 layers x 4 VFMs
                                          at n = 576
python -m benchmarks.sweep --width 4096   # width of the model's hidden states; 1024 by default
python -m benchmarks.sweep --small        # a check that it works, in seconds

The dense computation is timed on a few pairs and scaled to all of them; within images, ours is timed on a few images
and scaled too. The output says how many pairs were timed.
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
    """Draw layers that drift away from one another, and VFMs that share a part of the first layer."""
    generator = torch.Generator().manual_seed(seed)
    hidden = [torch.randn(n, width, generator=generator)]
    while len(hidden) < layers:
        hidden.append(hidden[-1] + 0.3 * torch.randn(n, width, generator=generator))
    shared = hidden[0][:, : min(width, VFM_WIDTH)]
    return hidden, [shared + torch.randn(*shared.shape, generator=generator) for _ in range(vfms)]


@dataclass
class Tally:
    """Times of both computations and the largest difference between their scores.

    Attributes:
        ours, dense: wall and CPU seconds.
        ours_pairs, dense_pairs: number of pairs that were timed.
        difference: largest absolute difference of a score.
    """

    ours: list[float] = field(default_factory=lambda: [0.0, 0.0])
    dense: list[float] = field(default_factory=lambda: [0.0, 0.0])
    ours_pairs: int = 0
    dense_pairs: int = 0
    difference: float = 0.0

    def report(self, title: str, pairs: int) -> None:
        """Print both times scaled to `pairs`; on a busy machine only the CPU seconds of all threads are comparable."""
        ours = [seconds / self.ours_pairs * pairs for seconds in self.ours]
        dense = [seconds / self.dense_pairs * pairs for seconds in self.dense]
        print(f"{title}\n                wall        CPU")
        print(f"  ours  {ours[0]:10.1f} {ours[1]:10.1f} s, timed on {self.ours_pairs:,} of {pairs:,} pairs")
        print(
            f"  dense {dense[0]:10.1f} {dense[1]:10.1f} s, timed on {self.dense_pairs:,} of {pairs:,} pairs and scaled"
        )
        print(
            f"  ratio {dense[0] / ours[0]:10.1f} {dense[1] / ours[1]:10.1f}, largest difference of a score"
            f" {self.difference:.1e}",
            flush=True,
        )


def timed(seconds: list[float], function: Callable[[], T]) -> T:
    """Call `function` and add its wall and CPU time to `seconds`."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    seconds[0], seconds[1] = seconds[0] + time.perf_counter() - wall, seconds[1] + time.process_time() - cpu
    return result


def measure(tally: Tally, hidden: list[Tensor], patches: list[Tensor], block: int = 8) -> None:
    """Score every layer against every VFM, both (image, n, d), and some pairs by the dense computation.

    After each block of layers, one pair of the first image is computed by the dense definition.
    """
    metric = METRICS.get("cknna")
    near = timed(tally.ours, lambda: [metric.prepare(y, K, "y", 1) for y in patches])
    for start in range(0, len(hidden), block):
        layers = hidden[start : start + block]
        table = timed(
            tally.ours,
            lambda layers=layers: [
                [metric.score(x, y) for y in near] for x in (metric.prepare(values, K, "x", 0) for values in layers)
            ],
        )
        vfm = (start // block) % len(patches)
        direct = timed(tally.dense, lambda x=layers[-1][0], y=patches[vfm][0]: dense_cknna(x, y, K))
        tally.dense_pairs += 1
        tally.difference = max(tally.difference, abs(direct - float(table[-1][vfm][0])))
    tally.ours_pairs += len(hidden[0]) * len(hidden) * len(patches)


def compare(title: str, *, n: int, width: int, batches: int, images: int, layers: int, vfms: int, total: int) -> None:
    """Measure `batches` batches of `images` images each, and print the times scaled to `total` images."""
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
    """Run both comparisons and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024, help="width of the model's hidden states")
    parser.add_argument("--small", action="store_true", help="a check that it works, in seconds")
    options = parser.parse_args()
    print(f"threads {torch.get_num_threads()}, k = {K}")
    if options.small:
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
    compare(
        "33 layers x 4 VFMs x 2 models", n=2048, width=options.width, batches=2, images=1, layers=33, vfms=4, total=2
    )
    compare(
        "100 images x 33 layers x 4 VFMs within the image",
        n=576,
        width=options.width,
        batches=2,
        images=8,
        layers=33,
        vfms=4,
        total=100,
    )


if __name__ == "__main__":
    main()
