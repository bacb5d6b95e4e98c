"""Speed of CKNNA over many layers and VFMs against the dense definition computed anew for each pair, alternating in one run.

python -m benchmarks.sweep                # 33 layers x 4 VFMs x 2 models at n = 2048; 100 images x 33 layers x 4 VFMs at n = 576
python -m benchmarks.sweep --width 4096   # of the model; 1024 by default
python -m benchmarks.sweep --small        # seconds, to see that it works

The dense computation is timed on a few pairs and scaled to all of them, and so is ours within images on a few images; the output says on how many.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cknna import dense_cknna
from workbench.metrics import METRICS, alignment_matrix

LAYERS, VFMS, K, VFM_WIDTH = 33, 4, 10, 768


def representations(n: int, width: int, layers: int, vfms: int, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Layers that drift away from one another, and VFMs that share something with them."""
    generator = torch.Generator().manual_seed(seed)
    hidden = [torch.randn(n, width, generator=generator)]
    while len(hidden) < layers:
        hidden.append(hidden[-1] + 0.3 * torch.randn(n, width, generator=generator))
    shared = hidden[0][:, : min(width, VFM_WIDTH)]
    return hidden, [shared + torch.randn(*shared.shape, generator=generator) for _ in range(vfms)]


def timed(function: Callable[[], object]) -> tuple[float, object]:
    """Seconds, and what the function returned."""
    start = time.perf_counter()
    found = function()
    return time.perf_counter() - start, found


@dataclass
class Tally:
    """Seconds of both sides and their largest disagreement, each in units of one pair."""

    ours: float = 0.0
    ours_pairs: int = 0
    dense: float = 0.0
    dense_pairs: int = 0
    apart: float = 0.0

    def report(self, title: str, pairs: int, what: str) -> None:
        """Print both sides scaled to `pairs`."""
        ours, dense = self.ours / self.ours_pairs * pairs, self.dense / self.dense_pairs * pairs
        print(f"{title}\n  ours  {ours:9.1f} s, timed on {self.ours_pairs:,} of {pairs:,} {what}")
        print(f"  dense {dense:9.1f} s, timed on {self.dense_pairs:,} of {pairs:,} {what} and scaled")
        print(f"  ratio {dense / ours:9.1f}, largest difference of a score {self.apart:.1e}")


def dense_pairs(tally: Tally, hidden: Sequence[Tensor], patches: Sequence[Tensor], scores: Callable[[int, int], float], count: int) -> None:
    """Time `count` pairs of the dense computation, spread over the layers."""
    for number in range(count):
        layer, vfm = (number * 7) % len(hidden), number % len(patches)
        seconds, score = timed(lambda x=hidden[layer], y=patches[vfm]: dense_cknna(x, y, K))
        tally.dense, tally.dense_pairs = tally.dense + seconds, tally.dense_pairs + 1
        tally.apart = max(tally.apart, abs(float(str(score)) - scores(layer, vfm)))


def sweep(n: int, width: int, models: int, layers: int, vfms: int) -> None:
    """All layers of every model against every VFM, tokens of all images together."""
    tally = Tally()
    for model in range(models):
        hidden, patches = representations(n, width, layers, vfms, seed=model)
        dense_cknna(hidden[0], patches[0], K)  # warm up
        seconds, table = timed(lambda h=hidden, p=patches: alignment_matrix(dict(enumerate(h)), dict(enumerate(p)), k=K))
        tally.ours, tally.ours_pairs = tally.ours + seconds, tally.ours_pairs + layers * vfms
        dense_pairs(tally, hidden, patches, lambda a, b, t=table: t.loc[a, b], 4)
    tally.report(f"{layers} layers x {vfms} VFMs x {models} models, n = {n}, d = {width} and {VFM_WIDTH}", layers * vfms * models, "pairs")


def within(n: int, width: int, images: int, measured: int, layers: int, vfms: int, batch: int = 8) -> None:
    """All layers against every VFM within each image."""
    tally, metric = Tally(), METRICS.get("cknna")
    for start in range(0, measured, batch):
        samples = [representations(n, width, layers, vfms, seed=start + i) for i in range(min(batch, measured - start))]
        hidden, patches = ([torch.stack(side) for side in zip(*sides, strict=True)] for sides in zip(*samples, strict=True))

        def ours(hidden: list[Tensor] = hidden, patches: list[Tensor] = patches) -> list[list[Tensor]]:
            near = [metric.prepare(y, K, "y") for y in patches]
            return [[metric.score(x, y) for y in near] for x in (metric.prepare(x, K, "x") for x in hidden)]

        seconds, table = timed(ours)
        tally.ours, tally.ours_pairs = tally.ours + seconds, tally.ours_pairs + len(samples) * layers * vfms
        dense_pairs(tally, samples[0][0], samples[0][1], lambda a, b, t=table: float(t[a][b][0]), 4)
    tally.report(f"{images} images x {layers} layers x {vfms} VFMs within the image, n = {n}, d = {width} and {VFM_WIDTH}", images * layers * vfms, "problems")


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024, help="of the model's hidden states")
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    print(f"threads {torch.get_num_threads()}, k = {K}")
    if given.small:
        sweep(256, 64, 2, 4, 2)
        within(64, 64, 8, 4, 4, 2)
        return
    sweep(2048, given.width, 2, LAYERS, VFMS)
    within(576, given.width, 100, 16, LAYERS, VFMS)


if __name__ == "__main__":
    main()
