"""Folders of models as people have them: each loads right, or is one sentence with the remedy, to the dry run as to
training."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.students import Bomb, noise_image, pickled
from tests.tiny import build
from trainer.alignment_config import AlignmentConfig
from trainer.dry_run.meta import attach_on_meta, check_files, outline
from trainer.model_config import ModelConfig
from workbench.devices import check_device
from workbench.errors import ConfigError, ModelError, UnknownNameError, WorkbenchError, one_line
from workbench.mllm import MLLM
from workbench.mllm.conversation import encode_conversations
from workbench.weights import pretrained
from workbench.weights.model_files import weight_files
from workbench.weights.pretrained import call
from workbench.weights.tensor_files import read_model, shapes_of

Change = Callable[[Path], object]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 13000000\n"
GONE = object()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Small models by family, made when they are first asked for."""
    root = tmp_path_factory.mktemp("models")
    return lambda family: root / family if (root / family).exists() else build(family, root / family)


def changed(folders: Callable[[str], Path], family: str, change: Change, to: Path) -> Path:
    shutil.copytree(folders(family), to)
    change(to)
    return to


def settings(file: str = "config.json", **values: Any) -> Change:
    """Set keys of a JSON file; `a__b` is b in a, GONE takes a key away."""

    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        for key, value in values.items():
            *above, last = key.split("__")
            place = content
            for name in above:
                place = place[name]
            place.pop(last, None)
            if value is not GONE:
                place[last] = value
        (folder / file).write_text(json.dumps(content))

    return change


def rewritten(file: str, text: str) -> Change:
    return lambda folder: (folder / file).write_text(text)


def indexed(index: object) -> Change:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        (folder / "model.safetensors.index.json").write_text(index if isinstance(index, str) else json.dumps(index))

    return change


def mapped(file: object, tensor: str = "language_model.lm_head.weight") -> Change:
    return indexed({"metadata": {}, "weight_map": {tensor: file}})


def linked(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to("/nowhere/blob")

    return change


def shortened(keep: Callable[[int], int]) -> Change:
    def change(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[: keep(file.stat().st_size)])

    return change


def without(*patterns: str) -> Change:
    return lambda folder: [file.unlink() for pattern in patterns for file in folder.glob(pattern)]


def adapter(
    *, base: str = "llava-hf/llava-1.5-7b-hf", config: bool = False, model: bool = False, also: tuple[str, ...] = ()
) -> Change:
    def change(folder: Path) -> None:
        named = base or str(folder.parent)
        (folder / "adapter_config.json").write_text(
            json.dumps({"peft_type": "LORA", "r": 8, "base_model_name_or_path": named})
        )
        (folder / "adapter_model.safetensors").write_bytes(b"")
        if not model:
            (folder / "model.safetensors").unlink()
        if not config:
            (folder / "config.json").unlink()
        for name in also:
            (folder / name).write_text("{}")

    return change


def bomb(folder: Path) -> None:
    pickled(folder)
    torch.save({"a": Bomb(folder / "mark")}, folder / "pytorch_model.bin")


IMAGES = "image_processor__"
REFUSED: dict[str, tuple[str, Change, str]] = {
    # configurations
    "no architectures": ("llava", settings(architectures=None), "unknown model architecture"),
    "architectures of numbers": ("llava", settings(architectures=[3]), "unknown model architecture '3'"),
    "another model_type": ("llava", settings(model_type="llavax"), "has a config.json that transformers refuses"),
    "no model_type": ("llava", settings(model_type=GONE), "has a config.json that transformers refuses"),
    "StrictDataclass": (
        "llava",
        settings(text_config__hidden_size="32"),
        r"refuses \(Validation error for field 'hidden_size'",
    ),
    "KeyError": ("llava", settings(projector_hidden_act="gelux"), "(could not be loaded|cannot be made) .*gelux"),
    "AttributeError": ("llava", settings(dtype="float33"), "refuses .*float33"),
    "a list of vision": ("llava", settings(vision_config=[1]), "has a config.json that transformers refuses"),
    "more blocks": ("llava", settings(text_config__num_hidden_layers=6), "the checkpoint lacks 18 tensors"),
    "fewer blocks": ("llava", settings(text_config__num_hidden_layers=2), "the model has no place for 18 tensors"),
    "another width": (
        "llava",
        settings(text_config__intermediate_size=64),
        "the checkpoint has other shapes for 12 tensors",
    ),
    "a layer that is not there": ("llava", settings(vision_feature_layer=99), "does not fit"),
    "JSON": ("llava", rewritten("config.json", "{"), "config.json is not valid JSON"),
    "a JSON list": ("llava", rewritten("config.json", "[]"), "holds a JSON list: expected an object"),
    "generation": (
        "llava",
        rewritten("generation_config.json", "[]"),
        "has a generation_config.json that transformers refuses",
    ),
    "an end that is no token": (
        "llava",
        settings("generation_config.json", eos_token_id="x"),
        "eos_token_id is 'x', not an integer",
    ),
    # quantization
    "awq": (
        "llava",
        settings(quantization_config={"quant_method": "awq", "bits": 4}),
        "is quantized with awq.*gptqmodel",
    ),
    "gptq": (
        "llava",
        settings(quantization_config={"quant_method": "gptq", "bits": 4}),
        "is quantized with gptq.*optimum",
    ),
    "4 bit": (
        "llava",
        settings(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "with bitsandbytes.*pip install",
    ),
    "compressed": (
        "llava",
        settings(quantization_config={"quant_method": "compressed-tensors", "config_groups": {}}),
        "compressed-tensors>=",
    ),
    "an unknown method": (
        "llava",
        settings(quantization_config={"quant_method": "my_quant"}),
        "my_quant, which transformers does not know",
    ),
    "no method": ("llava", settings(quantization_config={"bits": 4}), "an unnamed method"),
    # processors
    "no processor": ("llava", without("*processor*"), "has no processor that could be loaded"),
    "no tokenizer": ("llava", without("tokenizer*"), "has no tokenizer: expected tokenizer.json"),
    "processor of another class": (
        "llava",
        settings("processor_config.json", processor_class="Qwen2VLProcessor"),
        "has no processor",
    ),
    "class token": (
        "llava_siglip",
        settings("processor_config.json", num_additional_image_tokens=1),
        "num_additional_image_tokens, 1 in .* and 0 in",
    ),
    "no class token": (
        "llava",
        settings("processor_config.json", num_additional_image_tokens=0),
        "0 in its processor and 1 in its config",
    ),
    "strategy": (
        "llava",
        settings("processor_config.json", vision_feature_select_strategy="full"),
        "full in its processor and default in",
    ),
    "patch in words": (
        "llava",
        settings("processor_config.json", patch_size="x"),
        "patch_size, x in its processor and 14 in",
    ),
    "patch": (
        "llava_next",
        settings("processor_config.json", patch_size=28),
        "patch_size, 28 in its processor and 14 in",
    ),
    "crop": (
        "llava",
        settings("processor_config.json", **{f"{IMAGES}crop_size": {"height": 84, "width": 84}}),
        "84 x 84 in its processor and 56 x 56",
    ),
    "tile": (
        "internvl",
        settings("processor_config.json", image_seq_length=4),
        "image_seq_length, 4 in its processor and 16 in",
    ),
    "size of a tile": (
        "internvl",
        settings("processor_config.json", **{f"{IMAGES}size": {"height": 56, "width": 56}}),
        "56 x 56 in its processor and 112",
    ),
    "tile of SmolVLM": (
        "smolvlm",
        settings("processor_config.json", image_seq_len=4),
        "image_seq_len, 4 in its processor and 16 in",
    ),
    "pool": (
        "gemma3",
        settings("processor_config.json", image_seq_length=4),
        "image_seq_length, 4 in its processor and 16 in",
    ),
    "size": (
        "paligemma",
        settings("processor_config.json", **{f"{IMAGES}size": {"height": 84, "width": 84}}),
        "84 x 84 in its processor and 56 x 56",
    ),
    "merged": (
        "qwen2_vl",
        settings("processor_config.json", **{f"{IMAGES}merge_size": 1}),
        "merge_size, 1 in its processor and 2 in",
    ),
    "patch of Qwen": (
        "qwen2_vl",
        settings("processor_config.json", **{f"{IMAGES}patch_size": 28}),
        "patch_size, 28 in its processor and 14 in",
    ),
    "tokens of OneVision": (
        "llava_onevision",
        settings("processor_config.json", num_image_tokens=9),
        "num_image_tokens, 9 in its processor and 16 in",
    ),
    "image token": ("llava", settings(image_token_index=9999), "the image token, 4 in its processor and 9999 in"),
    "template": ("llava", rewritten("chat_template.jinja", "{% for"), "its chat template cannot be used"),
    "template that raises": (
        "llava",
        rewritten("chat_template.jinja", "{{ raise_exception('no') }}"),
        "its chat template cannot be used .no",
    ),
    # weights
    "pointer": (
        "llava",
        rewritten("model.safetensors", POINTER),
        "model.safetensors is a Git LFS pointer.*git lfs pull",
    ),
    "pointer to a tokenizer": ("llava", rewritten("tokenizer.json", POINTER), "tokenizer.json is a Git LFS pointer"),
    "cut header": ("llava", shortened(lambda size: 5000), "is not a safetensors file, but a damaged one"),
    "cut": ("llava", shortened(lambda size: size - 100), r"is cut, with [\d,]+ of [\d,]+ bytes"),
    "empty": ("llava", shortened(lambda size: 0), "model.safetensors is empty"),
    "none": ("llava", without("*.safetensors"), "holds no weights: expected model.safetensors or pytorch_model.bin"),
    "GGUF": (
        "llava",
        lambda p: (p / "model.safetensors").rename(p / "model-q4.gguf"),
        r"as GGUF only \(model-q4.gguf\), which is not read",
    ),
    "another name": (
        "llava",
        lambda p: (p / "model.safetensors").rename(p / "w.safetensors"),
        "no weights that are read, only w.safetensors",
    ),
    "no index": (
        "llava",
        lambda p: (p / "model.safetensors").rename(p / "model-00001-of-00002.safetensors"),
        "without their index",
    ),
    "link": ("llava", linked("model.safetensors"), "is a link to /nowhere/blob, which is not there"),
    "link of a processor": ("llava", linked("processor_config.json"), "is a link to /nowhere/blob, which is not there"),
    "an index that is a list": ("llava", indexed([]), "index.json holds a JSON list"),
    "an index without a map": ("llava", indexed({}), "is not an index of shards: expected a weight_map"),
    "an index of nothing": ("llava", indexed({"weight_map": {}}), "is not an index of shards"),
    "an index of a list": ("llava", indexed({"weight_map": []}), "is not an index of shards"),
    "an index that leaves": ("llava", mapped("../x.safetensors"), "is not an index of shards"),
    "an index of numbers": ("llava", mapped(3), "is not an index of shards"),
    "a missing shard": ("llava", mapped("none.safetensors"), "none.safetensors is missing"),
    "a tensor that is not there": (
        "llava",
        mapped("model-00001-of-00001.safetensors", "nope"),
        "names 1 tensor .nope. that .* does not hold",
    ),
    "a folder": (
        "llava",
        lambda p: ((p / "config.json").unlink(), (p / "config.json").mkdir()),
        "config.json is a folder: expected a file",
    ),
    "cut pickle": (
        "llava",
        lambda p: (pickled(p), (p / "pytorch_model.bin").write_bytes(b"PK")),
        "pytorch_model.bin (could not be read|was refused)",
    ),
    "bomb": ("llava", bomb, "was refused: it holds more than plain tensors"),
    # adapters
    "adapter": ("llava", adapter(), "holds an adapter of llava-hf/llava-1.5-7b-hf, not a model"),
    "adapter with a configuration": (
        "llava",
        adapter(config=True),
        "holds an adapter of llava-hf/llava-1.5-7b-hf, not a model",
    ),
    "adapter of a base at hand": (
        "llava",
        adapter(base=""),
        r"merge it into that model with peft, PeftModel.from_pretrained\(base",
    ),
    "adapter beside a model": ("llava", adapter(config=True, model=True), "holds a whole model and an adapter"),
    "checkpoint": (
        "llava",
        adapter(config=True, also=("trainer_state.json",)),
        "checkpoint within a LoRA training.*non_lora_trainables.bin and config.json",
    ),
    "original LoRA": (
        "llava",
        adapter(also=("non_lora_trainables.bin",)),
        "run python -m workbench.convert .* --base llava-hf/llava-1.5-7b-hf",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_loaded_is_one_sentence_to_training_and_to_the_dry_run(
    name: str, folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "4 bit":  # as where bitsandbytes is not installed
        monkeypatch.setattr("transformers.quantizers.quantizer_bnb_4bit.is_bitsandbytes_available", lambda: False)
    family, change, message = REFUSED[name]
    folder = changed(folders, family, change, tmp_path / "m")
    before = sorted(folder.rglob("*"))
    for load in (loaded, planned):
        with pytest.raises(WorkbenchError, match=message) as error:
            load(folder)
        assert len(str(error.value).replace(str(tmp_path), "")) < 300
        assert "\n" not in str(error.value)
    assert sorted(folder.rglob("*")) == before  # a bomb would have made a folder


def loaded(folder: Path) -> None:
    MLLM.load(str(folder))


def planned(folder: Path) -> None:
    """As the dry run of a training from `folder` looks at it."""

    mllm = outline(ModelConfig(name=str(folder)))
    check_files(ModelConfig(name=str(folder)))
    batch = encode_conversations(mllm, [[noise_image(0)]], [[("what is this ?", "a cat")]])[0]
    (places,), ids = mllm.visual_tokens(batch), batch.inputs["input_ids"][0]
    recipe: Any = SimpleNamespace(
        model=ModelConfig(), alignment=AlignmentConfig(objective="none"), check_layer=lambda count: None
    )
    attach_on_meta(recipe, mllm.model, batch.vision, places, int((ids == mllm.config.image_token_id).sum()), len(ids))


# --- what loads -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["patch_size", "vision_feature_select_strategy", "num_additional_image_tokens", "all"])
@pytest.mark.parametrize("family", ["llava", "llava_siglip", "llava_next"])
def test_what_an_old_processor_does_not_say_is_taken_from_the_configuration(
    family: str, lost: str, folders: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens") if lost == "all" else (lost,)
    old = changed(folders, family, settings("processor_config.json", **dict.fromkeys(keys, GONE)), tmp_path / "old")
    with caplog.at_level(logging.WARNING):
        model, whole = MLLM.load(str(old)), MLLM.load(str(folders(family)))
    for key in keys:
        assert getattr(model.processor, key) == getattr(whole.processor, key)
    if "patch_size" in keys:
        assert "lacks patch_size" in caplog.text
        assert "patch_size 14" in caplog.text
    ids, expected = (own.encode([noise_image(0)], ["what is this ?"]).inputs["input_ids"] for own in (model, whole))
    assert torch.equal(ids, expected)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "smolvlm"])
def test_pickled_weights_are_those_of_the_safetensors(
    family: str, shards: int, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = changed(folders, family, lambda p: pickled(p, shards), tmp_path / "m")
    model, whole = MLLM.load(str(folder)), MLLM.load(str(folders(family)))
    ours, theirs = model.model.state_dict(), whole.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)
    assert model.model.generation_config.to_dict() == whole.model.generation_config.to_dict()
    weights = check_files(ModelConfig(name=str(folder)))["model"]
    assert weights is not None
    assert weights.pickled
    assert len(weights.files) == shards


def test_shapes_are_those_of_the_tensors_and_hold_nothing(folders: Callable[[str], Path], tmp_path: Path) -> None:
    both = folders("llava"), changed(folders, "llava", lambda p: pickled(p, 2), tmp_path / "m")
    for folder in both:
        shapes, tensors = shapes_of(weight_files(folder)), read_model(folder)
        assert {key: (v.shape, v.dtype) for key, v in shapes.items()} == {
            key: (v.shape, v.dtype) for key, v in tensors.items()
        }
        assert all(value.is_meta for value in shapes.values())


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_vl", "internvl", "smolvlm", "gemma3"])
def test_a_model_without_a_chat_template_is_asked_plainly_and_not_trained(
    family: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    mllm = MLLM.load(str(changed(folders, family, without("chat_template*"), tmp_path / "m")))
    batch = mllm.encode([noise_image(0)], ["what is this ?"])
    assert mllm.visual_tokens(batch)[0]
    assert len(mllm.generate(batch, max_new_tokens=2)) == 1
    assert "User" not in mllm.prompt("what is this ?")
    assert mllm.prompt("what is this ?").endswith("what is this ?")
    for own in (mllm, outline(ModelConfig(name=str(tmp_path / "m")))):
        with pytest.raises(ModelError, match=r"has no chat template.*put the chat_template.jinja of the model"):
            encode_conversations(own, [[noise_image(0)]], [[("what is this ?", "a cat")]])


SETTINGS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "Vicuna's": ({"temperature": 0.9, "top_p": 0.6, "max_length": 4096}, {"temperature", "top_p"}),
    "sampling": ({"temperature": 0.9, "top_p": 0.6, "do_sample": True}, set()),
    "beams": ({"length_penalty": 2.0, "num_beams": 1}, {"length_penalty"}),
    "beam search": ({"length_penalty": 2.0, "num_beams": 4}, set()),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_generation_that_could_not_be_saved_are_left_out(
    name: str, folders: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values, unset = SETTINGS[name]
    folder = changed(folders, "llava", settings("generation_config.json", **values), tmp_path / "m")
    with caplog.at_level(logging.WARNING):
        model = MLLM.load(str(folder)).model
    assert ("left out" in caplog.text) == bool(unset)
    assert all(key in caplog.text for key in unset)
    model.generation_config.eos_token_id = [2, 3]  # changed, so that transformers looks at all of it
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert {key: saved[key] for key in values if key not in unset and values[key] != 1} == {
        k: v for k, v in values.items() if k not in unset and v != 1
    }
    assert not unset & {key for key in saved if saved[key] not in (None, 1.0)}


def test_a_configuration_keeps_its_pad_token_and_has_no_settings_of_generation(
    folders: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """LLaVA-1.5 has a pad token beside its parts."""
    folder = changed(folders, "llava", settings(temperature=0.7, pad_token_id=1), tmp_path / "m")
    with caplog.at_level(logging.WARNING):
        model = MLLM.load(str(folder)).model
    assert "left out" not in caplog.text
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert "temperature" not in saved
    assert saved["pad_token_id"] == 1


# --- the door -------------------------------------------------------------------------------------


def test_the_door_turns_every_exception_into_the_sentence_and_is_quiet(
    caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    import warnings

    def noisy(error: Exception) -> Any:
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s")
        warnings.warn("deprecated", stacklevel=1)
        raise error

    for error in (
        OSError("a\nb"),
        KeyError("a"),
        TypeError(),
        ImportError("a"),
        pickle.UnpicklingError("a"),
        struct.error("a"),
        AttributeError("a"),
    ):
        with pytest.raises(ModelError) as raised:
            call(lambda error=error: noisy(error), lambda e: ModelError(one_line(e)))  # type: ignore[misc]
        assert "\n" not in str(raised.value)
        assert str(raised.value)
    with pytest.raises(ConfigError, match="ours"):
        call(lambda: noisy(ConfigError("ours")), lambda e: ModelError("theirs"))
    with pytest.raises(KeyboardInterrupt):
        call(lambda: noisy(KeyboardInterrupt()), lambda e: ModelError("theirs"))  # type: ignore[arg-type]
    assert "Retrying" not in caplog.text
    assert not recwarn.list


def test_a_fault_of_our_own_is_no_sentence(folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import workbench.mllm.processors as processors

    def faulty(*_: object) -> None:
        raise KeyError("our own")

    monkeypatch.setattr(processors, "_complete", faulty)
    with pytest.raises(KeyError, match="our own"):
        MLLM.load(str(folders("llava")))


def test_no_hub_is_asked_twice_where_none_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []
    session = SimpleNamespace(
        head=lambda *_, **options: (
            asked.append(options["timeout"]) or (_ for _ in ()).throw(ConnectionError("no such host"))
        )
    )
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: session)
    pretrained._hub_answers.cache_clear()
    try:
        assert pretrained.hub_options("a/b") == pretrained.hub_options("c/d") == {"local_files_only": True}
        assert len(asked) == 1
        assert asked[0] <= 10
        assert pretrained.hub_options(tmp_path) == {}
    finally:
        pretrained._hub_answers.cache_clear()


def test_a_model_of_the_cache_without_weights_is_refused_and_the_dry_run_too() -> None:
    for name in ("nobody/nothing-here", "./no-folder", "runs/no/folder", "UPPER", "a b"):
        for load in (loaded, planned):
            with pytest.raises(ModelError, match="is neither a folder nor a hub id") as error:
                load(name)  # type: ignore[arg-type]
            assert len(str(error.value)) < 300
            assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu", "expected auto, cpu, cuda.*did you mean 'cuda'"),
        ("GPU", "did you mean 'cuda'"),
        ("tpu", "unknown device 'tpu': expected auto, cpu, cuda"),
        ("cuda:9", "expected cpu, since no GPU is visible here"),
        ("cuda:x", "unknown device 'cuda:x'"),
        ("mps", "there is no mps on this machine"),
        ("xpu:1", "there is no xpu on this machine"),
        ("", "unknown device ''"),
    ],
)
def test_a_device_that_is_not_there_is_named(name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match=message):
        check_device(name)
    # accelerate numbers the CPU of each process
    assert [check_device(own) for own in ("auto", "cpu", "cpu:0")] == ["cpu", "cpu", "cpu:0"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [check_device(own) for own in ("auto", "cpu", "cuda", "cuda:1")] == ["cuda", "cpu", "cuda", "cuda:1"]
    if name == "cuda:9":
        with pytest.raises(ConfigError, match="expected cuda:0 to cuda:1, since 2 GPUs are visible here"):
            check_device(name)


def test_a_long_list_of_names_is_the_nearest_ones() -> None:
    with pytest.raises(
        UnknownNameError, match=r"expected one of .*name7.*\.\.\. \(200 in all\).*did you mean 'name7'"
    ) as error:
        raise UnknownNameError("thing", "nam7", [f"name{n}" for n in range(200)])
    assert len(str(error.value)) < 200
