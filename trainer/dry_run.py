"""What a recipe would train, found out without training: sizes, shapes, data and disk, on tensors without storage (the meta device).

A `Plan` is made of small functions of the recipe and of a model on meta, whatever its architecture; `meta_model` is the place where a recipe becomes one.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PretrainedConfig, PreTrainedModel

from trainer import processes
from trainer.alignment import Alignment, attach_alignment
from trainer.config import Recipe
from trainer.data import Packer, first_questions
from trainer.lora import add_lora, check_peft
from trainer.model import build_processor, freeze, llava_config
from trainer.output import check_output
from workbench.data import Dataset, load_data
from workbench.errors import ConfigError, RunError
from workbench.files import cache_folder
from workbench.mllm.residual import Residual, attach_residual
from workbench.vfm import find_vfm

FLOAT = 4  # bytes: weights, gradients and both moments of AdamW are float32
PROCESSES = (1, 2, 4, 8, 16, 32)
STRATEGIES: tuple[processes.Strategy, ...] = ("ddp", "fsdp", "zero2", "zero3")


@dataclass(frozen=True)
class Sizes:
    """Parameters of a model on meta.

    Attributes:
        parts: parameters and trained parameters of each part: tower, connector, language, head, residual, lora.
        block: parameters of its largest decoder or tower block, which sharded training gathers one at a time.
        outside: parameters outside the blocks, which are gathered together.
    """

    parts: dict[str, tuple[int, int]]
    block: int
    outside: int

    @property
    def total(self) -> int:
        return sum(count for count, _ in self.parts.values())

    @property
    def trained(self) -> int:
        return sum(count for _, count in self.parts.values())


@dataclass(frozen=True)
class Plan:
    """What `--dry_run` says."""

    recipe: Recipe
    sizes: Sizes
    config: PretrainedConfig
    images: int
    image_tokens: int
    sequence: int
    val_images: int
    checkpoint: int
    features: int

    def report(self) -> str:
        """A few lines and a table, for people."""
        optim, own = self.recipe.optim, processes.count()
        batch = optim.images(own)
        text = self.config.get_text_config()
        rows = [(name, f"{count:,}", f"{trained:,}") for name, (count, trained) in self.sizes.parts.items() if count]
        parts = pd.DataFrame([*rows, ("all", f"{self.sizes.total:,}", f"{self.sizes.trained:,}")], columns=["part", "parameters", "trained"])
        memory = {
            strategy: {f"{count} proc.": _gigabytes(self.memory(strategy, count)) for count in PROCESSES if self._possible(count)} for strategy in STRATEGIES
        }
        kept = "all" if self.recipe.keep_checkpoints is None else self.recipe.keep_checkpoints
        return "\n".join(
            [
                f"model          {type(self.config).__name__.removesuffix('Config')}, {text.num_hidden_layers} layers of width {text.hidden_size}",
                parts.to_string(index=False),
                f"images         {self.images:,} to train on, {self.val_images:,} to validate on",
                f"visual tokens  {self.image_tokens} per image; longest sequence seen {self.sequence}",
                f"steps          {optim.steps:,} of {batch} images ({optim.batch_size} x {optim.accumulated(own)} accumulated x {own} processes):"
                f" {optim.steps * batch / self.images:.2f} passes over the data",
                f"alignment      {self._alignment()}",
                f"checkpoint     {_gigabytes(self.checkpoint)}, kept: {kept}; frozen features {_gigabytes(self.features)}",
                "memory per process, roughly: weights, gradients, optimiser states, activations",
                pd.DataFrame(memory).T.to_string(),
            ]
        )

    def memory(self, strategy: processes.Strategy, count: int) -> int:
        """Bytes per process.

        Float32 weights W, gradients G and the two moments of AdamW of the trained part, which `ddp` keeps in every process (its gradients twice: the buckets
        that are averaged), ZeRO-2 divides but for the weights, FSDP and ZeRO-3 divide whole, with what is gathered for one block and its successor beside it.
        """
        weights, trained = FLOAT * self.sizes.total, FLOAT * self.sizes.trained
        if strategy == "ddp" or count == 1:
            own = weights + 3 * trained + (trained if count > 1 else 0)
        elif strategy in ("zero1", "zero2"):
            own = weights + (trained if strategy == "zero1" else 0) + 3 * trained // count
        else:
            own = (weights + 3 * trained) // count + FLOAT * (self.sizes.outside + 2 * self.sizes.block)
        return own + self.activations()

    def activations(self) -> int:
        """Bytes of a forward pass of one process that wait for the backward pass.

        For each block 34 s b h bytes in half precision without the attention table, which is never kept (Korthikanti et al. 2022, eq. 2), twice that in
        float32; two tables of logits in float32. The frozen networks keep nothing.
        """
        text = self.config.get_text_config()
        tokens = self.recipe.optim.batch_size * self.sequence
        return tokens * (2 * 34 * text.hidden_size * text.num_hidden_layers + 2 * FLOAT * text.vocab_size)

    def _possible(self, count: int) -> bool:
        try:
            self.recipe.optim.accumulated(count)
        except ConfigError:
            return False
        return count <= self.images

    def _alignment(self) -> str:
        own = self.recipe.alignment
        if not own.aligned:
            return "none"
        of = self.config.get_text_config().num_hidden_layers
        target = ", ".join(own.vfm) if own.target == "vfm" else own.target
        return f"{own.objective}, {own.where} of layer {', '.join(map(str, own.layer))} of {of} with {target}, lambda {own.weight}"


def plan(recipe: Recipe) -> Plan:
    """Check a recipe and measure what it would train.

    Raises:
        WorkbenchError: a name, a shape or a data file is wrong, the output folder is taken, or the disk is too small.
    """
    recipe.optim.accumulated(processes.count())
    if recipe.model.released:
        raise ConfigError("dry_run is yes: expected no for a released model, which is checked once it is loaded; try --optim.steps 1 --data.limit_train 64")
    if recipe.model.train == "lora":
        check_peft()
    if recipe.start is None or recipe.start.suffix != ".yaml":  # a first stage is trained on the way
        check_output(recipe.output_dir, recipe)
    train, val = load_data(recipe.data.train[0], limit=recipe.data.limit_train), load_data(recipe.data.val, limit=recipe.data.limit_val)
    if len(train.scenes) < processes.count():
        raise ConfigError(f"{processes.count()} processes for {len(train.scenes)} training images: expected at most as many processes as images")
    model, processor = meta_model(recipe, train, val)
    tokens = model.config.image_seq_length
    alignment, residual, widths = attach(recipe, model, tokens)
    sizes = sizes_of(model, alignment, residual)
    packer = Packer(processor, tokens)
    sequence = max(len(packer(scene).input_ids) for scene in islice(first_questions(train, recipe.data.questions).scenes, 256))
    images = len(train.scenes)
    features = FLOAT * tokens * ((images + len(val.scenes)) * widths["tower"] + images * sum(widths[name] for name in widths if name != "tower"))
    found = Plan(recipe, sizes, model.config, images, tokens, sequence, len(val.scenes), checkpoint_bytes(sizes), features)
    check_disk(recipe, found)
    return found


def meta_model(recipe: Recipe, train: Dataset, val: Dataset) -> tuple[PreTrainedModel, LlavaProcessor]:
    """The model of a recipe on meta, frozen where it will be, and its processor."""
    processor = build_processor(recipe.model, sorted(train.vocabulary | val.vocabulary))
    model = on_meta(LlavaForConditionalGeneration, llava_config(recipe.model, processor))
    freeze(model, recipe.model)
    if recipe.model.train == "lora":
        with torch.device("meta"):
            add_lora(model, recipe.model.lora)
        model.model.multi_modal_projector.requires_grad_(True)
    return model, processor


def on_meta(cls: Any, config: PretrainedConfig) -> Any:
    """A transformers model without storage: `cls` is its class, or an auto class that finds it."""
    with torch.device("meta"):
        model = cls.from_config(config) if hasattr(cls, "from_config") else cls(config)
    model.config.architectures = [type(model).__name__]  # by which its family is known
    return model


@torch.no_grad()
def attach(recipe: Recipe, model: Any, tokens: int) -> tuple[Alignment | None, Residual | None, dict[str, int]]:
    """Put heads and residual on a LLaVA on meta, and run tower, connector, language model and heads once, so that every shape is seen to fit.

    Returns:
        The heads, the residual, and the width of what is cached: `tower` for the connector's input, and each VFM.

    Raises:
        ConfigError: an aligned layer that the model does not have, or a tower that gives another number of tokens than the model's configuration says.
    """
    settings, text = recipe.alignment, model.config.get_text_config()
    recipe.check_layer(text.num_hidden_layers)
    seen: list[Any] = []
    handle = model.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    side = int(tokens**0.5) * model.config.vision_config.patch_size
    try:
        features = model.get_image_features(pixel_values=torch.empty(1, 3, side, side, device="meta")).pooler_output
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"an image of {tokens} visual tokens does not fit through tower and connector ({' '.join(str(error).split())[:120]})") from error
    finally:
        handle.remove()
    if features[0].shape != (tokens, text.hidden_size):
        raise ConfigError(f"the tower gives visual tokens {tuple(features[0].shape)}: expected {(tokens, text.hidden_size)}")
    widths = {"tower": seen[0].shape[-1]}
    dims = {"encoder": widths["tower"], "projector": text.hidden_size}
    if settings.target == "vfm" and settings.aligned:
        widths |= {name: find_vfm(name, teacher_norm=settings.teacher_norm).dim for name in settings.vfm}
        dims |= widths
    names = settings.vfm if settings.target == "vfm" else (settings.target,)
    with torch.device("meta"):
        residual = None if settings.residual == "none" else attach_residual(model, settings.residual, sorted(settings.layer), widths["tower"])
        alignment = None
        if settings.objective != "none":
            alignment = attach_alignment(
                model,
                layers=settings.layer,
                dims={name: dims[name] for name in names},
                objective=settings.objective,
                heads=settings.heads,
                where=settings.where,
                hidden=settings.hidden,
            )
    if alignment is not None and residual is None:  # a residual needs the whole model, whose image positions meta cannot know
        decoder = model.get_decoder()
        seen_by_all = torch.ones(1, 1, tokens + 1, tokens + 1, dtype=torch.bool, device="meta")  # a mask of its own would be looked at
        decoder(inputs_embeds=torch.empty(1, tokens + 1, text.hidden_size, device="meta"), attention_mask=seen_by_all, use_cache=False)
        visual = torch.ones(1, tokens + 1, dtype=torch.bool)
        visual[0, -1] = False
        alignment.loss({name: torch.empty(1, tokens, dims[name], device="meta") for name in names}, visual)
    return alignment, residual, widths


def sizes_of(model: Any, alignment: nn.Module | None = None, residual: nn.Module | None = None) -> Sizes:
    """Count the parameters of a transformers model and of what is attached to it; tied ones count once."""
    tower = {id(p) for p in model.get_encoder(modality="image").parameters()}
    language = {id(p) for module in (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()) for p in module.parameters()}
    parts = dict.fromkeys(("tower", "connector", "language", "lora"), (0, 0))
    for name, p in model.named_parameters():
        part = "tower" if id(p) in tower else "lora" if ".lora_" in name else "language" if id(p) in language else "connector"
        parts[part] = (parts[part][0] + p.numel(), parts[part][1] + p.numel() * p.requires_grad)
    for part, module in (("head", alignment), ("residual", residual)):
        count = sum(p.numel() for p in module.parameters()) if module is not None else 0
        parts[part] = (count, count)
    kinds = set(model._no_split_modules or ())
    blocks = [sum(p.numel() for p in module.parameters()) for module in model.modules() if type(module).__name__ in kinds]
    total = sum(count for count, _ in parts.values())
    return Sizes(parts, max(blocks, default=0), total - sum(blocks))


def checkpoint_bytes(sizes: Sizes) -> int:
    """Weights and heads, and both moments of what is trained; sharded training writes its weights twice."""
    weights = FLOAT * sizes.total * (2 if processes.strategy() != "ddp" else 1)
    return weights + 2 * FLOAT * sizes.trained


def check_disk(recipe: Recipe, found: Plan) -> None:
    """See that checkpoints, the result and the frozen features fit on their disks.

    Raises:
        RunError: says how much is needed and how much is free.
    """
    saves = recipe.optim.steps // recipe.save_every
    kept = min(saves, saves if recipe.keep_checkpoints is None else recipe.keep_checkpoints + 1)  # the next one is whole before the oldest goes
    need = {"checkpoints and result": (_standing(recipe.output_dir), kept * found.checkpoint + FLOAT * found.sizes.total)}
    if recipe.data.features == "cache":
        need["frozen features"] = (cache_folder("features"), found.features)
    for what, (folder, size) in need.items():
        free = shutil.disk_usage(folder).free
        if size > free:
            raise RunError(f"{what} need about {_gigabytes(size)} in {folder}, where {_gigabytes(free)} are free")


def _standing(folder: Path) -> Path:
    """The nearest folder that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
