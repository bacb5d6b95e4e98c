"""Build the transformers folder: configuration, expected shapes, vocabulary, model and processor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from workbench.convert.source import HEAD, LANGUAGE_MODELS, VISION_ENCODER
from workbench.errors import ModelError, one_line
from workbench.weights.tensor_files import Tensors

if TYPE_CHECKING:
    from torch import Size
    from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerBase

NAMES = (  # prefixes of transformers' names and of the original ones; the first match counts
    ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ("model.vision_tower.", VISION_ENCODER),
    ("model.language_model.", "model."),
)
SYSTEM = (
    "A chat between a curious {user} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {user}'s questions."
)
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}SYSTEM {% endif %}{% for message in messages %}{% if message['role'] !="
    " 'system' %}{{ message['role'].upper() }}: {% endif %}{% if message['content'] is string %}{{ message['content']"
    " }}{% else %}{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}{% for"
    " part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}{{ eos_token if"
    " message['role'] == 'assistant' else ' ' }}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def llava_config(config: dict[str, Any], vision: Any) -> Any:
    """Return a LlavaConfig with the settings of the original config.json.

    The vocabulary still has its original size.

    Args:
        config: the content of the original config.json.
        vision: the CLIPVisionConfig of the vision encoder.

    Raises:
        ModelError: values that do not describe a language model, or a vision encoder without the layer that is read.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import LlamaConfig, LlavaConfig, Qwen2Config

    cls: Any = {"llama": LlamaConfig, "qwen2": Qwen2Config}[LANGUAGE_MODELS[config["model_type"]]]
    known = {*cls.__annotations__, "rope_theta", "rope_scaling"}
    try:
        text = cls(**{key: value for key, value in config.items() if key in known})
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ModelError(
            f"config.json does not describe a {cls.model_type} language model ({one_line(error, 200)})"
        ) from error
    layer = config.get("mm_vision_select_layer", -2)
    if not isinstance(layer, int) or not -vision.num_hidden_layers - 1 <= layer <= vision.num_hidden_layers:
        raise ModelError(
            f"config.json has mm_vision_select_layer={layer!r}: the vision encoder has {vision.num_hidden_layers}"
            " layers"
        )
    full = config.get("mm_vision_select_feature") == "cls_patch"
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=text.vocab_size,
        image_seq_length=(vision.image_size // vision.patch_size) ** 2 + full,
        vision_feature_layer=layer,
        vision_feature_select_strategy="full" if full else "default",
        tie_word_embeddings=text.tie_word_embeddings,
        architectures=["LlavaForConditionalGeneration"],
    )


def _model_without_weights(config: Any) -> LlavaForConditionalGeneration:
    """Return the model on the meta device."""
    import torch
    from transformers import LlavaForConditionalGeneration

    with torch.device("meta"):
        return LlavaForConditionalGeneration(config).eval()


def _original_name(name: str) -> str:
    """Return the original code's name of a tensor from transformers' name."""
    return next((old + name.removeprefix(new) for new, old in NAMES if name.startswith(new)), name)


def expected_tensors(config: Any) -> dict[str, Size]:
    """Return the shape of every tensor of the model, under the original names."""
    state = _model_without_weights(config).state_dict()
    shapes = {_original_name(name): value.shape for name, value in state.items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes


def expected_head(config: dict[str, Any], width: int, head: Tensors) -> dict[str, Size]:
    """Return the shapes of the alignment head, one MLP or one for each layer, under the original names.

    Args:
        config: the content of the original config.json.
        width: of the hidden states.
        head: the tensors of the head in the folder; if it has none, none are expected.
    """
    from torch import Size

    if not head:
        return {}
    hidden, dim = config.get("projector_dim", 2048), config.get("z_dim", 768)
    layers = config.get("target_layers") or (15, 16)
    prefixes = [f"{i}." for i in range(len(layers))] if config.get("use_multiple_projectors") else [""]
    shapes: dict[str, Size] = {}
    for prefix in prefixes:
        for number, (inputs, outputs) in zip(
            (0, 2, 4), ((width, hidden), (hidden, hidden), (hidden, dim)), strict=True
        ):
            name = f"{HEAD}{prefix}projector.{number}"
            shapes |= {f"{name}.weight": Size((outputs, inputs)), f"{name}.bias": Size((outputs,))}
    return shapes


def head_name(name: str) -> str:
    """Return our name of a tensor of the alignment head.

    It is `0.weight` for a single MLP, as in the trainer's AlignmentHead, and `1.0.weight` for the second of several.
    """
    return name.removeprefix(HEAD).replace("projector.", "")


def extend_vocabulary(tensors: Tensors, config: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Add rows to the embeddings for the tokens that the tokenizer has more; existing rows do not change.

    The vocabulary is padded to a multiple of 64, as transformers does. A new row is the mean of all rows: its logit is
    then the mean logit, which greedy decoding never chooses.

    Args:
        tensors: of the model, under the original names; changed in place.
        config: the LlavaConfig; vocabulary size and image token are set in place.
    """
    import torch

    text, old = config.text_config, config.text_config.vocab_size
    if len(tokenizer) > old:
        text.vocab_size = -(-len(tokenizer) // 64) * 64
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            if name in tensors:
                weight = tensors[name]
                mean = weight.mean(0, keepdim=True, dtype=torch.float32).to(weight.dtype)
                tensors[name] = torch.cat([weight, mean.expand(text.vocab_size - old, -1)])
    config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")


def build_model(config: Any, tensors: Tensors, tokenizer: PreTrainedTokenizerBase) -> LlavaForConditionalGeneration:
    """Return the model with the tensors, which are moved into it without a second copy in memory."""
    model = _model_without_weights(config)
    dtype, tied = tensors["model.embed_tokens.weight"].dtype, config.tie_word_embeddings
    names = {name: _original_name(name) for name in model.state_dict() if not (tied and name == "lm_head.weight")}
    model.load_state_dict(
        {name: tensors.pop(old).to(dtype).contiguous() for name, old in names.items()}, strict=not tied, assign=True
    )
    if tied:
        model.tie_weights()
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def build_processor(
    config: dict[str, Any], settings: Any, tokenizer: PreTrainedTokenizerBase, normalization: dict[str, Any]
) -> LlavaProcessor:
    """Return a processor with LLaVA-1.5's image geometry and chat template.

    Images are padded to a square with the mean color, or resized by their shortest edge and center cropped.

    Args:
        config: the content of the original config.json.
        settings: the LlavaConfig.
        normalization: image_mean and image_std; CLIP's by default.
    """
    from transformers import CLIPImageProcessor, LlavaProcessor
    from transformers.models.llava.image_processing_llava import LlavaImageProcessor

    vision = settings.vision_config
    square = {"height": vision.image_size, "width": vision.image_size}
    images: Any
    if config.get("image_aspect_ratio") == "pad":
        images = LlavaImageProcessor(do_pad=True, size=square, do_center_crop=False, crop_size=square, **normalization)
    else:
        images = CLIPImageProcessor(size={"shortest_edge": vision.image_size}, crop_size=square, **normalization)
    # how the system prompt calls the user: in Vicuna v1's template, and in that of the Qwen variants
    user = "user" if settings.text_config.model_type == "llama" else "human"
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=settings.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE.replace("SYSTEM", SYSTEM.format(user=user)),
    )
