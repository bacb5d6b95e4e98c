"""A multimodal language model with its processor: encoding, positions of visual tokens, answers.

What differs between model families is in their `Family`; everything here uses only the interface that transformers
gives to all of them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

import torch
import transformers
from jaxtyping import Int
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, BatchFeature, LogitsProcessor, LogitsProcessorList

from workbench.data.images import upright_rgb
from workbench.devices import check_device
from workbench.errors import DataError, ModelError, one_line
from workbench.hashing import fingerprint, model_settings, processor_fingerprint, saved_tensors, settings_hash
from workbench.mllm.family import TEXT_INPUTS, Batch, BatchImages, Family, VisualTokens, family_of
from workbench.mllm.generation import GREEDY
from workbench.mllm.hub_files import loaded_files
from workbench.mllm.load import check_cap, check_encoders, load_config, load_model, placement
from workbench.mllm.logits import Finite
from workbench.mllm.processors import check_agreement, load_processor
from workbench.mllm.residual import KEY, Residual, load_residual
from workbench.mllm.texts import ModelTexts
from workbench.mllm.validate import validate as validate_mllm
from workbench.plugins import identity
from workbench.weights.pretrained import hub_options
from workbench.weights.remembered import NO_FILES, LoadedFrom, remembered_fingerprint


class MLLM(ModelTexts):
    """A model, its processor and its family; make one with `MLLM.load`.

    Attributes:
        load_in: how the weights were quantized while they were loaded ("8bit" or "4bit"); None if they were not.
    """

    load_in: str | None = None

    def __init__(
        self,
        model: Any,
        processor: Any,
        family: Family,
        name: str,
        residual: Residual | None = None,
        source: LoadedFrom = NO_FILES,
    ) -> None:
        super().__init__(processor, model.config, name)
        self.model, self.family, self.residual = model.eval(), family, residual
        self.lock = threading.RLock()  # forward passes and traces of one model must not overlap
        self.fingerprint = self._fingerprint(source)
        self.processor.tokenizer.padding_side = "left"  # generation continues from the last position

    def refresh(self) -> None:
        """Compute the fingerprint again, since the model or its processor may have been changed in memory."""
        self.fingerprint = self._fingerprint(NO_FILES)

    def _fingerprint(self, source: LoadedFrom) -> str:
        """Return a hash of everything that decides an answer, except the versions of the libraries.

        That is: weights by name, configuration, generation settings, tokenizer, processor, chat template, and the code
        of the family if a plugin provides it.

        Args:
            source: the files that the model was loaded from, if the hash of its weights may be remembered.
        """
        adapters = {} if self.residual is None else self.residual.state_dict()
        residual_tensors = {f"{KEY}.{key}": value for key, value in adapters.items()}
        loaded_as = [type(self.model).__name__, self.model.dtype, model_settings(self.model), transformers.__version__]
        weights = remembered_fingerprint(
            source, loaded_as, lambda: fingerprint(saved_tensors(self.model) | residual_tensors)
        )
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

        If the model was trained with a residual (`visual_residual` in its config.json), it is attached again; plain
        transformers ignores it.

        Args:
            dtype: of the weights, such as "bfloat16"; "auto" keeps that of the checkpoint.
            device: such as "cpu" or "cuda:1"; "auto" picks one.
            revision: branch, tag or commit of a hub id.
            device_map: how to spread the model over the GPUs of this machine, as in `from_pretrained`: "auto",
                "balanced", "balanced_low_0", "sequential", or a mapping from modules to devices. It replaces `device`.
            load_in: "8bit" or "4bit" quantizes the weights while they are loaded (bitsandbytes). A quantized model is
                another model, with another fingerprint.
            validate: False skips the causal check, and accepts a checkpoint with tensors that the model has no place
                for.
            trust_remote_code: run code that comes with the model; without it, a model that needs such code is refused.

        Raises:
            ModelError, WeightsError: there is nothing to load, tensors are missing or have another shape, the processor
                belongs to another model, or the causal check failed.
            ConfigError: the device or the quantization does not exist, or bitsandbytes is not installed.
            UnknownNameError: an architecture that no family covers.
        """
        began, chosen_device = time.time_ns(), check_device(device)
        options: Any = {"revision": revision, "trust_remote_code": trust_remote_code} | hub_options(name)
        config = load_config(name, **options)
        family = family_of(config)
        processor = load_processor(name, family, config, check=validate, **options)
        placed = placement(name, config, chosen_device, device_map, load_in)
        model = load_model(AutoModelForImageTextToText, name, config, strict=validate, dtype=dtype, **placed, **options)
        if not placed:
            model.to(chosen_device)
        residual = load_residual(model, name, revision)
        # code that comes with a model may make other tensors of the same files
        source = NO_FILES if trust_remote_code else LoadedFrom(loaded_files(name, revision), began)
        mllm = cls(model, processor, family, name, residual, source)
        mllm.load_in = load_in
        if validate:
            validate_mllm(mllm)
        return mllm

    def load_alike(self, name: str, *, revision: str | None = None) -> MLLM:
        """Load another model as this one runs: with its data type and quantization, on its device.

        Args:
            name: hub id or folder of the other model.
            revision: of the hub id.

        Raises:
            ConfigError, ModelError, WeightsError, UnknownNameError: as `load`.
        """
        dtype = str(self.model.dtype).removeprefix("torch.")
        return MLLM.load(name, dtype=dtype, device=str(self.device), revision=revision, load_in=self.load_in)

    @classmethod
    def wrap(cls, model: Any, processor: Any, name: str = "") -> MLLM:
        """Wrap a transformers model in memory and its processor, with the same checks as `load`.

        Args:
            name: how messages and records call it; by default where it was loaded from, or its class.

        Raises:
            ModelError, UnknownNameError: see `load`; or the model was trained with a residual, which plain transformers
                leaves out.
        """
        name, family = name or model.config._name_or_path or type(model).__name__, family_of(model.config)
        check_encoders(name, model.config)
        check_cap(name, model.config)
        if getattr(model.config, KEY, None) is not None:
            raise ModelError(
                f"model '{name}' adds its image again ({KEY} in its config.json), which plain transformers leaves out:"
                " expected MLLM.load of its folder"
            )
        check_agreement(name, family, model.config, processor)
        mllm = cls(model, processor, family, name)
        validate_mllm(mllm)
        return mllm

    @property
    def decoder(self) -> Any:
        """Return the stack of decoder blocks, with `.layers` and `.norm`."""
        decoder = self.model.get_decoder()
        return getattr(decoder, "model", decoder)

    @property
    def projector(self) -> torch.nn.Module:
        """Return the module that receives the vision encoder's features."""
        return self.model.model.get_submodule(self.family.projector)

    @property
    def n_layers(self) -> int:
        return len(self.decoder.layers)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def encode(self, images: Sequence[Image.Image | Sequence[Image.Image]], prompts: Sequence[str]) -> Batch:
        """Encode one question for each sample, padded on the tokenizer's side.

        Args:
            images: for each sample one image, several images or none (an empty list).
            prompts: the question of each sample.

        Raises:
            ModelError: different numbers of samples and prompts, a question that contains the image placeholder, or an
                image that the model's processor cannot process.
        """
        if len(images) != len(prompts):
            raise ModelError(
                f"{len(images)} entries of images for {len(prompts)} prompts: expected one entry for each prompt"
            )
        upright_images = upright(images)
        texts = [
            self.prompt(question, len(sample_images))
            for question, sample_images in zip(prompts, upright_images, strict=True)
        ]
        return self.process(upright_images, texts, prompts)

    def process(
        self,
        images: BatchImages,
        texts: Sequence[str],
        prompts: Sequence[str],
        *,
        device: str | torch.device | None = None,
        **options: Any,
    ) -> Batch:
        """Put images and texts through the model's own processor: the only way into the model, also for training.

        Args:
            images: of each sample, upright and in RGB (`upright`).
            texts: in the model's own format, with image placeholders.
            prompts: the question of each sample, stored with the batch.
            device: where to put the batch; by default the model's device.
            options: further options of the processor.

        Raises:
            ModelError: an image that the processor cannot process.
        """
        try:
            with self.lock:
                inputs = self.processor(
                    images=[list(sample_images) for sample_images in images] if any(images) else None,
                    text=list(texts),
                    padding=True,
                    return_tensors="pt",
                    add_special_tokens=self.adds_special(texts),
                    **options,
                )
        except (ValueError, ZeroDivisionError, RuntimeError) as error:
            sizes = [f"{image.width} x {image.height} px" for sample_images in images for image in sample_images]
            what = f"images of {', '.join(sizes[:4])}" if all(images) else "a prompt without an image here"
            raise ModelError(f"{self.name}: its processor cannot take {what} ({one_line(error)})") from error
        inputs = BatchFeature({name: value for name, value in inputs.items() if name != "labels"})
        return Batch(inputs.to(self.device if device is None else device), images, tuple(prompts))

    def visual_tokens(self, batch: Batch) -> list[list[VisualTokens]]:
        """Return the visual tokens of each sample, `[sample][image or tile]`.

        Raises:
            ModelError: the family gives a position that holds no visual token, the same position twice, or a grid of
                another size.
        """
        samples, row = [], 0
        for number, sample in enumerate(self.family.visual_tokens(self.config, self.processor, batch)):
            parts = []
            for part in sample:
                if part.grid is not None and part.grid[0] * part.grid[1] != len(part.index):
                    raise ModelError(
                        f"family '{self.family.name}' gives a grid {part.grid} for {len(part.index)} visual tokens:"
                        " expected rows times columns to be their number"
                    )
                if part.spans is not None and part.grid != (len(part.spans[0]), len(part.spans[1])):
                    sides = f"{len(part.spans[0])} rows and {len(part.spans[1])} columns"
                    raise ModelError(
                        f"family '{self.family.name}' gives a grid {part.grid}, but spans of {sides}: rows and columns"
                        " look exchanged"
                    )
                rows = torch.arange(row, row + len(part.index)) if part.rows is None else part.rows
                row += len(part.index)
                parts.append(replace(part, rows=rows))
            self._check_positions(batch, number, parts)
            samples.append(parts)
        return samples

    def token_grids(self, batch: Batch) -> list[list[VisualTokens]]:
        """Return `visual_tokens`, or refuse the model if some of them have no place in the image.

        Raises:
            DataError: some visual tokens have no rows and columns.
        """
        visual = self.visual_tokens(batch)
        if any(part.grid is None for sample in visual for part in sample):
            raise DataError(
                f"{self.name} ({self.family.name}) gives visual tokens without a grid: expected a model whose visual"
                " tokens all have a place in the image"
            )
        return visual

    def _check_positions(self, batch: Batch, number: int, parts: list[VisualTokens]) -> None:
        """Raise a ModelError unless every position of a sample holds the placeholder and is given once."""
        if not parts:
            return
        ids, index = batch.inputs["input_ids"][number], torch.cat([part.index for part in parts])
        visual = ids == self.config.image_token_id
        inside = (index >= 0) & (index < len(ids))
        if not inside.all() or not visual[index].all():

            def explains(shift: int) -> bool:
                moved = index - shift
                return bool(((moved >= 0) & (moved < len(ids))).all() and visual[moved].all())

            shift = next((shift for shift in (-1, 1, -2, 2) if explains(shift)), None)
            hint = "" if shift is None else f"; all of them are off by {shift:+d}"
            wrong = int(index[~inside][0] if not inside.all() else index[~visual[index]][0])
            content = f"holds token {int(ids[wrong])}" if 0 <= wrong < len(ids) else "is outside the sequence"
            expected = f"expected a visual token ({self.config.image_token_id}){hint}"
            raise ModelError(
                f"family '{self.family.name}' is wrong about positions: {wrong} of sample {number} {content},"
                f" {expected}"
            )
        if len(index.unique()) < len(index):
            raise ModelError(
                f"family '{self.family.name}' is wrong about positions: it gives some visual tokens of sample {number}"
                " twice"
            )

    @property
    def pad_id(self) -> int:
        """Return the token that fills a batch; what it is has no effect."""
        return int(self.processor.tokenizer.pad_token_id or 0)

    def generate(self, batch: Batch, *, max_new_tokens: int = 16, sampler: LogitsProcessor | None = None) -> list[str]:
        """Return answers without the prompt and special tokens, greedy unless a `sampler` changes the logits."""
        return self.generated(batch.inputs, max_new_tokens, sampler)

    @torch.inference_mode()
    def generated(
        self, inputs: Mapping[str, Any], max_new_tokens: int, sampler: LogitsProcessor | None = None
    ) -> list[str]:
        """Return the answers to encoded prompts, as `generate`.

        Args:
            inputs: arguments of transformers' `generate`, of which `input_ids` are the whole prompts.
            max_new_tokens: tokens at which an answer is cut.
            sampler: changes the logits of the next token of each answer.
        """
        answers = self._answers(inputs, max_new_tokens, sampler)
        return [self.processor.decode(answer, skip_special_tokens=True).strip() for answer in answers]

    @torch.inference_mode()
    def generate_ids(self, batch: Batch, *, max_new_tokens: int = 16) -> list[list[int]]:
        """Return the tokens of greedy answers, without the token that ends an answer."""
        return self._answers(batch.inputs, max_new_tokens, None)

    def _answers(
        self, inputs: Mapping[str, Any], max_new_tokens: int, sampler: LogitsProcessor | None
    ) -> list[list[int]]:
        """Return the tokens of each answer, without the one that ends it and the padding that follows it.

        Neither needs to be a special token, which decoding would leave out.
        """
        processors = LogitsProcessorList([Finite(self), *([] if sampler is None else [sampler])])
        options = GREEDY | {"max_new_tokens": max_new_tokens, "logits_processor": processors}
        settings = self.model.generation_config
        end = settings.eos_token_id
        ends = set(end if isinstance(end, list) else [end])
        if settings.stop_strings is not None:  # an answer that ends with one is followed by padding alone
            options["tokenizer"] = self.processor.tokenizer
            ends.add(self.pad_id if settings.pad_token_id is None else settings.pad_token_id)
        with self.lock:
            ids: Int[Tensor, "sample s"] = self.model.generate(**inputs, **options)
        rows = ids[:, inputs["input_ids"].shape[1] :].tolist()
        return [list(takewhile(lambda token: token not in ends, row)) for row in rows]

    def continued(self, batch: Batch, answers: Sequence[Sequence[int]]) -> Batch:
        """Return a batch with the tokens of the beginning of an answer after each prompt, padded on the right.

        Args:
            batch: prompts.
            answers: tokens for each sample; a batch without any is returned as it is.
        """
        if not any(answers):
            return batch
        real = batch.inputs["attention_mask"].bool()
        fill: dict[str, Any] = {
            "input_ids": [torch.tensor(list(answer), dtype=torch.long) for answer in answers],
            "attention_mask": 1,
            "token_type_ids": self.family.answer_type,
        }
        padding = {"input_ids": self.pad_id}
        inputs = dict(batch.inputs)
        for name in TEXT_INPUTS:
            if name in inputs:
                rows = []
                for row, answer in enumerate(answers):
                    values = fill.get(name, 0)
                    tail = values[row] if isinstance(values, list) else torch.full((len(answer),), values)
                    rows.append(torch.cat([inputs[name][row, real[row]], tail.to(inputs[name])]))
                inputs[name] = torch.nn.utils.rnn.pad_sequence(rows, True, padding.get(name, 0))
        return Batch(BatchFeature(inputs), batch.images, batch.prompts)


class WeightlessMLLM(MLLM):
    """An MLLM on the meta device, made from a configuration alone.

    It encodes text and images (on the CPU) and knows its shapes, but has no weights.
    """

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def _fingerprint(self, source: LoadedFrom) -> str:
        return ""


def upright(images: Sequence[Image.Image | Sequence[Image.Image]]) -> BatchImages:
    """Return the images of each sample, upright and in RGB."""
    samples = ([sample] if isinstance(sample, Image.Image) else sample for sample in images)
    return tuple(tuple(upright_rgb(image) for image in sample) for sample in samples)
