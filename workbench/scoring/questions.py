"""The questions to ask about each image, and what the model sees of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.capture.hidden_states import read
from workbench.data.base import Sample
from workbench.errors import DataError, UnknownNameError
from workbench.mllm.base import MLLM
from workbench.mllm.family import Batch, VisualTokens

Scene = Sequence[Sample]
"""The questions about one image."""
Grid = tuple[int, int]
"""(rows, columns) of a patch grid."""


def survey(
    mllm: MLLM, scenes: Sequence[Scene], batch_size: int, *, encoder: bool
) -> tuple[list[list[VisualTokens]], list[Float[Tensor, "_token f"]]]:
    """Return the visual tokens of each scene's image, and on request the vision encoder's features.

    Args:
        mllm: the model.
        scenes: questions by image.
        batch_size: images in one forward pass.
        encoder: whether to return what the projector receives for each image too (on the CPU, by visual token);
            otherwise the second list is empty.

    Raises:
        DataError: visual tokens without a patch grid.
        ModelError: the encoder's features are asked for, but a visual token is made from several of them.
    """
    visual_tokens, features = [], []
    for start in range(0, len(scenes), batch_size):
        batch = _first_questions(mllm, scenes[start : start + batch_size])
        visual_tokens += mllm.token_grids(batch)
        if encoder:
            features += _encoder_features(mllm, batch)
    return visual_tokens, features


def encoder_features(mllm: MLLM, scenes: Sequence[Scene], batch_size: int) -> list[Float[Tensor, "_token f"]]:
    """Return what the projector receives for each scene's image, whether or not its visual tokens form a grid.

    See `survey`.
    """
    features = []
    for start in range(0, len(scenes), batch_size):
        features += _encoder_features(mllm, _first_questions(mllm, scenes[start : start + batch_size]))
    return features


def _first_questions(mllm: MLLM, scenes: Sequence[Scene]) -> Batch:
    first = [scene[0] for scene in scenes]
    return mllm.encode([sample.image for sample in first], [sample.question for sample in first])


def _encoder_features(mllm: MLLM, batch: Batch) -> list[Float[Tensor, "_token f"]]:
    activations = read(mllm, batch, layers=[0], encoder=True)
    return [sample.encoder_features for sample in activations if sample.encoder_features is not None]


def grids_of(parts: Sequence[VisualTokens]) -> tuple[Grid, ...]:
    """Return (rows, columns) of each patch grid of an image."""
    return tuple(part.grid for part in parts if part.grid is not None)


def questions_of(scenes: Sequence[Scene], *, types: Sequence[str] = (), each: int = 0) -> list[list[Sample]]:
    """Select the questions to ask: those with options and an answer; images without any are left out.

    Args:
        scenes: all questions, by image.
        types: question types to ask, all if empty.
        each: how many questions of a type to ask about an image, the first ones; 0 for all.

    Raises:
        DataError: no question has options and an answer.
        UnknownNameError: a type that no question with options has.
    """
    scored = [[sample for sample in scene if sample.answer in sample.options] for scene in scenes]
    known = {sample.category for scene in scored for sample in scene}
    if not known:
        raise DataError(
            f"none of {len(scenes)} images has a question with options and an answer: expected a data set of questions,"
            " such as shapes:val"
        )
    check_types(types, known)
    selected = []
    for scene in scored:
        count: Counter[str] = Counter()
        questions = []
        for sample in scene:
            count[sample.category] += 1
            if (not types or sample.category in types) and (not each or count[sample.category] <= each):
                questions.append(sample)
        if questions:
            selected.append(questions)
    return selected


def check_types(types: Sequence[str], known: Collection[str]) -> None:
    """Raise an UnknownNameError if a question type is not among those that the data set has."""
    for name in types:
        if name not in known:
            raise UnknownNameError("question type", name, [known_name for known_name in known if known_name])


def random_order(tokens: int, *, image: int, draw: int, seed: int) -> Int[Tensor, " token"]:
    """Return a random order of the visual tokens of image number `image`; the same at every site of an intervention."""
    return torch.from_numpy(np.random.default_rng([seed, draw, image]).permutation(tokens))
