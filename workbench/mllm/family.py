"""What differs between model families, above all where the visual tokens of an image are in the model's sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn
from transformers import BatchFeature, PretrainedConfig

from workbench.errors import ModelError, UnknownNameError
from workbench.registry import Registry

Processor = Any  # a transformers ProcessorMixin, whose attributes differ between families
Setting = tuple[str, object, object]
"""Name of a setting, the processor's value, the model's value."""
Box = tuple[float, float, float, float]
"""Left, top, right, bottom, in fractions of the image."""
BatchImages = tuple[tuple[Image.Image, ...], ...]
"""The images of a batch, [sample][image]."""
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
FINAL_NORMS = ("norm", "final_layernorm", "ln_f", "final_layer_norm")
"""Names that decoders of transformers give to the norm after their last block."""
TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


@dataclass(frozen=True)
class VisualTokens:
    """The visual tokens of one image (or of one tile of it): positions in the sequence, and places in the image.

    Attributes:
        index: positions in `input_ids`, row by row from the top left of the token grid.
        grid: (rows, columns) with rows * columns == len(index), or None if the tokens have no place in the image.
        box: left, top, right, bottom of the part of the original image that the tokens cover, in fractions of the
            image; below 0 or above 1 where the model pads the image.
        image: number of the image within its sample.
        rows: for each token, the row of the projector's input (flattened over the batch) that it is computed from; -1
            if it mixes several rows. A family may leave it None if tokens and rows are in the same order.
        spans: top and bottom of each grid row, left and right of each grid column, in fractions of the image; only
            needed where the tokens do not divide the box evenly.
        fill: RGB color that the model sees where the box reaches beyond the image.
        tile_starts: the grid rows and the grid columns with which a tile begins, where the grid spans the tiles of an
            image; see `workbench.spatial.tiles`.
    """

    index: Int[Tensor, " token"]
    grid: tuple[int, int] | None
    box: Box
    image: int = 0
    rows: Int[Tensor, " token"] | None = None
    spans: tuple[Float[Tensor, "h 2"], Float[Tensor, "w 2"]] | None = None
    fill: tuple[int, int, int] = (0, 0, 0)
    tile_starts: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    def token_box(self, row: int, column: int) -> Box:
        """Return the part of the image that the token at (row, column) covers, in fractions of the image."""
        assert self.grid is not None
        if self.spans is not None:
            (top, bottom), (left, right) = self.spans[0][row].tolist(), self.spans[1][column].tolist()
            return left, top, right, bottom
        left, top, right, bottom = self.box
        width, height = (right - left) / self.grid[1], (bottom - top) / self.grid[0]
        return left + column * width, top + row * height, left + (column + 1) * width, top + (row + 1) * height


@dataclass(frozen=True)
class Batch:
    """Encoded prompts and what they were made from.

    Attributes:
        inputs: what the processor returned; passed to the model unchanged.
        images: the images of each sample, as the processor received them.
        prompts: the question of each sample.
    """

    inputs: BatchFeature
    images: BatchImages
    prompts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def vision(self) -> dict[str, Any]:
        """Return the part of `inputs` that describes images."""
        return {name: value for name, value in self.inputs.items() if name not in TEXT_INPUTS}


@dataclass(frozen=True)
class Family:
    """Everything that differs between model families.

    Attributes:
        architectures: values of `config.architectures[0]` that belong to this family.
        visual_tokens: (config, processor, batch) -> `[sample][image or tile]`, images in order, the tiles of an image
            one after another.
        projector: path below `model.model` of the module that receives the vision encoder's features, one row for each
            visual token (see `rows_per_token`).
        rows_per_token: config -> how many consecutive rows of the projector's input make one visual token; more than 1
            where the projector itself merges patches.
        injected_blocks: config -> how many of the first blocks have encoder features added to their output.
        answer_type: value of `token_type_ids` at answer tokens; 0 if the family does not mark answers this way.
        shared_settings: (config, processor) -> settings on which both must agree, each as (name, the processor's
            value, the model's value); None for a value that one of them does not state.
        shares_prefix: whether all questions about an image can share one forward pass over its visual tokens. This
            needs the projector's output to reach the visual positions unchanged, and attention that is causal up to
            them.
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
QUERIES = "its Q-Former turns the image into trained queries, so its visual tokens have no place in the image"
REFUSED = {
    "MllamaForConditionalGeneration": CROSS_ATTENTION,
    "IdeficsForVisionText2Text": CROSS_ATTENTION,
    "Blip2ForConditionalGeneration": QUERIES,
    "InstructBlipForConditionalGeneration": QUERIES,
}


def family_of(config: PretrainedConfig) -> Family:
    """Return the family whose architectures contain `config.architectures[0]`.

    Raises:
        ModelError: an architecture whose visual tokens have no place in the image; the message says why.
        UnknownNameError: an architecture that no family covers; the message lists those that are covered.
    """
    names = config.architectures
    architecture = str(names[0]) if isinstance(names, list | tuple) and names else str(names or "(none)")
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
        also="or a new family: one file in workbench/mllm/families, see CONTRIBUTING.md",
    )


def placeholders(
    config: PretrainedConfig, batch: Batch, counts: Sequence[Sequence[int]] | None = None
) -> list[list[Int[Tensor, " _token"]]]:
    """Return the positions of visual tokens, [sample][image].

    Args:
        counts: how many visual tokens each image has, [sample][image]; by default the tokens of a sample are divided
            evenly among its images.

    Raises:
        ModelError: a sample has another number of visual tokens than its images need.
    """
    positions = []
    for number, ids in enumerate(batch.inputs["input_ids"]):
        index = (ids == config.image_token_id).nonzero().flatten()
        images = len(batch.images[number])
        sizes = list(counts[number]) if counts is not None else [len(index) // max(1, images)] * images
        if sum(sizes) != len(index):
            raise ModelError(
                f"{family_of(config).name}: sample {number} has {len(index)} visual tokens, but its {images} images"
                f" need {sum(sizes)}"
            )
        positions.append(list(index.split(sizes)) if sizes else [])
    return positions


def final_norm_of(decoder: Any) -> nn.Module:
    """Return the norm after the last block of a decoder.

    Raises:
        ModelError: it has none under a name that transformers uses.
    """
    for name in FINAL_NORMS:
        if isinstance(norm := getattr(decoder, name, None), nn.Module):
            return norm
    raise ModelError(
        f"{type(decoder).__name__} has no final norm where transformers' decoders have it: expected one of"
        f" {', '.join(FINAL_NORMS)}"
    )
