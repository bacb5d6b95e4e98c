"""The interventions on visual tokens: permutations, their parts, and controls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from annotated_types import Ge
from jaxtyping import Float, Int
from torch import Tensor

from workbench.benchmarks.asking import QuestionOptions
from workbench.capture.edit import Site
from workbench.errors import ConfigError
from workbench.options import refuse_unused
from workbench.scoring.questions import Grid, random_order
from workbench.scoring.quiz import Change

Order = Callable[[int], Tensor]
"""Number of an image -> for each place, the index of the token that moves there."""


@dataclass(frozen=True)
class Config(QuestionOptions):
    """Which questions are asked, and how tokens are permuted."""

    ADDED: ClassVar[tuple[str, ...]] = (*QuestionOptions.ADDED, "answers", "scorer", "max_new_tokens")

    layers: tuple[int, ...] = ()
    """Layers at which tokens are permuted, 0 to L; all by default. The vision encoder is always among the sites."""
    permutations: Annotated[int, Ge(1)] = 2
    """Random permutations of each image, whose results are averaged."""
    block: Annotated[int, Ge(1)] = 2
    """Side of the blocks that the block shuffle keeps together, in tokens."""
    answers: Literal["likelihood", "generated"] = "likelihood"
    """An answer is the likeliest option, or what the model generates (greedy), as in the paper."""
    scorer: str = "own"
    """Scorer of generated answers; see docs/reference/benchmarks.md."""
    max_new_tokens: Annotated[int, Ge(1)] = 16
    """Tokens at which a generated answer is cut."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.answers == "likelihood":
            refuse_unused(self, "scorer", because="answers by likelihood have none", expected="answers generated")


@dataclass(frozen=True)
class Condition:
    """One intervention at one site; `draw` counts the random ones."""

    site: Site
    kind: str
    part: str
    draw: int
    change: Change


@dataclass(frozen=True)
class Images:
    """What interventions need to know about the images of the run.

    Attributes:
        grids: (rows, columns) of every patch grid of each image.
        features: what the projector receives for each image; empty if the vision encoder is not among the sites.
    """

    config: Config
    grids: list[tuple[Grid, ...]]
    features: list[Float[Tensor, "_token f"]]

    @property
    def alike(self) -> bool:
        """Whether all images have the same patch grids, so that a place means the same in each of them."""
        return len(set(self.grids)) == 1

    def permuted(self, image: int, draw: int) -> Int[Tensor, " token"]:
        """Return a random order of all visual tokens of an image, the same at every site and for every part."""
        count = sum(rows * columns for rows, columns in self.grids[image])
        return random_order(count, image=image, draw=draw, seed=self.config.seed)

    def shuffled_blocks(self, image: int, draw: int) -> Int[Tensor, " token"]:
        """Return a random order of the blocks of each patch grid; within a block nothing moves.

        Raises:
            ConfigError: a patch grid that cannot be divided into such blocks.
        """
        rng, side = np.random.default_rng([self.config.seed, draw, image]), self.config.block

        def order(rows: int, columns: int) -> np.ndarray:
            if rows % side or columns % side:
                raise ConfigError(
                    f"block is {side} for a patch grid of {rows} x {columns} tokens: expected a divisor of both"
                )
            tokens = np.arange(rows * columns).reshape(rows // side, side, columns // side, side)
            blocks = tokens.transpose(0, 2, 1, 3).reshape(-1, side, side)
            shuffled = rng.permutation(blocks).reshape(rows // side, columns // side, side, side)
            return shuffled.transpose(0, 2, 1, 3)

        return _joined([order(*grid) for grid in self.grids[image]])

    def transposed(self, image: int) -> Int[Tensor, " token"]:
        """Return the order that exchanges the rows and columns of square patch grids."""
        return _joined([np.arange(rows * columns).reshape(rows, columns).T for rows, columns in self.grids[image]])


def _joined(orders: list[np.ndarray]) -> Int[Tensor, " token"]:
    """Join an order within each patch grid of an image to one order of all its tokens."""
    starts = np.cumsum([0, *(order.size for order in orders)])
    return torch.from_numpy(
        np.concatenate([order.reshape(-1) + start for order, start in zip(orders, starts, strict=False)])
    )


def conditions_of(images: Images, sites: list[Site], skipped: dict[str, str]) -> Iterator[Condition]:
    """Yield all interventions; those that the images' patch grids do not allow are noted in `skipped`."""
    if "encoder" in sites:
        yield from _encoder_conditions(images, skipped)
    for site in sites:
        for draw in range(images.config.permutations):
            order = partial(images.permuted, draw=draw)
            yield Condition(site, "permute", "whole", draw, partial(_reordered, order=order))
        yield Condition(site, "mean token", "whole", 0, lambda v, _: v.mean(0, keepdim=True).expand_as(v))


def _encoder_conditions(images: Images, skipped: dict[str, str]) -> Iterator[Condition]:
    """Yield the interventions at the encoder alone: the controls, and features and positions permuted apart."""
    draws = range(images.config.permutations)
    yield Condition("encoder", "identity", "whole", 0, lambda v, _: v)
    for draw in draws:
        block_order = partial(images.shuffled_blocks, draw=draw)
        yield Condition("encoder", "block shuffle", "whole", draw, partial(_reordered, order=block_order))
    if all(rows == columns for grids in images.grids for rows, columns in grids):
        yield Condition("encoder", "transpose", "whole", 0, partial(_reordered, order=images.transposed))
    else:
        skipped["transpose"] = "a patch grid is not square"
    if not images.alike:
        reason = "images have different patch grids, so that a place does not mean the same in all of them"
        skipped["other image"] = skipped["parts features, positions"] = reason
        return
    others = _other_images(len(images.grids), images.config.seed)
    yield Condition("encoder", "other image", "whole", 0, lambda _, i: images.features[others[i]])
    mean = torch.stack(images.features).mean(0)
    for draw in draws:
        for part in ("features", "positions"):
            change = partial(
                _permuted_part, mean=mean, order=partial(images.permuted, draw=draw), features=part == "features"
            )
            yield Condition("encoder", "permute", part, draw, change)


def _reordered(values: Float[Tensor, "token d"], image: int, *, order: Order) -> Float[Tensor, "token d"]:
    return values[order(image)]


def _permuted_part(
    values: Float[Tensor, "token f"], image: int, *, mean: Float[Tensor, "token f"], order: Order, features: bool
) -> Float[Tensor, "token f"]:
    return permute_part(values, mean, order(image), features=features)


def permute_part(
    values: Float[Tensor, "token f"], mean: Float[Tensor, "token f"], order: Int[Tensor, " token"], *, features: bool
) -> Float[Tensor, "token f"]:
    """Permute either the features without their positional part `mean`, or that part alone."""
    mean = mean.to(values.device)
    rest = values.float() - mean
    return mean + rest[order] if features else mean[order] + rest


def _other_images(count: int, seed: int) -> list[int]:
    """Return another image for each image: the one before it in a random circle of them all."""
    circle = np.random.default_rng([seed, count]).permutation(count)
    others = np.empty(count, dtype=int)
    others[circle] = np.roll(circle, 1)
    return [int(other) for other in others]
