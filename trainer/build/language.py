"""Put a pretrained language model into a LLaVA: its configuration, its tokenizer with an image token, its weights.

Wherever a function takes a `folder`, it is the one that `weights_folder(name)` returns for the language model.
"""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaForConditionalGeneration,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from workbench.errors import ConfigError, one_line
from workbench.hashing import saved_tensors
from workbench.weights.fetch import check_unchanged
from workbench.weights.pretrained import call

IMAGE = "<image>"
# Jinja put before a chat template that only handles text: it replaces a list of content parts (image, text) by plain
# text, with `<image>` on a line of its own.
FLATTEN_CONTENT = (
    "{%- set turns = namespace(all=[]) -%}{%- for message in messages -%}{%- set turn = namespace(text='') -%}{%- if"
    " message['content'] is string -%}{%- set turn.text = message['content'] -%}{%- else -%}{%- for part in"
    " message['content'] -%}{%- set turn.text = turn.text + ('<image>\\n' if part['type'] == 'image' else part['text'])"
    " -%}{%- endfor -%}{%- endif -%}{%- set turns.all = turns.all + [{'role': message['role'], 'content': turn.text}]"
    " -%}{%- endfor -%}{%- set messages = turns.all -%}"
)


def language_config(folder: Path) -> PretrainedConfig:
    """Return the configuration of the language model in `folder`.

    Raises:
        ConfigError: the folder does not hold a language model.
    """
    expected = (
        f"model.language is {folder.name}: expected the weights of a language model, such as smollm2-135m-instruct"
    )
    # transformers cannot read the configuration of other libraries' weights, such as timm's
    config: PretrainedConfig = call(
        lambda: AutoConfig.from_pretrained(folder), lambda error: ConfigError(f"{expected} ({one_line(error, 100)})")
    )
    if not any(str(architecture).endswith("ForCausalLM") for architecture in config.architectures or ()):
        raise ConfigError(expected)
    return config


def language_tokenizer(folder: Path) -> tuple[PreTrainedTokenizerFast, str]:
    """Return the language model's tokenizer with `<image>` added, and its chat template, which now accepts images.

    Raises:
        ConfigError: the folder does not hold a language model, or its tokenizer has no chat template.
    """
    language_config(folder)

    def failed(error: Exception) -> ConfigError:
        return ConfigError(f"model.language is {folder.name}, whose tokenizer cannot be read ({one_line(error, 120)})")

    tokenizer = call(lambda: AutoTokenizer.from_pretrained(folder, extra_special_tokens={"image_token": IMAGE}), failed)
    if (
        not isinstance(tokenizer, PreTrainedTokenizerFast)
        or not isinstance(tokenizer.chat_template, str)
        or tokenizer.eos_token is None
        or tokenizer.pad_token is None
    ):
        raise ConfigError(
            f"model.language is {folder.name}: expected a tokenizer with a chat template, an end-of-sequence token and"
            " a padding token"
        )
    return tokenizer, FLATTEN_CONTENT + tokenizer.chat_template


def copy_language_weights(llava: LlavaForConditionalGeneration, folder: Path) -> str:
    """Copy the pretrained language model into `llava`, and return the fingerprint of the copied weights.

    The vocabulary of `llava` is larger. The rows of new tokens, in input and output embeddings, are the mean of the
    pretrained rows.

    Raises:
        WeightsError: a tensor of `llava` does not hold the pretrained values after the copy.
    """
    pretrained = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    body, output = pretrained.base_model.state_dict(), pretrained.state_dict()["lm_head.weight"]
    vocab_size = llava.lm_head.out_features
    body["embed_tokens.weight"] = append_mean_rows(body["embed_tokens.weight"], vocab_size)
    llava.model.language_model.load_state_dict(body)
    llava.lm_head.load_state_dict({"weight": append_mean_rows(output, vocab_size)})
    return check_language(llava, folder)


def append_mean_rows(rows: Float[Tensor, "token d"], count: int) -> Float[Tensor, "count d"]:
    """Extend `rows` to `count` rows; each new row is the mean of the old ones."""
    return torch.cat([rows, rows.mean(0, keepdim=True).expand(count - len(rows), -1)])


def check_language(llava: LlavaForConditionalGeneration, folder: Path) -> str:
    """Check that the language model of `llava` holds the weights in `folder`, and return their fingerprint.

    The rows of new tokens are left out of both the comparison and the fingerprint.

    Raises:
        WeightsError: a tensor does not hold the values in `folder`; names the first such tensor.
    """
    pretrained = {name: value.float() for name, value in load_file(folder / "model.safetensors").items()}
    old_size = language_config(folder).vocab_size
    # the file holds tied embeddings only once
    pretrained.setdefault("lm_head.weight", pretrained["model.embed_tokens.weight"])
    tensors = {f"model.{name}": value for name, value in saved_tensors(llava.model.language_model).items()}
    tensors["lm_head.weight"] = llava.lm_head.weight
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:old_size]
    return check_unchanged(folder.name, tensors, pretrained)
