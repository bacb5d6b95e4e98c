"""Models as commands name them: labels that tell them apart, names of one's own, and sentences for those that are not
there."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from analyses.dynamics.comparison import groups
from tests import tiny
from tests.conftest import refused
from workbench import runs
from workbench.analysis import execution as analyses_module
from workbench.analysis.declaration import Analysis, DataOptions, Result, Where
from workbench.analysis.execution import execute
from workbench.errors import ConfigError, ModelError
from workbench.mllm import MLLM
from workbench.mllm.load import load_config
from workbench.models import check_there, did_you_mean, label_of, named_models, split_name
from workbench.runs import Run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with folders of models."""
    for name in (
        "runs/a/checkpoint-100",
        "runs/b/checkpoint-100",
        "runs/viral",
        "runs/a/viral-s0",
        "runs/b/viral-s0",
        "runs/b/viral-s1",
        "lr=0.1",
    ):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "labels"),
    [
        (["runs/viral"], ["viral"]),
        (["runs/viral/"], ["viral"]),
        (["llava-hf/llava-1.5-7b-hf"], ["llava-1.5-7b-hf"]),
        (["runs/a/checkpoint-100", "runs/b/checkpoint-100"], ["a/checkpoint-100", "b/checkpoint-100"]),
        (
            ["runs/a/checkpoint-100", "runs/viral", "runs/b/checkpoint-100"],
            ["a/checkpoint-100", "viral", "b/checkpoint-100"],
        ),
        (["one/llava", "two/llava"], ["one/llava", "two/llava"]),
        (["viral", "runs/viral"], ["viral", "runs/viral"]),
        (["mine=runs/viral", "runs/a/checkpoint-100"], ["mine", "checkpoint-100"]),
        (["x/y=runs/viral"], ["x/y"]),
        (["viral=runs/a/checkpoint-100", "runs/viral"], ["viral", "runs/viral"]),
        (["lr=0.1"], ["lr=0.1"]),
        (["low=lr=0.1"], ["low"]),
        (["runs/a/viral-s0", "runs/b/viral-s0", "runs/b/viral-s1"], ["a/viral-s0", "b/viral-s0", "b/viral-s1"]),
    ],
)
def test_labels_are_the_shortest_that_tell_models_apart(words: list[str], labels: list[str], here: Path) -> None:
    models = named_models(words)
    assert list(models) == labels
    assert all(word.endswith(model) for word, model in zip(words, models.values(), strict=True))


def test_a_label_can_be_said_again(here: Path) -> None:
    """As `analyses.all` does, which calls each analysis for one model at a time."""
    for label, model in named_models(["runs/a/checkpoint-100", "runs/b/checkpoint-100"]).items():
        assert named_models([f"{label}={model}"]) == {label: model}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no model given: expected --model FOLDER_OR_HUB_ID"),
        (["runs/viral", "runs/viral"], "model runs/viral is given twice: expected each model once"),
        (
            ["runs/viral", "./runs/../runs/viral/"],
            r"model \./runs/\.\./runs/viral/, which is runs/viral too is given twice",
        ),
        (["a=runs/viral", "b=runs/viral"], "model runs/viral is given twice"),
        (["a/b", "a/b"], "model a/b is given twice"),
        (["a=runs/viral", "a=runs/a/viral-s0"], "two models are called 'a': expected NAME=FOLDER with different names"),
        (["=runs/viral"], "model is '=runs/viral': expected NAME=FOLDER_OR_HUB_ID, with text on both sides"),
        (["a="], "model is 'a=': expected NAME=FOLDER_OR_HUB_ID, with text on both sides"),
    ],
)
def test_models_that_cannot_be_told_apart_are_refused(words: list[str], message: str, here: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        named_models(words)


def test_a_link_to_the_same_folder_is_the_same_model(here: Path) -> None:
    (here / "latest").symlink_to(here / "runs" / "viral")
    assert list(named_models(["latest"])) == ["latest"]
    with pytest.raises(ConfigError, match="model latest, which is runs/viral too is given twice"):
        named_models(["runs/viral", "latest"])


def test_seeds_stay_seeds_of_one_name(here: Path) -> None:
    record = {"data_fingerprint": "d", "config": {}}
    labels = named_models(["runs/a/viral-s0", "runs/b/viral-s0", "runs/b/viral-s1"])
    found = {label: Run("k", record | {"label": label}, {"scores": pd.DataFrame()}) for label in labels}
    assert {name: sorted(seeds) for name, seeds in groups(found).items()} == {"a/viral": ["0"], "b/viral": ["0", "1"]}


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("runs/virl", "runs/viral"),
        ("./runs/virall", "runs/viral"),
        ("run/viral", "runs"),
        ("runs/a/checkpoint-10", "runs/a/checkpoint-100"),
        ("nothing/like/it", ""),
        ("llava-hf/llava-1.5-7b-hf", ""),
    ],
)
def test_the_nearest_folder_is_named(name: str, near: str, here: Path) -> None:
    assert did_you_mean(name) == (f"; did you mean '{near}'?" if near else "")


@pytest.mark.parametrize(
    "name", ["./runs/virl", "/nowhere/at/all", "runs/a/checkpoint-10", "~/nothing", "runs/virl/", ""]
)
def test_what_can_only_be_a_folder_is_not_asked_of_a_hub(
    name: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workbench.mllm.load.AutoConfig", None)
    with pytest.raises(
        ModelError,
        match="is neither a folder nor a hub id: expected the folder of a model, or an id such as NAME/MODEL",
    ) as refusal:
        load_config(name)
    assert len(str(refusal.value)) < 300
    assert "\n" not in str(refusal.value)


def test_a_file_is_no_model(here: Path) -> None:
    (here / "runs" / "viral" / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="is a file: expected the folder that holds it"):
        check_there("runs/viral/model.safetensors")
    check_there("runs/viral")
    check_there("llava-hf/llava-1.5-7b-hf")


def test_a_hub_id_that_does_not_exist_may_be_a_folder(here: Path) -> None:
    with pytest.raises(
        ModelError,
        match=r"model 'runs/virl' is neither a folder nor a hub id within reach \(.*\); did you mean 'runs/viral'\?$",
    ) as refusal:
        load_config("runs/virl")
    assert len(str(refusal.value)) < 300


def test_names_and_paths_are_split() -> None:
    assert split_name("a=b/c") == ("a", "b/c")
    assert split_name("b/c") == ("", "b/c")
    assert split_name("a=~/c") == ("a", str(Path.home() / "c"))  # shells expand ~ at the beginning of a word alone
    assert split_name("~/c") == ("", str(Path.home() / "c"))
    assert label_of("a=b/c") == "a"
    assert label_of("b/c") == "c"


# --- a model under several names ------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models, each in a folder of one name."""
    root = tmp_path_factory.mktemp("pair")
    first = tiny.build("llava", root / "a" / "checkpoint-1")
    second = Path(shutil.copytree(first, root / "b" / "checkpoint-1"))
    config = json.loads((second / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 1e-2
    (second / "config.json").write_text(json.dumps(config))
    return [first, second]


def _analysis() -> Analysis:
    def measure(config: Any, context: Any) -> Result:
        return Result({"scores": pd.DataFrame({"score": [context.mllm.config.text_config.rms_norm_eps]})})

    return Analysis(
        "toy", "A toy", DataOptions, measure, lambda found: {}, lambda found: pd.DataFrame({"model": list(found)})
    )


@pytest.mark.slow
def test_each_model_has_its_numbers_whatever_it_is_called(pair: list[Path], tmp_path: Path) -> None:
    def scores(*words: str) -> dict[str, float]:
        found = execute(_analysis(), DataOptions(limit=2), Where(model=words, output_dir=tmp_path / "runs"), [])
        assert [run.label for run in found.values()] == list(found)
        return {label: float(run.tables["scores"]["score"].item()) for label, run in found.items()}

    first, second = map(str, pair)
    assert scores(first, second) == {"a/checkpoint-1": 1e-6, "b/checkpoint-1": 1e-2}
    assert scores(f"x={second}", f"y={first}") == {"x": 1e-2, "y": 1e-6}
    copy = shutil.copytree(first, tmp_path / "moved")
    assert scores(str(copy)) == {"moved": 1e-6}
    table = runs.index(tmp_path / "runs")
    assert len(table) == 2
    assert table["label"].nunique() == 2


def test_a_revision_reaches_the_hub_and_the_record(
    pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    whole = MLLM.load(str(pair[0]), validate=False)
    whole.config._commit_hash = "c0ffee"

    def load(name: str, *, revision: str | None, **_: Any) -> MLLM:
        asked.append((name, revision))
        return whole

    monkeypatch.setattr(analyses_module, "MLLM", SimpleNamespace(load=load))
    where = Where(model=("some/model", str(pair[1])), revision="v1.2", output_dir=tmp_path)
    found = execute(_analysis(), DataOptions(limit=2), where, [])
    assert asked == [("some/model", "v1.2"), (str(pair[1]), None)]
    assert found["model"].record["commit"] == "c0ffee"
    assert runs.load(runs.folder_of(tmp_path, "toy", found["model"].key)).record["revision"] == "v1.2"
    with pytest.raises(
        ConfigError,
        match=r"revision is v1\.2, and .*checkpoint-1 is a folder: expected a hub id, since a folder has no revisions",
    ):
        execute(_analysis(), DataOptions(limit=2), dataclasses.replace(where, model=(str(pair[1]),)), [])


def test_the_trainers_models_have_revisions() -> None:
    from trainer.model_config import ModelConfig

    assert ModelConfig(name="some/model", revision="v1").revision == "v1"
    assert (
        ModelConfig(
            kind="assembled",
            vision_encoder="some/clip",
            vision_encoder_revision="a",
            language="some/llama",
            language_revision="b",
        ).language_revision
        == "b"
    )
    for wrong in (
        {"revision": "v1"},
        {"vision_encoder_revision": "v1"},
        {"language_revision": "v1", "language": "smollm2-135m-instruct"},
    ):
        with pytest.raises(ConfigError, match="revision is v1, but the revisions of a toy LLaVA"):
            ModelConfig(**wrong)  # type: ignore[arg-type]


@pytest.mark.slow
def test_all_analyses_keep_two_folders_of_one_name_apart(
    pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from analyses.all.__main__ import Budget, _section
    from workbench.models import named_models as names

    monkeypatch.setattr("analyses.all.__main__.load_analysis", lambda name: _analysis())
    asked = Budget(model=tuple(map(str, pair)), limit=2, output_dir=tmp_path)
    section, crashed = _section("toy", asked, names(asked.model))
    assert not crashed
    assert section.models == ["a/checkpoint-1", "b/checkpoint-1"]
    assert not section.notes
    assert f"a/checkpoint-1={pair[0]}" in section.commands[0]


def test_a_model_that_is_not_there_is_one_sentence(pair: list[Path]) -> None:
    said = refused("analyses.cknna", "--model", str(pair[0].parent / "checkpoint-2"), "--limit", "2")
    assert said.endswith(f"did you mean '{pair[0]}'?")
    assert len(said) < 400
