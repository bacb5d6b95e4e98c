"""The plan of a training, made without training: sizes, shapes, data and memory, from tensors without storage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice

import pandas as pd
import torch
from transformers import LlavaProcessor, PretrainedConfig, PreTrainedModel

from trainer import distributed
from trainer.build.frozen_precision import halve_frozen
from trainer.build.lora import add_lora
from trainer.build.partition import choose_trained
from trainer.build.second_encoder import llava_class
from trainer.build.toy_llava import build_processor, check_start, freeze, llava_config
from trainer.checks import checked_stages
from trainer.dry_run.meta import attach_on_meta, check_files, on_meta, outline
from trainer.dry_run.sizes import FLOAT, HALF, Sizes, checkpoint_bytes, gigabytes, sizes_of, weights_line
from trainer.output.folder import check_output
from trainer.recipe import Recipe
from trainer.setups.conversation_checks import check_conversations
from trainer.setups.conversation_data import ConversationSet
from trainer.setups.conversation_splits import load_conversations
from trainer.setups.packed_data import Packer, first_questions, load_questions
from workbench.errors import ConfigError, DataError
from workbench.mllm import MLLM, Batch, VisualTokens
from workbench.mllm.conversation import encode_conversations
from workbench.mllm.family import WHOLE
from workbench.weights.model_files import WeightFiles

PROCESSES = (1, 2, 4, 8, 16, 32)
STRATEGIES: tuple[distributed.Strategy, ...] = ("ddp", "fsdp", "zero2", "zero3")
# conversations that are encoded: the first ones with an image, and the longest of all in characters
FIRST, LONGEST = 192, 64


@dataclass(frozen=True)
class Plan:
    """What `--dry_run` reports.

    Attributes:
        recipe: of the training.
        sizes: parameters of the model.
        config: of the transformers model.
        items: training items: images with their packed questions, or conversations.
        image_tokens: fewest and most visual tokens of an image, among the conversations that were encoded.
        sequence: tokens of the longest sequence that was encoded.
        val_items: validation items.
        checkpoint: bytes of a checkpoint.
        features: bytes of the features that are stored on disk.
        unit: what the items are called.
        texts: training conversations without an image.
        projector_values: number of values that the projector receives for an image.
        not_run: parts of the model that could not run on the meta device, with the reason.
        weights: weight files of each part of the model; None where they are still on the hub.
    """

    recipe: Recipe
    sizes: Sizes
    config: PretrainedConfig
    items: int
    image_tokens: tuple[int, int]
    sequence: int
    val_items: int
    checkpoint: int
    features: int
    unit: str = "images"
    texts: int = 0
    projector_values: int = 0
    not_run: tuple[str, ...] = ()
    weights: Mapping[str, WeightFiles | None] = field(default_factory=dict)

    def report(self) -> str:
        """Return the plan as text: sizes, data, steps, disk, and a table of the memory by launch file and processes."""
        optim, processes = self.recipe.optim, distributed.count()
        batch = optim.images(processes)
        text = self.config.get_text_config()
        rows = [(name, f"{count:,}", f"{trained:,}") for name, (count, trained) in self.sizes.parts.items() if count]
        parts = pd.DataFrame(
            [*rows, ("all", f"{self.sizes.total:,}", f"{self.sizes.trained:,}")],
            columns=["part", "parameters", "trained"],
        )
        memory = {
            strategy: {
                f"{count} proc.": gigabytes(self.memory(strategy, count))
                for count in PROCESSES
                if self._possible(count)
            }
            for strategy in (STRATEGIES if optim.frozen_precision == "float32" else STRATEGIES[:1])
        }
        checkpoints = "all" if self.recipe.keep_checkpoints is None else self.recipe.keep_checkpoints
        fewest, most = self.image_tokens
        visual_tokens = fewest if fewest == most else f"{fewest} to {most}"
        texts = f", {self.texts:,} of them without an image" if self.texts else ""
        weights = "; ".join(weights_line(part, files) for part, files in self.weights.items())
        lines = [
            (
                f"model          {type(self.config).__name__.removesuffix('Config')}, {text.num_hidden_layers}"
                f" layers of width {text.hidden_size}"
            ),
            parts.to_string(index=False),
            *([f"weights        {weights}"] if self.weights else []),
            f"{self.unit:15}{self.items:,} to train on{texts}, {self.val_items:,} to validate on",
            f"visual tokens  {visual_tokens} per image; longest sequence seen {self.sequence}",
            (
                f"steps          {optim.steps:,} of {batch} {self.unit} ({optim.at_once(processes)} x"
                f" {optim.accumulated(processes)} accumulated x {processes} processes):"
                f" {optim.steps * batch / self.items:.2f} epochs"
            ),
            f"alignment      {self._alignment()}",
            *(f"not run        {part}" for part in self.not_run),
            (
                f"checkpoint     {gigabytes(self.checkpoint)}, kept: {checkpoints}; frozen features"
                f" {gigabytes(self.features)}"
            ),
            *self._frozen_line(),
            "memory per process, roughly, without the VFM: weights, gradients, optimizer states, activations",
            pd.DataFrame(memory).T.to_string(),
        ]
        return "\n".join(lines)

    def memory(self, strategy: distributed.Strategy, count: int) -> int:
        """Estimate the bytes that each of `count` processes needs.

        The estimate counts the weights (float32, but frozen matrices as `optim.frozen_precision` stores them) and, of
        the trained parameters, gradients and AdamW's two moments:

        - `ddp` keeps all of them in every process, and the gradients twice (in the buckets that are averaged);
        - ZeRO-1 shards the moments, ZeRO-2 also the gradients;
        - FSDP and ZeRO-3 shard everything, but gather the weights outside the blocks and those of two blocks at a time.

        It is never less than all weights, since every process first loads the whole model; with FSDP the process's
        shard comes on top, because the whole model stays until all of it is sharded.
        """
        weights, trained = self.sizes.weights, FLOAT * self.sizes.trained
        if strategy == "ddp" or count == 1:
            states = weights + 3 * trained + (trained if count > 1 else 0)
        elif strategy in ("zero1", "zero2"):
            states = weights + (trained if strategy == "zero1" else 0) + 3 * trained // count
        else:
            states = (weights + 3 * trained) // count + FLOAT * (self.sizes.outside + 2 * self.sizes.block)
        loading = weights + (weights // count if strategy == "fsdp" and count > 1 else 0)
        return max(states + self.activations(count), loading)

    def activations(self, count: int) -> int:
        """Estimate the bytes that the forward pass of one of `count` processes stores for the backward pass.

        - Each block: 34 s b h bytes in half precision, without the attention scores, which are never stored
          (Korthikanti et al. 2022, eq. 2); twice as many in float32. With checkpointing: the float32 input of each
          block, and the other activations of one block at a time.
        - The logits: two float32 tables.
        - Autocast's bfloat16 copies of the trained weights, and of the frozen weights of blocks whose activations are
          stored, unless these are in bfloat16 already.
        - Each LoRA adapter, with autocast: a half-precision copy of its input, and its `rank` channels.

        A frozen vision encoder stores nothing.
        """
        text, optim, sizes = self.config.get_text_config(), self.recipe.optim, self.sizes
        half, at_once = optim.precision == "bfloat16", optim.at_once(count)
        stored, tokens, bytes_per_value = 0, at_once * self.sequence, 34 * (1 if half else 2)
        encoder_values = at_once * self.projector_values if self.recipe.model.train_vision_encoder else 0
        adapters = HALF * tokens * self._adapter_values() if half else 0
        for values, more, blocks in (
            (tokens * text.hidden_size, adapters, text.num_hidden_layers),
            (encoder_values, 0, sizes.encoder_blocks),
        ):
            block = values * bytes_per_value + more
            stored += values * FLOAT * blocks + block if optim.checkpointing else block * blocks
        if half:
            language, trained = sizes.parts["language"]
            copied = sizes.block if optim.checkpointing else language - trained
            stored += HALF * (sizes.trained + (copied if optim.frozen_precision == "float32" else 0))
        return stored + tokens * 2 * FLOAT * text.vocab_size

    def _frozen_line(self) -> list[str]:
        if not self.sizes.halved:
            return []
        halved, memory = f"{self.sizes.halved:,}", gigabytes(self.sizes.weights)
        return [f"in memory      {halved} frozen parameters in bfloat16; all weights {memory}"]

    def _adapter_values(self) -> int:
        """Return the values for each token that the LoRA adapters of one block store: inputs and `rank` channels."""
        text, model = self.config.get_text_config(), self.recipe.model
        if model.train != "lora":
            return 0
        return sum(
            (text.intermediate_size if target == "down_proj" else text.hidden_size) + model.lora.rank
            for target in model.lora.targets
        )

    def _possible(self, count: int) -> bool:
        """Return whether `count` processes can share the global batch and the training items."""
        try:
            self.recipe.optim.accumulated(count)
        except ConfigError:
            return False
        return count <= self.items

    def _alignment(self) -> str:
        alignment = self.recipe.alignment
        layers = f"layer {', '.join(map(str, alignment.layer))} of {self.config.get_text_config().num_hidden_layers}"
        target = ", ".join(alignment.vfm) if alignment.target == "vfm" else alignment.target
        parts = []
        if alignment.aligned:
            norm = " after the final norm" if alignment.final_norm else ""
            count = f"the {alignment.selection.heads} least aligned " if alignment.chooses_heads else ""
            states = f"{count}{alignment.where} of {layers}{norm}"
            hidden = f", {alignment.mask:.0%} of the tokens hidden" if alignment.mask else ""
            parts.append(f"{alignment.objective}, {states} with {target}, lambda {alignment.weight}{hidden}")
        if alignment.residual != "none":
            parts.append(f"residual {alignment.residual} into {layers}")
        return "; ".join(parts) or "none"


def plan(recipe: Recipe) -> Plan:
    """Check a recipe and measure what it would train.

    Raises:
        WorkbenchError: a name, a shape or a data file is wrong, or the output folder is not empty.
    """
    check_output(recipe.output_dir, checked_stages(recipe)[-1])
    measured = _packed_questions(recipe) if recipe.model.kind == "toy" else _conversations(recipe)
    if measured.items < distributed.count():
        raise ConfigError(
            f"{distributed.count()} processes for {measured.items} training {measured.unit}: expected at most as many"
            f" processes as {measured.unit}"
        )
    return measured


def _packed_questions(recipe: Recipe) -> Plan:
    """Return the plan of a toy LLaVA, which is trained on packed questions."""
    splits = load_questions(recipe.data, recipe.seed)
    model, processor = meta_model(recipe, splits.words)
    tokens = model.config.image_seq_length
    attached = attach_on_meta(recipe, model, *one_square(model, tokens))
    sizes = sizes_of(model, attached.alignment, attached.residual)
    packer = Packer(processor, tokens)
    sequence = max(
        len(packer(scene).input_ids)
        for scene in islice(first_questions(splits.train, recipe.data.questions).scenes, 256)
    )
    items, images = len(splits.train.scenes), sum(len(data.scenes) for data in splits.all)
    features = FLOAT * tokens * images * sum(attached.widths.values()) if recipe.data.features == "cache" else 0
    evaluated = len(splits.val.scenes)
    return Plan(
        recipe,
        sizes,
        model.config,
        items,
        (tokens, tokens),
        sequence,
        evaluated,
        checkpoint_bytes(sizes),
        features,
        not_run=attached.not_run,
    )


def meta_model(recipe: Recipe, words: list[str]) -> tuple[PreTrainedModel, LlavaProcessor]:
    """Build the toy LLaVA of a recipe on the meta device, with its frozen parts frozen, and its processor."""
    processor = build_processor(recipe.model, words)
    settings = llava_config(recipe.model, processor)
    model = on_meta(llava_class(settings), settings)
    if recipe.start is not None:
        check_start(model, processor, recipe.start)
    freeze(model, recipe.model)
    if recipe.model.train == "lora":
        with torch.device("meta"):
            add_lora(model, recipe.model.lora)
        model.model.multi_modal_projector.requires_grad_(True)
    return model, processor


def one_square(model: PreTrainedModel, tokens: int) -> tuple[dict[str, torch.Tensor], list[VisualTokens], int, int]:
    """Return the last four arguments of `attach_on_meta`: a square image, followed by one token of text."""
    side = int(tokens**0.5)
    pixels = side * model.config.vision_config.patch_size
    return (
        {"pixel_values": torch.empty(1, 3, pixels, pixels, device="meta")},
        [VisualTokens(torch.arange(tokens), None, WHOLE)],
        tokens,
        tokens + 1,
    )


def _conversations(recipe: Recipe) -> Plan:
    """Return the plan of a pretrained or an assembled model, which is trained on conversations."""
    splits = load_conversations(recipe)
    train = splits.train
    mllm, weights = outline(recipe.model), check_files(recipe.model)
    check_conversations(recipe, mllm, splits)
    with torch.device("meta"):
        choose_trained(mllm, recipe.model)
    if recipe.optim.frozen_precision == "bfloat16":
        halve_frozen(mllm.model)
    sample, tokens_per_image, longest = None, [], 0
    for batch in _encoded_samples(mllm, train, recipe.data.max_length):
        longest = max(longest, batch.inputs["input_ids"].shape[1])
        (visual,), (images,) = mllm.visual_tokens(batch), batch.images
        tokens_per_image += [sum(len(part.index) for part in visual if part.image == n) for n in range(len(images))]
        if images and sample is None:
            sample = batch
    if sample is None:
        raise DataError(
            f"none of the conversations of {train.data.name} has an image: expected some to plan by; train without"
            " --dry_run if that is meant"
        )
    ids = sample.inputs["input_ids"][0]
    (visual,), placeholders = mllm.visual_tokens(sample), int((ids == mllm.config.image_token_id).sum())
    attached = attach_on_meta(recipe, mllm.model, sample.vision, visual, placeholders, len(ids))
    sizes = sizes_of(mllm.model, attached.alignment, attached.residual)
    features = 0
    if recipe.data.features == "cache" and recipe.alignment.aligned and recipe.alignment.target == "vfm":
        width = sum(width for name, width in attached.widths.items() if name != "tower")
        stored = {image for c in train.conversations for image in c.image_ids}  # each once, however often it is shown
        features = round(FLOAT * width * len(stored) * sum(tokens_per_image) / len(tokens_per_image))
    return Plan(
        recipe,
        sizes,
        mllm.config,
        len(train),
        (min(tokens_per_image), max(tokens_per_image)),
        longest,
        len(splits.val),
        checkpoint_bytes(sizes),
        features,
        unit="conversations",
        texts=sum(not c.loads for c in train.conversations),
        projector_values=attached.projector_values // len(sample.images[0]),
        not_run=attached.not_run,
        weights=weights,
    )


def _encoded_samples(mllm: MLLM, train: ConversationSet, max_length: int | None) -> Iterator[Batch]:
    """Encode some conversations one by one: the first ones with an image, and those with the most characters."""
    with_image = [n for n, conversation in enumerate(train.conversations) if conversation.loads]
    by_length = sorted(range(len(train)), key=lambda n: -train.conversations[n].length)
    chosen = [train.conversations[n] for n in dict.fromkeys([*with_image[:FIRST], *by_length[:LONGEST]])]
    for conversation in chosen:
        yield encode_conversations(mllm, [conversation.images], [conversation.turns], max_length=max_length)[0]
