"""Everything that a number depends on is in its key, each tensor under its name; nothing else is."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, processors
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
)

from tests import tiny
from workbench import hashing as fingerprints
from workbench import runs
from workbench.errors import WeightsError
from workbench.hashing import digest, fingerprint, libraries, processor_fingerprint, saved_tensors, settings_hash
from workbench.mllm import MLLM
from workbench.vfm import find_vfm
from workbench.vfm.hf_models import KINDS
from workbench.weights.fetch import check_unchanged, load_tensors

State = dict[str, Tensor]


# --- tensors by name ------------------------------------------------------------------------------


def _exchanged(tensors: State, first: str, second: str) -> State:
    """The tensors with those whose names begin with `first` and with `second` in each other's place."""
    swap = {
        name: first + name.removeprefix(second) if name.startswith(second) else second + name.removeprefix(first)
        for name in tensors
    }
    return {swap[name] if name.startswith((first, second)) else name: value for name, value in tensors.items()}


def test_a_fingerprint_knows_where_a_tensor_stands_and_not_in_which_order() -> None:
    torch.manual_seed(0)
    tensors = {
        f"layers.{layer}.{part}.weight": torch.randn(4, 4) for layer in range(3) for part in ("gate_proj", "up_proj")
    }
    known = fingerprint(tensors)
    assert fingerprint(dict(reversed(tensors.items()))) == known
    assert fingerprint(_exchanged(tensors, "layers.0.", "layers.1.")) != known
    assert fingerprint(_exchanged(tensors, "layers.1.gate_proj", "layers.1.up_proj")) != known
    first = "layers.0.gate_proj.weight"
    for other in (
        tensors[first].half(),
        tensors[first].T.contiguous(),
        tensors[first].reshape(2, 8),
        tensors[first] + 1,
    ):
        assert fingerprint(tensors | {first: other}) != known
    # the same values, in another order in memory
    assert fingerprint(tensors | {first: tensors[first].T.contiguous().T}) == known
    assert fingerprint({"a.b": torch.zeros(0), "a": torch.tensor(True)}) != fingerprint(
        {"a": torch.zeros(0), "a.b": torch.tensor(True)}
    )


def test_a_large_tensor_is_hashed_where_it_is() -> None:
    tracemalloc.start()
    value = torch.zeros(4_000_000)
    digest(value)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000  # bytes(raw) took 16 MB


@pytest.mark.parametrize("family", list(tiny.BUILDERS))
def test_a_models_file_has_its_names_loaded_and_built(family: str, tmp_path: Path) -> None:
    """transformers renames parameters between file and memory, and drops second names of tied ones."""
    folder = tiny.build(family, tmp_path / family)
    loaded = AutoModelForImageTextToText.from_pretrained(folder)
    assert fingerprint(saved_tensors(loaded)) == fingerprint(load_tensors(folder / "model.safetensors"))
    built = tiny.BUILDERS[family]()[0]
    built.load_state_dict(loaded.state_dict())
    assert fingerprint(saved_tensors(built)) == fingerprint(saved_tensors(loaded))
    # nothing of it is changed
    assert loaded.state_dict().keys() == AutoModelForImageTextToText.from_pretrained(folder).state_dict().keys()


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_vision_models_file_has_its_names(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "image_size": 32,
    }
    own = KINDS[kind]
    own.model((own.config or own.model.config_class)(**sizes)).save_pretrained(tmp_path)
    loaded, file = own.model.from_pretrained(tmp_path), load_tensors(tmp_path / "model.safetensors")
    assert fingerprint(saved_tensors(loaded)) == fingerprint(file)
    check_unchanged(kind, saved_tensors(own.part(loaded)), file)


def test_timms_names_are_those_of_its_file(tmp_path: Path) -> None:
    network = timm.create_model("test_vit", pretrained=False)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    assert fingerprint(saved_tensors(network)) == fingerprint(load_tensors(tmp_path / "model.safetensors"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole CLIP, whose text and vision encoders have blocks of one shape and name."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    config = CLIPConfig(
        text_config=CLIPTextConfig(**sizes, vocab_size=50),
        vision_config=CLIPVisionConfig(**sizes, image_size=28, patch_size=14),
    )
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(folder)
    return folder


def test_a_part_of_a_model_is_compared_name_by_name(clip: Path) -> None:
    file = load_tensors(clip / "model.safetensors")
    whole = saved_tensors(CLIPVisionModel.from_pretrained(clip))
    assert check_unchanged("clip", whole, file) == fingerprint(whole)
    first = {name: value for name, value in whole.items() if "layers.2." not in name}
    assert len(first) < len(whole)
    check_unchanged("clip", first, file)
    check_unchanged("clip", dict(reversed(whole.items())), file)
    below = next(name for name in whole if "layers.0." in name).split("layers.0.")[0]
    exchanged = {
        "blocks": (f"{below}layers.0.", f"{below}layers.1."),
        "matrices": (f"{below}layers.1.self_attn.q_proj", f"{below}layers.1.self_attn.k_proj"),
    }
    for first_name, second_name in exchanged.values():
        with pytest.raises(
            WeightsError, match=r"clip: tensor '.*layers\..*' of the built model differs from the pretrained one"
        ):
            check_unchanged("clip", _exchanged(whole, first_name, second_name), file)
    with pytest.raises(WeightsError, match="clip: tensor 'more' of the built model is not in the pretrained file"):
        check_unchanged("clip", whole | {"more": torch.zeros(1)}, file)
    # the other encoder's blocks
    text = {name: file[f"text_model.{name}"] if "layers." in name else value for name, value in whole.items()}
    with pytest.raises(WeightsError, match="of the built model differs from the pretrained one"):
        check_unchanged("clip", text, file)


# --- the model's key ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build("llava", tmp_path_factory.mktemp("key") / "model")


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


def key(folder: Path) -> str:
    return MLLM.load(str(folder), validate=False).fingerprint


def edited(name: str, change: Callable[[Any], object]) -> Callable[[Path], None]:
    """Change the content of a JSON file of a model folder."""

    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return edit


def swapped_words(content: dict[str, Any]) -> None:
    words = content["model"]["vocab"]
    words["left"], words["right"] = words["right"], words["left"]


def tokenizer_with(change: Callable[[Tokenizer], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        core = Tokenizer.from_file(str(folder / "tokenizer.json"))
        change(core)
        core.save(str(folder / "tokenizer.json"))

    return edit


def begins_with_bos(core: Tokenizer) -> None:
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 1)]
    )


def weights(change: Callable[[State], State]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        save_file(
            change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"}
        )

    return edit


def chat_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text((folder / "chat_template.jinja").read_text().replace("User", "user"))


BLOCK = "language_model.model.layers"
MATTERS: dict[str, Callable[[Path], None]] = {
    "a weight": weights(
        lambda state: state | {f"{BLOCK}.0.mlp.up_proj.weight": state[f"{BLOCK}.0.mlp.up_proj.weight"] * 2}
    ),
    "two blocks exchanged": weights(lambda state: _exchanged(state, f"{BLOCK}.0.", f"{BLOCK}.1.")),
    "gate_proj and up_proj exchanged": weights(
        lambda state: _exchanged(state, f"{BLOCK}.2.mlp.gate_proj", f"{BLOCK}.2.mlp.up_proj")
    ),
    "config: norm of the language model": edited("config.json", lambda c: c["text_config"].update(rms_norm_eps=1e-2)),
    "config: rotary base": edited(
        "config.json", lambda c: c["text_config"]["rope_parameters"].update(rope_theta=123.0)
    ),
    "config: feature layer": edited("config.json", lambda c: c.update(vision_feature_layer=-1)),
    "generation settings": edited("generation_config.json", lambda c: c.update(repetition_penalty=1.5)),
    "vocabulary: two words exchanged": edited("tokenizer.json", swapped_words),
    "tokenizer: unknown token": edited("tokenizer.json", lambda c: c["model"].update(unk_token="cat")),
    "tokenizer: normalizer": edited("tokenizer.json", lambda c: c.update(normalizer={"type": "Lowercase"})),
    "tokenizer: pre-tokenizer": edited("tokenizer.json", lambda c: c.update(pre_tokenizer={"type": "Whitespace"})),
    "tokenizer: post-processor": tokenizer_with(begins_with_bos),
    "tokenizer: a token more": tokenizer_with(lambda core: core.add_tokens([AddedToken("zebra")])),
    "tokenizer: an added token strips": edited("tokenizer.json", lambda c: c["added_tokens"][-1].update(lstrip=True)),
    "special token: end": edited("tokenizer_config.json", lambda c: c.update(eos_token="<pad>")),
    "special token: padding": edited("tokenizer_config.json", lambda c: c.update(pad_token="<eos>")),
    "image processor: mean": edited(
        "processor_config.json", lambda c: c["image_processor"].update(image_mean=[0.5, 0.5, 0.5])
    ),
    "image processor: resampling": edited("processor_config.json", lambda c: c["image_processor"].update(resample=0)),
    "processor: patch_size": edited("processor_config.json", lambda c: c.update(patch_size=28)),
    "processor: select strategy": edited(
        "processor_config.json", lambda c: c.update(vision_feature_select_strategy="full")
    ),
    "processor: additional tokens": edited("processor_config.json", lambda c: c.update(num_additional_image_tokens=0)),
    "chat template": chat_template,
}


@pytest.mark.slow
@pytest.mark.parametrize("what", list(MATTERS))
def test_another_answer_has_another_key(what: str, model: Path, copy: Path) -> None:
    MATTERS[what](copy)
    assert key(copy) != key(model)


def test_merges_are_in_the_key() -> None:
    from tokenizers import models
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "a": 1, "b": 2, "c": 3, "ab": 4, "bc": 5}
    prints = set()
    for merges in ([("a", "b"), ("b", "c")], [("b", "c"), ("a", "b")]):
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.BPE(vocab=words, merges=merges, unk_token="<unk>")), unk_token="<unk>"
        )
        prints.add(settings_hash(fingerprints.tokenizer_settings(tokenizer)))
    assert len(prints) == 2


def moved(folder: Path) -> Path:
    return folder.rename(folder.parent / "another name")


def touched(folder: Path) -> Path:
    for file in folder.iterdir():
        os.utime(file, ns=(1, 1))
    return folder


def reordered(folder: Path) -> Path:
    weights(lambda state: dict(reversed(state.items())))(folder)
    for name in ("config.json", "tokenizer_config.json", "processor_config.json"):
        edited(name, lambda content: content.update({key: content.pop(key) for key in sorted(content, reverse=True)}))(
            folder
        )
    return folder


def sharded(folder: Path) -> Path:
    whole = AutoModelForImageTextToText.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    whole.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return folder


def in_memory_layout(folder: Path) -> Path:
    whole = AutoModelForImageTextToText.from_pretrained(folder)
    whole.save_pretrained(folder, save_original_format=False)
    assert "model.language_model.layers.0.mlp.up_proj.weight" in load_file(folder / "model.safetensors")
    return folder


def padded(folder: Path) -> Path:
    """What the last call of a tokenizer left in it."""

    def pad(core: Tokenizer) -> None:
        core.enable_padding(length=64)
        core.enable_truncation(32)

    tokenizer_with(pad)(folder)
    edited("tokenizer_config.json", lambda content: content.update(padding_side="left"))(folder)
    return folder


@pytest.mark.parametrize(
    "change", [moved, touched, reordered, sharded, in_memory_layout, padded], ids=lambda change: change.__name__
)
def test_the_same_answer_has_the_same_key(change: Callable[[Path], Path], model: Path, copy: Path) -> None:
    assert key(change(copy)) == key(model)


def test_using_a_model_leaves_its_key(model: Path) -> None:
    mllm = MLLM.load(str(model), validate=False)
    before = processor_fingerprint(mllm.processor)
    tokenizer = mllm.processor.tokenizer
    tokenizer(["what is this", "a"], padding="max_length", max_length=7, truncation=True)
    tokenizer.padding_side = "right"
    assert (
        processor_fingerprint(mllm.processor)
        == before
        == processor_fingerprint(MLLM.load(str(model), validate=False).processor)
    )


@pytest.mark.parametrize("family", list(tiny.BUILDERS))
def test_every_familys_processor_is_the_same_saved_and_loaded(family: str, tmp_path: Path) -> None:
    from transformers import AutoProcessor

    torch.manual_seed(0)
    built = tiny.BUILDERS[family]()[1]
    built.save_pretrained(tmp_path)
    assert processor_fingerprint(built) == processor_fingerprint(AutoProcessor.from_pretrained(tmp_path))


# --- the run's key --------------------------------------------------------------------------------


def test_a_run_is_keyed_by_question_versions_and_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: tuple[Any, ...] = ("cknna", 1, {"k": 10, "vfm": ["a"]}, "model", "data")
    known = runs.run_key(*asked)
    for place, other in enumerate(("tokens", 2, {"k": 11, "vfm": ["a"]}, "another", "other")):
        assert runs.run_key(*asked[:place], other, *asked[place + 1 :]) != known
    assert runs.run_key("cknna", 1, {"vfm": ["a"], "k": 10}, "model", "data") == known
    for name in ("torch", "transformers", "tokenizers", "timm", "pillow"):
        here = libraries()
        monkeypatch.setattr(fingerprints, "libraries", lambda here=here, name=name: here | {name: "99.0"})
        assert runs.run_key(*asked) != known
        monkeypatch.undo()


def test_a_patch_release_changes_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    libraries.cache_clear()
    monkeypatch.setattr(fingerprints, "version", lambda name: "2.14.1+cu130")
    assert libraries()["torch"] == "2.14"
    libraries.cache_clear()
    monkeypatch.setattr(fingerprints, "version", lambda name: "2.15.0")
    assert libraries()["torch"] == "2.15"
    libraries.cache_clear()


# --- the VFM's ------------------------------------------------------------------------------------


@pytest.fixture
def dinov2(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    folder = tmp_path / "vfm"
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14, "image_size": 28}
    KINDS["dinov2"].model(KINDS["dinov2"].model.config_class(**sizes)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]})
    )
    return folder


@pytest.mark.parametrize(
    "change",
    [
        weights(lambda state: _exchanged(state, "encoder.layer.0.", "encoder.layer.1.")),
        edited("config.json", lambda content: content.update(num_attention_heads=4)),
        edited("config.json", lambda content: content.update(layer_norm_eps=1e-2)),
        edited("preprocessor_config.json", lambda content: content.update(image_mean=[0.4, 0.5, 0.5])),
    ],
    ids=["blocks", "heads", "norm", "mean"],
)
def test_another_vfm_has_another_identity(change: Callable[[Path], None], dinov2: Path) -> None:
    other = Path(shutil.copytree(dinov2, dinov2.parent / "other"))
    assert find_vfm(str(other)).identity() == find_vfm(str(dinov2)).identity()  # whatever its folder is called
    change(other)
    assert find_vfm(str(other)).identity() != find_vfm(str(dinov2)).identity()
