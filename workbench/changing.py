"""Ask a question again after something was done to a part of the image, or to the visual tokens that cover it.

    reply = ask_again(mllm, sample, Change("mean", box=(0.5, 0.0, 1.0, 0.5), at=3))

What is changed at the projector or deeper was already seen by the vision encoder, in which every patch attends to all
others: the tokens around a region may still tell what was there. `paint` changes the pixels, so nothing can.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from workbench.capture.edit import Edit, Site
from workbench.data.base import Sample
from workbench.data.images import upright_rgb
from workbench.errors import ConfigError
from workbench.mllm.base import MLLM
from workbench.mllm.family import WHOLE, Box, VisualTokens
from workbench.scoring.questions import random_order
from workbench.scoring.quiz import Quiz
from workbench.spatial.grids import token_centers

Kind = Literal["mean", "permute", "paint"]


@dataclass(frozen=True)
class Change:
    """What is done.

    Attributes:
        kind: "mean" replaces each visual token by the mean of those outside the region (of all of them, if the region
            is the whole image); "permute" puts the tokens of the region in a random order; "paint" gives the pixels of
            the region the mean color of the others, and encodes the image anew.
        box: the region, in fractions of the image; a visual token belongs to it if the center of its patch does.
        at: where visual tokens are changed: "encoder", "projector" or a layer; "paint" ignores it.
        seed: of the random order.
    """

    kind: Kind
    box: Box = WHOLE
    at: Site = "projector"
    seed: int = 0


@dataclass(frozen=True)
class Reply:
    """The answer to a question after a change.

    Attributes:
        answer: what the model generates.
        options: {option: probability among the options}, {} for an open question.
        tokens: number of visual tokens that were changed; 0 for "paint".
    """

    answer: str
    options: dict[str, float]
    tokens: int


def ask_again(mllm: MLLM, sample: Sample, change: Change, *, max_new_tokens: int = 16) -> Reply:
    """Return the answer of a model to a question after a change.

    Raises:
        ConfigError: the region contains no patch, or all pixels are to be painted, or no such site.
        ModelError: the model's visual tokens cannot be changed there (`capture.edit`).
    """
    if change.kind == "paint":
        painted = paint(sample.image, change.box)
        quiz = Quiz(mllm, [[replace(sample, load=lambda: painted)]], 1)
        (answer,) = quiz.answers(max_new_tokens=max_new_tokens)
        return Reply(answer, _options(quiz, None, None), 0)
    quiz = Quiz(mllm, [[sample]], 1)
    (parts,) = mllm.visual_tokens(mllm.encode([sample.image], [sample.question]))
    chosen = inside(parts, change.box)
    if not chosen.any():
        raise ConfigError(f"the region {_percent(change.box)} has no visual token: expected one patch or more")

    def changed(values: Float[Tensor, "token d"], _: int) -> Float[Tensor, "token d"]:
        return changed_tokens(values, chosen.to(values.device), change)

    (answer,) = quiz.answers(change.at, changed, max_new_tokens=max_new_tokens)
    return Reply(answer, _options(quiz, change.at, changed), int(chosen.sum()))


def _options(quiz: Quiz, at: Site | None, change: Edit | None) -> dict[str, float]:
    options = quiz.samples[0].options
    chances = quiz.logprobs(at, change)[0].exp().tolist() if options else []
    return dict(zip(options, chances, strict=True))


def changed_tokens(
    values: Float[Tensor, "token d"], chosen: Bool[Tensor, " token"], change: Change
) -> Float[Tensor, "token d"]:
    """Return the visual tokens of an image with those `chosen` changed."""
    result = values.clone()
    if change.kind == "permute":
        order = random_order(int(chosen.sum()), image=0, draw=0, seed=change.seed).to(values.device)
        result[chosen] = values[chosen][order]
    else:
        outside = values if bool(chosen.all()) else values[~chosen]
        result[chosen] = outside.float().mean(0).to(values.dtype)
    return result


def inside(parts: Sequence[VisualTokens], box: Box) -> Bool[Tensor, " token"]:
    """Return which visual tokens of an image have the center of their patch in a box.

    A token without a place in the image (a class token) has none.
    """
    left, top, right, bottom = box
    rows = []
    for part in parts:
        if part.grid is None:
            rows.append(torch.zeros(len(part.index), dtype=torch.bool))
            continue
        x, y = torch.from_numpy(token_centers([part])).T
        rows.append((x >= left) & (x < right) & (y >= top) & (y < bottom))
    return torch.cat(rows)


def paint(image: Image.Image, box: Box) -> Image.Image:
    """Return the image with the mean color of its other pixels in a box.

    Raises:
        ConfigError: no pixel is in the box, or none outside it.
    """
    pixels = np.asarray(upright_rgb(image)).copy()
    height, width = pixels.shape[:2]
    left, top, right, bottom = (
        round(min(1.0, max(0.0, edge)) * size) for edge, size in zip(box, (width, height, width, height), strict=True)
    )
    region = np.zeros((height, width), dtype=bool)
    region[top:bottom, left:right] = True
    if not region.any() or region.all():
        what = "all pixels" if region.any() else "no pixel"
        raise ConfigError(f"the region {_percent(box)} has {what} of the image: expected a part of it")
    pixels[region] = pixels[~region].mean(0).round()
    return Image.fromarray(pixels)


def _percent(box: Box) -> str:
    return f"{box[0]:.0%} to {box[2]:.0%} from the left, {box[1]:.0%} to {box[3]:.0%} from the top"
