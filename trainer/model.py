"""Building a small LLaVA around a real tower, and wrapping any LLaVA with an alignment head for training."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from trainer.alignment import Alignment, mean_loss
from trainer.config import ModelConfig
from trainer.language import language_config, language_tokenizer, put_language
from trainer.packing import Packing, use_packed_attention
from trainer.second_encoder import llava_class, second_config, tower_alone
from workbench.errors import ConfigError, one_line
from workbench.fingerprints import fingerprint, saved_tensors, tokenizer_settings
from workbench.mllm.conversation import IGNORED
from workbench.mllm.family import VisualTokens
from workbench.mllm.loading import SECOND_ENCODER
from workbench.mllm.residual import KEY, Residual
from workbench.pretrained import call
from workbench.vfm.base import IMAGENET
from workbench.weights import check_unchanged, load_tensors, load_weights, weights_folder

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


def build_processor(config: ModelConfig, words: list[str]) -> LlavaProcessor:
    """A LlavaProcessor that stretches images to a square.

    Args:
        words: a closed vocabulary, which becomes one token each; a pretrained language model has its own tokenizer instead.
    """
    tokenizer, template = language_tokenizer(weights_folder(config.language)) if config.language else (_word_tokenizer(words), CHAT_TEMPLATE)
    size = {"height": config.image_size, "width": config.image_size}
    pixels = CLIPImageProcessor(size=size, do_center_crop=False, image_mean=IMAGENET[0], image_std=IMAGENET[1], crop_size=size)
    patch = tower_config(config).patch_size
    return LlavaProcessor(pixels, tokenizer, patch_size=patch, vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=template)


def _word_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    special = ["<pad>", "<bos>", "<eos>", "<unk>", "<image>"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *words])}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", extra_special_tokens={"image_token": "<image>"}
    )


def tower_config(config: ModelConfig) -> PretrainedConfig:
    """The whole tower's configuration.

    Raises:
        ConfigError: the weights are not a vision transformer's.
    """
    folder, expected = weights_folder(config.tower), f"model.tower is {config.tower}: expected the weights of a vision transformer, such as dinov2-small"
    # timm's weights, among others, are not known to transformers
    found: PretrainedConfig = call(lambda: AutoConfig.from_pretrained(folder), lambda error: ConfigError(f"{expected} ({one_line(error, 100)})"))
    if not hasattr(found, "patch_size"):
        raise ConfigError(expected)
    return found


def llava_config(config: ModelConfig, processor: LlavaProcessor) -> LlavaConfig:
    """The configuration of `build_llava`: the tower's first blocks, and a pretrained language model or a fresh Qwen3 one.

    Raises:
        ConfigError: a block that the tower does not have, or an image size that its patches do not divide.
    """
    vision = tower_config(config)
    if max(config.tower_features) > vision.num_hidden_layers:
        raise ConfigError(f"model.tower_features is {config.tower_features}: expected 0 to {vision.num_hidden_layers}, the blocks of {config.tower}")
    if config.image_size % vision.patch_size:
        raise ConfigError(f"model.image_size is {config.image_size}: expected a multiple of {vision.patch_size}, the patch size of {config.tower}")
    if (side := config.image_size // vision.patch_size) < 3:  # fewer have no place code: sines and cosines of so few points are all alike
        raise ConfigError(f"model.image_size is {config.image_size}, {side} x {side} patches: expected at least {3 * vision.patch_size}")
    blocks = max(1, *config.tower_features)  # later blocks would be computed and thrown away
    whole = {name: value for name, value in vision.to_dict().items() if name not in ("out_features", "out_indices", "stage_names")}  # they name the last block
    vision = type(vision).from_dict(whole | {"num_hidden_layers": blocks})
    tokenizer = processor.tokenizer
    text = language_config(weights_folder(config.language)) if config.language else _fresh_text(config, tokenizer)
    text.vocab_size = max(text.vocab_size, len(tokenizer))
    llava = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=processor.image_token_id,
        image_seq_length=(config.image_size // vision.patch_size) ** 2,
        vision_feature_layer=list(config.tower_features),
        vision_feature_select_strategy="default",
        tie_word_embeddings=text.tie_word_embeddings,
    )
    if config.second_encoder is not None:
        setattr(llava, SECOND_ENCODER, second_config(config.second_encoder))
    return llava


def build_llava(config: ModelConfig, processor: LlavaProcessor) -> tuple[LlavaForConditionalGeneration, dict[str, str]]:
    """A LlavaForConditionalGeneration with a pretrained frozen tower, and a pretrained language model or a fresh Qwen3 one.

    Returns:
        The model, and the fingerprint of each pretrained part: `tower`, `language`.

    Raises:
        ConfigError: a block that the tower does not have, or an image size that its patches do not divide.
        WeightsError: a part no longer holds its pretrained values once the model stands around it.
    """
    settings, tokenizer = llava_config(config, processor), processor.tokenizer
    llava = llava_class(settings)(settings)
    llava.config.architectures = ["LlavaForConditionalGeneration"]
    llava.generation_config.eos_token_id = tokenizer.eos_token_id
    llava.generation_config.pad_token_id = tokenizer.pad_token_id
    tower = AutoModel.from_pretrained(weights_folder(config.tower), config=llava.config.vision_config)
    llava.model.vision_tower.load_state_dict(tower.state_dict())
    parts = {"tower": check_unchanged(config.tower, saved_tensors(llava.model.vision_tower), load_weights(config.tower))}
    if config.language:
        parts["language"] = put_language(llava, weights_folder(config.language))
    freeze(llava, config)
    return llava, parts


def freeze(llava: LlavaForConditionalGeneration, config: ModelConfig) -> None:
    """Take the gradient from what is not trained: always the tower, and the language model where it stays as it is or gets adapters."""
    llava.model.vision_tower.requires_grad_(False)
    if config.train != "all":
        llava.model.language_model.requires_grad_(False)
        llava.lm_head.requires_grad_(False)


def _fresh_text(config: ModelConfig, tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    """The configuration of a language model that is trained from nothing."""
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=config.width,
        intermediate_size=config.ffn,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        head_dim=config.width // config.heads,
        initializer_range=config.init,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def load_start(llava: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> str:
    """Copy the model in `folder` into `llava`, and return its fingerprint.

    Raises:
        ConfigError: as `check_start`, or a tensor is not in its file.
    """
    check_start(llava, processor, folder)
    loaded: Any = llava_class(llava.config).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    stored, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ConfigError(f"start is {folder}, whose model.safetensors lacks '{missing[0]}': expected the folder of a finished training")
    llava.load_state_dict(stored.state_dict())
    return fingerprint(saved_tensors(stored))


def check_start(llava: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """See that the model in `folder` fits `llava`, which may be on meta, by all but the values of its tensors.

    Raises:
        ConfigError: it is not a finished training, or another model or vocabulary than the recipe describes.
    """
    if not (folder / "model.safetensors").exists():
        raise ConfigError(f"start is {folder}: expected the folder of a finished training")
    load_tensors(folder / "model.safetensors")

    def failed(error: Exception) -> ConfigError:
        return ConfigError(f"start is {folder}, whose configuration or tokenizer cannot be read ({one_line(error, 120)})")

    config = call(lambda: AutoConfig.from_pretrained(folder), failed)
    tokenizer = call(lambda: PreTrainedTokenizerFast.from_pretrained(folder), failed)
    if (found := (config.architectures or ["nothing"])[0]) != "LlavaForConditionalGeneration":
        raise ConfigError(f"start is {folder}, which holds {found}: expected a LlavaForConditionalGeneration, as this recipe describes")
    if hasattr(config, KEY):
        raise ConfigError(f"start is {folder}, which adds its image again ({KEY} in its config.json): expected a model trained without a residual")
    stored_second, second = (getattr(own, SECOND_ENCODER, None) or {"vfm": "none"} for own in (config, llava.config))
    if any(stored_second.get(key) != value for key, value in second.items()):
        changed = " of other weights" * (stored_second["vfm"] == second["vfm"])
        raise ConfigError(f"start is {folder}, whose second encoder is {stored_second['vfm']}{changed}: expected {second['vfm']}, as model.second_encoder says")
    if tokenizer.get_vocab() != processor.tokenizer.get_vocab():
        raise ConfigError(f"start is {folder}, whose vocabulary differs from the one of this recipe's data")
    if tokenizer_settings(tokenizer)["core"] != tokenizer_settings(processor.tokenizer)["core"]:
        raise ConfigError(f"start is {folder}, whose tokenizer has the vocabulary of this recipe's, but splits text otherwise: expected the same tokenizer")
    with torch.device("meta"):
        stored = call(lambda: llava_class(config)(config), failed).state_dict()
    own = llava.state_dict()
    wrong = sorted(name for name in stored.keys() | own.keys() if name not in stored or name not in own or stored[name].shape != own[name].shape)
    if wrong:
        raise ConfigError(f"start is {folder}, whose tensor '{wrong[0]}' does not fit the model of this recipe")


@torch.inference_mode()
def connector_inputs(llava: LlavaForConditionalGeneration, processor: LlavaProcessor, images: list[Image.Image]) -> Float[Tensor, "image token d"]:
    """What the frozen tower hands to the connector: read at the connector itself, so that it cannot differ from inference."""
    seen: list[Tensor] = []

    def keep(connector: nn.Module, args: tuple[Tensor]) -> Tensor:
        seen.append(args[0])
        return tower_alone(connector, args[0])

    llava.model.vision_tower.eval()  # a training step sets the whole model to training
    handle = llava.model.multi_modal_projector.register_forward_pre_hook(keep)
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"].to(llava.device)
    try:
        llava.get_image_features(pixel_values=pixels)
    finally:
        handle.remove()
    return seen[0]


def input_deviation(inputs: Float[Tensor, "image token d"]) -> float:
    """Mean standard deviation of a connector input channel."""
    return float(inputs.flatten(0, 1).std(0).mean())


def start_connector(llava: LlavaForConditionalGeneration, inputs: Float[Tensor, "image token d"], side: int) -> None:
    """Give the connector a first layer that fits its inputs.

    Its units see inputs of mean 0 and deviation 1, folded into weight and bias, in random directions; the first few instead start as the least-squares
    estimate of each token's place (sine and cosine of row and column, and their negatives). A tower carries that place faintly, and a language
    model with one-dimensional positions finds the column last or never.
    """
    first = llava.model.multi_modal_projector.linear_1
    tokens = inputs.flatten(0, 1)
    mean, std = tokens.mean(0), tokens.std(0).clamp_min(1e-6)
    standard = ((tokens - mean) / std).double()
    code = _place_code(side).repeat(len(inputs), 1)
    ridge = standard.T @ standard + 0.01 * len(standard) * torch.eye(len(std), dtype=torch.float64)
    place = torch.linalg.solve(ridge, standard.T @ code).T.float()
    with torch.no_grad():
        nn.init.normal_(first.weight, std=len(std) ** -0.5)
        first.weight[: 2 * len(place)] = torch.cat([place, -place])
        first.weight /= std
        first.bias.copy_(-first.weight @ mean)


def _place_code(side: int) -> Float[Tensor, "token channel"]:
    """Sine and cosine of half and whole turns over rows and columns, in raster order; every channel has mean 0 and deviation 1."""
    at = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    waves = torch.stack([f(turns * torch.pi * at) for turns in (1, 2) for f in (torch.sin, torch.cos)], dim=-1)
    rows, columns = waves[:, None].expand(side, side, -1), waves[None].expand(side, side, -1)
    code = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    return (code - code.mean(0)) / code.std(0)


@dataclass
class AlignedOutput:
    """Losses of one forward pass, with the logits."""

    lm_loss: Tensor
    alignment_loss: Tensor | None
    logits: Tensor
    alignment_losses: dict[str, Tensor] = field(default_factory=dict)
    """Of each layer and target; `alignment_loss` is their mean."""


class Aligned(nn.Module):
    """A transformers model as it is, its alignment heads and its residual, called as one module so that DDP, FSDP and ZeRO see all of them.

    Args:
        alignment: attached to the model; None for the baseline, which then has no head at all.
        residual: attached to the model.
    """

    student: PreTrainedModel

    def __init__(self, student: PreTrainedModel, alignment: Alignment | None, residual: Residual | None) -> None:
        super().__init__()
        self.student, self.config, self.alignment, self.residual = student, student.config, alignment, residual
        blocks = {type(part).__name__ for part in student.modules()}
        self._no_split_modules = sorted(blocks & set(student._no_split_modules or ()))  # what FSDP divides one by one


class AlignedForConditionalGeneration(Aligned):
    """A LLaVA that learns from packed questions; its tower stays frozen.

    Args:
        to_projector: the target is what the connector gives, instead of features that come with the batch.
    """

    student: LlavaForConditionalGeneration

    def __init__(
        self, llava: LlavaForConditionalGeneration, alignment: Alignment | None = None, residual: Residual | None = None, *, to_projector: bool = False
    ) -> None:
        super().__init__(llava, alignment, residual)
        self.to_projector = to_projector
        use_packed_attention(llava)

    def forward(
        self,
        input_ids: Int[Tensor, "b s"],
        labels: Int[Tensor, "b s"],
        position_ids: Int[Tensor, "b s"],
        segments: Int[Tensor, "b s"],
        connector_inputs: Float[Tensor, "b token d"],
        targets: dict[str, Float[Tensor, "b token dim"]] | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **_: object,
    ) -> AlignedOutput:
        """Language-model loss over the answers, and the alignment loss of the visual tokens.

        Args:
            labels: the token to predict *at* each position (already shifted), -100 where nothing is learnt.
            segments: 0 for the shared image prefix, q for question q, -1 for padding; questions do not see one another.
            targets: features by name; without them, and without `to_projector`, there is no alignment loss.
            num_items_in_batch: answer tokens of the whole accumulated batch, by which the loss is normalised.
        """
        packing = Packing.of(segments)
        ids, answers = packing.flat(input_ids), packing.flat(labels)
        projected = self.student.model.multi_modal_projector(connector_inputs)
        image = BaseModelOutputWithPooling(pooler_output=list(projected))  # type: ignore[arg-type]
        logits = self.student(
            input_ids=ids,
            attention_mask=ids.new_ones(1, 1, 1, 1, dtype=torch.bool),  # no mask is made; what a token sees is in `packing`
            position_ids=packing.flat(position_ids),
            mm_encoder_outputs={"image": image},
            use_cache=False,
            packing=packing,
        ).logits
        wanted = answers != IGNORED
        losses = nn.functional.cross_entropy(logits[wanted].float(), answers[wanted], reduction="sum")
        lm_loss = losses / (wanted.sum() if num_items_in_batch is None else num_items_in_batch)
        if self.to_projector:
            targets = {"projector": projected.detach()}
        if self.alignment is None or targets is None:
            return AlignedOutput(lm_loss, None, packing.padded(logits))
        tokens = (ids[0] == self.config.image_token_id).nonzero().flatten()
        visual = [VisualTokens(index, None, (0.0, 0.0, 1.0, 1.0)) for index in tokens.view(len(projected), -1)]
        parts = self.alignment.losses(targets, [visual])
        return AlignedOutput(lm_loss, mean_loss(parts), packing.padded(logits), parts)
