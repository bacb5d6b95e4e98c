"""Data of a toy LLaVA's training: all questions of an image packed into one sequence.

Each question is trained on as if it were the only one after the image; see `trainer.setups.packing`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trainer.recipe import DataConfig
from trainer.targets.features import Features
from workbench.data import Dataset, Sample, load_data
from workbench.data.base import IMAGE_MARK, Conversation, content_hash
from workbench.data.conversations import ConversationDataset
from workbench.errors import ConfigError, DataError
from workbench.mllm.control import control_tokens, spelled_in
from workbench.mllm.conversation import IGNORED


@dataclass(frozen=True)
class Packed:
    """All questions about one image as one sequence.

    Attributes:
        labels: the token to predict *at* each position (the one that follows), or IGNORED.
        position_ids: every question starts right after the prefix, as if it were the only one.
        segments: 0 for the prefix that all questions share, q for the tokens of question q (from 1).
    """

    input_ids: Int[Tensor, " s"]
    labels: Int[Tensor, " s"]
    position_ids: Int[Tensor, " s"]
    segments: Int[Tensor, " s"]


class Packer:
    """Packs the samples of one image into a `Packed` sequence, with the chat template of the processor.

    Args:
        image_tokens: number of visual tokens of an image.
    """

    def __init__(self, processor: Any, image_tokens: int) -> None:
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.image_tokens = image_tokens
        self._control = control_tokens(processor, {processor.image_token})
        self._token_ids = lru_cache(maxsize=100_000)(self._tokenize)

    def _tokenize(self, question: str, answer: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Return the token ids of the prefix, of the rest of the prompt, and of the answer.

        The prefix ends with the last visual token, the answer with the end-of-sequence token.

        Raises:
            DataError: a text contains a control token, or the question marks where its image goes, or it has another
                number of visual tokens than an image.
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
                " expected the image before them"
            )
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        image_token = self.processor.image_token
        text = text.replace(image_token, image_token * self.image_tokens)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        visual = [i for i, token in enumerate(ids) if token == self.processor.image_token_id]
        if len(visual) != self.image_tokens:
            raise DataError(
                f"question '{question}' gives {len(visual)} visual tokens: expected {self.image_tokens}, the visual"
                f" tokens of one image; does it contain '{image_token}'?"
            )
        prefix_end = visual[-1] + 1
        reply = [*self.tokenizer(answer, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]
        return tuple(ids[:prefix_end]), tuple(ids[prefix_end:]), tuple(reply)

    def __call__(self, samples: list[Sample]) -> Packed:
        """Pack `samples`, which must be about the same image.

        Raises:
            DataError: see `_tokenize`; or the chat template puts different text before the image, or no token between
                the image and an answer, because the question is empty.
        """
        tokenized = [self._token_ids(sample.question, sample.answer) for sample in samples]
        for sample, (_, question, _) in zip(samples, tokenized, strict=True):
            if not question:  # the answer would follow the prefix, which has no label
                raise DataError(
                    f"question {sample.id} about image {sample.image_name} has no words: expected some, since a toy"
                    " LLaVA's answers follow a question"
                )
        prefix = tokenized[0][0]
        if any(other_prefix != prefix for other_prefix, _, _ in tokenized):
            raise DataError(
                f"the questions about image {samples[0].image_id} do not share the text before the image, so they"
                " cannot be packed"
            )
        ids = list(prefix)
        labels = [IGNORED] * len(prefix)
        positions = list(range(len(prefix)))
        segments = [0] * len(prefix)
        for number, (_, question, answer) in enumerate(tokenized, start=1):
            inputs = [*question, *answer[:-1]]  # the end token is only predicted, never an input
            ids += inputs
            labels += [IGNORED] * (len(question) - 1) + list(answer)
            positions += range(len(prefix), len(prefix) + len(inputs))
            segments += [number] * len(inputs)
        return Packed(*(torch.tensor(values) for values in (ids, labels, positions, segments)))


class Splits(NamedTuple):
    """The data sets of a run; `test` is None if the finished model is evaluated on `val`."""

    train: Dataset
    val: Dataset
    test: Dataset | None

    @property
    def all(self) -> list[Dataset]:
        """The data sets that the run has, in the order train, val, test."""
        return [data for data in self if data is not None]

    @property
    def words(self) -> list[str]:
        """All words of all splits, sorted: the whole vocabulary of a randomly initialized language model."""
        return sorted(set().union(*(data.vocabulary for data in self.all)))


def first_questions(data: Dataset, count: int | None) -> Dataset:
    """Return `data` with only the first `count` questions of each image; with all of them if `count` is None.

    Raises:
        ConfigError: the data set has conversations, whose later turns need the earlier ones.
    """
    if count is None:
        return data
    if isinstance(data, ConversationDataset):
        raise ConfigError(
            f"data.questions is {count}, which cannot be used for {data.name}, whose rows are conversations: remove it,"
            " or take fewer conversations with data.limit_train"
        )
    samples = [sample for scene in data.scenes for sample in scene[:count]]
    return Dataset(
        data.name, samples, lambda: content_hash(data.fingerprint, count), sorted(data.vocabulary), data.left_out
    )


def load_training(spec: str, limit: int | None, seed: int) -> Dataset:
    """Load a training data set, or a random subset of it with `limit` images.

    Args:
        spec: the data set and its split.
        limit: number of images; all by default.
        seed: the run's seed, which draws the subset. For the same seed, a larger subset contains every smaller one.

    Raises:
        ConfigError: the data set has fewer than `limit` images.
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
    """Load the questions that a toy LLaVA is trained and evaluated on, with all questions of each image.

    Args:
        seed: the run's seed, which draws the training images if `data.limit_train` is set.

    Raises:
        ConfigError: a data set has rows that are not a single question about a single image, or questions for
            evaluation lack options, or `data.limit_train` exceeds the number of images.
    """
    train, val = load_training(config.train[0], config.limit_train, seed), load_data(config.val, limit=config.limit_val)
    test = None if config.test is None else load_data(config.test, limit=config.limit_test)
    for key, data in (("train", train), ("val", val), ("test", test)):
        if isinstance(data, ConversationDataset) and any(
            len(c.loads) != 1 or len(c.turns) != 1 for c in data.conversations
        ):
            raise ConfigError(
                f"{data.name} has conversations with several turns, or with several images or none: expected single"
                " questions about one image, or a pretrained model (model.name)"
            )
        if data is None or key == "train":
            continue
        if unscored := next((sample for sample in data if sample.answer not in sample.options), None):
            raise ConfigError(
                f"question {unscored.id} of {data.name} has no options with its answer among them: data.{key} needs"
                " them, since accuracy is measured on it"
            )
    return Splits(train, val, test)


class PackedDataset(torch.utils.data.Dataset):
    """One item per image: its packed questions, its features for the projector and, if given, its alignment targets.

    Args:
        inputs: (image, token, d) features that the projector receives.
        targets: (image, token, dim) features of each target, by name; None for a baseline.
    """

    def __init__(
        self, data: Dataset, packer: Packer, inputs: Features, targets: dict[str, Features] | None = None
    ) -> None:
        self.data, self.packer, self.inputs, self.targets = data, packer, inputs, targets
        self.packed = [packer(scene) for scene in data.scenes]

    def __len__(self) -> int:
        return len(self.packed)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """Return the items of a whole batch; torch's data loader calls this.

        With `data.features: compute`, the features of the batch are thus computed together.
        """
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
    """Return `items` as a batch: sequences padded on the right, features and targets stacked."""
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
