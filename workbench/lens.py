"""The logit lens: apply a model's final norm and output head to the hidden states of any layer.

Families differ in where they keep the norm and in whether they cap their logits. The lens is therefore compared with
the logits that the model itself computes, and a model for which they differ is refused. This module also finds the
token that stands for a word.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.capture.hidden_states import read
from workbench.errors import DataError, ModelError
from workbench.mllm.base import MLLM
from workbench.mllm.family import Batch, final_norm_of

CHECKED = 8  # number of visual tokens at which the lens is compared with the model


@dataclass(frozen=True)
class Lens:
    """Compute logits over the vocabulary from hidden states before the final norm; `lens_of` makes one for a model.

    Attributes:
        norm: the final norm.
        head: the output head.
        cap: the cap c of logits, c tanh(logits / c); None for no cap.
        dtype, device: those of the output head.
    """

    norm: Callable[[Tensor], Tensor]
    head: Any
    cap: float | None
    dtype: torch.dtype
    device: torch.device

    @torch.inference_mode()
    def __call__(self, hidden: Float[Tensor, "*row d"]) -> Float[Tensor, "*row vocab"]:
        """Return logits in float32, on the model's device."""
        logits = self.head(self.norm(hidden.to(self.device, self.dtype))).float()
        return logits if self.cap is None else self.cap * (logits / self.cap).tanh()


def lens_of(mllm: MLLM, batch: Batch) -> Lens:
    """Return the lens of a model, after checking on `batch` that it reproduces the model's logits at the last layer.

    They are compared at CHECKED visual tokens of the first sample.

    Raises:
        ModelError: the model has no output head or no final norm, or the lens gives other logits than the model.
    """
    head = mllm.model.get_output_embeddings()
    if head is None:
        raise ModelError(f"{mllm.name} has no output head where transformers' models have it: expected one")
    norm = final_norm_of(mllm.decoder)
    last = read(mllm, batch, layers=[mllm.n_layers])[0]
    chosen = torch.linspace(0, len(last.tokens) - 1, min(CHECKED, len(last.tokens))).long()
    with mllm.lock, torch.inference_mode():
        positions = last.tokens[chosen].to(mllm.device)
        expected = mllm.model(**batch.inputs, use_cache=False, logits_to_keep=positions).logits[0].float()
    softcap = getattr(mllm.config.get_text_config(), "final_logit_softcapping", None)
    tolerance = 1e-3 if expected.dtype == torch.float32 and head.weight.dtype == torch.float32 else 0.05
    for cap in dict.fromkeys((softcap, None)):  # some families ignore the setting
        lens = Lens(norm, head, cap, head.weight.dtype, head.weight.device)
        logits = lens(last.values[0, chosen])
        if logits.shape == expected.shape and (logits - expected).abs().max() <= tolerance * expected.std():
            return lens
    raise ModelError(
        f"{mllm.name}: its final norm and output head do not give its own logits, so the logit lens would show other"
        " words than the model predicts"
    )


def first_tokens(mllm: MLLM, words: Sequence[str]) -> tuple[dict[str, int], dict[str, str]]:
    """Return the first token of each word in the middle of a text, with its leading space.

    A word of several tokens is represented by its first one. Words that begin with the same token cannot be
    distinguished and are all left out.

    Returns:
        {word: token id}, and {word: reason} of the words that were left out.

    Raises:
        DataError: every word was left out.
    """
    tokenizer = mllm.processor.tokenizer
    before = tokenizer("a", add_special_tokens=False)["input_ids"]
    first, left_out = {}, {}
    for word in dict.fromkeys(words):
        ids = tokenizer(f"a {word}", add_special_tokens=False)["input_ids"]
        # some tokenizers have a token for the space alone
        word_ids = [i for i in ids[len(before) :] if i == tokenizer.unk_token_id or tokenizer.decode([i]).strip()]
        if ids[: len(before)] != before or not word_ids:
            left_out[word] = "the tokenizer merges it with the word before"
        elif word_ids[0] == tokenizer.unk_token_id:
            left_out[word] = "not in the vocabulary"
        else:
            first[word] = word_ids[0]
    ids = list(first.values())
    for word in [word for word, token in first.items() if ids.count(token) > 1]:
        left_out[word] = f"begins with the same token as another ({tokenizer.convert_ids_to_tokens(first.pop(word))})"
    if not first:
        reasons = "; ".join(f"{word}: {why}" for word, why in list(left_out.items())[:3]) or "there are none"
        raise DataError(f"none of {len(left_out)} words has a token of its own in {mllm.name} ({reasons})")
    return first, left_out


def readable(mllm: MLLM, token: int) -> str:
    """Return a token as text, or as the tokenizer writes it if it is only a space."""
    tokenizer = mllm.processor.tokenizer
    return tokenizer.decode([token]).strip() or str(tokenizer.convert_ids_to_tokens(token))
