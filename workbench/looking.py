"""What one model does with one image and one question: its answer, and what is behind it.

    mllm, sample = load_mllm("runs/viral"), load_data("shapes:val")[0]
    seen = look(mllm, sample.image, sample.question, options=sample.options)
    seen.answer, seen.tokens[0].probability, seen.attention[0, 3].mean(0)

A `Look` has what page Explorer shows. It is for looking at: one image and one question are no measurement, and the
analyses measure the same quantities over many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from workbench.capture.attention import attention
from workbench.capture.hidden_states import read
from workbench.data.base import Sample
from workbench.errors import DataError, WorkbenchError
from workbench.lens import lens_of, readable
from workbench.metrics import METRICS
from workbench.mllm.base import MLLM
from workbench.mllm.family import Batch, VisualTokens
from workbench.mllm.logits import logits_at_end, positions_to_keep
from workbench.scoring.quiz import Quiz
from workbench.spatial.grids import sum_onto_grid, whole_image
from workbench.spatial.vfm_patches import patches_under
from workbench.spatial.within_image import Within
from workbench.vfm.base import VFM

LIKELY = 5  # tokens listed at each place of an answer, and words listed at each visual token
ROWS = 256  # tokens whose logits over the vocabulary are in memory at once
HALF = 6e4  # hidden states up to this are stored in float16
NEIGHBORS, DRAWS = 10, 100  # of CKNNA and of its null, as the analysis has them


@dataclass(frozen=True)
class Token:
    """One token of an answer.

    Attributes:
        text: what it adds to the answer.
        probability: given the prompt and the tokens before it.
        likely: the LIKELY most likely tokens in its place, with their probabilities.
    """

    text: str
    probability: float
    likely: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Words:
    """The most likely words of the logit lens at each visual token in each layer.

    Attributes:
        ids: token ids, the most likely first.
        probabilities: of `ids`, over the whole vocabulary.
        texts: {token id: text}.
        special: those of `ids` that are no words (`<pad>`, `<unk>` and the like).
        vocabulary: number of tokens among which the probabilities are.
    """

    ids: Int[Tensor, "layer token word"]
    probabilities: Float[Tensor, "layer token word"]
    texts: dict[int, str]
    special: frozenset[int]
    vocabulary: int


@dataclass(frozen=True)
class Look:
    """One model, one image, one question.

    `token` is a visual token of `place`, row by row from the top left; `layer` goes from 0 (the projector's output) to
    L, and `block` from 1 to L. `row` is a position whose attention is read: the end of the prompt, which decides the
    first token of the answer, then each token of the answer.

    Attributes:
        answer: what the model generates, greedy.
        tokens: its tokens, without the one that ends it.
        cut: whether the answer was cut before the model ended it.
        options: {option: probability among the options}, {} for an open question.
        place: the grid of visual tokens that shows most of the image in one piece.
        hidden: hidden states of these tokens, in float16 unless that overflows.
        attention: attention of each row on each patch of `place`. Visual tokens of other grids (tiles) are spread over
            the patches that they cover.
        mass: attention on all visual tokens.
        uniform: `mass` if all tokens that the row sees got the same attention.
        words: of the logit lens; None if the model has none (`why_no_words`).
        why_no_words: why the logit lens cannot be read.
    """

    answer: str
    tokens: tuple[Token, ...]
    cut: bool
    options: dict[str, float]
    place: VisualTokens
    hidden: Float[Tensor, "layer token d"]
    attention: Float[Tensor, "row block head token"]
    mass: Float[Tensor, "row block head"]
    uniform: Float[Tensor, " row"]
    words: Words | None = field(repr=False)
    why_no_words: str = ""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the patches."""
        assert self.place.grid is not None
        return self.place.grid

    @property
    def nbytes(self) -> int:
        """Memory of its tensors."""
        lens = [] if self.words is None else [self.words.ids, self.words.probabilities]
        return sum(t.nbytes for t in (self.hidden, self.attention, self.mass, *lens))


def look(
    mllm: MLLM, image: Image.Image, question: str, *, options: Sequence[str] = (), max_new_tokens: int = 16
) -> Look:
    """Ask a model about an image, and read what is behind its answer.

    Args:
        mllm: the model.
        image: any size and mode.
        question: without the image placeholder; the model's own chat template is put around it.
        options: the answers that the question allows, for their probabilities.
        max_new_tokens: tokens at which the answer is cut.

    Raises:
        ModelError: the model cannot process the image or the question, its visual tokens have no rows and columns, or
            its attention cannot be read.
        DataError: two options have the same tokens.
    """
    batch = mllm.encode([image], [question])
    (parts,) = mllm.visual_tokens(batch)
    inside, place = whole_image(parts)
    hidden = read(mllm, batch)[0].values[:, inside]
    (answer_ids,) = mllm.generate_ids(batch, max_new_tokens=max_new_tokens)
    text = mllm.processor.tokenizer.decode(answer_ids, skip_special_tokens=True).strip()
    cut = len(answer_ids) == max_new_tokens
    # an untrained model may answer with the placeholder of an image; nothing can be read from there on
    answer_ids = list(takewhile(lambda token: token != mllm.config.image_token_id, answer_ids))
    on_patches, mass, uniform = _attention(mllm, batch, answer_ids, parts, place)
    words, why = _words(mllm, batch, hidden)
    return Look(
        text,
        _tokens(mllm, batch, answer_ids),
        cut,
        probabilities(mllm, image, question, options) if options else {},
        place,
        hidden.half() if float(hidden.abs().max()) < HALF else hidden,
        on_patches,
        mass,
        uniform,
        words,
        why,
    )


def probabilities(mllm: MLLM, image: Image.Image, question: str, options: Sequence[str]) -> dict[str, float]:
    """Return the probability of each option among the options, by all its tokens (`scoring.options`).

    Raises:
        DataError: two options have the same tokens.
    """
    sample = Sample("", "", lambda: image, question, options=tuple(options))
    logprobs = Quiz(mllm, [[sample]], 1).logprobs()[0]
    return dict(zip(options, logprobs.exp().tolist(), strict=True))


def _tokens(mllm: MLLM, batch: Batch, answer: list[int]) -> tuple[Token, ...]:
    """Return the tokens of an answer with their probabilities, from one forward pass over prompt and answer."""
    if not answer:
        return ()
    whole = mllm.continued(batch, [answer])
    with mllm.lock, torch.inference_mode():
        keep = len(answer) + 1
        logits = mllm.model(**whole.inputs, use_cache=False, logits_to_keep=positions_to_keep(whole, keep)).logits
        chances = logits_at_end(logits, whole, keep)[0, :-1].softmax(-1).cpu()
    best = chances.topk(min(LIKELY, chances.shape[1]))
    texts = ["", *mllm.texts_of(answer)]
    return tuple(
        Token(
            texts[number + 1][len(texts[number]) :],
            float(chances[number, token]),
            tuple((readable(mllm, i), p) for i, p in zip(ids, values, strict=True)),
        )
        for number, (token, ids, values) in enumerate(
            zip(answer, best.indices.tolist(), best.values.tolist(), strict=True)
        )
    )


def _attention(
    mllm: MLLM, batch: Batch, answer: list[int], parts: list[VisualTokens], place: VisualTokens
) -> tuple[
    Float[Tensor, "row block head token"],
    Float[Tensor, "row block head"],
    Float[Tensor, " row"],
]:
    """Return the attention of the end of the prompt and of each token of the answer on the image."""
    prompt = batch.inputs["input_ids"].shape[1]
    rows = list(range(prompt - 1, prompt + len(answer)))
    keys = torch.cat([part.index for part in parts]).cpu()
    blocks = [block[0][..., keys].float() for block in attention(mllm, mllm.continued(batch, [answer]), rows=[rows])]
    visual = torch.stack(blocks).movedim(2, 0)  # (row, block, head, key)
    placed = [part.grid is not None for part in parts for _ in part.index]
    gridded = [part for part in parts if part.grid is not None]
    on_patches = sum_onto_grid(visual[..., torch.tensor(placed)].numpy(), gridded, place).astype(np.float32)
    # where the family marks answers, the prompt is not causal; its end sees all of it in every family
    uniform = torch.tensor([len(keys) / (row + 1) for row in rows])
    return torch.from_numpy(on_patches).flatten(-2), visual.sum(-1), uniform


def _words(mllm: MLLM, batch: Batch, hidden: Float[Tensor, "layer token d"]) -> tuple[Words | None, str]:
    """Return the words of the logit lens, or why it cannot be read."""
    try:
        lens = lens_of(mllm, batch)
    except WorkbenchError as error:
        return None, str(error)
    ids, chances, vocabulary = [], [], 0
    for rows in hidden.flatten(0, 1).split(ROWS):
        shares = lens(rows).softmax(-1)
        vocabulary = shares.shape[1]
        best = shares.topk(min(LIKELY, vocabulary))
        ids.append(best.indices.cpu().int())
        chances.append(best.values.cpu())
    shape = hidden.shape[:2]
    top = torch.cat(ids).unflatten(0, shape)
    shown = [int(token) for token in top.unique()]
    tokenizer = mllm.processor.tokenizer
    added = {token for token, entry in tokenizer.added_tokens_decoder.items() if entry.special}
    special = frozenset(shown) & (added | frozenset(tokenizer.all_special_ids))
    texts = {token: readable(mllm, token) for token in shown}
    return Words(top, torch.cat(chances).unflatten(0, shape), texts, special, vocabulary), ""


# --- beside a vision foundation model -------------------------------------------------------------


@dataclass(frozen=True)
class Alignment:
    """How much the visual tokens of one image resemble a VFM's patches of it (CKNNA), in each layer.

    Attributes:
        scores: of each layer.
        chance: the mean score of each layer if the patches are permuted.
    """

    scores: tuple[float, ...]
    chance: tuple[float, ...]


def vfm_patches(vfm: VFM, image: Image.Image, place: VisualTokens) -> Float[Tensor, "token d"]:
    """Return a VFM's features of the pixels under each visual token of `place`."""
    return patches_under(vfm, [image], [[place]])[0][0]


def aligned_with(seen: Look, patches: Float[Tensor, "token d"], *, seed: int = 0) -> Alignment | str:
    """Return the CKNNA of each layer with a VFM's patches (`vfm_patches`), or why this image has none."""
    within = Within(METRICS.get("cknna"), NEIGHBORS, null=DRAWS, seed=seed)
    try:
        within.add([[[layer]] for layer in seen.hidden.float()], [[[patches]]])
    except DataError as error:
        return str(error)
    if not within.scored:
        return next(iter(within.left_out.values()))
    scores = within.finish()
    return Alignment(
        tuple(float(row[0].estimate) for row in scores.intervals), tuple(scores.nulls[:, :, 0].mean(0).tolist())
    )
