"""What a recipe would train, found out without training: sizes, shapes, data and disk, on tensors without storage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice

import pandas as pd
import torch
from transformers import LlavaProcessor, PretrainedConfig, PreTrainedModel

from trainer import distributed
from trainer.build.lora import add_lora
from trainer.build.partition import choose_trained
from trainer.build.second_encoder import llava_class
from trainer.build.toy_llava import build_processor, check_start, freeze, llava_config
from trainer.checks import checked_stages
from trainer.dry_run.meta import attach, check_files, on_meta, outline
from trainer.dry_run.sizes import FLOAT, HALF, Sizes, checkpoint_bytes, gigabytes, sizes_of, weights_line
from trainer.output.folder import check_output
from trainer.recipe import Recipe
from trainer.setups.conversation import check_conversations, load_conversations
from trainer.setups.conversation_data import ConversationSet
from trainer.setups.packed_data import Packer, first_questions, load_questions
from workbench.errors import ConfigError, DataError
from workbench.mllm import MLLM, Batch, VisualTokens
from workbench.mllm.conversation import encode_conversations
from workbench.mllm.family import WHOLE
from workbench.weights.model_files import WeightFiles

PROCESSES = (1, 2, 4, 8, 16, 32)
STRATEGIES: tuple[distributed.Strategy, ...] = ("ddp", "fsdp", "zero2", "zero3")
LOOKED_AT = 192, 64  # conversations: the first so many with an image, and the longest of all, in characters


@dataclass(frozen=True)
class Plan:
    """What `--dry_run` says."""

    recipe: Recipe
    sizes: Sizes
    config: PretrainedConfig
    items: int  # images with their packed questions, or conversations
    image_tokens: tuple[int, int]  # fewest and most of an image
    sequence: int
    val_items: int
    checkpoint: int
    features: int
    unit: str = "images"
    texts: int = 0  # conversations without an image
    tower_values: int = 0
    not_run: tuple[str, ...] = ()
    weights: Mapping[str, WeightFiles | None] = field(default_factory=dict)

    def report(self) -> str:
        """A few lines and a table, for people."""
        optim, own = self.recipe.optim, distributed.count()
        batch = optim.images(own)
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
            for strategy in STRATEGIES
        }
        kept = "all" if self.recipe.keep_checkpoints is None else self.recipe.keep_checkpoints
        fewest, most = self.image_tokens
        texts = f", {self.texts:,} of them without an image" if self.texts else ""
        return "\n".join(
            [
                (
                    f"model          {type(self.config).__name__.removesuffix('Config')}, {text.num_hidden_layers}"
                    f" layers of width {text.hidden_size}"
                ),
                parts.to_string(index=False),
                *(
                    [f"weights        {'; '.join(weights_line(part, files) for part, files in self.weights.items())}"]
                    if self.weights
                    else []
                ),
                f"{self.unit:15}{self.items:,} to train on{texts}, {self.val_items:,} to validate on",
                (
                    f"visual tokens  {fewest if fewest == most else f'{fewest} to {most}'} per image; longest sequence"
                    f" seen {self.sequence}"
                ),
                (
                    f"steps          {optim.steps:,} of {batch} {self.unit} ({optim.at_once(own)} x"
                    f" {optim.accumulated(own)} accumulated x {own} processes): {optim.steps * batch / self.items:.2f}"
                    " passes over the data"
                ),
                f"alignment      {self._alignment()}",
                *(f"not run        {what}" for what in self.not_run),
                (
                    f"checkpoint     {gigabytes(self.checkpoint)}, kept: {kept}; frozen features"
                    f" {gigabytes(self.features)}"
                ),
                "memory per process, roughly, without the VFM: weights, gradients, optimiser states, activations",
                pd.DataFrame(memory).T.to_string(),
            ]
        )

    def memory(self, strategy: distributed.Strategy, count: int) -> int:
        """Bytes per process.

        Float32 weights W, gradients G and the two moments of AdamW of the trained part, which `ddp` keeps in every
        process (its gradients twice: the buckets that are averaged), ZeRO-2 divides but for the weights, FSDP and
        ZeRO-3 divide whole, with what is gathered for one block and its successor beside it; never less than all
        weights and, with FSDP, its part of them: every process loads the model whole, and holds it until all of it is
        divided.
        """
        weights, trained = FLOAT * self.sizes.total, FLOAT * self.sizes.trained
        if strategy == "ddp" or count == 1:
            own = weights + 3 * trained + (trained if count > 1 else 0)
        elif strategy in ("zero1", "zero2"):
            own = weights + (trained if strategy == "zero1" else 0) + 3 * trained // count
        else:
            own = (weights + 3 * trained) // count + FLOAT * (self.sizes.outside + 2 * self.sizes.block)
        return max(
            own + self.activations(count), weights + (weights // count if strategy == "fsdp" and count > 1 else 0)
        )

    def activations(self, count: int) -> int:
        """Bytes of a forward pass of one of so many processes that wait for the backward pass.

        For each block 34 s b h bytes in half precision without the attention table, which is never kept (Korthikanti et
        al. 2022, eq. 2), twice that in float32; two tables of logits in float32. With checkpointing a block's input is
        kept instead, in float32, and one block's rest at a time. Autocast's bfloat16 copies of the weights wait too: of
        those that are trained, and of the frozen ones of the blocks that wait. A frozen encoder keeps nothing. Each
        adapter of LoRA keeps a copy of its input in half precision, which autocast makes of the float32 values that it
        is given, and its few channels.
        """
        text, optim, sizes = self.config.get_text_config(), self.recipe.optim, self.sizes
        half, at_once = optim.precision == "bfloat16", optim.at_once(count)
        kept, tokens, each_value = 0, at_once * self.sequence, 34 * (1 if half else 2)
        of_tower = at_once * self.tower_values if self.recipe.model.train_vision_encoder else 0
        adapted = HALF * tokens * self._adapted() if half else 0
        for values, more, blocks in (
            (tokens * text.hidden_size, adapted, text.num_hidden_layers),
            (of_tower, 0, sizes.tower_blocks),
        ):
            each = values * each_value + more
            kept += values * FLOAT * blocks + each if optim.checkpointing else each * blocks
        if half:
            language, trained = sizes.parts["language"]
            kept += HALF * (sizes.trained + (sizes.block if optim.checkpointing else language - trained))
        return kept + tokens * 2 * FLOAT * text.vocab_size

    def _adapted(self) -> int:
        """Values that the adapters of one block keep of each token: their input and its projection on `rank`
        channels."""
        text, model = self.config.get_text_config(), self.recipe.model
        if model.train != "lora":
            return 0
        return sum(
            (text.intermediate_size if target == "down_proj" else text.hidden_size) + model.lora.rank
            for target in model.lora.targets
        )

    def _possible(self, count: int) -> bool:
        try:
            self.recipe.optim.accumulated(count)
        except ConfigError:
            return False
        return count <= self.items

    def _alignment(self) -> str:
        own = self.recipe.alignment
        layers = f"layer {', '.join(map(str, own.layer))} of {self.config.get_text_config().num_hidden_layers}"
        target = ", ".join(own.vfm) if own.target == "vfm" else own.target
        aligned = (
            [f"{own.objective}, {own.where} of {layers} with {target}, lambda {own.weight}"] if own.aligned else []
        )
        return (
            "; ".join([*aligned, *([f"residual {own.residual} into {layers}"] if own.residual != "none" else [])])
            or "none"
        )


def plan(recipe: Recipe) -> Plan:
    """Check a recipe and measure what it would train.

    Raises:
        WorkbenchError: a name, a shape or a data file is wrong, or the output folder is taken.
    """
    check_output(recipe.output_dir, checked_stages(recipe)[-1])
    found = _packed_questions(recipe) if recipe.model.kind == "toy" else _conversations(recipe)
    if found.items < distributed.count():
        raise ConfigError(
            f"{distributed.count()} processes for {found.items} training {found.unit}: expected at most as many"
            f" processes as {found.unit}"
        )
    return found


def _packed_questions(recipe: Recipe) -> Plan:
    """The plan of a toy LLaVA."""
    splits = load_questions(recipe.data, recipe.seed)
    model, processor = meta_model(recipe, splits.words)
    tokens = model.config.image_seq_length
    attached = attach(recipe, model, *one_square(model, tokens))
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
    """The toy LLaVA of a recipe on meta, frozen where it will be, and its processor."""
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
    """For `attach`: one square image of a LLaVA, and the sequence of its visual tokens and one token of text."""
    side = int(tokens**0.5)
    pixels = side * model.config.vision_config.patch_size
    return (
        {"pixel_values": torch.empty(1, 3, pixels, pixels, device="meta")},
        [VisualTokens(torch.arange(tokens), None, WHOLE)],
        tokens,
        tokens + 1,
    )


def _conversations(recipe: Recipe) -> Plan:
    """The plan of a pretrained or an assembled model."""
    splits = load_conversations(recipe)
    train = splits.train
    mllm, weights = outline(recipe.model), check_files(recipe.model)
    check_conversations(recipe, mllm, splits)
    with torch.device("meta"):
        choose_trained(mllm, recipe.model)
    shown, per_image, longest = None, [], 0
    for batch in _looked_at(mllm, train, recipe.data.max_length):
        longest = max(longest, batch.inputs["input_ids"].shape[1])
        (places,), (images,) = mllm.visual_tokens(batch), batch.images
        per_image += [sum(len(part.index) for part in places if part.image == n) for n in range(len(images))]
        if images and shown is None:
            shown = batch
    if shown is None:
        raise DataError(f"none of the conversations of {train.data.name} has an image: expected some to plan by")
    ids = shown.inputs["input_ids"][0]
    (places,), placeholders = mllm.visual_tokens(shown), int((ids == mllm.config.image_token_id).sum())
    attached = attach(recipe, mllm.model, shown.vision, places, placeholders, len(ids))
    sizes = sizes_of(mllm.model, attached.alignment, attached.residual)
    cached = recipe.data.features == "cache" and recipe.alignment.aligned and recipe.alignment.target == "vfm"
    width = sum(width for name, width in attached.widths.items() if name != "tower")
    return Plan(
        recipe,
        sizes,
        mllm.config,
        len(train),
        (min(per_image), max(per_image)),
        longest,
        len(splits.val),
        checkpoint_bytes(sizes),
        (
            round(FLOAT * width * sum(len(c.loads) for c in train.conversations) * sum(per_image) / len(per_image))
            if cached
            else 0
        ),
        unit="conversations",
        texts=sum(not c.loads for c in train.conversations),
        tower_values=attached.tower_values // len(shown.images[0]),
        not_run=attached.not_run,
        weights=weights,
    )


def _looked_at(mllm: MLLM, train: ConversationSet, max_length: int | None) -> Iterator[Batch]:
    """Some conversations as the model would be given them, one by one: the first ones with an image, and those with
    most characters."""
    first, longest = LOOKED_AT
    with_image = [n for n, own in enumerate(train.conversations) if own.loads]
    by_length = sorted(range(len(train)), key=lambda n: -train.conversations[n].length)
    chosen = [train.conversations[n] for n in dict.fromkeys([*with_image[:first], *by_length[:longest]])]
    for own in chosen:
        yield encode_conversations(mllm, [own.images], [own.turns], max_length=max_length)[0]
