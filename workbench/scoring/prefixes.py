"""The prompts about some images up to their last visual token, run once for all questions about an image."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor

from workbench.capture.edit import Site, apply_edit
from workbench.capture.knockout import Blocked, blocking
from workbench.mllm.base import MLLM

Change = Callable[[Float[Tensor, "token d"], int], Float[Tensor, "token d"]]
"""Maps the visual tokens of one image and the number of the image to replacements of the tokens."""
Memory = list[tuple[Tensor, Tensor]]
"""Keys and values of every block for the prefixes of all images."""


class Prefixes:
    """The prompts about images, cut after the last visual token.

    Args:
        mllm: the model, of a family in which this is the same computation in another order (`can_share`).
        features: what the projector receives for each image.
        starts: token ids of each image's prompts up to the last visual token.
        visual: positions of the visual tokens, the same for all images.
        first: number of the first image; a `Change` receives image numbers that start here.
    """

    def __init__(
        self,
        mllm: MLLM,
        features: Float[Tensor, "image token f"],
        starts: Int[Tensor, "image position"],
        visual: Int[Tensor, " token"],
        first: int,
    ) -> None:
        self.mllm, self.features, self.starts, self.visual, self.first = mllm, features, starts, visual, first
        self._unchanged: Memory | None = None

    def memory(self, at: Site | None, change: Change | None) -> Memory:
        """Return the keys and values of the prefixes, with `change` applied at `at`; without a change computed once."""
        if at is not None and change is not None:
            return self._computed(at, change)
        if self._unchanged is None:
            self._unchanged = self._computed(None, None)
        return self._unchanged

    def logits(
        self,
        memory: Memory,
        images: Int[Tensor, " row"],
        tails: Sequence[Int[Tensor, " _"]],
        *,
        keep: int,
        blocks: Sequence[int] = (),
    ) -> Float[Tensor, "row keep vocab"]:
        """Return the logits at the last `keep` positions of prompts that continue the prefixes.

        Where a tail has fewer tokens, those before its first one mean nothing.

        Args:
            memory: as `memory` returns it.
            images: the image of each prompt.
            tails: token ids of each prompt after its prefix.
            keep: for how many positions.
            blocks: blocks in which the tails do not attend to the visual tokens.
        """
        model: Any = self.mllm.model
        # the padding follows the last position that is read, so it has no effect
        ids = torch.nn.utils.rnn.pad_sequence(list(tails), batch_first=True).to(self.mllm.device)
        inputs = {"inputs_embeds": model.get_input_embeddings()(ids), **self._cache(memory, images)}
        if blocks:
            keys = torch.zeros(len(tails), self.starts.shape[1] + ids.shape[1], dtype=torch.bool)
            keys[:, self.visual] = True
            blocked = Blocked(frozenset(blocks), torch.ones(ids.shape, dtype=torch.bool), keys)
            with blocking(self.mllm, blocked):
                hidden = self.mllm.decoder(**inputs, blocked=blocked).last_hidden_state
        else:
            hidden = self.mllm.decoder(**inputs).last_hidden_state
        last = torch.tensor([len(tail) - 1 for tail in tails], device=hidden.device)
        at = (last[:, None] - torch.arange(keep - 1, -1, -1, device=hidden.device)).clamp(min=0)
        rows = torch.arange(len(tails), device=hidden.device)[:, None]
        return model.get_output_embeddings()(hidden[rows, at]).float().cpu()

    def generate(
        self,
        memory: Memory,
        images: Int[Tensor, " row"],
        tails: Sequence[Int[Tensor, " _"]],
        max_new_tokens: int,
        sampler: LogitsProcessor | None,
    ) -> list[str]:
        """Return the answers to prompts that continue the prefixes, as `MLLM.generate` does from whole prompts."""
        longest = max(len(tail) for tail in tails)
        starts = self.starts[images.cpu()]
        ids, mask = (
            torch.cat([start, torch.stack([_left_padded(row, longest, fill) for row in rows])], dim=1)
            for start, rows, fill in (
                (starts, tails, self.mllm.pad_id),
                (torch.ones_like(starts), [torch.ones_like(tail) for tail in tails], 0),
            )
        )
        return self.mllm.generated(
            {"input_ids": ids.to(self.mllm.device), "attention_mask": mask.to(self.mllm.device)}
            | {name: value for name, value in self._cache(memory, images).items() if name != "use_cache"},
            max_new_tokens,
            sampler,
        )

    def _cache(self, memory: Memory, images: Int[Tensor, " row"]) -> dict[str, Any]:
        """Return the arguments of a forward pass that continues from the prefixes of some images."""
        images = images.to(self.mllm.device)
        return _with_cache(
            self.mllm.decoder,
            DynamicCache(
                [(key[images], value[images]) for key, value in memory], config=self.mllm.config.get_text_config()
            ),
        )

    def _computed(self, at: Site | None, change: Change | None) -> Memory:
        visual, embed = self.visual.to(self.mllm.device), self.mllm.model.get_input_embeddings()

        def changed(values: Float[Tensor, "image token d"]) -> Float[Tensor, "image token d"]:
            assert change is not None
            return torch.stack(
                [apply_edit(change, tokens, self.first + number) for number, tokens in enumerate(values)]
            )

        def at_block(_: object, __: object, output: Tensor) -> Tensor:
            output = output.clone()
            output[:, visual] = changed(output[:, visual])
            return output

        features = self.features.to(self.mllm.device, embed.weight.dtype)
        projected = self.mllm.projector(changed(features) if at == "encoder" else features)
        hidden = embed(self.starts.to(self.mllm.device))
        hidden[:, visual] = (changed(projected) if at in ("projector", 0) else projected).to(hidden.dtype)
        cache: Any = DynamicCache(config=self.mllm.config.get_text_config())
        with _hook(self.mllm, at, at_block):
            self.mllm.decoder(inputs_embeds=hidden, **_with_cache(self.mllm.decoder, cache))
        return [(layer.keys, layer.values) for layer in cache.layers]


def can_share(mllm: MLLM) -> bool:
    """Return whether the questions about an image can continue from one forward pass over it.

    They can if the family allows it, every block attends to all earlier positions, and nothing is added to the visual
    tokens between blocks.
    """
    text = mllm.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    return (
        mllm.family.shares_prefix
        and mllm.residual is None
        and kinds == {"full_attention"}
        and getattr(text, "sliding_window", None) is None
    )


def _with_cache(decoder: Any, cache: DynamicCache) -> dict[str, Any]:
    """Return the arguments of a decoder's forward pass with a cache, whose name transformers changed in 5.24."""
    name = "cache" if "cache" in signature(decoder.forward).parameters else "past_key_values"
    return {name: cache, "use_cache": True}


def _left_padded(values: Int[Tensor, " _"], length: int, fill: int) -> Int[Tensor, " length"]:
    return torch.nn.functional.pad(values, (length - len(values), 0), value=fill)


@contextmanager
def _hook(mllm: MLLM, at: Site | None, fn: Callable[[object, object, Tensor], Tensor]) -> Iterator[None]:
    """Let `fn` replace the output of block `at`, if `at` is a block number."""
    handle = mllm.decoder.layers[at - 1].register_forward_hook(fn) if isinstance(at, int) and at > 0 else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
