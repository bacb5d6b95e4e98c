"""The tokens that are probed: which are sampled from an image, and their features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int

from analyses.linear_probe.options import ENCODER, Config
from workbench.analysis.chunks import Chunk, Part
from workbench.analysis.declaration import Context
from workbench.capture.hidden_states import encoder_rows, read
from workbench.data.base import Sample
from workbench.data.folder import QUESTION
from workbench.errors import ModelError
from workbench.mllm.family import VisualTokens
from workbench.spatial.grids import OUTSIDE, object_per_token, token_centers
from workbench.spatial.vfm_patches import patches_under
from workbench.vfm import VFM


@dataclass
class Tokens:
    """The sampled tokens, one row for each, and the mean token of each image.

    Attributes:
        images: number of the token's image.
        objects: number of the object under the token, counted over all images; where there is none, a negative number
            as in `object_per_token` (BACKGROUND, BETWEEN, OUTSIDE).
        other_objects: for each control task, the object of another image at the same position, or a negative number.
        positions: x and y of the patch's center, in fractions of the image.
        patches: (number of the grid, its rows, its columns, number of the patch in it).
        uniform: True for a token sampled from all tokens, False for one sampled from those on objects.
        features, means: {layer number, "tower" or VFM: features of the sampled tokens, and the mean of each image}.
    """

    images: list[int] = field(default_factory=list)
    objects: list[int] = field(default_factory=list)
    other_objects: list[np.ndarray] = field(default_factory=list)
    positions: list[np.ndarray] = field(default_factory=list)
    patches: list[tuple[int, ...]] = field(default_factory=list)
    uniform: list[bool] = field(default_factory=list)
    features: dict[str, list[np.ndarray]] = field(default_factory=dict)
    means: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def part(self, skipped: str) -> Part:
        """Return the tokens as a part to be stored.

        Args:
            skipped: why the vision encoder has no features; empty if it has.
        """
        tensors = {
            f"{kind}.{name}": torch.from_numpy(np.concatenate(arrays))
            for kind in ("features", "means")
            for name, arrays in getattr(self, kind).items()
        }
        if self.images:
            tensors["elsewhere"] = torch.from_numpy(np.stack(self.other_objects))
            tensors["place"] = torch.from_numpy(np.stack(self.positions))
        record = {"image": self.images, "thing": self.objects, "cell": self.patches, "spread": self.uniform}
        return Part(tensors=tensors, record=record | {"skipped": skipped})

    def take(self, part: Part, without: set[str]) -> None:
        """Append the tokens of a stored part, except the features named in `without`; parts come in image order."""
        self.images += part.record["image"]
        self.objects += part.record["thing"]
        self.uniform += part.record["spread"]
        self.patches += [tuple(patch) for patch in part.record["cell"]]
        if "place" in part.tensors:
            self.other_objects += list(part.tensors["elsewhere"].numpy())
            self.positions += list(part.tensors["place"].numpy())
        for key, values in part.tensors.items():
            kind, _, name = key.partition(".")
            if kind in ("features", "means") and name not in without:
                getattr(self, kind).setdefault(name, []).append(values.numpy())

    def add_features(
        self, name: str, values: Float[np.ndarray, "token d"], sampled: Int[np.ndarray, " sampled"]
    ) -> None:
        """Add the features of an image's sampled tokens, and the mean over all its tokens."""
        self.features.setdefault(name, []).append(values[sampled])
        self.means.setdefault(name, []).append(values.mean(0, keepdims=True))


def read_chunk(
    config: Config,
    context: Context,
    layers: list[int],
    images: Sequence[Sample],
    vfms: Mapping[str, VFM],
    chunk: Chunk[Sample],
) -> Part:
    """Read the sampled tokens of a chunk of `images` at every layer, the vision encoder and the VFMs.

    Every image has the same prompt, so that no question can give the answer away.
    """
    mllm, tokens, skipped = context.mllm, Tokens(), ""
    first_objects = np.cumsum([0, *(len(sample.objects) for sample in images)])
    for start, samples in chunk.batches():
        batch_images = [s.image for s in samples]
        batch = mllm.encode(batch_images, [QUESTION] * len(samples))
        visual_tokens = mllm.visual_tokens(batch)
        try:
            encoder_rows(mllm, visual_tokens)
        except ModelError as error:
            skipped = str(error)
        activations = read(mllm, batch, layers=layers, encoder=not skipped, final_norm=config.final_norm)
        vfm_features = {name: patches_under(vfm, batch_images, visual_tokens) for name, vfm in vfms.items()}
        for row, hidden in enumerate(activations):
            number = start + row
            sampled = _sample_tokens(config, tokens, images, number, visual_tokens[row], int(first_objects[number]))
            for layer, values in zip(layers, hidden.values.numpy(), strict=True):
                tokens.add_features(str(layer), values, sampled)
            if hidden.encoder_features is not None:
                tokens.add_features(ENCODER, hidden.encoder_features.numpy(), sampled)
            for name in vfms:
                features = np.concatenate([grid.numpy() for grid in vfm_features[name][row]])
                tokens.add_features(name, features, sampled)
    return tokens.part(skipped)


def _sample_tokens(
    config: Config, tokens: Tokens, images: Sequence[Sample], number: int, parts: list[VisualTokens], first_object: int
) -> Int[np.ndarray, " row"]:
    """Sample tokens of an image, add them to `tokens`, and return their numbers.

    The sample is the same for every model with the same patch grid.

    Args:
        number: number of the image.
        parts: its visual tokens, one part for each tile.
        first_object: number of its first object, counted over all images.
    """
    rng = np.random.default_rng([config.seed, number])
    positions = token_centers(parts)
    object_of_token = object_per_token(images[number].objects, parts, share=config.cover)
    uniform = rng.permutation((object_of_token != OUTSIDE).nonzero()[0])[: config.tokens_per_image]
    on_objects = rng.permutation((object_of_token >= 0).nonzero()[0])[: config.tokens_per_image]
    others = (number + 1 + rng.integers(len(images) - 1, size=config.controls)) % len(images)
    of_others = [object_per_token(images[other].objects, parts, share=config.cover) for other in others]
    other_objects = np.stack(of_others, axis=1)
    patches = [(grid, *(part.grid or ()), patch) for grid, part in enumerate(parts) for patch in range(len(part.index))]
    sampled = np.concatenate([uniform, on_objects])
    tokens.images += [number] * len(sampled)
    tokens.objects += [int(n) + first_object if n >= 0 else int(n) for n in object_of_token[sampled]]
    tokens.other_objects += list(other_objects[sampled])
    tokens.positions += list(positions[sampled])
    tokens.patches += [patches[i] for i in sampled]
    tokens.uniform += [True] * len(uniform) + [False] * len(on_objects)
    return sampled
