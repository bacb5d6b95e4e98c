"""Choose the attention heads that are aligned (`alignment.where: heads`): those least aligned with the VFMs.

The alignment of a head is the mutual kNN of its output at the visual tokens with the VFM's patches, within images, mean
over images and VFMs. It is measured once, on the model before its first step; checkpoints and the record of the run
hold the choice, and a resumed run takes it from there. `python -m analyses.heads` draws the same scores as a map.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from trainer.alignment_config import AlignmentConfig
from trainer.build.frozen_precision import half_autocast
from workbench.attention_heads import Head, attention_heads
from workbench.capture.heads import read_heads
from workbench.errors import ConfigError, RunError
from workbench.metrics import METRICS
from workbench.mllm import MLLM
from workbench.progress import progress_bar
from workbench.spatial.vfm_patches import patches_under
from workbench.spatial.within_image import Within
from workbench.vfm import VFM

FILE = "attention_heads.json"  # in every checkpoint of a run that aligns attention heads
BATCH = 8  # images per forward pass
DRAWS = 20  # permutations for the chance level in the record


@dataclass(frozen=True)
class HeadChoice:
    """The attention heads that a run aligns, and the scores that they were chosen by.

    Attributes:
        chosen: in ascending order.
        scores: mutual kNN of every candidate, as [layer, head, score, chance]; chance is the mean over permutations.
        k: nearest neighbors of the mutual kNN.
        images: number of images that the scores are a mean over.
        tokens: median number of visual tokens of a patch grid.
    """

    chosen: Sequence[Head]
    scores: Sequence[tuple[int, int, float, float]]
    k: int
    images: int
    tokens: int

    def save(self, checkpoint: Path) -> None:
        """Write the choice into a checkpoint."""
        (checkpoint / FILE).write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, checkpoint: Path) -> HeadChoice:
        """Read the choice from a checkpoint."""
        stored = json.loads((checkpoint / FILE).read_text())
        return cls(**stored | {"chosen": [(layer, head) for layer, head in stored["chosen"]]})

    @property
    def record(self) -> dict[str, Any]:
        """The entry of training.json."""
        return {"attention_heads": asdict(self)}


def check_same_choice(choices: Sequence[HeadChoice | None]) -> None:
    """Check that all ranks align the same attention heads.

    Args:
        choices: of each rank; None where the recipe chooses no heads.

    Raises:
        RunError: two ranks have chosen different ones.
    """
    chosen = [None if choice is None else [tuple(head) for head in choice.chosen] for choice in choices]
    for rank, heads in enumerate(chosen):
        if heads != chosen[0]:
            names = [" ".join(f"{layer}.{head}" for layer, head in of_rank or ()) for of_rank in (chosen[0], heads)]
            raise RunError(
                f"rank 0 chose attention heads {names[0]} and rank {rank} {names[1]}: expected the same (layer.head),"
                " for which all ranks need the same data, weights, package versions and kind of device"
            )


def candidates(model: Any, settings: AlignmentConfig) -> list[Head]:
    """Return the attention heads of a transformers model among which the recipe chooses.

    Raises:
        ConfigError: there are fewer than are to be chosen.
        ModelError: a layer's attention has no o_proj.
    """
    heads, count = attention_heads(model, settings.layer), settings.selection.heads
    if count > len(heads):
        raise ConfigError(
            f"alignment.selection.heads is {count}: expected at most {len(heads)}, the attention heads of"
            f" alignment.layer {', '.join(map(str, settings.layer))}"
        )
    return heads


def choose_heads(
    mllm: MLLM,
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    vfms: Sequence[VFM],
    settings: AlignmentConfig,
) -> HeadChoice:
    """Measure the candidates on some training images and choose the least aligned ones; of equal ones the first.

    Args:
        images: one for each prompt.

    Raises:
        ConfigError: there are fewer candidates than heads to choose.
        DataError: the visual tokens have no patch grid, or no image has more than k of them.
    """
    selection = settings.selection
    heads = candidates(mllm.model, settings)
    within = Within(METRICS.get("mutual_knn"), selection.k, null=DRAWS, seed=0)
    modes = {module: module.training for module in mllm.model.modules()}
    mllm.model.eval()
    for start in progress_bar("attention heads", range(0, len(images), BATCH), unit="batch"):
        part = images[start : start + BATCH]
        batch = mllm.encode(part, prompts[start : start + BATCH])
        grids = mllm.token_grids(batch)
        patches = [[[tile.cpu() for tile in tiles] for tiles in patches_under(vfm, part, grids)] for vfm in vfms]
        with half_autocast(mllm.model):  # not the VFMs, whose features are always float32
            outputs = read_heads(mllm, batch, grids, heads)
        within.add(outputs, patches)
    for module, training in modes.items():
        module.training = training
    results = within.finish()
    scores = results.parts.mean((0, 2)).tolist()
    chance = results.nulls.mean((0, 2)).tolist()
    order = sorted(range(len(heads)), key=lambda n: (scores[n], heads[n]))
    return HeadChoice(
        chosen=sorted(heads[n] for n in order[: selection.heads]),
        scores=[(*head, scores[n], chance[n]) for n, head in enumerate(heads)],
        k=selection.k,
        images=len(within.scored),
        tokens=results.n,
    )
