"""What differs between model families: where the images of a prompt sit in the language model's sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, PretrainedConfig

from workbench.errors import ModelError, UnknownNameError
from workbench.registry import Registry

Processor = Any  # a transformers ProcessorMixin, whose attributes differ between families
Setting = tuple[str, object, object]
Box = tuple[float, float, float, float]
BatchImages = tuple[tuple[Image.Image, ...], ...]
"""[sample][image]"""
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


@dataclass(frozen=True)
class VisualTokens:
    """Where one image (or one tile of it) sits in the language model's sequence.

    Attributes:
        index: positions in `input_ids`, in raster order.
        grid: (rows, columns) with rows * columns == len(index), or None where the tokens have no raster.
        box: left, top, right, bottom of the part of the original image that the tokens cover, in 0..1; it can reach
            outside 0..1 where the model pads.
        image: number of the image within its sample.
        rows: rows of the connector's input, flattened over the batch, that each token comes from; -1 where a token
            mixes several. A family may leave it None where tokens and rows follow one another.
        spans: top and bottom of each row, left and right of each column, in fractions of the image, where cells do not
            divide the box evenly.
        fill: colour that the model is shown where the box reaches beyond the image.
    """

    index: Int[Tensor, " token"]
    grid: tuple[int, int] | None
    box: Box
    image: int = 0
    rows: Int[Tensor, " token"] | None = None
    spans: tuple[Float[Tensor, "h 2"], Float[Tensor, "w 2"]] | None = None
    fill: tuple[int, int, int] = (0, 0, 0)

    def token_box(self, row: int, column: int) -> Box:
        """The part of the image that the token at (row, column) covers, in fractions of the image."""
        assert self.grid is not None
        if self.spans is not None:
            (top, bottom), (left, right) = self.spans[0][row].tolist(), self.spans[1][column].tolist()
            return left, top, right, bottom
        left, top, right, bottom = self.box
        width, height = (right - left) / self.grid[1], (bottom - top) / self.grid[0]
        return left + column * width, top + row * height, left + (column + 1) * width, top + (row + 1) * height


@dataclass(frozen=True)
class Batch:
    """Encoded prompts.

    Attributes:
        inputs: what the processor returned; goes into the model as it is.
        images: the pictures of each sample, as they were given to the processor.
        prompts: the question of each sample.
    """

    inputs: BatchFeature
    images: BatchImages
    prompts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def vision(self) -> dict[str, Any]:
        """The part of `inputs` that describes images."""
        return {name: value for name, value in self.inputs.items() if name not in TEXT_INPUTS}


@dataclass(frozen=True)
class Family:
    """All that differs between model families.

    Attributes:
        architectures: values of `config.architectures[0]` that belong to this family.
        visual_tokens: (config, processor, batch) -> `[sample][image or tile]`, images in order, the tiles of an image
            one after another.
        projector: path below `model.model` of the module whose input is the tower's features, one row for each visual
            token.
        rows_per_token: config -> how many consecutive rows of the projector's input make one visual token; more than 1
            where the projector itself merges patches.
        injected_blocks: config -> how many of the first blocks have encoder features added to their output.
        answer_type: value of `token_type_ids` at answer tokens, where the family uses them.
        shared_settings: (config, processor) -> settings on which both must agree, each as (name, the processor's
            value, the model's value); None for a value that one of them does not state.
        shares_prefix: the connector's output goes as it is to the visual positions, and nothing up to them depends on
            what follows, so that all questions about an image can share one pass over it.
    """

    name: str
    architectures: tuple[str, ...]
    visual_tokens: Callable[[PretrainedConfig, Processor, Batch], list[list[VisualTokens]]]
    projector: str = "multi_modal_projector"
    rows_per_token: Callable[[PretrainedConfig], int] = lambda config: 1
    injected_blocks: Callable[[PretrainedConfig], int] = lambda config: 0
    answer_type: int = 0
    shared_settings: Callable[[PretrainedConfig, Any], Iterable[Setting]] = lambda config, processor: ()
    shares_prefix: bool = False


FAMILIES: Registry[Family] = Registry("model family", "families", Family)

CROSS_ATTENTION = (
    "its language model reads the image through cross-attention, so no position of its sequence is a visual token"
)
QUERIES = "its Q-Former turns the image into learnt queries, so its visual tokens have no place in the image"
REFUSED = {
    "MllamaForConditionalGeneration": CROSS_ATTENTION,
    "IdeficsForVisionText2Text": CROSS_ATTENTION,
    "Blip2ForConditionalGeneration": QUERIES,
    "InstructBlipForConditionalGeneration": QUERIES,
}


def family_of(config: PretrainedConfig) -> Family:
    """Return the family whose architectures contain `config.architectures[0]`.

    Raises:
        ModelError: an architecture that has no visual tokens with a place, and why.
        UnknownNameError: an architecture that no family covers; lists those that are.
    """
    named = config.architectures
    architecture = str(named[0]) if isinstance(named, list | tuple) and named else str(named or "(none)")
    for name in FAMILIES:
        if architecture in FAMILIES.get(name).architectures:
            return FAMILIES.get(name)
    if architecture in REFUSED:
        raise ModelError(f"{architecture} cannot be probed: {REFUSED[architecture]}")
    known = [a for name in FAMILIES for a in FAMILIES.get(name).architectures]
    raise UnknownNameError(
        "model architecture",
        architecture,
        known,
        also="or a new family: one file in workbench/mllm, see CONTRIBUTING.md",
    )


def placeholders(
    config: PretrainedConfig, batch: Batch, counts: Sequence[Sequence[int]] | None = None
) -> list[list[Int[Tensor, " token"]]]:
    """The positions of visual tokens, [sample][image]: split by `counts`, or evenly over the images of a sample.

    Raises:
        ModelError: a sample has another number of visual tokens.
    """
    found = []
    for number, ids in enumerate(batch.inputs["input_ids"]):
        index = (ids == config.image_token_id).nonzero().flatten()
        images = len(batch.images[number])
        own = list(counts[number]) if counts is not None else [len(index) // max(1, images)] * images
        if sum(own) != len(index):
            raise ModelError(
                f"{family_of(config).name}: {len(index)} visual tokens for {images} images of sample {number}, expected"
                f" {sum(own)}"
            )
        found.append(list(index.split(own)) if own else [])
    return found
