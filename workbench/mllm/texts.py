"""The texts of a multimodal language model: prompts, control tokens, and the tokens of answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from transformers import PretrainedConfig, ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from workbench.data.base import IMAGE_MARK
from workbench.errors import ModelError, one_line
from workbench.mllm.control import as_words, control_tokens, spelled_in
from workbench.weights.pretrained import call


class ModelTexts:
    """The half of an `MLLM` that needs no weights: what its chat template and its tokenizer make of texts."""

    def __init__(self, processor: Any, config: PretrainedConfig, name: str) -> None:
        self.processor, self.config, self.name = processor, config, name
        # False: `safe_text` refuses control tokens in texts of the data; True: it turns them into ordinary words
        self.control_tokens_as_words = False
        self._keeps_order: dict[tuple[str, ...], bool] = {}  # cache of `_keeps_places`
        if processor.chat_template is None:
            processor.chat_template = processor.tokenizer.chat_template

    def prompt(self, question: str, images: int = 1) -> str:
        """Return one user turn with its images as text, in the model's own chat template.

        The images come before the question, or at its IMAGE_MARKs if it has them (one for each image). For a model
        without a chat template the text is just the image placeholders and the question.

        Raises:
            ModelError: the question contains the image placeholder or a control token, or the template gives another
                number of placeholders or puts the images elsewhere.
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
        """Return the parts of a user turn, images and texts, as the chat template takes them.

        Raises:
            ModelError: the question contains the image placeholder, or has IMAGE_MARKs for another number of images, or
                the template does not keep the images where the marks are.
        """
        pieces = self.safe_text("question", question).split(IMAGE_MARK)
        if len(pieces) == 1:
            return [{"type": "image"}] * images + [{"type": "text", "text": pieces[0]}]
        if len(pieces) - 1 != images:
            raise ModelError(
                f"the question has {len(pieces) - 1} image marks for {images} images: expected one mark for each image"
            )
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
        """Return whether the chat template keeps parts of these kinds ("image" or "text") in their order."""
        if self.processor.chat_template is None:
            return False
        if kinds not in self._keeps_order:
            texts = [f"({number})" for number in range(len(kinds))]
            parts = [
                {"type": kind} | ({"text": text} if kind == "text" else {})
                for kind, text in zip(kinds, texts, strict=True)
            ]
            rest, in_order = self.render([{"role": "user", "content": parts}], generation=False), True
            for kind, text in zip(kinds, texts, strict=True):
                _, match, rest = rest.partition(text if kind == "text" else self.image_placeholder)
                in_order = in_order and bool(match)
            self._keeps_order[kinds] = in_order and self.image_placeholder not in rest
        return self._keeps_order[kinds]

    def safe_text(self, what: str, text: str) -> str:
        """Return a text of the data as the model may receive it: unchanged, or with its control tokens as words.

        The second needs `control_tokens_as_words`.

        Args:
            what: what the text is, for the error: "question", "answer" or "option".

        Raises:
            ModelError: the text contains the image placeholder, or a control token (workbench/mllm/control.py) while
                `control_tokens_as_words` is False.
        """
        self._check_no_placeholder(what, text)
        if self.control_tokens_as_words:
            return as_words(text, self.control_tokens)
        if spelled := spelled_in(text, self.control_tokens):
            raise ModelError(
                f"the {what} contains '{spelled[0]}', a control token of this model: remove it, or set"
                " data.control_tokens to words in a recipe"
            )
        return text

    @cached_property
    def control_tokens(self) -> tuple[str, ...]:
        """Return the tokens that no text of the data may contain, besides image placeholders."""
        return control_tokens(self.processor, self._placeholders)

    def render(self, messages: Sequence[Mapping[str, object]], *, generation: bool) -> str:
        """Return messages as text in the model's own chat template.

        Thinking is switched off where a template offers it, so that the answer follows its prompt at once.

        Args:
            generation: end with the beginning of the assistant's turn.

        Raises:
            ModelError: the template cannot be used.
        """
        template = self.processor.chat_template
        thinking = {"enable_thinking": False} if "enable_thinking" in str(template) else {}
        overridden = type(self.processor).apply_chat_template is not ProcessorMixin.apply_chat_template

        def rendered() -> str:
            if not isinstance(template, str) or overridden:
                return str(
                    self.processor.apply_chat_template(
                        messages, add_generation_prompt=generation, tokenize=False, **thinking
                    )
                )
            # what ProcessorMixin.apply_chat_template does, in a fifth of the time
            special = {**self.processor.tokenizer.special_tokens_map, **thinking}
            conversation = [dict(message) for message in messages]
            texts = render_jinja_template(
                conversations=[conversation], chat_template=template, add_generation_prompt=generation, **special
            )[0]
            return str(texts[0])

        def failed(error: Exception) -> ModelError:
            return ModelError(
                f"{self.name}: its chat template cannot be used ({one_line(error, 120)}): put a working"
                " chat_template.jinja into its folder"
            )

        return call(rendered, failed)

    def _check_no_placeholder(self, what: str, text: str) -> None:
        """Raise a ModelError if a text contains one of the model's image placeholders."""
        for placeholder in self._placeholders:
            if placeholder in text:
                raise ModelError(
                    f"the {what} contains '{placeholder}', this model's image placeholder: expected text only, since"
                    " images come before it"
                )

    @property
    def _placeholders(self) -> set[str]:
        return {
            self.processor.image_token,
            self.processor.tokenizer.convert_ids_to_tokens(self.config.image_token_id),
            self.image_placeholder,
        }

    @property
    def image_placeholder(self) -> str:
        """Return the text that the processor replaces by an image's tokens.

        In some families that is not the visual token itself but the mark that begins an image.
        """
        return getattr(self.processor, "boi_token", None) or self.processor.image_token

    def answer_ids(self, answer: str) -> list[int]:
        """Return the tokens of an answer where it follows its prompt: those that training teaches.

        On its own, the same text may be other tokens: byte-level tokenizers merge the space that many templates put
        before an answer into its first token. See workbench/mllm/conversation.py for training.

        Raises:
            ModelError: an answer without tokens, or with the image placeholder.
        """
        answer = self.safe_text("option", answer)
        prompt, space = self._prompt_and_space
        before, whole = self._text_ids(prompt), self._text_ids(prompt + space + answer)
        ids = whole[len(before) :] if whole[: len(before)] == before else self._text_ids(answer)
        if not answer or not ids or self.config.image_token_id in ids:
            raise ModelError(
                f"option '{answer}' has {'the image placeholder in it' if answer and ids else 'no tokens'}: expected an"
                " answer in words"
            )
        return list(ids)

    def texts_of(self, ids: Sequence[int]) -> list[str]:
        """Return the text of some tokens up to and including each of them."""
        decode = self.processor.tokenizer.decode
        return [decode(list(ids[: n + 1]), clean_up_tokenization_spaces=False) for n in range(len(ids))]

    def _text_ids(self, text: str) -> list[int]:
        ids: list[int] = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    @cached_property
    def _prompt_and_space(self) -> tuple[str, str]:
        """Return a prompt, and the white space that the chat template puts between it and an answer.

        Both are empty if there is no template, or if it puts words there.
        """
        if self.processor.chat_template is None:
            return "", ""
        question = {"role": "user", "content": [{"type": "text", "text": "?"}]}
        answer = {"role": "assistant", "content": [{"type": "text", "text": "!"}]}
        prompt = self.render([question], generation=True)
        whole = self.render([question, answer], generation=False)
        if not whole.startswith(prompt):
            return "", ""
        space, mark, _ = whole.removeprefix(prompt).partition("!")
        return (prompt, space) if mark and not space.strip() else ("", "")

    def adds_special(self, texts: Sequence[str]) -> bool:
        """Return whether the tokenizer must add its special tokens: not if the template has already put BOS there."""
        bos = self.processor.tokenizer.bos_token
        return not (bos and texts and texts[0].startswith(bos))
