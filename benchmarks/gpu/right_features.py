"""VFM features on the device, compared with the CPU's; and cached features, compared with computed ones."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.gpu import models
from benchmarks.gpu.harness import Bench
from benchmarks.gpu.right_reading import relative
from trainer.targets.feature_store import frozen_features
from trainer.targets.vfm_targets import vfm_tokens
from workbench.data import Dataset
from workbench.data.base import Sample
from workbench.errors import RunError

GRID = (8, 8)


def run(bench: Bench) -> None:
    """Compare features of a few images, in batches of several sizes."""
    vfm, on_cpu = models.dino(bench.device, toy=True), models.dino("cpu", toy=True)
    on_cpu.network.double()
    images = [models.image(n, 80) for n in range(12)]
    data = Dataset(
        "images", [Sample(f"{n}", f"{n}", lambda image=image: image) for n, image in enumerate(images)], "images"
    )  # type: ignore[misc]
    compute = partial(vfm_tokens, vfm, GRID)
    with bench.guard("VFM features against the CPU"):
        wanted = on_cpu._features(on_cpu._batch(images, *GRID).double()).permute(0, 2, 3, 1).flatten(1, 2)
        bench.error("VFM features against the CPU", relative(compute(images), wanted), 1e-4, setting="float32")
    with bench.guard("cached against computed"):
        stored = frozen_features(data, ("benchmark", GRID), compute, what="dinov2")
        values = stored.rows(range(12))
        computed = frozen_features(data, (), compute, what="dinov2", mode="compute").rows(range(12))
        bench.error("cached against computed, the same batch", relative(values, computed), 1e-6, setting="float32")
        single = torch.cat([compute([image]).cpu() for image in images])
        bench.error("cached against computed one by one", relative(values, single), 1e-4, setting="float32")
        again = frozen_features(data, ("benchmark", GRID), compute, what="dinov2").rows(range(12))
        bench.error("cached, opened again", relative(again, values), 0.0, setting="float32")
    with bench.guard("a store of another network"):
        torch.manual_seed(5)
        other = models.dino(bench.device, toy=True)
        with torch.no_grad():
            for value in other.network.parameters():
                value.add_(0.1 * torch.randn_like(value))
        try:
            frozen_features(data, ("benchmark", GRID), partial(vfm_tokens, other, GRID), what="another")
            refused = False
        except RunError:
            refused = True
        bench.add("features of another network are refused", {"refused": refused}, passed=refused)
    if bench.device == "cuda":
        with bench.guard("TF32 convolutions"):  # the default of torch
            torch.backends.cudnn.allow_tf32 = True
            values = compute(images)
            torch.backends.cudnn.allow_tf32 = False
            bench.error(
                "VFM features with TF32 convolutions", relative(values, wanted), 0.01, setting="torch's default"
            )
