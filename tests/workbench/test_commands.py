"""Every command: a stray word is refused, and what is refused leaves no folder behind."""

from __future__ import annotations

import gc
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest

from tests import tiny
from tests.conftest import ROOT, SMALL, recipe, refused
from trainer.recipe import Recipe
from workbench.analysis import discover
from workbench.analysis.command import run as run_analysis
from workbench.analysis.declaration import Analysis
from workbench.analysis.discover import analysis_files, load_analyses, words_of
from workbench.cli import number_text, parse
from workbench.errors import ConfigError, RunError
from workbench.files import atomic_file, atomic_folder, check_can_make, locked
from workbench.html_page import html_table
from workbench.vfm.__main__ import main as show
from workbench.yaml_config import nearest_key


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build("llava", tmp_path_factory.mktemp("model") / "llava")


BAD = {
    "no model": lambda model: [],
    "model": lambda model: ["--model", f"{model}x"],
    "the same model": lambda model: ["--model", str(model), str(model)],
    "data": lambda model: ["--model", str(model), "--data", "shapes:vall"],
    "limit": lambda model: ["--model", str(model), "--limit", "0"],
    "option": lambda model: ["--model", str(model), "--lmit", "3"],
    "revision": lambda model: ["--model", str(model), "--revision", "main"],
}
LATE: dict[str, list[str]] = {  # what is wrong only once data and model are there
    "attention": ["--layers", "99"],
    "benchmark": ["--prompt", "paper"],
    "cknna": ["--layers", "99"],
    "dynamics": [],
    "heads": ["--layers", "0"],
    "knockout": ["--width", "99"],
    "linear_probe": ["--layers", "99"],
    "logit_lens": ["--layers", "99"],
    "patching": ["--source", "./nothing"],
    "permutation": ["--layers", "99"],
    "tokens": ["--layers", "99"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*analysis_files(), "all"])
def test_an_analysis_that_is_refused_leaves_no_folder(name: str, model: Path, tmp_path: Path) -> None:
    out = [
        "--output_dir",
        str(tmp_path / "new" / "runs"),
        *(["--report", str(tmp_path / "new" / "report.html")] if name == "all" else []),
    ]
    for words in BAD.values():
        refused(f"analyses.{name}", *words(model), *out)
        assert not list(tmp_path.iterdir()), words(model)
    if name != "all":  # which reports what an analysis refuses
        refused(f"analyses.{name}", "--model", str(model), "--limit", "2", *LATE[name], *out)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        ["--data.train", "shapes:trian"],
        ["--data.val", "shapes:vall"],
        ["--start", "nothing"],
        ["--model.vision_encoder", "dinov2-smal"],
        ["--alignment.vfm", "dinov2-smal"],
        ["--alignment.layer", "99"],
        ["--model.image_size", "57"],
        ["--optim.lr", "1"],
        ["--resume"],
    ],
)
def test_a_training_that_is_refused_leaves_no_folder(words: list[str], tmp_path: Path) -> None:
    refused(
        "trainer", recipe("viral"), "--stage1", "None", *SMALL, *words, "--output_dir", str(tmp_path / "new" / "model")
    )
    assert not list(tmp_path.iterdir())


def test_conversations_that_are_refused_leave_no_folder(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "model"
    for name, data in ((str(model), "llava_json:nothing.json"), (f"{model}x", "shapes:train")):
        refused("trainer", "--model.name", name, "--data.train", data, "--output_dir", str(out))
        assert not list(tmp_path.iterdir())


def test_other_commands_that_are_refused_leave_no_folder(model: Path, tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(
        f"variants: ['baseline: {tmp_path}/nothing.yaml']\noutput_dir: {tmp_path}/new/sweep\n"
    )
    out = str(tmp_path / "new" / "out")
    for words in (
        ["trainer.sweep", str(tmp_path / "sweep.yaml")],
        ["trainer.sweep", str(tmp_path / "sweep.yaml"), "--report"],
        ["trainer.card", out],
        ["workbench.convert", str(tmp_path / "nothing"), out],
        ["workbench.convert", str(model), out],
        ["workbench.vfm", "dinov2-smal"],
    ):
        refused(*words)
        assert [path.name for path in tmp_path.iterdir()] == ["sweep.yaml"], words


# --- the means ------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [atomic_folder, atomic_file])
def test_what_cannot_be_written_leaves_no_parents(write: Callable[[Path], object], tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="no"), write(tmp_path / "there" / "new" / "target"):  # type: ignore[attr-defined]
        raise ValueError("no")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert not list((tmp_path / "there").iterdir())
    with write(tmp_path / "there" / "new" / "target") as partial:  # type: ignore[attr-defined]
        if not partial.is_dir():
            partial.write_text("a")
    assert (tmp_path / "there" / "new" / "target").exists()


def test_a_lock_leaves_no_parents_but_what_was_written_there(tmp_path: Path) -> None:
    with locked(tmp_path / "new" / ".a.lock") as held:
        assert held
    assert not list(tmp_path.iterdir())
    with locked(tmp_path / "new" / ".a.lock"):
        (tmp_path / "new" / "a").write_text("a")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a"]


def test_whether_a_folder_can_be_made_is_asked_without_making_it(tmp_path: Path) -> None:
    check_can_make(tmp_path / "new" / "runs")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "runs", Path("/proc/here")):
        with pytest.raises(RunError, match=f"cannot make folder {path}"):
            check_can_make(path)


# --- words that belong to no option ---------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["trainer", recipe("viral"), "dinov2-small"],
        ["trainer", recipe("viral"), "dinov2-small", "--seed", "1"],
        ["trainer", recipe("viral"), "--seed", "1", "dinov2-small"],
        ["trainer.sweep", str(ROOT / "trainer" / "sweeps" / "demo.yaml"), "5"],
        ["trainer.card", "runs/viral", "again"],
        ["analyses.cknna", "runs/viral"],
        ["analyses.cknna", "runs/viral", "--limit", "2"],
        ["analyses.all", "runs/viral"],
        ["workbench.convert", "a", "b", "c"],
    ],
)
def test_a_stray_word_is_refused(words: list[str]) -> None:
    said = refused(*words)
    assert any(f"{word}" in said for word in words[1:])
    assert len(said) < 300


def test_words_of_a_list_are_not_stray(capsys: pytest.CaptureFixture[str]) -> None:
    asked = parse(
        Recipe, ["--alignment.vfm", "dinov2-small", "efficientnet-lite0"], prog="x", recipe=Path(recipe("viral"))
    )
    assert asked.alignment.vfm == ("dinov2-small", "efficientnet-lite0")

    @dataclass(frozen=True)
    class Listed:
        model: tuple[str, ...] = ()

    assert parse(Listed, ["--model", "a", "b"], prog="x").model == ("a", "b")
    show(["efficientnet-lite0"])  # a command of words
    assert "efficientnet-lite0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("optim.lr", "optim.learning_rate"),
        ("lr", "optim.learning_rate"),
        ("learning_rate", "optim.learning_rate"),
        ("optim.learnig_rate", "optim.learning_rate"),
        ("optm.steps", "optim.steps"),
        ("data.batch_size", "optim.batch_size"),
        ("optim.bs", "optim.batch_size"),
        ("optim.max_steps", "optim.steps"),
        ("alignment.layers", "alignment.layer"),
        ("outputdir", "output_dir"),
        ("xyz", None),
    ],
)
def test_the_nearest_key_is_near_in_its_last_part(key: str, near: str | None) -> None:
    from workbench.yaml_config import config_fields

    assert nearest_key(key, [name for name, _ in config_fields(Recipe)]) == near


def test_an_unknown_option_is_one_short_sentence(tmp_path: Path) -> None:
    assert refused("trainer", recipe("viral"), "--optim.lr", "1").endswith(
        "unknown option '--optim.lr': did you mean '--optim.learning_rate'?"
    )
    (tmp_path / "r.yaml").write_text("optim:\n  lr: 1.0\n")
    with pytest.raises(ConfigError, match=r"unknown key 'optim\.lr' in .*: did you mean 'optim\.learning_rate'\?$"):
        parse(Recipe, [], prog="x", recipe=tmp_path / "r.yaml")
    assert len(refused("trainer", recipe("viral"), "--xyz", "1")) < 300


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["trainer.sweep", "shapes_seeds", "--launcher", "slurm"],
            "unknown value of --launcher 'slurm': expected one of local, submitit",
        ),
        (
            ["analyses.cknna", "--model", "x", "--device_map", "atuo"],
            "unknown value of --device_map 'atuo': expected one of auto, balanced, balanced_low_0, sequential;"
            " did you mean 'auto'?",
        ),
        (["analyses.all", "--hlep"], "unknown option '--hlep': did you mean '--help'?"),
        (
            ["trainer", "shapes_viral", "--alignment.objective", "cosin"],
            "unknown value of --alignment.objective 'cosin': expected one of cosine, none, predict, relation;"
            " did you mean 'cosine'?",
        ),
    ],
)
def test_a_wrong_choice_names_the_option_and_the_nearest_value(words: list[str], message: str) -> None:
    assert refused(*words) == f"error: {message}"


@pytest.mark.parametrize("analysis", load_analyses().values(), ids=load_analyses())
def test_help_says_what_a_number_is_not(analysis: Analysis, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_analysis(analysis, ["--help"])
    text = " ".join(capsys.readouterr().out.partition("options ─")[0].split())
    assert text.startswith(f"usage: {' '.join(words_of(analysis.name))} [-h] [OPTIONS] {analysis.title}. ")
    assert re.search(r"What (the numbers?|this number|they) (is|are|do) not", text)
    example = f" python -m analyses.{analysis.name} --model "
    assert example in text


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    code = "from workbench.cli import command; command(lambda _: print('x' * 10**6))"
    done = subprocess.run(
        ["bash", "-c", f"{shlex.join([sys.executable, '-c', code])} | head -c 5; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("xxxxx", "", 141)


def test_pages_in_many_threads_read_what_an_analysis_says() -> None:
    """Python 3.11 loses count of a syntax tree's depth if another thread parses too (here: whenever garbage is
    collected), and raises SystemError: a page did, once in 4000."""
    files, threshold = list(analysis_files().values()) * 20, gc.get_threshold()
    read = discover._docstring.__wrapped__

    def switch(*_: object) -> None:
        time.sleep(0)  # lets another thread run

    gc.callbacks.append(switch)
    gc.set_threshold(50)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(read, files))
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(switch)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.000"),
        (-1e-17, "0.000"),
        (0.4996, "0.500"),
        (0.0004, "0.0004"),
        (-0.00042, "-0.0004"),
        (2.4e-5, "2e-05"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
    ],
)
def test_a_printed_number_looks_like_0_only_if_it_is(value: float, text: str) -> None:
    """A p-value is never 0, and the sign of a small difference shows."""
    assert number_text(value) == text
    rows = html_table(pd.DataFrame({"p": [value, 0.25]}), "table").split("<p>")[0]
    assert f"<td>{'' if text == 'nan' else text}</td>" in rows
    assert "<td>0.250</td>" in rows
