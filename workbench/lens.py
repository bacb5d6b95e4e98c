"""The logit lens: a model's own final norm and output head on the hidden states of any layer, and the tokens that stand
for words.

Where a family keeps its norm and head, and whether it caps its logits, is not looked up by name: what is found is
compared with the logits that the model itself gives, and a model for which they differ is refused.
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
from workbench.mllm.family import Batch

NORMS = ("norm", "final_layernorm", "ln_f", "final_layer_norm")
CHECKED = 8  # visual positions at which the lens is compared with the model


@dataclass(frozen=True)
class Lens:
    """From hidden states before the final norm to logits over the vocabulary; make one with `lens_of`."""

    norm: Callable[[Tensor], Tensor]
    head: Any
    cap: float | None
    dtype: torch.dtype
    device: torch.device

    @torch.inference_mode()
    def __call__(self, hidden: Float[Tensor, "*row d"]) -> Float[Tensor, "*row vocab"]:
        """Logits in float32, on the model's device."""
        logits = self.head(self.norm(hidden.to(self.device, self.dtype))).float()
        return logits if self.cap is None else self.cap * (logits / self.cap).tanh()


def lens_of(mllm: MLLM, batch: Batch) -> Lens:
    """The lens of a model, checked on `batch`: at the last layer it gives the model's own logits at visual positions.

    Raises:
        ModelError: no output head, no final norm, or other logits than the model's.
    """
    head = mllm.model.get_output_embeddings()
    norm = next((getattr(mllm.decoder, name) for name in NORMS if hasattr(mllm.decoder, name)), None)
    if head is None or norm is None:
        raise ModelError(
            f"{mllm.name} has no {'output head' if head is None else 'final norm'} where transformers' decoders have"
            " it: expected both"
        )
    last = read(mllm, batch, layers=[mllm.n_layers])[0]
    chosen = torch.linspace(0, len(last.tokens) - 1, min(CHECKED, len(last.tokens))).long()
    with mllm.lock, torch.inference_mode():
        own = (
            mllm.model(**batch.inputs, use_cache=False, logits_to_keep=last.tokens[chosen].to(mllm.device))
            .logits[0]
            .float()
        )
    cap = getattr(mllm.config.get_text_config(), "final_logit_softcapping", None)
    tolerance = 1e-3 if own.dtype == torch.float32 and head.weight.dtype == torch.float32 else 0.05
    for limit in dict.fromkeys((cap, None)):  # some families read the setting, others do not
        lens = Lens(norm, head, limit, head.weight.dtype, head.weight.device)
        found = lens(last.values[0, chosen])
        if found.shape == own.shape and (found - own).abs().max() <= tolerance * own.std():
            return lens
    raise ModelError(
        f"{mllm.name}: its final norm and output head do not give its own logits, so the lens would show what it does"
        " not say"
    )


def first_tokens(mllm: MLLM, words: Sequence[str]) -> tuple[dict[str, int], dict[str, str]]:
    """The first token of each word as it stands after another word, with its space, and why words were left out.

    A word of several tokens counts by its first one; where words begin with the same token, none of them is told from
    the others, and all are left out.

    Raises:
        DataError: no word is left.
    """
    tokenizer = mllm.processor.tokenizer
    before = tokenizer("a", add_special_tokens=False)["input_ids"]
    found, left_out = {}, {}
    for word in dict.fromkeys(words):
        ids = tokenizer(f"a {word}", add_special_tokens=False)["input_ids"]
        # some write the space as a token of its own
        own = [i for i in ids[len(before) :] if i == tokenizer.unk_token_id or tokenizer.decode([i]).strip()]
        if ids[: len(before)] != before or not own:
            left_out[word] = "the tokenizer merges it with the word before"
        elif own[0] == tokenizer.unk_token_id:
            left_out[word] = "not in the vocabulary"
        else:
            found[word] = own[0]
    ids = list(found.values())
    for word in [word for word, own in found.items() if ids.count(own) > 1]:
        left_out[word] = f"begins with the same token as another ({tokenizer.convert_ids_to_tokens(found.pop(word))})"
    if not found:
        what = "; ".join(f"{word}: {why}" for word, why in list(left_out.items())[:3]) or "there are none"
        raise DataError(f"none of {len(left_out)} words has a token of its own in {mllm.name} ({what})")
    return found, left_out
