"""Conversations encoded for training, in the model's own chat template, with the labels of the training loss.

Labeled are the assistant's tokens and the token that ends its turn, nothing else. Some chat templates (that of
llava-hf's LLaVA-1.5) do not end the assistant's turn with a token; there the tokenizer's end token is inserted, as
LLaVA's own code does, because a model would otherwise never learn to stop. The tokens before the first answer are those
that `MLLM.encode` gives for the first question, and pixels go through the same `MLLM.process`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from workbench.errors import ModelError
from workbench.mllm.base import MLLM, upright
from workbench.mllm.family import Batch, BatchImages

IGNORED = -100  # label of positions without a loss
Turns = Sequence[tuple[str, str]]
"""Questions and answers; the images come before the first question, or each at its IMAGE_MARK in it."""


def encode_conversations(
    mllm: MLLM,
    images: Sequence[Image.Image | Sequence[Image.Image]],
    turns: Sequence[Turns],
    *,
    max_length: int | None = None,
    device: str | torch.device | None = None,
) -> tuple[Batch, Int[Tensor, "sample s"]]:
    """Encode conversations, padded on the right, together with their labels.

    Args:
        images: of each conversation: one image, several or none.
        turns: questions and answers of each conversation.
        max_length: longer sequences are cut to this many tokens.
        device: where to put the batch; by default the model's device.

    Returns:
        The batch, and its labels: at answers and their end tokens the token id itself (a model predicts each from the
            position before), elsewhere -100.

    Raises:
        ModelError: an image placeholder within the text, a template or a tokenizer with which the answers cannot be
            found again among the tokens, or an image that reaches beyond max_length.
    """
    upright_images = upright(images)
    questions = [conversation[0][0] for conversation in turns]
    if mllm.processor.chat_template is None:
        return _without_template(mllm, upright_images, turns, max_length, device)
    rendered = [
        conversation_text(mllm, conversation, len(shown))
        for conversation, shown in zip(turns, upright_images, strict=True)
    ]
    texts = [text for text, _ in rendered]
    batch = mllm.process(upright_images, texts, questions, device=device, padding_side="right")
    labels = torch.full_like(batch.inputs["input_ids"], IGNORED)
    special = mllm.adds_special(texts)
    for row, (text, spans) in enumerate(rendered):
        ids = batch.inputs["input_ids"][row, : int(batch.inputs["attention_mask"][row].sum())]
        labeled, tail = _labeled_tail(mllm, text, spans, special)
        if len(tail) > len(ids) or not torch.equal(ids[len(ids) - len(tail) :].cpu(), tail):
            raise ModelError(
                f"{mllm.name}: its processor changes the text after the image, so the answers cannot be found in it:"
                " expected a processor that only replaces image placeholders"
            )
        start = len(ids) - len(tail)
        labels[row, start : len(ids)] = torch.where(labeled, tail, IGNORED).to(labels.device)
    return _cut(mllm, batch, labels, max_length)


def conversation_text(mllm: MLLM, turns: Turns, images: int) -> tuple[str, list[tuple[int, int]]]:
    """Return a conversation in the model's chat template, with an end token after every answer.

    Args:
        images: number of images of the conversation.

    Returns:
        The text, and for each answer the characters (start, stop) that it and its end token take.

    Raises:
        ModelError: a template that changes an answer, or that renders earlier turns differently once more follow.
    """
    ends, eos = end_tokens(mllm), mllm.processor.tokenizer.eos_token
    messages: list[dict[str, object]] = []
    text, before, spans = "", "", []
    for number, (question, answer) in enumerate(turns):
        answer = mllm.safe_text("answer", answer)
        messages.append({"role": "user", "content": mllm.content(question, images if number == 0 else 0)})
        prompt = mllm.render(messages, generation=True)
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        whole = mllm.render(messages, generation=False)
        at = whole.find(answer, len(prompt))
        if not prompt.startswith(before) or not whole.startswith(prompt) or at < 0 or whole[len(prompt) : at].strip():
            raise ModelError(
                f"{mllm.name}: its chat template does not put answer {number + 1} unchanged after its prompt, so the"
                " tokens to train on are not known: expected another chat_template.jinja"
            )
        at += len(answer)
        first_end = min(((whole.find(end, at), end) for end in ends if whole.find(end, at) >= 0), default=None)
        text += prompt[len(before) :]
        start = len(text)
        if first_end is None:  # keep what else ends the turn, except white space, which LLaVA's own code drops too
            text += whole[len(prompt) :].rstrip() + eos
            spans.append((start, len(text)))
            text += whole[len(whole.rstrip()) :] if whole[at:].strip() else ""
        else:
            stop = first_end[0] + len(first_end[1])
            text += whole[len(prompt) : stop]
            spans.append((start, len(text)))
            text += whole[stop:]
        before = whole
    if text.count(mllm.image_placeholder) != images:
        raise ModelError(
            f"{mllm.name}: its chat template gives {text.count(mllm.image_placeholder)} image placeholders for {images}"
            " images"
        )
    return text, spans


def end_tokens(mllm: MLLM) -> list[str]:
    """Return the tokens at which the model stops generating, the tokenizer's own first.

    Raises:
        ModelError: the tokenizer has no end token.
    """
    tokenizer = mllm.processor.tokenizer
    ids = getattr(mllm.model.generation_config, "eos_token_id", None)
    stop_ids = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    texts = [tokenizer.eos_token, *tokenizer.convert_ids_to_tokens(stop_ids)]
    if tokenizer.eos_token is None:
        raise ModelError(
            f"{mllm.name}: its tokenizer has no end token (eos_token): expected one, since every answer must end with"
            " it"
        )
    return [text for text in dict.fromkeys(texts) if text]


def _labeled_tail(
    mllm: MLLM, text: str, spans: list[tuple[int, int]], special: bool
) -> tuple[Tensor, Int[Tensor, " tail"]]:
    """Return which tokens from the first answer on are labeled, and these tokens.

    No image comes after the first answer begins, so the processor leaves these tokens unchanged.
    """
    tokenizer = mllm.processor.tokenizer
    if not tokenizer.is_fast:
        raise ModelError(
            f"{mllm.name}: its tokenizer does not give the characters of each token: expected a fast tokenizer"
            " (tokenizer.json)"
        )
    encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"]
    labeled = torch.tensor(
        [any(first < stop and last > start for start, stop in spans) and last > first for first, last in offsets]
    )
    begin = int(labeled.long().argmax())
    return labeled[begin:], torch.tensor(encoded["input_ids"])[begin:]


def _without_template(
    mllm: MLLM,
    images: BatchImages,
    turns: Sequence[Turns],
    max_length: int | None,
    device: str | torch.device | None,
) -> tuple[Batch, Tensor]:
    """Encode one-turn conversations for a model without a chat template, the answer as the processor's suffix."""
    if not mllm.family.answer_type:
        raise ModelError(
            f"{mllm.name} has no chat template, so where an answer begins and ends is not known: put the"
            " chat_template.jinja of the model that it was made from into its folder"
        )
    if any(len(conversation) != 1 for conversation in turns):
        raise ModelError(
            f"{mllm.name} ({mllm.family.name}) has no chat template, so it can be trained on one question and its"
            " answer only: expected no second turn"
        )
    answers = [mllm.safe_text("answer", conversation[0][1]) for conversation in turns]
    questions = [conversation[0][0] for conversation in turns]
    texts = [mllm.prompt(question, len(shown)) for question, shown in zip(questions, images, strict=True)]
    batch = mllm.process(images, texts, questions, device=device, padding_side="right", suffix=answers)
    ids = batch.inputs["input_ids"]
    answer = (batch.inputs["token_type_ids"] == mllm.family.answer_type) & batch.inputs["attention_mask"].bool()
    return _cut(mllm, batch, ids.masked_fill(~answer, IGNORED), max_length)


def _cut(mllm: MLLM, batch: Batch, labels: Tensor, max_length: int | None) -> tuple[Batch, Tensor]:
    """Cut sequences to `max_length` tokens, or refuse if that would cut an image."""
    ids = batch.inputs["input_ids"]
    if max_length is None or ids.shape[1] <= max_length:
        return batch, labels
    if (ids[:, max_length:] == mllm.config.image_token_id).any():
        raise ModelError(f"an image reaches beyond max_length, {max_length} tokens: set a larger max_length")
    for name, value in batch.inputs.items():
        if isinstance(value, Tensor) and value.shape[:2] == ids.shape:
            batch.inputs[name] = value[:, :max_length]
    return batch, labels[:, :max_length]
