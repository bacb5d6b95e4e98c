"""Which questions are asked of which images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.capture.hidden_states import read
from workbench.data.base import Sample
from workbench.errors import DataError, UnknownNameError
from workbench.mllm.base import MLLM
from workbench.mllm.family import VisualTokens

Scene = Sequence[Sample]
Grid = tuple[int, int]


def option_ids(mllm: MLLM, samples: Sequence[Sample]) -> Int[Tensor, "question option"]:
    """First token of every option where it stands behind a prompt, -1 where a question has fewer options."""
    known: dict[tuple[str, ...], Tensor] = {}
    for options in {sample.options for sample in samples}:
        known[options] = torch.tensor([mllm.answer_ids(option)[0] for option in options])
        if len(known[options].unique()) < len(options):
            raise DataError(
                f"the options {', '.join(options)} are not told apart by their first token in {mllm.name}: expected"
                " options that begin differently"
            )
    return torch.nn.utils.rnn.pad_sequence(
        [known[sample.options] for sample in samples], batch_first=True, padding_value=-1
    )


def survey(
    mllm: MLLM, scenes: Sequence[Scene], batch_size: int, *, tower: bool
) -> tuple[list[list[VisualTokens]], list[Float[Tensor, "token f"]]]:
    """The visual tokens of each scene's image, and on request what the connector receives for them (on the CPU, by
    visual token).

    Raises:
        DataError: visual tokens without a raster.
        ModelError: the tower is asked for where a token comes from several features.
    """
    rasters, features = [], []
    for start in range(0, len(scenes), batch_size):
        part = [scene[0] for scene in scenes[start : start + batch_size]]
        batch = mllm.encode([s.image for s in part], [s.question for s in part])
        rasters += mllm.token_grids(batch)
        if tower:
            features += [
                own.encoder_features
                for own in read(mllm, batch, layers=[0], encoder=True)
                if own.encoder_features is not None
            ]
    return rasters, features


def grids_of(parts: Sequence[VisualTokens]) -> tuple[Grid, ...]:
    """The rasters of an image as (rows, columns)."""
    return tuple(part.grid for part in parts if part.grid is not None)


def questions_of(scenes: Sequence[Scene], *, types: Sequence[str] = (), each: int = 0) -> list[list[Sample]]:
    """The questions to ask: those with options, of the asked types, the first `each` of a type for an image (0: all);
    images without any are left out.

    Raises:
        DataError: nothing is left.
        UnknownNameError: a type that no question with options has.
    """
    scored = [[sample for sample in scene if sample.answer in sample.options] for scene in scenes]
    known = {sample.category for scene in scored for sample in scene}
    if not known:
        raise DataError(
            f"none of {len(scenes)} images has a question with options and an answer: expected a data set of questions,"
            " such as shapes:val"
        )
    for name in types:
        if name not in known:
            raise UnknownNameError("question type", name, known)
    kept = []
    for scene in scored:
        count: Counter[str] = Counter()
        own = []
        for sample in scene:
            count[sample.category] += 1
            if (not types or sample.category in types) and (not each or count[sample.category] <= each):
                own.append(sample)
        if own:
            kept.append(own)
    return kept


def random_order(tokens: int, *, image: int, draw: int, seed: int) -> Int[Tensor, " token"]:
    """A random order of the visual tokens of image number `image`, the same wherever they are permuted."""
    return torch.from_numpy(np.random.default_rng([seed, draw, image]).permutation(tokens))
