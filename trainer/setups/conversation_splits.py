"""The conversations of a run: training, validation and test."""

from __future__ import annotations

from dataclasses import dataclass

from trainer import distributed
from trainer.recipe import DataConfig, Recipe
from trainer.setups.conversation_data import ConversationSet
from trainer.setups.packed_data import first_questions, load_training
from trainer.setups.rows import Rows
from workbench.data import Dataset, load_data
from workbench.data.conversations import mixed
from workbench.errors import ConfigError


@dataclass(frozen=True)
class ConversationSplits:
    """The data of a run; `test` is None if the finished model is evaluated on `val`."""

    train: ConversationSet
    val: ConversationSet
    test: ConversationSet | None

    @property
    def all(self) -> list[ConversationSet]:
        """The splits that the run has, in the order train, val, test."""
        return [data for data in (self.train, self.val, self.test) if data is not None]

    @property
    def evaluated(self) -> list[ConversationSet]:
        """The splits that the model is evaluated on."""
        return self.all[1:]


def load_conversations(recipe: Recipe, stored: Rows | None = None) -> ConversationSplits:
    """Load the training, validation and, if the recipe has it, test data.

    Args:
        stored: for a resumed run, the training rows that it was started with; see `ConversationSet`.

    Raises:
        ConfigError: see `_check_kinds`.
    """
    config = recipe.data

    def load_evaluated(spec: str, limit: int | None) -> ConversationSet:
        return ConversationSet(first_questions(load_data(spec, limit=limit), config.questions))

    parts = [
        first_questions(load_training(spec, config.limit_train, recipe.seed), config.questions) for spec in config.train
    ]
    weights = config.weights or (1.0,) * len(parts)
    train = parts[0] if len(parts) == 1 and weights == (1.0,) else mixed(parts, weights, recipe.seed)
    _check_kinds(train, config)
    test = None if config.test is None else load_evaluated(config.test, config.limit_test)
    return ConversationSplits(ConversationSet(train, parts, stored), load_evaluated(config.val, config.limit_val), test)


def _check_kinds(data: Dataset, config: DataConfig) -> None:
    """Check that the launch file can train on data that mix conversations with images and conversations without.

    Raises:
        ConfigError: the launch file is ZeRO-3's; or it is FSDP's and the kinds are not grouped, so that a rank with an
            image would wait forever for the others to gather the vision encoder's weights.
    """
    strategy, kinds = distributed.strategy(), {bool(c.loads) for c in data.conversations}
    if strategy == "zero3" and len(kinds) > 1:
        raise ConfigError(
            "zero3 cannot train on conversations with and without images: expected the launch file fsdp.yaml, since"
            " DeepSpeed applies an old gradient again to parameters that get none from a text"
        )
    if distributed.is_sharded() and not config.group and len(kinds) > 1:
        raise ConfigError(
            f"data.group is no with {strategy} for conversations with and without images: expected yes, since ranks"
            " that share the weights must have images in the same forward passes"
        )
