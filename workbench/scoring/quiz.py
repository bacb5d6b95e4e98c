"""Asking a model questions with options, as it is and with its visual tokens changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from workbench.capture.edit import Site, apply_edit, check_site, edit
from workbench.capture.hidden_states import check_layers
from workbench.capture.knockout import Blocked, blocking, knockout
from workbench.mllm.base import MLLM, last_logits, positions_to_keep
from workbench.scoring.questions import Scene, option_ids, survey
from workbench.scoring.tables import kl_divergence

Change = Callable[[Float[Tensor, "token d"], int], Float[Tensor, "token d"]]
"""(visual tokens of one image, number of the image) -> their replacement."""


class Quiz:
    """Some images with their questions, encoded once and asked as often as there are changes.

    Where the family allows it (`Family.shares_prefix`), an image and what stands before it go through the language
    model once for all its questions, and each question continues from there. That is the same computation in another
    order, not an approximation; `tests/test_permutation.py` compares both.

    Args:
        scenes: questions by image.
        batch_size: sequences in one forward pass.
        features: what the connector receives for each image, if it is known already.
        first: number of the first image, as `Change` is told.

    Raises:
        DataError: two options of a question begin with the same token.
    """

    def __init__(
        self,
        mllm: MLLM,
        scenes: Sequence[Scene],
        batch_size: int,
        *,
        features: Sequence[Tensor] | None = None,
        first: int = 0,
    ) -> None:
        self.mllm, self.batch_size, self.first = mllm, batch_size, first
        self.samples = [sample for scene in scenes for sample in scene]
        self.owner = torch.tensor([number for number, scene in enumerate(scenes) for _ in scene])
        self._options = option_ids(mllm, self.samples)
        chunks = [self.samples[start : start + batch_size] for start in range(0, len(self.samples), batch_size)]
        self._batches = [mllm.encode([s.image for s in chunk], [s.question for s in chunk]) for chunk in chunks]
        self._shared = self._share(scenes, features) if _may_share(mllm) else None
        self._plain: list[tuple[Tensor, Tensor]] | None = None

    def logprobs(self, at: Site | None = None, change: Change | None = None) -> Float[Tensor, "question option"]:
        """Log-probability of each option among the options of its question, -inf where a question has fewer; `change`
        acts on the visual tokens at `at`.

        Raises:
            ConfigError, ModelError: see `capture.edit`.
        """
        if at is not None:
            check_site(self.mllm, at)
        return self._among_options(
            self._from_prefix(at, change) if self._shared is not None else self._whole(at, change)
        )

    def knocked_out(self, blocks: Sequence[int]) -> Float[Tensor, "question option"]:
        """The same log-probabilities when no text looks at the visual tokens in `blocks` (1 to L): see
        `capture.knockout`."""
        if self._shared is not None:
            return self._among_options(self._from_prefix(None, None, check_layers(self.mllm, blocks, first=1)))
        return self._among_options(torch.cat([knockout(self.mllm, batch, blocks=blocks) for batch in self._batches]))

    def _among_options(self, logits: Float[Tensor, "question vocab"]) -> Float[Tensor, "question option"]:
        taken = logits.gather(1, self._options.clamp(min=0)).masked_fill(self._options < 0, -torch.inf)
        return taken.log_softmax(-1)

    def scored(self, before: Float[Tensor, "question option"], after: Float[Tensor, "question option"]) -> pd.DataFrame:
        """One row per question: id, image_id, category, chance, correct_before, correct_after, kl (nats)."""
        right = torch.tensor([sample.options.index(sample.answer) for sample in self.samples])
        names = {
            "id": [s.id for s in self.samples],
            "image_id": [s.image_id for s in self.samples],
            "category": [s.category for s in self.samples],
            "chance": [s.chance for s in self.samples],
        }
        correct = {
            "correct_before": (before.argmax(1) == right).numpy(),
            "correct_after": (after.argmax(1) == right).numpy(),
        }
        return pd.DataFrame(names | correct | {"kl": kl_divergence(before, after).numpy()})

    def _whole(self, at: Site | None, change: Change | None) -> Float[Tensor, "question vocab"]:
        """Every prompt as a whole: any family."""
        logits, row = [], 0
        for batch in self._batches:
            owner = self.owner[row : row + len(batch)].tolist()
            row += len(batch)
            if at is None or change is None:
                with self.mllm.lock, torch.inference_mode():
                    output = self.mllm.model(**batch.inputs, use_cache=False, logits_to_keep=positions_to_keep(batch))
                    logits.append(last_logits(output, batch).cpu())
            else:
                logits.append(
                    edit(
                        self.mllm,
                        batch,
                        at=at,
                        fn=partial(_of_sample, change=change, images=[self.first + n for n in owner]),
                    )[:, -1]
                )
        return torch.cat(logits)

    def _share(self, scenes: Sequence[Scene], features: Sequence[Tensor] | None) -> _Shared | None:
        """The common beginning of each image's prompts, or None where there is none of one length and with the visual
        tokens at one place."""
        prompts, places = [], []
        for batch in self._batches:
            for row, parts in enumerate(self.mllm.visual_tokens(batch)):
                real = batch.inputs["attention_mask"][row].nonzero().flatten()
                pad = int(real[0])
                prompts.append(batch.inputs["input_ids"][row, real].cpu())
                places.append(torch.cat([part.index for part in parts]).cpu() - pad)
        visual = places[0]
        cut = int(visual.max()) + 1
        starts = [prompts[int((self.owner == number).nonzero()[0])][:cut] for number in range(len(scenes))]
        same = all(torch.equal(place, visual) for place in places)
        if not same or any(
            not torch.equal(prompt[:cut], starts[number])
            for prompt, number in zip(prompts, self.owner.tolist(), strict=True)
        ):
            return None
        if features is None:
            features = survey(self.mllm, scenes, self.batch_size, tower=True)[1]
        return _Shared(torch.stack(list(features)), torch.stack(starts), visual, [prompt[cut:] for prompt in prompts])

    def _from_prefix(
        self, at: Site | None, change: Change | None, blocks: Sequence[int] = ()
    ) -> Float[Tensor, "question vocab"]:
        """From the images' own pass, which is kept where nothing changes in it; text after the image looks away from it
        in `blocks`."""
        assert self._shared is not None
        with self.mllm.lock, torch.inference_mode():
            memory = self._prefix(at, change) if change is not None else self._plain or self._prefix(None, None)
            if change is None:
                self._plain = memory
            return torch.cat(
                [self._continued(memory, start, blocks) for start in range(0, len(self.samples), self.batch_size)]
            )

    def _continued(
        self, memory: list[tuple[Tensor, Tensor]], start: int, blocks: Sequence[int]
    ) -> Float[Tensor, "question vocab"]:
        """Logits at the end of some questions, each after the pass over its image."""
        assert self._shared is not None
        model: Any = self.mllm.model
        tails, owner = (
            self._shared.tails[start : start + self.batch_size],
            self.owner[start : start + self.batch_size].to(self.mllm.device),
        )
        last = torch.tensor([len(tail) - 1 for tail in tails], device=self.mllm.device)
        # padding comes after what is read, so it is not seen
        ids = torch.nn.utils.rnn.pad_sequence(tails, batch_first=True).to(self.mllm.device)
        cache = DynamicCache(
            [(key[owner], value[owner]) for key, value in memory], config=self.mllm.config.get_text_config()
        )
        inputs = {"inputs_embeds": model.get_input_embeddings()(ids), "past_key_values": cache, "use_cache": True}
        if blocks:
            keys = torch.zeros(len(tails), self._shared.starts.shape[1] + ids.shape[1], dtype=torch.bool)
            keys[:, self._shared.visual] = True
            blocked = Blocked(frozenset(blocks), torch.ones(ids.shape, dtype=torch.bool), keys)
            with blocking(self.mllm, blocked):
                hidden = self.mllm.decoder(**inputs, blocked=blocked).last_hidden_state
        else:
            hidden = self.mllm.decoder(**inputs).last_hidden_state
        return model.get_output_embeddings()(hidden[torch.arange(len(tails), device=hidden.device), last]).float().cpu()

    def _prefix(self, at: Site | None, change: Change | None) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of every block for the images and what stands before them, with the change in place."""
        assert self._shared is not None
        visual, embed = self._shared.visual.to(self.mllm.device), self.mllm.model.get_input_embeddings()

        def changed(values: Float[Tensor, "image token d"]) -> Float[Tensor, "image token d"]:
            assert change is not None
            return torch.stack([apply_edit(change, own, self.first + number) for number, own in enumerate(values)])

        def at_block(_: object, __: object, output: Tensor) -> Tensor:
            output = output.clone()
            output[:, visual] = changed(output[:, visual])
            return output

        features = self._shared.features.to(self.mllm.device, embed.weight.dtype)
        projected = self.mllm.projector(changed(features) if at == "encoder" else features)
        hidden = embed(self._shared.starts.to(self.mllm.device))
        hidden[:, visual] = (changed(projected) if at in ("projector", 0) else projected).to(hidden.dtype)
        cache: Any = DynamicCache(config=self.mllm.config.get_text_config())
        with _hook(self.mllm, at, at_block):
            self.mllm.decoder(inputs_embeds=hidden, past_key_values=cache, use_cache=True)
        return [(layer.keys, layer.values) for layer in cache.layers]


def _of_sample(
    values: Float[Tensor, "token d"], sample: int, *, change: Change, images: list[int]
) -> Float[Tensor, "token d"]:
    """`change` as `capture.edit` calls it."""
    return change(values, images[sample])


class _Shared:
    """What `_from_prefix` needs: the connector's input, the prompts up to the last visual token, its positions there,
    and what follows."""

    def __init__(
        self,
        features: Float[Tensor, "image token f"],
        starts: Int[Tensor, "image position"],
        visual: Int[Tensor, " token"],
        tails: list[Int[Tensor, " _"]],
    ) -> None:
        self.features, self.starts, self.visual, self.tails = features, starts, visual, tails


@contextmanager
def _hook(mllm: MLLM, at: Site | None, fn: Callable[[object, object, Tensor], Tensor]) -> Iterator[None]:
    """Replace the output of block `at`, if it is one."""
    handle = mllm.decoder.layers[at - 1].register_forward_hook(fn) if isinstance(at, int) and at > 0 else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def _may_share(mllm: MLLM) -> bool:
    """The family says so, every block sees all that came before, and nothing is added to the visual tokens on their
    way."""
    text = mllm.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    return (
        mllm.family.shares_prefix
        and mllm.residual is None
        and kinds == {"full_attention"}
        and getattr(text, "sliding_window", None) is None
    )
