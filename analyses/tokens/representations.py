"""Read the tokens of an image in every representation: vision encoder, layers, VFMs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from analyses.tokens.options import EDGES, ENCODER
from workbench.analysis.chunks import Chunk
from workbench.analysis.declaration import Context
from workbench.capture.hidden_states import encoder_rows, read
from workbench.data.base import Sample
from workbench.data.folder import QUESTION
from workbench.errors import ModelError
from workbench.mllm.family import VisualTokens
from workbench.spatial.vfm_patches import patches_under
from workbench.vfm import VFM


@dataclass(frozen=True)
class ImageTokens:
    """The tokens of one image in every representation.

    Attributes:
        number: of the image, among all.
        grids: its visual tokens, one patch grid after another.
        question: what the model was asked.
        answer: the model's greedy answer, where it was asked for.
        tokens: by representation: "tower" (the vision encoder), "layer 0", ..., and the name of each VFM.
    """

    number: int
    sample: Sample
    image: Image.Image
    grids: list[VisualTokens]
    tokens: dict[str, Float[Tensor, "_token _d"]]
    question: str = ""
    answer: str = ""


def images_of_chunk(
    context: Context,
    layers: list[int],
    vfms: Mapping[str, VFM],
    skipped: dict[str, str],
    chunk: Chunk[Sample],
    *,
    final_norm: bool = False,
    answers: tuple[int, int] = (0, 0),
) -> Iterator[ImageTokens]:
    """Yield every image of a chunk with its tokens in every representation.

    Where the vision encoder cannot be read token by token, the reason is written to `skipped`, and it is left out from
    there on.

    Args:
        final_norm: read the last layer after the final norm.
        answers: number of images, the first ones of all, that the model answers, and tokens of an answer.
    """
    mllm = context.mllm
    for start, samples in chunk.batches():
        images = [sample.image for sample in samples]
        questions = [sample.question or QUESTION for sample in samples]
        batch = mllm.encode(images, questions)
        grids = mllm.token_grids(batch)
        try:
            encoder_rows(mllm, grids)
        except ModelError as error:
            skipped[ENCODER] = str(error)
        activations = read(mllm, batch, layers=layers, encoder=not skipped, final_norm=final_norm)
        count = min(max(0, answers[0] - start), len(samples))
        said = mllm.generate(mllm.encode(images[:count], questions[:count]), max_new_tokens=answers[1]) if count else []
        said += [""] * (len(samples) - count)
        patches = {name: patches_under(vfm, images, grids) for name, vfm in vfms.items()}
        for row, sample in enumerate(samples):
            encoder = activations[row].encoder_features
            tokens = {} if encoder is None else {ENCODER: encoder}
            by_layer = zip(layers, activations[row].values, strict=True)
            tokens |= {f"layer {layer}": values for layer, values in by_layer}
            tokens |= {name: torch.cat([*of_images[row]]) for name, of_images in patches.items()}
            yield ImageTokens(start + row, sample, images[row], grids[row], tokens, questions[row], said[row])


def token_boxes(grids: list[VisualTokens]) -> list[tuple[float, float, float, float]]:
    """Return left, top, right, bottom of the patch of every token, in fractions of the image."""
    return [
        grid.token_box(*divmod(number, grid.grid[1]))
        for grid in grids
        if grid.grid
        for number in range(len(grid.index))
    ]


def edges_of(box: tuple[float, float, float, float]) -> dict[str, float]:
    """Return the columns of a table for a box."""
    return dict(zip(EDGES, box, strict=True))


def layer_number(name: str) -> float:
    """Return the layer number of a representation for figures: -1 for the vision encoder, NaN for a VFM."""
    if name == ENCODER:
        return -1
    return float(name.removeprefix("layer ")) if name.startswith("layer ") else np.nan
