"""A pretrained language model inside a LLaVA: its tokenizer with an image token, its chat format, its configuration and
its weights, checked.

Every function takes the folder that `weights_folder(name)` gives.
"""

from __future__ import annotations

from pathlib import Path

import torch
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
# Turns whose content is a list of parts become plain text, the image on a line of its own before the question, for a
# template that knows text only.
FLATTEN = (
    "{%- set turns = namespace(all=[]) -%}{%- for message in messages -%}{%- set turn = namespace(text='') -%}{%- if"
    " message['content'] is string -%}{%- set turn.text = message['content'] -%}{%- else -%}{%- for part in"
    " message['content'] -%}{%- set turn.text = turn.text + ('<image>\\n' if part['type'] == 'image' else part['text'])"
    " -%}{%- endfor -%}{%- endif -%}{%- set turns.all = turns.all + [{'role': message['role'], 'content': turn.text}]"
    " -%}{%- endfor -%}{%- set messages = turns.all -%}"
)


def language_config(folder: Path) -> PretrainedConfig:
    """The language model's configuration.

    Raises:
        ConfigError: the folder holds something else.
    """
    expected = (
        f"model.language is {folder.name}: expected the weights of a language model, such as smollm2-135m-instruct"
    )
    # timm's weights, among others, are not known to transformers
    config: PretrainedConfig = call(
        lambda: AutoConfig.from_pretrained(folder), lambda error: ConfigError(f"{expected} ({one_line(error, 100)})")
    )
    if not any(str(architecture).endswith("ForCausalLM") for architecture in config.architectures or ()):
        raise ConfigError(expected)
    return config


def language_tokenizer(folder: Path) -> tuple[PreTrainedTokenizerFast, str]:
    """The language model's own tokenizer with `<image>` as one more token, and its own chat format, with the image in
    the user's turn.

    Raises:
        ConfigError: not a language model, or one that was never taught a chat format.
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
            f"model.language is {folder.name}: expected a tokenizer with a chat template, an end token and a padding"
            " token"
        )
    return tokenizer, FLATTEN + tokenizer.chat_template


def put_language(llava: LlavaForConditionalGeneration, folder: Path) -> str:
    """Copy the pretrained language model into `llava`, whose vocabulary is larger, and return the fingerprint of what
    was copied.

    A new token's row, in the embedding and in the output, is the mean of the pretrained rows.

    Raises:
        WeightsError: a pretrained tensor or row has other values once it is there.
    """
    pretrained = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    body, output = pretrained.base_model.state_dict(), pretrained.state_dict()["lm_head.weight"]
    body["embed_tokens.weight"] = grown(body["embed_tokens.weight"], llava.lm_head.out_features)
    llava.model.language_model.load_state_dict(body)
    llava.lm_head.load_state_dict({"weight": grown(output, llava.lm_head.out_features)})
    return check_language(llava, folder)


def grown(rows: Tensor, count: int) -> Tensor:
    """`rows` (token, d), followed by their mean as often as it takes to have `count`."""
    return torch.cat([rows, rows.mean(0, keepdim=True).expand(count - len(rows), -1)])


def check_language(llava: LlavaForConditionalGeneration, folder: Path) -> str:
    """Return the fingerprint of the pretrained part of the language model: all but the rows of new tokens.

    Raises:
        WeightsError: a tensor does not hold the values in `folder`; names the first one.
    """
    expected = {name: value.float() for name, value in load_file(folder / "model.safetensors").items()}
    old = language_config(folder).vocab_size
    expected.setdefault("lm_head.weight", expected["model.embed_tokens.weight"])  # tied ones are in a file once
    parts = {f"model.{name}": value for name, value in saved_tensors(llava.model.language_model).items()} | {
        "lm_head.weight": llava.lm_head.weight
    }
    return check_unchanged(
        folder.name,
        {k: v[:old] if k in ("model.embed_tokens.weight", "lm_head.weight") else v for k, v in parts.items()},
        expected,
    )
