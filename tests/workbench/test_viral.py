"""The command `viral`: it is every other command, it completes itself, and a file may have an analysis's options."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from analyses.cknna import ANALYSIS as CKNNA
from tests import tiny
from tests.conftest import ROOT, refused, run
from workbench.analysis.command import run as run_analysis
from workbench.analysis.discover import analysis_names
from workbench.cli import ConfigFile, parse_with_file
from workbench.commands import COMMANDS, main, version
from workbench.completion import script
from workbench.errors import ConfigError, UnknownNameError
from workbench.package_files import RECIPES, SWEEPS


def viral(*words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What `viral WORDS`, run in this process, says where it refuses them."""
    monkeypatch.setattr(sys, "argv", ["viral", *words])
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    assert ended.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_there_and_refuses_what_it_does_not_know(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = {"train": ["shapes_viral"], "sweep": ["demo"], "analyze": ["cknna"], "card": ["runs/viral"]}.get(name, [])
    said = viral(name, *first, "--xyz", "1", monkeypatch=monkeypatch, capsys=capsys)
    assert said.startswith("error: unknown option '--xyz'")
    assert len(said) < 300


def test_the_first_word_names_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown command 'trian': .*did you mean 'train'\?"):
        main(["trian"])
    with pytest.raises(ConfigError, match=r"no command given: expected viral demo\|train"):
        main([])
    main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in COMMANDS)
    assert all(len(line) < 120 for line in shown.splitlines())


def test_debug_reaches_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["viral", "train", "nothing", "--debug"])
    with pytest.raises(UnknownNameError):
        main(["train", "nothing"])


def test_the_version_is_that_of_the_code_that_runs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"viral": "viral_workbench:main"}
    said = version()
    assert said.startswith(f"viral-workbench {project['version']}")
    if (ROOT / ".git").exists():
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
        assert f"(commit {commit[:12]}" in said


def test_an_analysis_is_named_as_in_its_module(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused("analyses", "cknnna").endswith("did you mean 'cknna'?")
    assert refused("analyses", "--modle").startswith("error: unknown option '--modle'")
    assert refused("analyses", "all", "--modle", "a") == refused("analyses.all", "--modle", "a")
    assert refused("analyses", "knockout", "--model", "a", "--width", "0") == refused(
        "analyses.knockout", "--model", "a", "--width", "0"
    )


# --- completion -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def completion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("completion") / "viral"
    file.write_text(script("bash"))
    return file


def completed(file: Path, *words: str) -> list[str]:
    """What bash offers for the last word."""
    code = (
        f"source {shlex.quote(str(file))}; COMP_WORDS=({shlex.join(['viral', *words])}); COMP_CWORD={len(words)};"
        " _viral; printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    return subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_bash_completes_commands_names_and_options(completion: Path) -> None:
    assert completed(completion, "") == [*COMMANDS, "--help", "--version"]
    assert completed(completion, "tr") == ["train"]
    assert completed(completion, "train", "shapes_") == [name for name in RECIPES.files() if name.startswith("shapes_")]
    assert completed(completion, "sweep", "de") == ["demo"]
    assert set(SWEEPS.files()) < set(completed(completion, "sweep", ""))
    assert completed(completion, "analyze", "") == analysis_names()
    assert completed(completion, "analyze", "ck") == ["cknna"]
    assert completed(completion, "train", "shapes_viral", "--alignment.la") == ["--alignment.layer"]
    assert completed(completion, "analyze", "cknna", "--vf") == ["--vfm", "--vfm_layers"]
    assert completed(completion, "analyze", "knockout", "--vf") == []
    assert completed(completion, "analyze", "cknna", "--conf") == ["--config"]
    assert completed(completion, "demo", "--no") == ["--no-headless"]
    # not the words that it takes in order
    assert completed(completion, "convert", "--") == ["--vision_tower", "--base", "--help", "--debug"]


def test_zsh_has_the_same_script() -> None:
    bash, zsh = script("bash"), script("zsh")
    assert zsh.endswith(bash)
    assert "bashcompinit" in zsh
    assert "bashcompinit" not in bash


# --- a file with options --------------------------------------------------------------------------


def test_a_file_has_the_options_and_flags_override_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("vfm: [dinov2-small, efficientnet-lite0]\nk: 7\nlimit: 12\nmodel: runs/a\nrevision: null\n")
    asked = []
    monkeypatch.setattr(
        "workbench.analysis.command.execute",
        lambda analysis, config, where, argv: asked.append((config, where, argv)) or {},
    )
    monkeypatch.setattr("workbench.analysis.command.Analysis.summary", None, raising=False)
    for words in (
        ["--config", str(file), "--k", "5"],
        ["--k", "5", f"--config={file}"],
        ["--vfm", "dinov2-small", "--config", str(file)],
    ):
        with pytest.raises(Exception, match=r".*"):  # an empty result has no summary
            run_analysis(CKNNA, words)
    (first, where, argv), (second, _, _), (third, _, _) = asked
    assert first == second
    assert (first.k, first.limit, first.vfm) == (5, 12, ("dinov2-small", "efficientnet-lite0"))
    assert where.model == ("runs/a",)
    assert where.revision is None
    assert (third.k, third.vfm) == (7, ("dinov2-small",))
    assert argv == ["python", "-m", "analyses.cknna", "--config", str(file), "--k", "5"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("limt: 3", r"unknown key 'limt' in .*options\.yaml: did you mean 'limit'\?"),
        ("limit: [3]", "key 'limit' in .* is .*: expected one value"),
        ("limit: three", "limit"),
        ("limit: 3\nlimit: 4", "file .* is not valid YAML .*'limit' appears twice"),
        ("- limit", "file .* holds list: expected a mapping"),
        (
            "config: other.yaml",
            r"key 'config' in .*options\.yaml is other\.yaml: expected other options there",
        ),
        (None, r"no file .*options\.yaml: expected a YAML file; did you mean '.*option\.yaml'\?"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_sentence(text: str | None, message: str, tmp_path: Path) -> None:
    (tmp_path / "option.yaml").write_text("")
    if text is not None:
        (tmp_path / "options.yaml").write_text(text)

    with pytest.raises(ConfigError, match=message):
        parse_with_file(_options(), ["--config", str(tmp_path / "options.yaml")], prog="test")


@pytest.mark.parametrize(
    "words", [["--config"], ["--config", "--limit", "3"], ["--config="], ["--config", "a.yaml", "--config", "b.yaml"]]
)
def test_the_option_has_one_file(words: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"option '--config' (has|appears twice)"):
        parse_with_file(_options(), words, prog="test")


def _options() -> type:
    from dataclasses import make_dataclass

    return make_dataclass("Command", [], bases=(CKNNA.config, ConfigFile), frozen=True)


@pytest.mark.slow
def test_a_file_and_flags_are_one_question(tmp_path: Path) -> None:
    """The real command, twice: the second time the run is looked up."""
    model = tiny.build("llava", tmp_path / "llava")
    (tmp_path / "options.yaml").write_text(
        f"model: {model}\nlimit: 4\nk: 5\nlayers: [0, 2]\n'null': 10\noutput_dir: {tmp_path}/runs\n"
    )
    run("analyses", "cknna", "--config", str(tmp_path / "options.yaml"), "--limit", "3")
    (folder,) = (tmp_path / "runs").glob("[!.]*")
    config = json.loads((folder / "run.json").read_text())["config"]
    assert (config["limit"], config["k"], config["layers"]) == (3, 5, [0, 2])
    flags = [
        "--model",
        str(model),
        "--limit",
        "3",
        "--k",
        "5",
        "--layers",
        "0",
        "2",
        "--null",
        "10",
        "--output_dir",
        str(tmp_path / "runs"),
    ]
    run("analyses.cknna", *flags)
    assert list((tmp_path / "runs").glob("[!.]*")) == [folder]
