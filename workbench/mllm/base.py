"""A multimodal language model and its processor.

What differs between model families is in their `Family`; everything here goes through the interface that transformers
gives to all of them.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, BatchFeature, PretrainedConfig, ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from workbench.data.base import IMAGE_MARK
from workbench.data.images import upright_rgb
from workbench.devices import check_device
from workbench.errors import DataError, ModelError, one_line
from workbench.hashing import fingerprint, model_settings, processor_fingerprint, saved_tensors, settings_hash
from workbench.mllm.control import as_words, control_tokens, spelled_in
from workbench.mllm.family import TEXT_INPUTS, Batch, BatchImages, Family, VisualTokens, family_of
from workbench.mllm.load import load_config, load_model, placement
from workbench.mllm.processors import check_agreement, load_processor
from workbench.mllm.residual import KEY, Residual, load_residual
from workbench.mllm.validate import validate as validate_mllm
from workbench.plugins import identity
from workbench.weights.pretrained import call, hub_options


class MLLM:
    """A model, its processor and its family; make one with `MLLM.load`."""

    def __init__(self, model: Any, processor: Any, family: Family, name: str, residual: Residual | None = None) -> None:
        self.model, self.processor, self.family, self.name, self.residual = (
            model.eval(),
            processor,
            family,
            name,
            residual,
        )
        self.config: PretrainedConfig = model.config
        self.lock = threading.RLock()  # one trace of a model at a time
        if processor.chat_template is None:
            processor.chat_template = processor.tokenizer.chat_template
        self._orders: dict[tuple[str, ...], bool] = {}
        self.control_tokens_as_words = False  # whether control tokens in a text of the data are words (`safe_text`)
        self.fingerprint = self._fingerprint()
        self.processor.tokenizer.padding_side = "left"  # generation continues from the last position

    def _fingerprint(self) -> str:
        """Of weights by name, configuration, generation settings, tokenizer, processor and chat template: all that
        decides an answer but the libraries."""
        adapters = (
            {f"{KEY}.{key}": value for key, value in self.residual.state_dict().items()}
            if self.residual is not None
            else {}
        )
        weights = fingerprint(saved_tensors(self.model) | adapters)
        code = [plugin] if (plugin := identity("families", self.family.name)) else []
        return settings_hash(weights, model_settings(self.model), processor_fingerprint(self.processor), *code)

    @classmethod
    def load(
        cls,
        name: str,
        *,
        dtype: str = "auto",
        device: str = "auto",
        revision: str | None = None,
        device_map: str | Mapping[str, Any] | None = None,
        load_in: str | None = None,
        validate: bool = True,
        trust_remote_code: bool = False,
    ) -> MLLM:
        """Load a hub id or a folder, and check causally that its visual tokens are where its family says.

        A model that was trained with a residual (`visual_residual` in its config.json) gets it back here; plain
        transformers ignores it.

        Args:
            device_map: how the model's parts are spread over the GPUs of this machine, as in `from_pretrained`: "auto",
                "balanced", "sequential", or a mapping of modules to devices. In place of `device`.
            load_in: "8bit" or "4bit" quantizes the weights while they are loaded (bitsandbytes). The numbers are those
                of the quantized model, which has a fingerprint of its own.
            validate: False skips the causal check, and takes a checkpoint with tensors that the model has no place for.
            trust_remote_code: run code that comes with the model; without it such a model is refused.

        Raises:
            ModelError, WeightsError: nothing loadable there, tensors missing or of another shape, a processor of
                another model, or the validation failed.
            ConfigError: no such device, no such way to quantize, or its package is not installed.
            UnknownNameError: an architecture that no family covers.
        """
        where = check_device(device)
        options: Any = {"revision": revision, "trust_remote_code": trust_remote_code} | hub_options(name)
        config = load_config(name, **options)
        family = family_of(config)
        processor = load_processor(name, family, config, check=validate, **options)
        placed = placement(name, config, where, device_map, load_in)
        model = load_model(AutoModelForImageTextToText, name, config, strict=validate, dtype=dtype, **placed, **options)
        if not placed:
            model.to(where)
        mllm = cls(model, processor, family, name, load_residual(model, name, revision))
        if validate:
            validate_mllm(mllm)
        return mllm

    @classmethod
    def wrap(cls, model: Any, processor: Any, name: str = "") -> MLLM:
        """A transformers model in memory and its processor, checked as a loaded one is.

        Args:
            name: what it is called; by default where it was loaded from, or its class.

        Raises:
            ModelError, UnknownNameError: see `load`.
        """
        name, family = name or model.config._name_or_path or type(model).__name__, family_of(model.config)
        check_agreement(name, family, model.config, processor)
        mllm = cls(model, processor, family, name)
        validate_mllm(mllm)
        return mllm

    @property
    def decoder(self) -> Any:
        """The stack of decoder blocks: `.layers`, `.norm`."""
        decoder = self.model.get_decoder()
        return getattr(decoder, "model", decoder)

    @property
    def projector(self) -> torch.nn.Module:
        """The module whose input is the tower's features."""
        return self.model.model.get_submodule(self.family.projector)

    @property
    def n_layers(self) -> int:
        return len(self.decoder.layers)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def prompt(self, question: str, images: int = 1) -> str:
        """One user turn with its images, in the model's own chat template; without one, placeholders and the question.

        The images come before the question, or where it has an IMAGE_MARK for each.

        Raises:
            ModelError: the question contains the image placeholder or a control token, or the template gives another
                number of them or puts them elsewhere.
        """
        content = self.content(question, images)
        if self.processor.chat_template is None:
            return "".join(self.image_placeholder if part["type"] == "image" else part["text"] for part in content)
        text = self.render([{"role": "user", "content": content}], generation=True)
        if text.count(self.image_placeholder) != images:
            raise ModelError(
                f"{self.name}: its chat template gives {text.count(self.image_placeholder)} image placeholders for"
                f" {images} images"
            )
        return text

    def content(self, question: str, images: int) -> list[dict[str, str]]:
        """The parts of a user turn, images and texts, for the chat template.

        Raises:
            ModelError: the question contains the image placeholder, has marks for another number of images, or the
                template does not keep their places.
        """
        pieces = self.safe_text("question", question).split(IMAGE_MARK)
        if len(pieces) == 1:
            return [{"type": "image"}] * images + [{"type": "text", "text": pieces[0]}]
        if len(pieces) - 1 != images:
            raise ModelError(f"the question has {len(pieces) - 1} places for {images} images: expected one for each")
        parts: list[dict[str, str]] = []
        for number, piece in enumerate(pieces):
            parts += [{"type": "image"}] * (number > 0) + [{"type": "text", "text": piece}] * bool(piece.strip())
        if not self._keeps_places(tuple(part["type"] for part in parts)):
            reason = (
                "has no chat template"
                if self.processor.chat_template is None
                else "has a chat template that puts images elsewhere"
            )
            raise ModelError(f"{self.name} {reason}: expected images before the question, not between its words")
        return parts

    def _keeps_places(self, kinds: tuple[str, ...]) -> bool:
        """Whether the chat template leaves images and texts in their order."""
        if self.processor.chat_template is None:
            return False
        if kinds not in self._orders:
            texts = [f"({number})" for number in range(len(kinds))]
            parts = [
                {"type": kind} | ({"text": text} if kind == "text" else {})
                for kind, text in zip(kinds, texts, strict=True)
            ]
            rest, right = self.render([{"role": "user", "content": parts}], generation=False), True
            for kind, text in zip(kinds, texts, strict=True):
                _, there, rest = rest.partition(text if kind == "text" else self.image_placeholder)
                right = right and bool(there)
            self._orders[kinds] = right and self.image_placeholder not in rest
        return self._orders[kinds]

    def safe_text(self, what: str, text: str) -> str:
        """A text of the data as the model may be given it: as it is, or with its control tokens as words, if `words`
        says so.

        Raises:
            ModelError: it has the image placeholder, or a control token (workbench/mllm/control.py) that is not to be
                words.
        """
        self._check_no_placeholder(what, text)
        if self.control_tokens_as_words:
            return as_words(text, self.control_tokens)
        if spelled := spelled_in(text, self.control_tokens):
            raise ModelError(
                f"the {what} contains '{spelled[0]}', a control token of this model: expected a text without it, or"
                " data.control_tokens words in a recipe"
            )
        return text

    @cached_property
    def control_tokens(self) -> tuple[str, ...]:
        """What no text of the data may tell the model, besides image placeholders."""
        return control_tokens(self.processor, self._places)

    def render(self, messages: Sequence[Mapping[str, object]], *, generation: bool) -> str:
        """Messages in the model's own chat template, with the beginning of the answer if `generation`; a template that
        can think does not, so that an answer follows its prompt at once."""
        template = self.processor.chat_template
        thinks = {"enable_thinking": False} if "enable_thinking" in str(template) else {}

        def rendered() -> str:
            if (
                not isinstance(template, str)
                or type(self.processor).apply_chat_template is not ProcessorMixin.apply_chat_template
            ):
                return str(
                    self.processor.apply_chat_template(
                        messages, add_generation_prompt=generation, tokenize=False, **thinks
                    )
                )
            special = {**self.processor.tokenizer.special_tokens_map, **thinks}  # the same, in a fifth of the time
            conversation = [dict(message) for message in messages]
            return str(
                render_jinja_template(
                    conversations=[conversation], chat_template=template, add_generation_prompt=generation, **special
                )[0][0]
            )

        def failed(error: Exception) -> ModelError:
            return ModelError(
                f"{self.name}: its chat template cannot be used ({one_line(error, 120)}): expected another"
                " chat_template.jinja in its folder"
            )

        return call(rendered, failed)

    def _check_no_placeholder(self, what: str, text: str) -> None:
        """Raise a ModelError if a text contains the image placeholder, or what stands for it in the model's
        template."""
        for place in self._places:
            if place in text:
                raise ModelError(
                    f"the {what} contains '{place}', this model's image placeholder: expected text only, since images"
                    " come before it"
                )

    @property
    def _places(self) -> set[str]:
        return {
            self.processor.image_token,
            self.processor.tokenizer.convert_ids_to_tokens(self.config.image_token_id),
            self.image_placeholder,
        }

    @property
    def image_placeholder(self) -> str:
        """What a processor replaces by an image's tokens: in some families not the visual token itself, but the mark
        that begins an image."""
        return getattr(self.processor, "boi_token", None) or self.processor.image_token

    def encode(self, images: Sequence[Image.Image | Sequence[Image.Image]], prompts: Sequence[str]) -> Batch:
        """Encode one question for each sample, with one image, several images or none, padded on the tokenizer's side.

        Raises:
            ModelError: different numbers of samples and prompts, a question with the image placeholder in it, or an
                image that the model's processor cannot take.
        """
        if len(images) != len(prompts):
            raise ModelError(
                f"{len(images)} images for {len(prompts)} prompts: expected one entry of images for each prompt"
            )
        pictures = upright(images)
        texts = [self.prompt(question, len(own)) for question, own in zip(prompts, pictures, strict=True)]
        return self.process(pictures, texts, prompts)

    def process(
        self,
        pictures: BatchImages,
        texts: Sequence[str],
        prompts: Sequence[str],
        *,
        device: str | torch.device | None = None,
        **options: Any,
    ) -> Batch:
        """Images and texts in the model's own format through its own processor: the one way into the model, for
        questions and for training.

        Args:
            texts: with image placeholders.
            prompts: what the batch says that was asked.
            device: where the batch is wanted; the model's by default.
            options: of the processor.

        Raises:
            ModelError: an image that the processor cannot take.
        """
        given = [list(own) for own in pictures] if any(pictures) else None
        try:
            with self.lock:
                inputs = self.processor(
                    images=given,
                    text=list(texts),
                    padding=True,
                    return_tensors="pt",
                    add_special_tokens=self.adds_special(texts),
                    **options,
                )
        except (ValueError, ZeroDivisionError, RuntimeError) as error:
            sizes = [f"{i.width} x {i.height} px" for own in pictures for i in own]
            what = f"images of {', '.join(sizes[:4])}" if all(pictures) else "a prompt without an image here"
            raise ModelError(f"{self.name}: its processor cannot take {what} ({one_line(error)})") from error
        inputs = BatchFeature({name: value for name, value in inputs.items() if name != "labels"})
        return Batch(inputs.to(self.device if device is None else device), pictures, tuple(prompts))

    def adds_special(self, texts: Sequence[str]) -> bool:
        """Whether the tokenizer begins a text with its own tokens: the template may have put BOS there already, and one
        is enough."""
        bos = self.processor.tokenizer.bos_token
        return not (bos and texts and texts[0].startswith(bos))

    def visual_tokens(self, batch: Batch) -> list[list[VisualTokens]]:
        """Where the visual tokens of each sample are, `[sample][image or tile]`.

        Raises:
            ModelError: the family gives a position that holds no visual token, the same one twice, or a grid of another
                size.
        """
        found, row = [], 0
        for number, sample in enumerate(self.family.visual_tokens(self.config, self.processor, batch)):
            taken = []
            for part in sample:
                if part.grid is not None and part.grid[0] * part.grid[1] != len(part.index):
                    raise ModelError(
                        f"{self.family.name}: grid {part.grid} does not multiply to {len(part.index)} visual tokens"
                    )
                if part.spans is not None and part.grid != (len(part.spans[0]), len(part.spans[1])):
                    sides = f"{len(part.spans[0])} rows and {len(part.spans[1])} columns"
                    raise ModelError(
                        f"{self.family.name}: grid {part.grid} for {sides} of pixels; the sides look exchanged"
                    )
                rows = torch.arange(row, row + len(part.index)) if part.rows is None else part.rows
                row += len(part.index)
                taken.append(replace(part, rows=rows))
            self._check_positions(batch, number, taken)
            found.append(taken)
        return found

    def token_grids(self, batch: Batch) -> list[list[VisualTokens]]:
        """`visual_tokens`, each of which has a place in the image.

        Raises:
            DataError: some have no rows and columns.
        """
        found = self.visual_tokens(batch)
        if any(part.grid is None for sample in found for part in sample):
            raise DataError(
                f"{self.name} ({self.family.name}) gives visual tokens without a raster: expected a place in the image"
                " for each"
            )
        return found

    def _check_positions(self, batch: Batch, number: int, parts: list[VisualTokens]) -> None:
        """Every position holds the placeholder, and none is given twice."""
        if not parts:
            return
        ids, index = batch.inputs["input_ids"][number], torch.cat([part.index for part in parts])
        visual = ids == self.config.image_token_id
        right = (index >= 0) & (index < len(ids))
        if not right.all() or not visual[index].all():
            shift = next(
                (
                    s
                    for s in (-1, 1, -2, 2)
                    if ((index - s >= 0) & (index - s < len(ids))).all() and visual[index - s].all()
                ),
                None,
            )
            why = "" if shift is None else f"; all of them are off by {shift:+d}"
            wrong = int(index[~right][0] if not right.all() else index[~visual[index]][0])
            held = f"holds token {int(ids[wrong])}" if 0 <= wrong < len(ids) else "is outside the sequence"
            expected = f"expected a visual token ({self.config.image_token_id}){why}"
            raise ModelError(
                f"family '{self.family.name}' is wrong about positions: {wrong} of sample {number} {held}, {expected}"
            )
        if len(index.unique()) < len(index):
            raise ModelError(
                f"family '{self.family.name}' is wrong about positions: it gives some visual tokens of sample {number}"
                " twice"
            )

    @torch.inference_mode()
    def generate(self, batch: Batch, *, max_new_tokens: int = 16) -> list[str]:
        """Greedy answers, without the prompt and special tokens."""
        with self.lock:
            ids = self.model.generate(**batch.inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = ids[:, batch.inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)]

    @torch.inference_mode()
    def option_logprobs(self, batch: Batch, options: Sequence[Sequence[str]]) -> list[Float[Tensor, " option"]]:
        """Length-normalised log-likelihood of each option as the answer: mean log p over the option's tokens.

        Args:
            options: for each sample, the answers to compare; each is appended to the prompt as `answer_ids` gives it.

        Raises:
            ModelError: another number of samples than `batch` has, or an option without tokens or with the image
                placeholder.
        """
        if len(options) != len(batch):
            raise ModelError(f"options for {len(options)} samples: expected {len(batch)}")
        answers = [[self.answer_ids(option) for option in own] for own in options]
        with self.lock:
            first = (
                last_logits(self.model(**batch.inputs, use_cache=False, logits_to_keep=positions_to_keep(batch)), batch)
                .log_softmax(-1)
                .cpu()
            )
        scores = []
        for row, own in enumerate(answers):
            if all(len(ids) == 1 for ids in own):
                scores.append(first[row, [ids[0] for ids in own]])
            # all options of a sample in the same way, since rounding differs between a padded batch and a prompt alone
            else:
                alone = self.encode([batch.images[row]], [batch.prompts[row]])
                scores.append(torch.stack([self._continuation(alone, ids).mean() for ids in own]))
        return scores

    def answer_ids(self, answer: str) -> list[int]:
        """The tokens of an answer where it stands in a conversation, behind its prompt: those that training teaches
        (workbench/mllm/conversation.py).

        Alone, the same text may be other tokens: byte-level tokenizers have the space that many templates put before an
        answer in its first token.

        Raises:
            ModelError: an answer without tokens, or with the image placeholder.
        """
        tokenizer, (prompt, space), answer = self.processor.tokenizer, self._turn, self.safe_text("option", answer)
        before, whole = (
            tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, prompt + space + answer)
        )
        ids = (
            whole[len(before) :]
            if whole[: len(before)] == before
            else tokenizer(answer, add_special_tokens=False)["input_ids"]
        )
        if not answer or not ids or self.config.image_token_id in ids:
            raise ModelError(
                f"option '{answer}' has {'the image placeholder in it' if answer and ids else 'no tokens'}: expected an"
                " answer in words"
            )
        return list(ids)

    @cached_property
    def _turn(self) -> tuple[str, str]:
        """A prompt, and the space that the template puts between it and an answer; empty where there is no template, or
        one that puts words there."""
        if self.processor.chat_template is None:
            return "", ""
        question = {"role": "user", "content": [{"type": "text", "text": "?"}]}
        prompt = self.render([question], generation=True)
        whole = self.render(
            [question, {"role": "assistant", "content": [{"type": "text", "text": "!"}]}], generation=False
        )
        space = (
            whole.removeprefix(prompt).partition("!")[0]
            if whole.startswith(prompt) and "!" in whole[len(prompt) :]
            else "-"
        )
        return ("", "") if space.strip() else (prompt, space)

    def _continuation(self, alone: Batch, answer: Sequence[int]) -> Float[Tensor, " token"]:
        """Log p of each token of `answer` after the prompt of one sample."""
        inputs = dict(alone.inputs)
        own = torch.tensor([list(answer)], device=self.device)
        fill: dict[str, Any] = {"input_ids": own, "attention_mask": 1, "token_type_ids": self.family.answer_type}
        for name in TEXT_INPUTS:
            if name in inputs:
                tail = torch.zeros(1, len(answer), dtype=inputs[name].dtype, device=self.device) + fill.get(name, 0)
                inputs[name] = torch.cat([inputs[name], tail], dim=1)
        with self.lock:
            logits = self.model(**inputs, use_cache=False, logits_to_keep=len(answer) + 1).logits[0, :-1].float()
        return logits.log_softmax(-1).gather(1, own.T)[:, 0].cpu()


class WeightlessMLLM(MLLM):
    """An MLLM on the meta device, made from a configuration alone: it encodes text and images, on the CPU, and knows
    its shapes, but holds no weights."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def _fingerprint(self) -> str:
        return ""


def upright(images: Sequence[Image.Image | Sequence[Image.Image]]) -> BatchImages:
    """The pictures of each sample, upright and in RGB."""
    return tuple(tuple(upright_rgb(i) for i in ([one] if isinstance(one, Image.Image) else one)) for one in images)


def last_logits(output: Any, batch: Batch) -> Float[Tensor, "sample vocab"]:
    """Logits at the last position of each sample that is not padding."""
    mask = batch.inputs["attention_mask"]
    last = -1 - mask.flip(1).long().argmax(1)
    return output.logits[torch.arange(len(mask), device=mask.device), last].float()


def positions_to_keep(batch: Batch) -> int:
    """Return how many positions from the end hold the last one of every sample that is not padding."""
    return int(batch.inputs["attention_mask"].flip(1).long().argmax(1).max()) + 1
