"""CKNNA of the aligned layer with the VFM, at every evaluation."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import chain
from statistics import median
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from tqdm import tqdm

from trainer.recipe import AlignmentConfig, MonitorConfig, Recipe
from trainer.setups.base import Setup, WatchedBatch
from workbench.errors import ConfigError, DataError, UnknownNameError, WeightsError
from workbench.metrics import METRICS
from workbench.metrics.alignment import MIN_ROWS
from workbench.spatial.within_image import Within
from workbench.stats import null_of


class SubsetAlignment:
    """CKNNA of the visual tokens of some layers with VFMs, within images, on the same first validation images at every
    evaluation.

    The layers are the aligned ones (or those with a residual); a baseline's is the middle one, as in
    `analyses.dynamics`. The VFMs are the recipe's.

    Raises:
        ConfigError: k is not below the number of visual tokens.
        WeightsError, UnknownNameError: a VFM that cannot be had.
    """

    def __init__(self, setup: Setup, alignment: AlignmentConfig, settings: MonitorConfig, seed: int) -> None:
        decoder = setup.model.base.get_decoder()
        self.blocks = getattr(decoder, "model", decoder).layers
        self.layers = sorted(alignment.layer) if alignment.changes_layers else [max(1, len(self.blocks) // 2)]
        self.model, self.settings, self.seed = setup.model, settings, seed
        self.watched = setup.watched()
        lengths = [[len(raster) for raster in image] for batch in self.watched.batches for _, image in batch.places]
        large = [own for own in lengths if min(own) >= max(settings.k + 1, MIN_ROWS)]
        if not large:
            raise ConfigError(
                f"monitor.k is {settings.k}: expected less than {max(map(min, lengths))}, the visual tokens of an image"
            )
        self.n = int(median(chain.from_iterable(large)))
        self.images = len(large)
        self.left_out = len(lengths) - len(large)

    @property
    def record(self) -> dict[str, object]:
        """What the scores are of."""
        shared = {
            "n": self.n,
            "k": self.settings.k,
            "n_images": self.images,
            "permutations": self.settings.permutations,
            "seed": self.seed,
        }
        return {"pooling": "within", "layers": self.layers, **shared, "vfm_fingerprint": self.watched.fingerprint}

    @torch.no_grad()  # sharded weights know no inference mode
    def measure(self) -> dict[str, float]:
        """The score of each layer and VFM as `cknna/layer_L/VFM`, its 95 % interval over images and its permutation
        null, with n, k and images."""
        collector = Within(METRICS.get("cknna"), self.settings.k, null=self.settings.permutations, seed=self.seed)
        training = self.model.training
        self.model.eval()
        for batch in self.watched.batches:
            collector.add(self._hidden(batch), list(batch.patches.values()))
        self.model.train(training)
        try:
            found = collector.finish()
        except DataError as error:  # the tokens of every image are alike by now, perhaps
            tqdm.write(f"warning: CKNNA is not measured here: {error}", file=sys.stderr)
            return {}
        logs: dict[str, float] = {}
        for row, layer in enumerate(self.layers):
            for column, name in enumerate(self.watched.batches[0].patches):
                interval = found.intervals[row][column]
                null = null_of(interval.estimate, found.nulls[:, row, column])
                values = {"cknna": interval.estimate, "cknna_low": interval.low, "cknna_high": interval.high}
                logs |= {f"{key}/layer_{layer}/{name}": value for key, value in values.items()}
                logs |= {
                    f"cknna_null_mean/layer_{layer}/{name}": null.mean,
                    f"cknna_null_q95/layer_{layer}/{name}": null.q95,
                }
        return logs | {"cknna_n": found.n, "cknna_k": self.settings.k, "cknna_images": len(collector.scored)}

    def _hidden(self, batch: WatchedBatch) -> list[list[list[Tensor]]]:
        """The visual tokens of each layer, [layer][image][raster]."""
        kept: dict[int, Tensor] = {}

        def keep(layer: int) -> Callable[..., None]:
            def hook(_: nn.Module, __: object, output: Any) -> None:
                kept[layer] = output[0] if isinstance(output, tuple) else output

            return hook

        handles = [self.blocks[layer - 1].register_forward_hook(keep(layer)) for layer in self.layers]
        try:
            self.model(**send_to_device(batch.inputs, next(self.model.parameters()).device))
        finally:
            for handle in handles:
                handle.remove()
        return [
            [
                [kept[layer][row, index.to(kept[layer].device)].float().cpu() for index in image]
                for row, image in batch.places
            ]
            for layer in self.layers
        ]


def subset_alignment(recipe: Recipe, setup: Setup) -> tuple[SubsetAlignment | None, list[str]]:
    """What measures CKNNA during training; a run that cannot have it, such as a baseline without a VFM at hand, goes
    on, and a sentence says so."""
    if recipe.monitor.cknna_images == 0:
        return None, []
    try:
        subset = SubsetAlignment(setup, recipe.alignment, recipe.monitor, recipe.seed)
        few = (
            f"CKNNA during training leaves out {subset.left_out} of {subset.left_out + subset.images} images, which"
            " have too few visual tokens for it"
        )
        return subset, [few] if subset.left_out else []
    except (ConfigError, DataError, WeightsError, UnknownNameError) as error:
        return None, [f"CKNNA is not measured during training: {error}"]
