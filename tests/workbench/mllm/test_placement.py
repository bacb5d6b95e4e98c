"""Where a model's parts go and how they are quantized when it is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conftest import refused
from tests.tiny import build
from workbench import MLLM, load_data, read, run_analysis
from workbench.errors import ConfigError, UnknownNameError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llava", tmp_path_factory.mktemp("model") / "llava")


def hidden_states(mllm: MLLM) -> torch.Tensor:
    images = [scene[0].image for scene in load_data("shapes:val", limit=2).scenes]
    return torch.stack([sample.values.float() for sample in read(mllm, mllm.encode(images, ["What is it?"] * 2))])


@pytest.mark.slow
def test_a_device_map_changes_no_number(folder: Path) -> None:
    plain, mapped = MLLM.load(str(folder)), MLLM.load(str(folder), device_map="auto")
    assert mapped.fingerprint == plain.fingerprint
    assert hidden_states(mapped).equal(hidden_states(plain))
    asked = {"vfm": ["efficientnet-lite0"], "null": 10, "k": 3, "layers": [1], "limit": 4}
    runs = [run_analysis("cknna", folder, device_map=device_map, **asked) for device_map in (None, {"": "cpu"})]
    assert runs[0].key == runs[1].key
    assert runs[0].tables["scores"].equals(runs[1].tables["scores"])


def test_a_quantized_model_is_another_model(folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    plain, quantized = MLLM.load(str(folder)), MLLM.load(str(folder), load_in="8bit")
    first, second = hidden_states(plain), hidden_states(quantized)
    assert quantized.fingerprint != plain.fingerprint
    assert not first.equal(second)
    assert torch.cosine_similarity(first, second, dim=-1).min() > 0.98


def test_bad_input_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'auto'"):
        MLLM.load(str(folder), device_map="atuo")
    with pytest.raises(UnknownNameError, match="did you mean '8bit'"):
        MLLM.load(str(folder), load_in="8bits")
    words = ["analyses.cknna", "--model", str(folder), "--output_dir", str(tmp_path / "runs"), "--load_in", "3bit"]
    assert "8bit" in refused(*words)


def test_ranks_do_not_share_what_a_map_spreads(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    from workbench.analysis.declaration import Where
    from workbench.analysis.discover import load_analysis
    from workbench.analysis.execution import execute

    analysis = load_analysis("cknna")
    where = Where(model=(str(folder),), output_dir=tmp_path / "runs", device_map="auto")
    with pytest.raises(ConfigError, match="device_map is auto in 2 processes"):
        execute(analysis, analysis.config(limit=4), where, [])
