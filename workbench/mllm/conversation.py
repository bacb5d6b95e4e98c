"""Conversations as a model reads them when it is trained: its own chat template, and which tokens are learnt.

Learnt are the assistant's tokens and the token that ends its turn, nothing else. Where a chat template does not end the
assistant's turn with a token (that of llava-hf's LLaVA-1.5), the tokenizer's end token is put there, as LLaVA's own
code does; else a model would never learn to stop. What stands before an answer is, token by token, what `MLLM.encode`
gives for the first question, and pixels take the same way: `MLLM.process`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from workbench.errors import ModelError
from workbench.mllm.base import MLLM, upright
from workbench.mllm.family import Batch

IGNORED = -100  # label of positions that are not learnt
Turns = Sequence[tuple[str, str]]
"""Questions and answers; images stand before the first question, or each at its IMAGE_MARK within it."""


def encode_conversations(
    mllm: MLLM,
    images: Sequence[Image.Image | Sequence[Image.Image]],
    turns: Sequence[Turns],
    *,
    max_length: int | None = None,
    device: str | torch.device | None = None,
) -> tuple[Batch, Int[Tensor, "sample s"]]:
    """Encode conversations, padded on the right, and say what is learnt from them.

    Args:
        max_length: tokens at which a sequence is cut.
        device: where the batch is wanted; the model's by default.

    Returns:
        The batch, and its labels: the tokens of the answers and of their ends, in place (a model predicts each from the
            position before), else -100.

    Raises:
        ModelError: a placeholder within the text, a template or a tokenizer that gives no answer to be found again, or
            images that reach beyond max_length.
    """
    pictures = upright(images)
    questions = [own[0][0] for own in turns]
    if mllm.processor.chat_template is None:
        return _without_template(mllm, pictures, turns, max_length, device)
    built = [conversation_text(mllm, own, len(shown)) for own, shown in zip(turns, pictures, strict=True)]
    batch = mllm.process(pictures, [text for text, _ in built], questions, device=device, padding_side="right")
    labels = torch.full_like(batch.inputs["input_ids"], IGNORED)
    special = mllm.adds_special([text for text, _ in built])
    for row, (text, spans) in enumerate(built):
        ids = batch.inputs["input_ids"][row, : int(batch.inputs["attention_mask"][row].sum())]
        learnt, tail = _learnt(mllm, text, spans, special)
        if len(tail) > len(ids) or not torch.equal(ids[len(ids) - len(tail) :].cpu(), tail):
            raise ModelError(
                f"{mllm.name}: its processor does not leave the text after the image as it is, so the answers cannot be"
                " found in it"
            )
        start = len(ids) - len(tail)
        labels[row, start : len(ids)] = torch.where(learnt, tail, IGNORED).to(labels.device)
    return _cut(mllm, batch, labels, max_length)


def conversation_text(mllm: MLLM, turns: Turns, images: int) -> tuple[str, list[tuple[int, int]]]:
    """The conversation in the model's chat template with an end after every answer, and from which character to which
    each answer and its end go.

    Raises:
        ModelError: a template that changes an answer, or what it gave for earlier turns.
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
                f"{mllm.name}: its chat template does not put answer {number + 1} behind its prompt as it is, so what"
                " is learnt cannot be told"
            )
        at += len(answer)
        found = min(((whole.find(end, at), end) for end in ends if whole.find(end, at) >= 0), default=None)
        text += prompt[len(before) :]
        start = len(text)
        if found is None:  # what else ends the turn stays, but for space, which LLaVA's own code leaves out too
            text += whole[len(prompt) :].rstrip() + eos
            spans.append((start, len(text)))
            text += whole[len(whole.rstrip()) :] if whole[at:].strip() else ""
        else:
            stop = found[0] + len(found[1])
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
    """The tokens at which the model stops to generate."""
    tokenizer = mllm.processor.tokenizer
    ids = getattr(mllm.model.generation_config, "eos_token_id", None)
    known = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    texts = [tokenizer.eos_token, *tokenizer.convert_ids_to_tokens(known)]
    if tokenizer.eos_token is None:
        raise ModelError(
            f"{mllm.name}: its tokenizer has no end token: expected one, which every answer is to end with"
        )
    return [text for text in dict.fromkeys(texts) if text]


def _learnt(mllm: MLLM, text: str, spans: list[tuple[int, int]], special: bool) -> tuple[Tensor, Int[Tensor, " tail"]]:
    """The tokens from the first answer on (no image stands there, so the processor leaves them as they are), and which
    of them are learnt."""
    tokenizer = mllm.processor.tokenizer
    if not tokenizer.is_fast:
        raise ModelError(
            f"{mllm.name}: its tokenizer does not say where its tokens come from: expected a fast tokenizer"
            " (tokenizer.json)"
        )
    encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"]
    chosen = torch.tensor(
        [any(first < stop and last > start for start, stop in spans) and last > first for first, last in offsets]
    )
    begin = int(chosen.long().argmax())
    return chosen[begin:], torch.tensor(encoded["input_ids"])[begin:]


def _without_template(
    mllm: MLLM,
    pictures: tuple[tuple[Image.Image, ...], ...],
    turns: Sequence[Turns],
    max_length: int | None,
    device: str | torch.device | None,
) -> tuple[Batch, Tensor]:
    """A model without a chat template is given the answer as a suffix; it knows no second question."""
    if not mllm.family.answer_type:
        raise ModelError(
            f"{mllm.name} has no chat template, so where an answer begins and ends is not known: put the"
            " chat_template.jinja of the model that it was made from into its folder"
        )
    if any(len(own) != 1 for own in turns):
        raise ModelError(
            f"{mllm.name} ({mllm.family.name}) has no chat template, so it knows one question and its answer: expected"
            " no second turn"
        )
    answers = [mllm.safe_text("answer", own[0][1]) for own in turns]
    questions = [own[0][0] for own in turns]
    texts = [mllm.prompt(question, len(own)) for question, own in zip(questions, pictures, strict=True)]
    batch = mllm.process(pictures, texts, questions, device=device, padding_side="right", suffix=answers)
    ids = batch.inputs["input_ids"]
    answer = (batch.inputs["token_type_ids"] == mllm.family.answer_type) & batch.inputs["attention_mask"].bool()
    return _cut(mllm, batch, ids.masked_fill(~answer, IGNORED), max_length)


def _cut(mllm: MLLM, batch: Batch, labels: Tensor, max_length: int | None) -> tuple[Batch, Tensor]:
    """Sequences of at most `max_length` tokens."""
    ids = batch.inputs["input_ids"]
    if max_length is None or ids.shape[1] <= max_length:
        return batch, labels
    if (ids[:, max_length:] == mllm.config.image_token_id).any():
        raise ModelError(f"an image reaches beyond {max_length} tokens: expected a larger max_length")
    for name, value in batch.inputs.items():
        if isinstance(value, Tensor) and value.shape[:2] == ids.shape:
            batch.inputs[name] = value[:, :max_length]
    return batch, labels[:, :max_length]
