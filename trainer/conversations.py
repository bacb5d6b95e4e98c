"""Conversations as batches: sequences with their labels, where the visual tokens are, and what these are aligned to."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Sampler
from tqdm import tqdm

from trainer.config import AlignmentConfig
from trainer.features import DerivedFeatures, Features, frozen_features, image_hashes, other_images
from trainer.rows import Rows
from workbench.data import Dataset, Sample
from workbench.data.base import Conversation, content_hash, rows_hash
from workbench.data.images import image_hash, shown
from workbench.errors import ConfigError, DataError, RunError, WorkbenchError
from workbench.mllm import MLLM, Batch, VisualTokens
from workbench.mllm.conversation import encode_conversations
from workbench.vfm import VFM, load_vfm, patches_under
from workbench.vfm.patches import covered_pixels

MEGABATCH = 50  # batches whose conversations are sorted by length together, as in transformers' own grouping


class GroupedSampler(Sampler[int]):
    """The order of all conversations over a whole training: each epoch another one, all of it known from the seed, so that a resumed run has the same.

    Consecutive `group` conversations all have images, or none, and are of about the same length. What an epoch leaves over of each kind, less than a group,
    is the first of that kind in the next one, where it may stand in one group twice; so of one kind none is ever two times ahead of another.

    Args:
        group: conversations of one optimiser step.
        total: conversations of the whole training.
        grouped: False for a plain random order.
    """

    def __init__(self, rows: Rows, group: int, total: int, seed: int, *, grouped: bool = True) -> None:
        self._with_image, self._lengths = torch.from_numpy(rows.with_image), torch.from_numpy(rows.lengths)
        self._group, self._total, self._seed, self._grouped = group, total, seed, grouped

    def __len__(self) -> int:
        return self._total

    def __iter__(self) -> Iterator[int]:
        given, epoch, left = 0, 0, torch.empty(0, dtype=torch.long)
        while given < self._total:
            own = torch.Generator().manual_seed(int(np.random.SeedSequence((self._seed, epoch)).generate_state(1)[0]))
            order = torch.cat([left, torch.randperm(len(self._lengths), generator=own)])
            batches, left = self._groups(order, own) if self._grouped else (list(order.split(self._group)), order[:0])
            for batch in batches:
                yield from batch[: self._total - given].tolist()
                given += len(batch[: self._total - given])
            epoch += 1

    def left_out(self) -> str | None:
        """One sentence about a kind of conversations that comes less than half as often as it is in the data: what is left over of few fills no group."""
        seen = self._with_image[torch.tensor(list(self))].float().mean()
        for kind, there, own in (("with", self._with_image.float().mean(), seen), ("without", 1 - self._with_image.float().mean(), 1 - seen)):
            if own < there / 2:
                count = int((self._with_image == (kind == "with")).sum())
                shares = f"{float(there):.3g} of the data and {float(own):.3g} of what is trained on"
                why = f"since they rarely fill a step of {self._group}; see optim.global_batch and data.group"
                return f"the {count} conversations {kind} an image are {shares}, {why}"
        return None

    def _groups(self, order: Tensor, generator: torch.Generator) -> tuple[list[Tensor], Tensor]:
        """Whole groups of one kind each, in random order, and what is left of both kinds."""
        groups: list[Tensor] = []
        left: list[Tensor] = []
        for kind in (True, False):
            own = order[self._with_image[order] == kind]
            whole = len(own) - len(own) % self._group
            left.append(own[whole:])
            for mega in own[:whole].split(MEGABATCH * self._group):
                groups += mega[self._lengths[mega].argsort(stable=True)].split(self._group)
        groups = [group for group in groups if len(group)]
        return [groups[i] for i in torch.randperm(len(groups), generator=generator)], torch.cat(left)


class ConversationSet(torch.utils.data.Dataset):
    """Conversations by number; the collator makes batches of them.

    Args:
        data: what is read.
        parts: the data sets that it is mixed from, by which rows are named.
        stored: the rows that a run which goes on with repaired data was started with; its order stays, whatever became of some of them.

    Attributes:
        rows: those that the order is of.
        said: what looking through them before the first step found (trainer/preflight.py).

    Raises:
        RunError: the data are not the stored rows, some of them repaired or some left out.
    """

    def __init__(self, data: Dataset, parts: Sequence[Dataset] = (), stored: Rows | None = None) -> None:
        self.data, self.conversations, self.rows = data, data.conversations, Rows.of(data.conversations)
        self._names = {id(c): part.name for part in parts for c in part.conversations}
        self.said: list[str] = []
        self.dropped = 0
        if stored is not None:
            numbers, self.dropped = self.rows.in_place_of(stored, data.name)
            self.conversations, self.rows = [data.conversations[n] for n in numbers], stored

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> int:
        return index

    def where(self, conversation: Conversation) -> str:
        """A conversation in messages, by its row and its data set."""
        return f"conversation {conversation.id} of {shown(self._names.get(id(conversation), self.data.name))}"

    def sentences(self) -> list[str]:
        """What is left out of the data, and what is cut."""
        return [*(f"{shown(self.data.name)}: {sentence}" for sentence in self.data.left_out), *self.said]


def encoded(mllm: MLLM, data: ConversationSet, numbers: Sequence[int], max_length: int | None, *, device: str | None = None) -> tuple[Batch, Tensor]:
    """Some conversations as a batch, and its labels; on the model's device where no other is asked for.

    Raises:
        DataError: names the row that cannot be used (all was looked through before, so its image is broken behind its header, or was replaced) and the remedy.
    """
    own = [data.conversations[number] for number in numbers]
    try:
        return encode_conversations(mllm, [c.images for c in own], [c.turns for c in own], max_length=max_length, device=device)
    except WorkbenchError as error:
        broken, why = own[0], error
        for conversation in own if len(own) > 1 else ():
            try:
                encode_conversations(mllm, [conversation.images], [conversation.turns], max_length=max_length)
            except WorkbenchError as alone:
                broken, why = conversation, alone
                break
        remedy = "repair it, or leave it out (drop=ROW in the spec), and go on with --resume --repaired"
        raise DataError(f"{data.where(broken)}: {why}; {remedy}") from error


class Collator:
    """Numbers of conversations -> what the model's forward takes.

    Args:
        targets: (numbers, images, visual tokens) -> features by VFM, [conversation][image or tile]; None where nothing comes with the batch.
        count_tiles: what one batch weighs among those of a step: its images and tiles, or its visual tokens.
    """

    def __init__(self, mllm: MLLM, data: ConversationSet, max_length: int | None, targets: Targets | None = None, *, count_tiles: bool = False) -> None:
        self._mllm, self._data, self.max_length, self._targets, self._count_tiles = mllm, data, max_length, targets, count_tiles

    def __call__(self, numbers: list[int]) -> dict[str, Any]:
        """Everything on the CPU: the Trainer moves it."""
        batch, labels = encoded(self._mllm, self._data, numbers, self.max_length, device="cpu")
        visual = self._mllm.visual_tokens(batch)
        inputs: dict[str, Any] = dict(batch.inputs)
        parts = [part for sample in visual for part in sample]
        inputs |= {"labels": labels, "visual": visual, "aligned": len(parts) if self._count_tiles else sum(len(part.index) for part in parts)}
        if self._targets is not None:
            inputs["targets"] = self._targets(numbers, batch.images, visual)
        return inputs


# --- targets -----------------------------------------------------------------------------------------------------------------------------

Places = Sequence[Sequence[VisualTokens]]
Pictures = Sequence[Sequence[Image.Image]]


class Targets:
    """Features of some VFMs of the pixels under each visual token, by VFM: [conversation][image or tile] (token, dim)."""

    def __init__(self, vfms: Sequence[VFM]) -> None:
        self.vfms = vfms
        self.dims = {vfm.name: vfm.dim for vfm in vfms}

    def __call__(self, numbers: Sequence[int], images: Pictures, visual: Places) -> dict[str, list[list[Tensor]]]:
        """Computed now: images of a batch go through a VFM together."""
        shown = [(image, [part for part in visual[row] if part.image == n]) for row, own in enumerate(images) for n, image in enumerate(own)]
        found = {}
        for vfm in self.vfms:
            by_image = iter(patches_under(vfm, [image for image, _ in shown], [parts for _, parts in shown])) if shown else iter(())
            found[vfm.name] = [[tile.cpu().clone() for _ in own for tile in next(by_image)] for own in images]  # a clone takes part in autograd
        return found


class StoredTargets(Targets):
    """The same from the feature cache, which one pass over the data fills: a store for each size of patch grid.

    The pass looks at the pixels of every image, by which the stored features are known; each image that comes later must have them still.

    Raises:
        ConfigError: the control `images: others` where most images of a patch grid are one image.
    """

    def __init__(self, vfms: Sequence[VFM], mllm: MLLM, data: ConversationSet, settings: AlignmentConfig, seed: int, max_length: int | None) -> None:
        super().__init__(vfms)
        self._data = data
        self._pixels: list[list[bytes]] = []  # of each conversation: hashes of its images
        self._tiles: list[list[tuple[tuple[int, int], int]]] = []  # of each conversation: patch grid, number within its store
        samples: dict[tuple[int, int], list[Sample]] = {}
        pictures: dict[tuple[int, int], list[tuple[int, int]]] = {}  # whose tile each sample is: conversation, image
        boxes = []
        for number, own in enumerate(tqdm(data.conversations, desc=f"tiles of {data.data.name}", file=sys.stderr, mininterval=2, delay=2)):
            places: list[tuple[tuple[int, int], int]] = []
            self._pixels.append([])
            if own.loads:
                batch, _ = encoded(mllm, data, [number], max_length, device="cpu")
                self._pixels[-1] = [image_hash(image) for image in batch.images[0]]
                for n, part in enumerate(mllm.visual_tokens(batch)[0]):
                    if part.grid is None:
                        raise ConfigError(f"{mllm.name} gives visual tokens without rows and columns: expected data.features compute, or another model")
                    same = samples.setdefault(part.grid, [])
                    places.append((part.grid, len(same)))
                    boxes.append((part.grid, part.image, part.box, part.fill))
                    pictures.setdefault(part.grid, []).append((number, part.image))
                    same.append(Sample(f"{number}:{n}", f"{number}:{n}", partial(_covered, own, part)))
            self._tiles.append(places)
        fingerprint = rows_hash(chain(self._pixels, boxes))
        sets = {grid: Dataset(data.data.name, own, content_hash(fingerprint, grid)) for grid, own in samples.items()}
        known = _known(pictures, sets) if settings.images == "others" else {}
        self._features: dict[str, dict[tuple[int, int], Features]] = {}
        for vfm in vfms:
            stores = {grid: frozen_features(own, (vfm.entry.identity(), grid), partial(vfm_tokens, vfm, grid), what=vfm.name) for grid, own in sets.items()}
            self._features[vfm.name] = _controlled(stores, known, settings, seed)

    def __call__(self, numbers: Sequence[int], images: Pictures, visual: Places) -> dict[str, list[list[Tensor]]]:
        """Read from the store.

        Raises:
            RunError: an image has other pixels than those whose features are stored.
        """
        for number, own in zip(numbers, images, strict=True):
            for n, (image, pixels) in enumerate(zip(own, self._pixels[number], strict=True)):
                if image_hash(image) != pixels:
                    raise RunError(
                        f"image {n + 1} of conversation {self._data.conversations[number].id} of {shown(self._data.data.name)} has been replaced since the "
                        "training began: expected the pixels that its targets were computed of; put it back, or start again"
                    )
        return {name: [[stores[grid][row] for grid, row in self._tiles[number]] for number in numbers] for name, stores in self._features.items()}


def load_vfms(settings: AlignmentConfig, device: str = "cpu") -> list[VFM]:
    """The VFMs that a recipe names."""
    return [load_vfm(name, device=device, teacher_norm=settings.teacher_norm) for name in settings.vfm]


def vfm_record(vfms: Sequence[VFM]) -> dict[str, Any]:
    """What the VFMs say of themselves: plain values for one, lists for several."""
    records = [vfm.record() for vfm in vfms]
    return dict(records[0]) if len(records) == 1 else {key: [record[key] for record in records] for key in records[0]}


def vfm_tokens(vfm: VFM, grid: tuple[int, int], images: list[Image.Image]) -> Tensor:
    """Features (image, token, dim) of whole images on a grid."""
    return vfm(images, grid=grid).tokens()


def _covered(conversation: Conversation, part: VisualTokens) -> Image.Image:
    return covered_pixels(conversation.loads[part.image](), part)


def _controlled(
    stores: dict[tuple[int, int], Features], pictures: Mapping[tuple[int, int], Sequence[Hashable]], settings: AlignmentConfig, seed: int
) -> dict[tuple[int, int], Features]:
    """Targets with the controls that the recipe asks for: less the mean of all tokens, or those of another picture with the same raster."""
    if settings.center:
        counts = {grid: own.shape[0] * own.shape[1] for grid, own in stores.items()}
        mean = sum(own.mean() * (counts[grid] / sum(counts.values())) for grid, own in stores.items())
        assert isinstance(mean, Tensor)
        stores = {grid: DerivedFeatures(own, minus=mean) for grid, own in stores.items()}
    if settings.images == "others":
        stores = {grid: DerivedFeatures(own, order=other_images(pictures[grid], seed)) for grid, own in stores.items()}
    return stores


def _known(
    pictures: Mapping[tuple[int, int], Sequence[tuple[int, int]]], sets: Mapping[tuple[int, int], Dataset]
) -> dict[tuple[int, int], list[tuple[bytes, ...]]]:
    """The picture of each tile by what it shows, which is all its tiles, instead of by conversation and number: it may occur elsewhere."""
    tiles: dict[tuple[int, int], list[bytes]] = {}
    for grid, data in sets.items():
        for picture, tile in zip(pictures[grid], image_hashes(data), strict=True):
            tiles.setdefault(picture, []).append(tile)
    return {grid: [tuple(tiles[picture]) for picture in own] for grid, own in pictures.items()}
