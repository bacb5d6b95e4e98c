"""Checks that recipe, model and conversations fit together, before anything is written."""

from __future__ import annotations

from trainer import distributed
from trainer.model_config import ModelConfig
from trainer.preflight import look_through
from trainer.recipe import Recipe
from trainer.setups.conversation_data import ConversationSet
from trainer.setups.conversation_splits import ConversationSplits
from workbench.data import Sample
from workbench.data.images import shown
from workbench.errors import ConfigError
from workbench.mllm import MLLM
from workbench.mllm.conversation import IGNORED, encode_conversations
from workbench.mllm.residual import KEY
from workbench.scoring.options import Options
from workbench.scoring.questions import questions_of

CONVERSATIONS_CHECKED = 4  # of each kind, with and without images


def check_conversations(recipe: Recipe, mllm: MLLM, splits: ConversationSplits) -> list[list[list[Sample]]]:
    """Check that recipe, model and data fit together, before anything is written.

    All texts are read; the first conversations with and without images are encoded.

    Returns:
        The questions with options, by image, of the validation split and, if there is one, of the test split. An empty
        list for a split whose questions have no options.

    Raises:
        WorkbenchError: recipe, model and data do not fit together.
    """
    _check_model(mllm, recipe.model)
    recipe.alignment.check_layers(mllm.n_layers)
    mllm.control_tokens_as_words = recipe.data.control_tokens == "words"
    questions = [_questions_with_options(mllm, data) for data in splits.evaluated]
    for data, asked in zip(splits.all, [False, *map(bool, questions)], strict=True):
        _check_texts(mllm, data, recipe.data.max_length, asked=asked)
    if recipe.alignment.changes_layers and not any(c.loads for c in splits.train.conversations):
        count, name = len(splits.train), splits.train.data.name
        raise ConfigError(
            f"none of the {count} conversations of {name} has an image: expected some, or alignment.objective none"
        )
    return questions


def _check_model(mllm: MLLM, config: ModelConfig) -> None:
    if hasattr(mllm.config, KEY):
        raise ConfigError(
            f"model.name is {config.name}, which has a residual: expected a model trained without a residual"
        )
    if (quantized := getattr(mllm.config, "quantization_config", None)) is not None:
        if isinstance(quantized, dict):
            method = quantized.get("quant_method")
        else:
            method = getattr(quantized, "quant_method", quantized)
        raise ConfigError(
            f"model.name is {config.name}, quantized with {getattr(method, 'value', method)}: expected a model in full"
            " precision, since a quantized one cannot be trained"
        )


def _check_texts(mllm: MLLM, data: ConversationSet, max_length: int | None, *, asked: bool) -> None:
    """Check all texts, and that `max_length` does not cut off the answers of all the first conversations of a kind.

    Args:
        mllm: the model.
        data: the conversations.
        max_length: in tokens; None for any length.
        asked: whether each question is asked alone, without `max_length`, since it has options.
    """
    max_length = None if asked else max_length
    if distributed.is_main():  # an error on the main rank ends the others too
        data.preflight_warnings += look_through(mllm, data, max_length, alone=asked)
    if asked:
        return
    for with_image in (True, False):
        first = [c for c in data.conversations if bool(c.loads) == with_image][:CONVERSATIONS_CHECKED]
        has_answer = [
            bool(encode_conversations(mllm, [c.images], [c.turns], max_length=max_length)[1].ne(IGNORED).any())
            for c in first
        ]
        if first and not any(has_answer):
            kind = "with" if with_image else "without"
            which = f"the first {len(first)} conversations {kind} an image of {data.data.name}"
            raise ConfigError(
                f"data.max_length is {max_length}, which leaves none of the answers in {which}: expected more tokens"
            )


def _questions_with_options(mllm: MLLM, split: ConversationSet) -> list[list[Sample]]:
    """Return the questions by image; an empty list if none has options. If only some have, a warning counts the rest.

    Raises:
        ConfigError: the answer of a question is not among its options.
    """
    data = split.data
    if lost := [sample for sample in data if sample.options and sample.answer not in sample.options]:
        raise ConfigError(
            f"the answer '{lost[0].answer}' of question {lost[0].id} of {data.name} is not among its options"
            f" ({len(lost)} such questions): expected one of them"
        )
    if not (count := sum(bool(sample.options) for sample in data)):
        return []
    turns = sum(len(conversation.turns) for conversation in split.conversations)
    if rest := turns - count:
        split.preflight_warnings.append(
            f"{shown(data.name)}: {rest} of {turns} questions are not evaluated, since only those about one image that"
            " have options are"
        )
    scenes = questions_of(data.scenes)
    Options(mllm, [sample for scene in scenes for sample in scene])  # raises if the options cannot be scored
    return scenes
