"""Packing: all questions of one image in one sequence, each as if it stood alone behind the image."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trainer.recipe import DataConfig
from trainer.targets.features import Features
from workbench.data import Dataset, Sample, load_data
from workbench.data.base import IMAGE_MARK, Conversation, ConversationDataset, content_hash
from workbench.errors import ConfigError, DataError
from workbench.mllm.control import control_tokens, spelled_in
from workbench.mllm.conversation import IGNORED


@dataclass(frozen=True)
class Packed:
    """One image's questions as one sequence; every tensor is (s,). `labels[i]` is the token to predict *at* position
    i."""

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    segments: Tensor


class Packer:
    """Turns the samples of one image into a `Packed` sequence with the processor's own chat template.

    Args:
        image_tokens: visual tokens of one image.
    """

    def __init__(self, processor: Any, image_tokens: int) -> None:
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.image_tokens = image_tokens
        self._control = control_tokens(processor, {processor.image_token})
        self._ids = lru_cache(maxsize=100_000)(self._tokenise)

    def _tokenise(self, question: str, answer: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Prefix up to the last visual token, rest of the prompt, and answer with its end token.

        Raises:
            DataError: a text with a control token, or a question with places for its images, or with another number of
                visual tokens.
        """
        for text in (question, answer):
            if spelled := spelled_in(text, self._control):
                raise DataError(
                    f"the text {text[:60]!r} contains '{spelled[0]}', a control token of this model: expected a text"
                    " without it"
                )
        if IMAGE_MARK in question:
            raise DataError(
                f"the question {question.replace(IMAGE_MARK, '<image>')[:80]!r} has its image between its words:"
                " expected it before them"
            )
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        image = self.processor.image_token
        ids = self.tokenizer(text.replace(image, image * self.image_tokens), add_special_tokens=False)["input_ids"]
        visual = [i for i, token in enumerate(ids) if token == self.processor.image_token_id]
        if len(visual) != self.image_tokens:
            raise DataError(
                f"question '{question}' gives {len(visual)} visual tokens, expected {self.image_tokens}; does it"
                f" contain '{image}'?"
            )
        end = visual[-1] + 1
        reply = [*self.tokenizer(answer, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]
        return tuple(ids[:end]), tuple(ids[end:]), tuple(reply)

    def __call__(self, samples: list[Sample]) -> Packed:
        """Pack `samples`, which must share their image."""
        parts = [self._ids(sample.question, sample.answer) for sample in samples]
        prefix = parts[0][0]
        if any(part[0] != prefix for part in parts):
            raise DataError(
                f"the questions about image {samples[0].image_id} do not share the text before the image, so they"
                " cannot be packed"
            )
        ids = list(prefix)
        labels = [IGNORED] * len(prefix)
        positions = list(range(len(prefix)))
        segments = [0] * len(prefix)
        for number, (_, question, answer) in enumerate(parts, start=1):
            own = [*question, *answer[:-1]]  # the end token is predicted, never read
            ids += own
            labels += [IGNORED] * (len(question) - 1) + list(answer)
            positions += range(len(prefix), len(prefix) + len(own))
            segments += [number] * len(own)
        return Packed(*(torch.tensor(v) for v in (ids, labels, positions, segments)))


class Splits(NamedTuple):
    """The data sets of a run; `test` is None where the finished model is evaluated on `val`."""

    train: Dataset
    val: Dataset
    test: Dataset | None

    @property
    def all(self) -> list[Dataset]:
        """Those that there are."""
        return [data for data in self if data is not None]

    @property
    def words(self) -> list[str]:
        """The closed vocabulary of all of them."""
        return sorted(set().union(*(data.vocabulary for data in self.all)))


def first_questions(data: Dataset, most: int | None) -> Dataset:
    """`data` with the first `most` questions of each image, or all of them.

    Raises:
        ConfigError: it has conversations of its own, whose turns need the earlier ones.
    """
    if most is None:
        return data
    if isinstance(data, ConversationDataset):
        raise ConfigError(
            f"data.questions is {most}: expected none for {data.name}, whose rows are conversations; data.limit_train"
            " takes fewer of them"
        )
    kept = [sample for scene in data.scenes for sample in scene[:most]]
    return Dataset(
        data.name, kept, lambda: content_hash(data.fingerprint, most), sorted(data.vocabulary), data.left_out
    )


def load_training(spec: str, limit: int | None, seed: int) -> Dataset:
    """A training data set, or a random `limit` of its images drawn with the run's `seed`; a smaller subset lies within
    every larger one of that seed.

    Raises:
        ConfigError: it has fewer images.
    """
    data = load_data(spec, limit=limit, draw=seed, decode=False)
    items = data.conversations if isinstance(data, ConversationDataset) else data.scenes
    images = len(
        {(item.image_ids or item.id) if isinstance(item, Conversation) else item[0].image_id for item in items}
    )
    if limit is not None and images < limit:
        raise ConfigError(f"data.limit_train is {limit}: expected at most {images}, the images of {spec}")
    return data


def load_questions(config: DataConfig, seed: int) -> Splits:
    """Questions of a toy LLaVA, all of every image.

    Args:
        seed: of the run, which draws the images of `data.limit_train`.

    Raises:
        ConfigError: conversations, of which packing would leave out those without an image or with several; questions
            without options where accuracy is measured; a limit beyond the training images.
    """
    train, val = load_training(config.train[0], config.limit_train, seed), load_data(config.val, limit=config.limit_val)
    test = None if config.test is None else load_data(config.test, limit=config.limit_test)
    for key, data in (("train", train), ("val", val), ("test", test)):
        if isinstance(data, ConversationDataset) and any(
            len(c.loads) != 1 or len(c.turns) != 1 for c in data.conversations
        ):
            raise ConfigError(
                f"{data.name} has conversations of several turns or images, or none: expected single questions about an"
                " image, or model.name"
            )
        if data is None or key == "train":
            continue
        if unscored := next((sample for sample in data if sample.answer not in sample.options), None):
            raise ConfigError(
                f"question {unscored.id} of {data.name} has no options with its answer among them: expected them in"
                f" data.{key}, which accuracy is of"
            )
    return Splits(train, val, test)


class PackedDataset(torch.utils.data.Dataset):
    """One item per image: its packed questions, its connector input and, if given, its alignment targets.

    Args:
        inputs: (image, token, d) connector inputs.
        targets: (image, token, dim) features by name, or None for a baseline.
    """

    def __init__(
        self, data: Dataset, packer: Packer, inputs: Features, targets: dict[str, Features] | None = None
    ) -> None:
        self.data, self.inputs, self.targets = data, inputs, targets
        self.packed = [packer(scene) for scene in data.scenes]

    def __len__(self) -> int:
        return len(self.packed)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """A whole batch, which the data loader asks for, so that features that are computed anew are computed
        together."""
        items: list[dict[str, Any]] = [
            {name: getattr(self.packed[index], name) for name in PADDING} for index in indices
        ]
        for item, values in zip(items, self.inputs.rows(indices), strict=True):
            item["connector_inputs"] = values
        for name, features in (self.targets or {}).items():
            for item, values in zip(items, features.rows(indices), strict=True):
                item.setdefault("targets", {})[name] = values
        return items


PADDING = {"input_ids": 0, "labels": IGNORED, "position_ids": 0, "segments": -1}


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Pad sequences on the right and stack the rest."""
    batch: dict[str, Any] = {
        name: pad_sequence([item[name] for item in items], batch_first=True, padding_value=fill)
        for name, fill in PADDING.items()
    }
    batch["connector_inputs"] = torch.stack([item["connector_inputs"] for item in items])
    if "targets" in items[0]:
        batch["targets"] = {
            name: torch.stack([item["targets"][name] for item in items]) for name in items[0]["targets"]
        }
    return batch
