"""What the commands do, from Python: the same numbers, in memory or stored."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import transformers as tf

from tests.tiny import build
from workbench import MLLM, compare, load_data, run_analysis
from workbench.analysis.command import main
from workbench.errors import ConfigError, ModelError, RunError, UnknownNameError
from workbench.runs import Run, index, load

ASKED = {"vfm": ["efficientnet-lite0"], "null": 10, "k": 3, "layers": [1, 2], "limit": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llava", tmp_path_factory.mktemp("model") / "llava")


@pytest.fixture(scope="module")
def run(model: Path) -> Run:
    return run_analysis("cknna", model, **ASKED)


def test_a_run_in_memory_has_the_numbers_of_the_command(
    run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from analyses.cknna import ANALYSIS

    words = [
        "--model",
        str(model),
        "--vfm",
        "efficientnet-lite0",
        "--null",
        "10",
        "--k",
        "3",
        "--layers",
        "1",
        "2",
        "--limit",
        "4",
    ]
    monkeypatch.setattr("sys.argv", ["analyses.cknna", *words, "--output_dir", str(tmp_path)])
    main(ANALYSIS)
    (folder,) = (path.parent for path in tmp_path.glob("cknna-*/run.json"))
    stored = load(folder)
    pd.testing.assert_frame_equal(run.tables["scores"], stored.tables["scores"], check_exact=True)
    assert run.key == stored.key
    assert set(run.record) == set(json.loads((folder / "run.json").read_text())) - {
        "key",
        "tables",
    }
    assert run.save(tmp_path / "again") == tmp_path / "again" / folder.name
    assert load(tmp_path / "again" / folder.name).key == run.key
    assert index(tmp_path / "again")["folder"].tolist() == [tmp_path / "again" / folder.name]


@pytest.mark.slow
def test_a_stored_run_is_looked_up(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from analyses import cknna

    first = run_analysis("cknna", model, output_dir=tmp_path, **ASKED)
    monkeypatch.setattr(cknna, "_compare_chunk", None)
    assert run_analysis("cknna", model, output_dir=tmp_path, **ASKED).record == first.record


@pytest.mark.slow
def test_models_in_memory_and_folders_are_one_model(run: Run, model: Path) -> None:
    wrapped = MLLM.wrap(
        tf.AutoModelForImageTextToText.from_pretrained(model), tf.AutoProcessor.from_pretrained(model), name="mine"
    )
    for given in (wrapped, (wrapped.model, wrapped.processor)):
        again = run_analysis("cknna", given, data=load_data("shapes:val", limit=4), **ASKED)
        pd.testing.assert_frame_equal(again.tables["scores"], run.tables["scores"])
        assert again.record["data"] == "shapes:val"
        assert again.key == run.key
    assert run_analysis("cknna", wrapped, label="other", **ASKED).label == "other"
    wrong = tf.AutoProcessor.from_pretrained(model)
    wrong.patch_size = 7
    with pytest.raises(ModelError):
        MLLM.wrap(wrapped.model, wrong)


@pytest.mark.slow
def test_a_model_changed_in_memory_is_another_model(model: Path, tmp_path: Path) -> None:
    mllm = MLLM.load(str(model), validate=False)
    first = run_analysis("cknna", mllm, output_dir=tmp_path, **ASKED)
    mllm.decoder.layers[0].mlp.down_proj.weight.data.zero_()  # which torch does not count as a change
    changed = run_analysis("cknna", mllm, output_dir=tmp_path, **ASKED)
    assert changed.key != first.key
    assert changed.tables["scores"]["score"].tolist() != first.tables["scores"]["score"].tolist()
    mllm.model.load_state_dict(MLLM.load(str(model), validate=False).model.state_dict())
    assert run_analysis("cknna", mllm, output_dir=tmp_path, **ASKED).key == first.key


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("visual_residual", {"source": "projector", "layers": [2], "features": 0}, "leaves out: expected MLLM.load"),
        ("viral_second_encoder", {"vfm": "dinov2-small"}, "only the trainer can run it"),
    ],
)
def test_a_plain_model_without_what_its_config_asks_for_is_refused(
    key: str, value: object, message: str, model: Path
) -> None:
    """transformers ignores both keys, so the model in memory is not the one that was trained."""
    plain = tf.AutoModelForImageTextToText.from_pretrained(model)
    setattr(plain.config, key, value)
    with pytest.raises(ModelError, match=message):
        MLLM.wrap(plain, tf.AutoProcessor.from_pretrained(model))


def test_runs_are_compared_by_label(run: Run, model: Path) -> None:
    other = run_analysis("cknna", f"second={model}", **ASKED)
    both = compare([run, other])
    assert list(both.tables["scores"]["model"].unique()) == ["llava", "second"]
    assert len(both.tables["scores"]) == 2 * len(run.tables["scores"])
    assert set(both.figures()) > set(run.figures())
    assert len(both.summary) == 2 * len(run.tables["scores"])
    with pytest.raises(RunError, match="2 runs with labels llava: expected one or more of different labels"):
        compare([run, run])
    assert list(compare({"a": run, "b": run}).runs) == ["a", "b"]


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ({"name": "cknn"}, UnknownNameError, "did you mean 'cknna'"),
        ({"limt": 3}, ConfigError, "unknown option 'limt' of cknna: did you mean 'limit'"),
        ({"k": 0}, ConfigError, "k is 0"),
        ({"k": "10"}, ConfigError, "k is '10': expected a whole number"),
        ({"by": "tiles"}, ConfigError, "by is 'tiles': expected 'grid' or 'tile'"),
        ({"vfm": "dinov2-small"}, ConfigError, "vfm is 'dinov2-small': expected a list"),
        ({"layers": 3}, ConfigError, "layers is 3: expected a list"),
    ],
)
def test_bad_input_is_one_sentence(model: Path, words: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run_analysis(**({"name": "cknna", "model": model, "vfm": ["efficientnet-lite0"]} | words))  # type: ignore[arg-type]
