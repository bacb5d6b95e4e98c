"""Is the family right about this model? Checked causally, with two drawn images, in two or three forward passes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from workbench.errors import ModelError

if TYPE_CHECKING:
    from workbench.mllm.base import MLLM


def validate(mllm: MLLM) -> None:
    """Check that visual tokens sit where the family says.

    1. The first block receives, at the visual positions, exactly what the projector returned.
    2. Another image changes the hidden states at those positions, and leaves the text before them as it was.
    3. Painting one grid cell changes that cell's token more than nine in ten of the tokens, at the projector's output (attention in the tower spreads
       a change over all tokens, but not evenly).

    Raises:
        ModelError: names the check that failed.
    """
    from workbench.capture import read

    rng = np.random.default_rng(0)
    side = 224
    plain = Image.fromarray(rng.integers(90, 160, size=(side, side, 3), dtype=np.uint8))
    other = Image.fromarray(rng.integers(0, 255, size=(side, side, 3), dtype=np.uint8))
    batch = mllm.encode([plain, other], ["what is this ?"] * 2)
    tokens = mllm.visual_tokens(batch)
    if not all(tokens) or not all(len(part.index) for sample in tokens for part in sample):
        raise ModelError(f"{mllm.name}: family '{mllm.family.name}' finds no visual tokens for an image")
    visual = torch.cat([part.index for part in tokens[0]])

    projected = projector_output(mllm, [plain])
    embedded = read(mllm, batch, layers=[0])
    scale = projected.abs().max()
    if projected.shape != embedded[0].values[0].shape or (projected - embedded[0].values[0]).abs().max() > 1e-3 * scale:
        raise ModelError(
            f"{mllm.name}: what the language model receives at the visual positions is not the projector's output; "
            f"family '{mllm.family.name}' is wrong about positions"
        )

    everything = read(mllm, batch, layers=[mllm.n_layers], tokens="all")
    first, second = everything[0].values[0], everything[1].values[0]
    before = everything[0].tokens < visual[0].cpu()
    inside = torch.isin(everything[0].tokens, visual.cpu())
    if before.any() and not torch.allclose(first[before], second[before], atol=1e-4, rtol=1e-3):
        raise ModelError(f"{mllm.name}: another image changed the text before the visual tokens; family '{mllm.family.name}' starts them too late")
    if ((first - second)[inside].abs().amax(-1) == 0).any():
        raise ModelError(f"{mllm.name}: another image left a visual token unchanged; family '{mllm.family.name}' is wrong about positions")
    _check_raster(mllm, plain, tokens[0][0].grid, projected)


def projector_output(mllm: MLLM, images: list[Image.Image]) -> torch.Tensor:
    """Projected visual tokens (token, d) of one image, without the language model."""
    batch = mllm.encode(images, ["what is this ?"] * len(images))
    vision = {name: value for name, value in batch.inputs.items() if name not in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")}
    with mllm.lock, torch.inference_mode():
        output = mllm.model.get_image_features(**vision).pooler_output
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in output]).float().cpu()


def _check_raster(mllm: MLLM, image: Image.Image, grid: tuple[int, int] | None, plain: torch.Tensor) -> None:
    """Paint a cell off the diagonal and see its token move: catches a transposed or shifted raster."""
    if grid is None:
        return
    rows, columns = grid
    row, column = rows // 4, (3 * columns) // 4
    painted = image.copy()
    width, height = image.width / columns, image.height / rows
    box = tuple(round(v) for v in (column * width, row * height, (column + 1) * width, (row + 1) * height))
    painted.paste((255, 0, 0), box)  # type: ignore[arg-type]
    change = (projector_output(mllm, [painted]) - plain).norm(dim=-1)[: rows * columns]
    if change[row * columns + column] < change.quantile(0.9):
        raise ModelError(
            f"{mllm.name}: painting cell ({row}, {column}) changed other tokens more than its own; the raster of family '{mllm.family.name}' is wrong"
        )
