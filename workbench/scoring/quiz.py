"""Questions with options put to a model, as it is and with its visual tokens changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from inspect import signature
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

Change = Callable[[Float[Tensor, "token d"], int], Float[Tensor, "token d"]]
"""Maps the visual tokens of one image and the number of the image to replacements of the tokens."""


class Quiz:
    """Images with their questions, encoded once and asked again under each intervention.

    Where the family allows it (`Family.shares_prefix`), an image and the text before it go through the language model
    once for all questions about the image, and each question continues from there. This is the same computation in
    another order, not an approximation; `tests/analyses/test_permutation.py` compares both.

    Args:
        mllm: the model.
        scenes: questions by image.
        batch_size: sequences in one forward pass.
        features: what the projector receives for each image, if it is already known.
        first: number of the first image; a `Change` receives image numbers that start here.

    Attributes:
        samples: all questions.
        image_numbers: (question,), which of these images each question is about, from 0.

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
        self.image_numbers = torch.tensor([number for number, scene in enumerate(scenes) for _ in scene])
        self._options = option_ids(mllm, self.samples)
        chunks = [self.samples[start : start + batch_size] for start in range(0, len(self.samples), batch_size)]
        self._batches = [mllm.encode([s.image for s in chunk], [s.question for s in chunk]) for chunk in chunks]
        self._prefixes = self._shared_prefixes(scenes, features) if _can_share(mllm) else None
        self._unchanged: list[tuple[Tensor, Tensor]] | None = None  # keys and values of the prefixes

    def logprobs(self, at: Site | None = None, change: Change | None = None) -> Float[Tensor, "question option"]:
        """Return the log-probability of each option among the options of its question.

        It is -inf where a question has fewer options.

        Args:
            at: the site of the intervention: "encoder", "projector" or a layer number.
            change: what is done to the visual tokens there.

        Raises:
            ConfigError, ModelError: see `capture.edit`.
        """
        if at is not None:
            check_site(self.mllm, at)
        if self._prefixes is not None:
            return self._among_options(self._from_prefixes(at, change))
        return self._among_options(self._from_whole_prompts(at, change))

    def knocked_out(self, blocks: Sequence[int]) -> Float[Tensor, "question option"]:
        """Return the same log-probabilities when no text token attends to the visual tokens in `blocks` (1 to L).

        See `capture.knockout`.
        """
        if self._prefixes is not None:
            return self._among_options(self._from_prefixes(None, None, check_layers(self.mllm, blocks, first=1)))
        return self._among_options(torch.cat([knockout(self.mllm, batch, blocks=blocks) for batch in self._batches]))

    def _among_options(self, logits: Float[Tensor, "question vocab"]) -> Float[Tensor, "question option"]:
        option_logits = logits.gather(1, self._options.clamp(min=0)).masked_fill(self._options < 0, -torch.inf)
        return option_logits.log_softmax(-1)

    def scored(self, before: Float[Tensor, "question option"], after: Float[Tensor, "question option"]) -> pd.DataFrame:
        """Return one row per question: id, image_id, category, chance, correct_before, correct_after, kl (nats).

        Args:
            before: log-probabilities of the options without the intervention.
            after: those with it.
        """
        answers = torch.tensor([sample.options.index(sample.answer) for sample in self.samples])
        names = {
            "id": [s.id for s in self.samples],
            "image_id": [s.image_id for s in self.samples],
            "category": [s.category for s in self.samples],
            "chance": [s.chance for s in self.samples],
        }
        correct = {
            "correct_before": (before.argmax(1) == answers).numpy(),
            "correct_after": (after.argmax(1) == answers).numpy(),
        }
        return pd.DataFrame(names | correct | {"kl": kl_divergence(before, after).numpy()})

    def _from_whole_prompts(self, at: Site | None, change: Change | None) -> Float[Tensor, "question vocab"]:
        """Return the logits at the end of each prompt, each run through the model as a whole; works for any family."""
        logits, row = [], 0
        for batch in self._batches:
            numbers = self.image_numbers[row : row + len(batch)].tolist()
            row += len(batch)
            if at is None or change is None:
                with self.mllm.lock, torch.inference_mode():
                    output = self.mllm.model(**batch.inputs, use_cache=False, logits_to_keep=positions_to_keep(batch))
                    logits.append(last_logits(output, batch).cpu())
            else:
                change_sample = partial(_change_sample, change=change, images=[self.first + n for n in numbers])
                logits.append(edit(self.mllm, batch, at=at, fn=change_sample)[:, -1])
        return torch.cat(logits)

    def _shared_prefixes(self, scenes: Sequence[Scene], features: Sequence[Tensor] | None) -> _Prefixes | None:
        """Return what the prompts about an image have in common, up to the last visual token.

        Returns:
            None where the prompts about an image differ there, or the visual tokens of the images are not all at the
            same positions.
        """
        prompts, positions = [], []
        for batch in self._batches:
            for row, parts in enumerate(self.mllm.visual_tokens(batch)):
                real = batch.inputs["attention_mask"][row].nonzero().flatten()
                pad = int(real[0])
                prompts.append(batch.inputs["input_ids"][row, real].cpu())
                positions.append(torch.cat([part.index for part in parts]).cpu() - pad)
        visual = positions[0]
        cut = int(visual.max()) + 1
        starts = [prompts[int((self.image_numbers == number).nonzero()[0])][:cut] for number in range(len(scenes))]
        if not all(torch.equal(index, visual) for index in positions):
            return None
        numbers = self.image_numbers.tolist()
        if any(not torch.equal(prompt[:cut], starts[n]) for prompt, n in zip(prompts, numbers, strict=True)):
            return None
        if features is None:
            features = survey(self.mllm, scenes, self.batch_size, encoder=True)[1]
        return _Prefixes(torch.stack(list(features)), torch.stack(starts), visual, [prompt[cut:] for prompt in prompts])

    def _from_prefixes(
        self, at: Site | None, change: Change | None, blocks: Sequence[int] = ()
    ) -> Float[Tensor, "question vocab"]:
        """Return the logits at the end of each prompt, continued from the prefixes.

        Without a change, the keys and values of the prefixes are computed only once.

        Args:
            at: the site of the intervention.
            change: what is done to the visual tokens there.
            blocks: blocks in which the text after the image does not attend to the visual tokens.
        """
        assert self._prefixes is not None
        with self.mllm.lock, torch.inference_mode():
            if change is not None:
                memory = self._prefix_memory(at, change)
            else:
                memory = self._unchanged = self._unchanged or self._prefix_memory(None, None)
            starts = range(0, len(self.samples), self.batch_size)
            return torch.cat([self._continue_prefixes(memory, start, blocks) for start in starts])

    def _continue_prefixes(
        self, memory: list[tuple[Tensor, Tensor]], start: int, blocks: Sequence[int]
    ) -> Float[Tensor, "question vocab"]:
        """Return the logits at the end of a batch of questions, the first of which is number `start`.

        Args:
            memory: keys and values of every block for the prefixes of all images.
            start: number of the first question.
            blocks: blocks in which these questions do not attend to the visual tokens.
        """
        assert self._prefixes is not None
        model: Any = self.mllm.model
        tails = self._prefixes.tails[start : start + self.batch_size]
        images = self.image_numbers[start : start + self.batch_size].to(self.mllm.device)
        last = torch.tensor([len(tail) - 1 for tail in tails], device=self.mllm.device)
        # the padding follows the last position that is read, so it has no effect
        ids = torch.nn.utils.rnn.pad_sequence(tails, batch_first=True).to(self.mllm.device)
        cache = DynamicCache(
            [(key[images], value[images]) for key, value in memory], config=self.mllm.config.get_text_config()
        )
        inputs = {"inputs_embeds": model.get_input_embeddings()(ids), **_with_cache(self.mllm.decoder, cache)}
        if blocks:
            keys = torch.zeros(len(tails), self._prefixes.starts.shape[1] + ids.shape[1], dtype=torch.bool)
            keys[:, self._prefixes.visual] = True
            blocked = Blocked(frozenset(blocks), torch.ones(ids.shape, dtype=torch.bool), keys)
            with blocking(self.mllm, blocked):
                hidden = self.mllm.decoder(**inputs, blocked=blocked).last_hidden_state
        else:
            hidden = self.mllm.decoder(**inputs).last_hidden_state
        return model.get_output_embeddings()(hidden[torch.arange(len(tails), device=hidden.device), last]).float().cpu()

    def _prefix_memory(self, at: Site | None, change: Change | None) -> list[tuple[Tensor, Tensor]]:
        """Return keys and values of every block for the prefixes, with the change applied at `at`."""
        assert self._prefixes is not None
        visual, embed = self._prefixes.visual.to(self.mllm.device), self.mllm.model.get_input_embeddings()

        def changed(values: Float[Tensor, "image token d"]) -> Float[Tensor, "image token d"]:
            assert change is not None
            return torch.stack(
                [apply_edit(change, tokens, self.first + number) for number, tokens in enumerate(values)]
            )

        def at_block(_: object, __: object, output: Tensor) -> Tensor:
            output = output.clone()
            output[:, visual] = changed(output[:, visual])
            return output

        features = self._prefixes.features.to(self.mllm.device, embed.weight.dtype)
        projected = self.mllm.projector(changed(features) if at == "encoder" else features)
        hidden = embed(self._prefixes.starts.to(self.mllm.device))
        hidden[:, visual] = (changed(projected) if at in ("projector", 0) else projected).to(hidden.dtype)
        cache: Any = DynamicCache(config=self.mllm.config.get_text_config())
        with _hook(self.mllm, at, at_block):
            self.mllm.decoder(inputs_embeds=hidden, **_with_cache(self.mllm.decoder, cache))
        return [(layer.keys, layer.values) for layer in cache.layers]


def _with_cache(decoder: Any, cache: DynamicCache) -> dict[str, Any]:
    """Return the arguments of a decoder's forward pass with a cache, whose name transformers changed in 5.24."""
    name = "cache" if "cache" in signature(decoder.forward).parameters else "past_key_values"
    return {name: cache, "use_cache": True}


def _change_sample(
    values: Float[Tensor, "token d"], sample: int, *, change: Change, images: list[int]
) -> Float[Tensor, "token d"]:
    """Apply `change` with the arguments of `capture.edit`, which passes the number of a sample within its batch."""
    return change(values, images[sample])


class _Prefixes:
    """The prompts about images, cut after the last visual token.

    Args:
        features: what the projector receives for each image.
        starts: token ids of each image's prompts up to the last visual token.
        visual: positions of the visual tokens, the same for all images.
        tails: token ids of each prompt after the last visual token.
    """

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
    """Let `fn` replace the output of block `at`, if `at` is a block number."""
    handle = mllm.decoder.layers[at - 1].register_forward_hook(fn) if isinstance(at, int) and at > 0 else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def _can_share(mllm: MLLM) -> bool:
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


def kl_divergence(
    before: Float[Tensor, "question option"], after: Float[Tensor, "question option"]
) -> Float[Tensor, " question"]:
    """Return KL(before || after) in nats of log-probabilities that are -inf at the same places; 0 where equal."""
    terms = before.exp() * (before - after)
    return terms.masked_fill(before == -torch.inf, 0).sum(-1).clamp(min=0)
