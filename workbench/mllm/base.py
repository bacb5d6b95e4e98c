"""A multimodal language model, its processor, and where its images sit in the language model's sequence.

What differs between model families is data and one function in a `Family`; everything else goes through the interface that transformers gives to
all of them.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, BatchFeature, PretrainedConfig

from workbench.data.base import content_hash
from workbench.errors import ModelError, UnknownNameError
from workbench.registry import Registry
from workbench.weights import fingerprint

log = logging.getLogger(__name__)


Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class VisualTokens:
    """Where one image (or one tile of it) sits in the language model's sequence.

    Attributes:
        index: positions in `input_ids`, in raster order.
        grid: (rows, columns) with rows * columns == len(index), or None where the tokens have no raster.
        box: left, top, right, bottom of the part of the original image that the tokens cover, in 0..1; it can reach
            outside 0..1 where the model pads.
    """

    index: Int[Tensor, token]  # noqa: F821  (a jaxtyping dimension)
    grid: tuple[int, int] | None
    box: Box


@dataclass(frozen=True)
class Family:
    """All that differs between model families.

    Attributes:
        architectures: values of `config.architectures[0]` that belong to this family.
        visual_tokens: (config, batch) -> [sample][image or tile], with boxes relative to what the processor was shown.
    """

    name: str
    architectures: tuple[str, ...]
    visual_tokens: Callable[[PretrainedConfig, BatchFeature], list[list[VisualTokens]]]


FAMILIES: Registry[Family] = Registry("model family")


def family_of(config: PretrainedConfig) -> Family:
    """Return the family whose architectures contain `config.architectures[0]`."""
    architecture = (config.architectures or ["(none)"])[0]
    for name in FAMILIES:
        if architecture in FAMILIES.get(name).architectures:
            return FAMILIES.get(name)
    known = [a for name in FAMILIES for a in FAMILIES.get(name).architectures]
    raise UnknownNameError("model architecture", architecture, known)


@dataclass(frozen=True)
class Batch:
    """Encoded prompts: `inputs` as the processor gave them, and the part of each image (left, top, right, bottom in 0..1) that it was shown."""

    inputs: BatchFeature
    shown: tuple[Box, ...]

    def __len__(self) -> int:
        return self.inputs["input_ids"].shape[0]


class MLLM:
    """A model, its processor and its family; make one with `MLLM.load`."""

    def __init__(self, model: Any, processor: Any, family: Family, name: str) -> None:
        self.model, self.processor, self.family, self.name = model.eval(), processor, family, name
        self.config: PretrainedConfig = model.config
        self.lock = threading.RLock()  # one trace of a model at a time
        settings = {key: value for key, value in self.config.to_diff_dict().items() if key != "_name_or_path"}
        self.fingerprint = content_hash(fingerprint(model.state_dict()), settings, processor.image_processor.to_dict(), processor.chat_template)
        self.processor.tokenizer.padding_side = "left"  # generation continues from the last position

    @classmethod
    def load(cls, name: str, *, dtype: str = "auto", device: str = "auto", revision: str | None = None, validate: bool = True) -> MLLM:
        """Load a hub id or a folder, and check causally that its visual tokens are where its family says.

        Raises:
            ModelError: nothing loadable there, or the validation failed.
            UnknownNameError: an architecture that no family covers.
        """
        where = "cuda" if torch.cuda.is_available() else "cpu"
        if device.startswith("cuda") and where == "cpu":
            raise ModelError(f"device is {device}: expected cpu, since no GPU is visible here")
        if Path(name).is_dir() and not (Path(name) / "config.json").exists():
            raise ModelError(f"folder {name} holds no model: expected a config.json and model.safetensors there")
        try:
            config = AutoConfig.from_pretrained(name, revision=revision)
        except (OSError, ValueError) as error:
            raise ModelError(f"model '{name}' is neither a folder nor a hub id within reach ({_first_line(error)})") from error
        family = family_of(config)
        try:
            model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, revision=revision, use_safetensors=True)
            processor: Any = AutoProcessor.from_pretrained(name, revision=revision)
        except (OSError, ValueError) as error:
            raise ModelError(f"model '{name}' could not be loaded ({_first_line(error)})") from error
        model.to(where if device == "auto" else device)  # type: ignore[arg-type]
        mllm = cls(model, processor, family, name)
        if validate:
            from workbench.mllm.validate import validate as check

            check(mllm)
        return mllm

    @property
    def decoder(self) -> Any:
        """The stack of decoder blocks: `.layers`, `.norm`."""
        decoder = self.model.get_decoder()
        return getattr(decoder, "model", decoder)

    @property
    def n_layers(self) -> int:
        return len(self.decoder.layers)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def prompt(self, question: str) -> str:
        """One user turn with one image, in the model's own chat template."""
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)

    def encode(self, images: list[Image.Image], prompts: list[str]) -> Batch:
        """Encode one image and one question for each sample, padded on the left.

        Raises:
            ModelError: different numbers of images and prompts.
        """
        if len(images) != len(prompts):
            raise ModelError(f"{len(images)} images for {len(prompts)} prompts: expected one image each")
        texts = [self.prompt(p) for p in prompts]
        pictures, boxes = zip(*map(self._centred, images), strict=True)
        inputs = self.processor(images=list(pictures), text=texts, padding=True, return_tensors="pt").to(self.device)
        return Batch(inputs, boxes)

    def _centred(self, image: Image.Image) -> tuple[Image.Image, Box]:
        """Do the centre crop of a processor that has one, so that the part of the image behind each token is known."""
        image = image.convert("RGB")
        if not getattr(self.processor.image_processor, "do_center_crop", False):
            return image, (0.0, 0.0, 1.0, 1.0)
        (width, height), side = image.size, min(image.size)
        left, top = (width - side) // 2, (height - side) // 2
        box = (left / width, top / height, (left + side) / width, (top + side) / height)
        return image.crop((left, top, left + side, top + side)), box

    def visual_tokens(self, batch: Batch) -> list[list[VisualTokens]]:
        """Where the visual tokens of each sample are: [sample][image or tile]."""
        found = self.family.visual_tokens(self.config, batch.inputs)
        found = [[replace(t, box=_inside(t.box, shown)) for t in sample] for sample, shown in zip(found, batch.shown, strict=True)]
        for tokens in (t for sample in found for t in sample):
            if tokens.grid is not None and tokens.grid[0] * tokens.grid[1] != len(tokens.index):
                raise ModelError(f"{self.family.name}: grid {tokens.grid} does not multiply to {len(tokens.index)} visual tokens")
        return found

    @torch.inference_mode()
    def generate(self, batch: Batch, *, max_new_tokens: int = 16) -> list[str]:
        """Greedy answers, without the prompt and special tokens."""
        with self.lock:
            ids = self.model.generate(**batch.inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = ids[:, batch.inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)]

    @torch.inference_mode()
    def option_logprobs(self, batch: Batch, options: list[list[str]]) -> list[Float[Tensor, option]]:  # noqa: F821
        """Length-normalised log-likelihood of each option as the answer: mean log p over the option's tokens.

        Args:
            options: for each sample, the answers to compare; each is appended to the prompt as a text of its own tokens.
        """
        tokenizer = self.processor.tokenizer
        scores = []
        for row in range(len(batch)):
            keep = batch.inputs["attention_mask"][row].bool()
            prompt = batch.inputs["input_ids"][row][keep]
            row_scores = []
            for option in options[row]:
                answer = torch.tensor(tokenizer(option, add_special_tokens=False)["input_ids"], device=self.device)
                ids = torch.cat([prompt, answer])[None]
                images = {"pixel_values": batch.inputs["pixel_values"][row : row + 1]}
                with self.lock:
                    logits = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), **images).logits[0].float()
                logprobs = logits[len(prompt) - 1 : -1].log_softmax(-1)
                row_scores.append(logprobs.gather(1, answer[:, None]).mean())
            scores.append(torch.stack(row_scores).cpu())
        return scores


def _inside(box: Box, outer: Box) -> Box:
    """`box`, given as fractions of `outer`, as fractions of the whole image."""
    width, height = outer[2] - outer[0], outer[3] - outer[1]
    return outer[0] + box[0] * width, outer[1] + box[1] * height, outer[0] + box[2] * width, outer[1] + box[3] * height


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
