"""CKNNA between the aligned layers and the VFMs, measured at every evaluation while a model trains.

It is measured within images, on the same first images of the validation split each time, so that the values of a run
can be compared over time.
"""

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

from trainer.alignment_config import AlignmentConfig
from trainer.recipe import MonitorConfig, Recipe
from trainer.setups.base import MonitorBatch, Setup
from workbench.errors import ConfigError, DataError, UnknownNameError, WeightsError
from workbench.metrics import METRICS
from workbench.metrics.alignment import MIN_ROWS
from workbench.mllm.family import final_norm_of
from workbench.spatial.within_image import Within
from workbench.stats import null_of


class CknnaMonitor:
    """Measures CKNNA between the visual tokens of some layers and VFMs, within images.

    The layers are those that are aligned or have a residual; for a baseline, the middle layer, as in
    `analyses.dynamics`. The VFMs are the recipe's. Images with too few visual tokens are left out.

    Attributes:
        n: median number of visual tokens of a patch grid, over the images that are measured.
        images: number of images that are measured.
        left_out: number of images with too few visual tokens.

    Raises:
        ConfigError: no image has more than k visual tokens.
        WeightsError, UnknownNameError: a VFM cannot be loaded.
    """

    def __init__(self, setup: Setup, alignment: AlignmentConfig, settings: MonitorConfig, seed: int) -> None:
        decoder = setup.model.base.get_decoder()
        decoder = getattr(decoder, "model", decoder)
        self.blocks = list(decoder.layers)
        if alignment.final_norm:  # layer L is measured where it is aligned
            self.blocks[-1] = final_norm_of(decoder)
        self.final_norm = alignment.final_norm
        self.layers = sorted(alignment.layer) if alignment.changes_layers else [max(1, len(self.blocks) // 2)]
        self.model, self.settings, self.seed = setup.model, settings, seed
        self.data = setup.monitor_batches()
        lengths = [[len(grid) for grid in grids] for batch in self.data.batches for _, grids in batch.visual]
        large = [grid_lengths for grid_lengths in lengths if min(grid_lengths) >= max(settings.k + 1, MIN_ROWS)]
        if not large:
            raise ConfigError(
                f"monitor.k is {settings.k}: expected less than {max(map(min, lengths))}, the visual tokens of an image"
            )
        self.n = int(median(chain.from_iterable(large)))
        self.images = len(large)
        self.left_out = len(lengths) - len(large)

    @property
    def record(self) -> dict[str, object]:
        """How the scores are measured, for the training record."""
        return {
            "pooling": "within",
            "layers": self.layers,
            "final_norm": self.final_norm,
            "n": self.n,
            "k": self.settings.k,
            "n_images": self.images,
            "permutations": self.settings.permutations,
            "seed": self.seed,
            "vfm_fingerprint": self.data.vfm_fingerprint,
        }

    @torch.no_grad()  # inference mode does not work with sharded weights
    def measure(self) -> dict[str, float]:
        """Return the score of each layer and VFM as entries of the training log.

        Returns:
            `cknna/layer_L/VFM` with the ends of its 95 % interval over images (`cknna_low/...`, `cknna_high/...`), the
            mean and the 95 % quantile of its permutation null, and n, k and the number of images. Empty, after a
            warning, if CKNNA is not defined for the model as it is.
        """
        collector = Within(METRICS.get("cknna"), self.settings.k, null=self.settings.permutations, seed=self.seed)
        was_training = self.model.training
        self.model.eval()
        for batch in self.data.batches:
            collector.add(self._visual_tokens(batch), list(batch.vfm_features.values()))
        self.model.train(was_training)
        try:
            scores = collector.finish()
        except DataError as error:  # for example, because all tokens of an image have become equal
            tqdm.write(f"warning: CKNNA is not measured here: {error}", file=sys.stderr)
            return {}
        logs: dict[str, float] = {}
        for row, layer in enumerate(self.layers):
            for column, name in enumerate(self.data.batches[0].vfm_features):
                interval = scores.intervals[row][column]
                null = null_of(interval.estimate, scores.nulls[:, row, column])
                values = {"cknna": interval.estimate, "cknna_low": interval.low, "cknna_high": interval.high}
                logs |= {f"{key}/layer_{layer}/{name}": value for key, value in values.items()}
                logs |= {
                    f"cknna_null_mean/layer_{layer}/{name}": null.mean,
                    f"cknna_null_q95/layer_{layer}/{name}": null.q95,
                }
        return logs | {"cknna_n": scores.n, "cknna_k": self.settings.k, "cknna_images": len(collector.scored)}

    def _visual_tokens(self, batch: MonitorBatch) -> list[list[list[Tensor]]]:
        """Return the hidden states of the visual tokens (token, d): [layer][image][patch grid]."""
        outputs: dict[int, Tensor] = {}

        def capture(layer: int) -> Callable[..., None]:
            def hook(_: nn.Module, __: object, output: Any) -> None:
                outputs[layer] = output[0] if isinstance(output, tuple) else output

            return hook

        handles = [self.blocks[layer - 1].register_forward_hook(capture(layer)) for layer in self.layers]
        try:
            self.model(**send_to_device(batch.inputs, next(self.model.parameters()).device))
        finally:
            for handle in handles:
                handle.remove()

        def tokens(layer: int, row: int, positions: Tensor) -> Tensor:
            return outputs[layer][row, positions.to(outputs[layer].device)].float().cpu()

        return [
            [[tokens(layer, row, positions) for positions in grids] for row, grids in batch.visual]
            for layer in self.layers
        ]


def build_cknna_monitor(recipe: Recipe, setup: Setup) -> tuple[CknnaMonitor | None, list[str]]:
    """Return what measures CKNNA during training, and warnings about it.

    A run in which CKNNA cannot be measured, such as a baseline whose VFM is not available, trains without it: then the
    first value is None, and a warning says why.
    """
    if recipe.monitor.cknna_images == 0:
        return None, []
    try:
        monitor = CknnaMonitor(setup, recipe.alignment, recipe.monitor, recipe.seed)
        too_few = (
            f"CKNNA during training leaves out {monitor.left_out} of {monitor.left_out + monitor.images} images, which"
            " have too few visual tokens for it"
        )
        return monitor, [too_few] if monitor.left_out else []
    except (ConfigError, DataError, WeightsError, UnknownNameError) as error:
        return None, [f"CKNNA is not measured during training: {error}"]
