"""Patching between models: planted truth on small models, and the real command line."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from analyses import patching
from analyses.patching import ANALYSIS, PATCHED, SELF, Config
from tests import tiny
from tests.analyses.test_permutation import model, planted
from tests.conftest import refused, run
from workbench import runs
from workbench.analysis.declaration import Context
from workbench.errors import ConfigError, ModelError
from workbench.mllm import MLLM
from workbench.scoring.quiz import Quiz
from workbench.training_folder import MEAN


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def changed(mllm: MLLM, change: Any) -> MLLM:
    """A copy of a model with other weights."""
    other = copy.deepcopy(mllm.model)
    with torch.no_grad():
        change(other.model)
    return MLLM(other, mllm.processor, mllm.family, f"{mllm.name}-changed")


def patched(monkeypatch: pytest.MonkeyPatch, target: MLLM, source: MLLM, **options: Any) -> Any:
    monkeypatch.setattr(patching, "_load", lambda *_: source)
    return patching.run(
        Config(source="source", questions=0, **options), Context(target, planted(), batch_size=3)
    ).tables


@pytest.mark.slow
def test_patching_a_model_with_itself_changes_nothing(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mllm = model("llava", folders)
    table = patched(monkeypatch, mllm, mllm)["scores"]
    assert set(table["layer"]) == {0, 1, 2, 3, 4}
    assert set(table["kind"]) == {PATCHED, SELF}
    assert (table["accuracy_drop"] == 0).all()
    assert (table["kl"] < 1e-6).all()
    assert (table["n_images"] == 4).all()
    # four images leave room for a drop
    assert (table["low"] < 0).all()
    assert (table["high"] > 0).all()
    assert table["few"].all()


@pytest.mark.slow
def test_a_blind_model_answers_with_the_tokens_of_one_that_sees(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the target is the source but for its connector, so that the source's tokens at layer 0 give the source's
    own answers."""
    source = model("llava", folders)
    blind = changed(source, lambda m: m.multi_modal_projector.linear_2.weight.zero_())
    quiz = Quiz(source, planted().scenes, 4)
    expected = quiz.scored(Quiz(blind, planted().scenes, 4).logprobs(), quiz.logprobs()).set_index("id")
    samples = patched(monkeypatch, blind, source)["samples"]
    own = samples[(samples["kind"] == PATCHED) & (samples["layer"] == 0)].set_index("id").loc[expected.index]
    assert (own["correct_after"] == expected["correct_after"]).all()
    assert np.allclose(own["kl"], expected["kl"], atol=1e-5)
    assert (own["kl"] > 1e-5).any()
    # nothing reads them after the last block
    assert (samples[(samples["kind"] == PATCHED) & (samples["layer"] == 4)]["kl"] < 1e-6).all()
    assert (samples[samples["kind"] == SELF]["kl"] < 1e-6).all()


def test_other_blocks_read_the_same_projection_but_other_layers(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = model("llava", folders)
    other = changed(target, lambda m: m.language_model.layers[0].self_attn.v_proj.weight.mul_(-1))
    table = patched(monkeypatch, target, other, layers=(0, 1))["scores"]
    kl = table[table["category"] == MEAN].set_index(["kind", "layer"])["kl"]
    assert kl[PATCHED, 0] < 1e-6
    assert kl[PATCHED, 1] > 1e-6
    assert kl[SELF, 1] < 1e-6


def test_a_source_runs_with_the_data_type_of_the_model_that_gets_its_tokens(folders: Path) -> None:
    stored = model("llava", folders)  # in float32
    for dtype in ("bfloat16", "float32"):
        mllm = MLLM.load(stored.name, dtype=dtype)
        config = Config(source=f"it={stored.name}", questions=0, layers=(0, 2))
        samples = patching.run(config, Context(mllm, planted(2), batch_size=2)).tables["samples"]
        kinds = {kind: table["kl"].to_numpy() for kind, table in samples.groupby("kind")}
        assert np.array_equal(kinds[PATCHED], kinds[SELF])


def test_a_source_that_was_trained_again_is_read_again(tmp_path: Path) -> None:
    """In one process, as in a notebook: neither its identity nor its tokens may be those of the old weights."""
    folder = tiny.build("llava", tmp_path / "llava")
    before = patching.uses(Config(source=str(folder)))
    assert before == {"source": MLLM.load(str(folder)).fingerprint}
    assert patching._load(str(folder), None) is patching._load(f"it={folder}", None)
    changed(MLLM.load(str(folder)), lambda m: m.language_model.norm.weight.mul_(2)).model.save_pretrained(folder)
    after = patching.uses(Config(source=str(folder)))
    assert after == {"source": MLLM.load(str(folder)).fingerprint} != before


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="the error is that it is missing")
def test_a_source_is_quantized_as_the_model_that_gets_its_tokens(folders: Path) -> None:
    mllm = model("llava", folders)
    mllm.load_in = "8bit"
    with pytest.raises(ConfigError, match="load_in is 8bit, which needs bitsandbytes"):
        patching.run(Config(source=mllm.name), Context(mllm, planted(2), batch_size=2))


def test_models_that_do_not_fit_are_refused(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llava, other, pali = model("llava", folders), model("llava_onevision", folders), model("paligemma", folders)
    with pytest.raises(
        ConfigError, match=r"llava_onevision and .*llava have different tokenizers: choose a source with the same one"
    ):
        patched(monkeypatch, llava, other)
    with pytest.raises(ModelError, match=r"paligemma depend on the question that follows"):
        patched(monkeypatch, pali, pali)
    with pytest.raises(ConfigError, match="layer 9 does not exist"):
        patched(monkeypatch, llava, llava, layers=(9,))
    wide = copy.deepcopy(llava.config)
    wide.get_text_config().hidden_size = 64
    monkeypatch.setattr(other, "config", wide)
    with pytest.raises(
        ConfigError,
        match=r"llava_onevision has visual tokens of width 64, .*llava of width 32: choose a source of the same width",
    ):
        patched(monkeypatch, llava, other)


@pytest.mark.slow
def test_the_command_compares_the_pair(runs_folder: Path, tmp_path: Path) -> None:
    models = [str(runs_folder / "baseline"), str(runs_folder / "viral")]
    words = [
        "analyses.patching",
        "--model",
        *models,
        "--limit",
        "3",
        "--layers",
        "0",
        "2",
        "--output_dir",
        str(tmp_path),
    ]
    assert refused(*words) == (
        "error: no source given: name the model whose tokens are put in with --source FOLDER_OR_HUB_ID"
    )
    done = run(*words, "--source", models[1])
    found = {stored.label: stored for stored in map(runs.load, runs.index(tmp_path)["folder"])}
    assert set(found) == {"baseline", "viral"}
    assert "patching-" in done.stdout
    scores = found["viral"].tables["scores"]
    assert (scores["accuracy_drop"] == 0).all()
    assert (scores["kl"] < 1e-6).all()
    (figure,) = ANALYSIS.figures(found).values()
    assert sum(trace.fill == "toself" for trace in figure.data) == 4
