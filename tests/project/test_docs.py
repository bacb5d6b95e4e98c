"""Every command, link and piece of Python in the README and the pages works: as it stands, but on the small models and
with small settings."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from skimage import data as photographs

from tests.conftest import ROOT, SMALL, SMALL_VIRAL, launch, run
from tests.pages import DOCS, PAGES, README, blocks, commands
from tests.tiny import build
from trainer.recipe import Recipe
from workbench.cli import parse
from workbench.data.twins.write import write_twin

OUTSIDE = ("results/",)  # pages whose commands are what made their tables, hours long


def _commands() -> Iterator[str]:
    for text in (README, *(text for name, text in PAGES.items() if not name.startswith(OUTSIDE))):
        yield from commands(text)


# the first is test_pretrained's
COMMANDS = [line for line in dict.fromkeys(_commands()) if "mine.yaml" not in line and "ablation" not in line]
FEW = {
    "analyses.benchmark": ["--limit", "2", "--blind", "off"],
    "analyses.attention": ["--limit", "12", "--null", "10"],
    "analyses.cknna": ["--limit", "12", "--null", "10", "--k", "5"],
    "analyses.permutation": ["--limit", "3", "--permutations", "1", "--layers", "2"],
    "analyses.knockout": ["--limit", "3", "--layers", "2", "--width", "1"],
    "analyses.logit_lens": ["--limit", "12", "--null", "10", "--maps", "1"],
    "analyses.linear_probe": ["--limit", "20", "--controls", "1", "--folds", "2"],
    "analyses.all": ["--limit", "3", "--only", "cknna", "dynamics"],
    "analyses.dynamics": ["--limit", "3", "--permutations", "1", "--null", "10", "--k", "5"],
    "analyses.heads": ["--limit", "3", "--null", "10", "--k", "5"],
    "analyses.tokens": ["--limit", "3", "--umap_images", "0", "--null", "10"],
    "analyses.patching": ["--limit", "3", "--layers", "2"],
}


@pytest.fixture(scope="module")
def folder(runs_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder as the pages assume it: recipes, `my_photos`, and `runs` with a trained pair and their first
    stages."""
    root = tmp_path_factory.mktemp("readme")
    for name in ("trainer", "app.py", "analyses", "workbench", "viral_workbench.py", "benchmarks"):
        (root / name).symlink_to(ROOT / name)
    shutil.copytree(runs_folder, root / "runs")
    (root / "my_photos").mkdir()
    Image.fromarray(photographs.astronaut()).save(root / "my_photos" / "astronaut.jpg")
    return root


def here(folder: Path, *words: str, code: int = 0) -> str:
    """What `python -m ...` prints, run in this process: each of its own would spend seconds on imports."""
    printed, errors = io.StringIO(), io.StringIO()
    ended: object = 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        patch.chdir(folder)
        patch.setattr(sys, "argv", list(words))
        patch.setitem(sys.modules, "__main__", sys.modules["__main__"])
        try:
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        except SystemExit as stop:
            ended = stop.code or 0
    assert ended == code, f"{words} ended with {ended}:\n{printed.getvalue()}\n{errors.getvalue()}"
    return printed.getvalue() if code == 0 else errors.getvalue()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("line", COMMANDS, ids=lambda line: " ".join(line.split()[2:5]))
def test_command(line: str, folder: Path, tmp_path: Path) -> None:
    words = shlex.split(line, comments=True)
    if words[0] == "streamlit":
        assert "streamlit run app.py" in line  # the browser test starts exactly this
        return
    start = folder / "runs" / "baseline"
    if words[:2] == ["accelerate", "launch"]:
        few = [
            *SMALL_VIRAL,
            "--optim.steps",
            "2",
            "--eval_every",
            "2",
            "--start",
            str(start),
            "--output_dir",
            str(tmp_path / "out"),
        ]
        of_an_analysis = words[words.index("-m") + 1].startswith("analyses.")
        few = FEW["analyses.cknna"] if of_an_analysis else few
        if "fsdp" in line:  # by the real launcher
            done = run("accelerate.commands.launch", *words[2:], *few, cwd=folder)
        else:
            done = launch(*words[2:], *few, cwd=folder)
        assert ("cknna-" if of_an_analysis else "accuracy") in done.stdout
        return
    assert words[:2] == ["python", "-m"]
    module, given = words[2], words[3:]
    given = [
        str(tmp_path / Path(word).name) if given[i - 1] == "--output_dir" and module != "analyses" else word
        for i, word in enumerate(given)
    ]
    if module == "trainer":
        small = SMALL_VIRAL if "viral" in line else SMALL
        done = run(module, *given, *small, "--start", str(start), cwd=folder)
        assert ("visual tokens" if "--dry_run" in given else "accuracy") in done.stdout
    elif module == "trainer.sweep":
        sweep = tmp_path / "sweep.yaml"
        flags = " ".join(SMALL)
        sweep.write_text(
            f"seeds: [0]\nvariants:\n  - 'stage1: trainer/recipes/shapes_stage1.yaml {flags}'\n"
            f"  - 'baseline: trainer/recipes/shapes_baseline.yaml --start {{output_dir}}/stage1-s{{seed}} {flags}'\n"
        )
        if "--report" in given:
            assert "no finished run" in run(module, str(sweep), *given[1:], cwd=folder, code=2).stderr
        else:
            assert "baseline" in run(module, str(sweep), *given[1:], cwd=folder).stdout
    elif "--push_to_hub" in given:  # where nobody is logged in
        assert "hub" in here(folder, module, *given, code=2)
    elif module == "analyses.all":
        assert "report.html" in here(folder, module, *given, *FEW[module])
        assert (folder / "report.html").exists()
    elif module == "analyses.claims":
        for name in given[1 : given.index("runs/scarce_easy_vqa") + 1]:
            (folder / name).mkdir(exist_ok=True)
        assert (
            "trainer.sweep" in here(folder, module, *given)
            if "--commands" in given
            else "no runs yet" in here(folder, module, *given)
        )
    elif module == "workbench.data.twins":
        assert "pope, whatsup, mmvp" in here(folder, module, *given)  # which the commands after it read
    elif module.startswith("analyses."):
        for name in set(re.findall(r"\btwins/(\w+)", line)) - {path.name for path in folder.glob("twins/*")}:
            write_twin(folder / "twins" / name, name)
        few = FEW[module][:4] if "photos" in line else FEW[module]
        few = [*few, "--benchmark_limit", "3"] if "--benchmarks" in words else few
        assert f"{module.removeprefix('analyses.')}-" in here(folder, module, *given, *few)
    elif module.startswith("benchmarks."):
        assert run(module, *given, cwd=folder).stdout
    else:
        assert here(folder, module, *given)


@pytest.mark.slow
def test_commands_that_are_only_read() -> None:
    """Those of the result pages and the long sweeps: module, files and options exist."""
    texts = "\n".join(
        [
            *(block for text in PAGES.values() for block in blocks(text, "")),
            *(line for text in PAGES.values() for line in commands(text)),
        ]
    )
    lines = re.findall(r"^python -m .*$", texts, re.M) + re.findall(
        r"`(python -m [^`]*)`", "\n".join([README, *PAGES.values()])
    )
    assert len(lines) > 60
    for line in lines:
        words = shlex.split(line, comments=True)
        assert words[2] in ("MODULE", "analyses.NAME") or importlib.util.find_spec(words[2]), line
        for name in (word for word in words if word.endswith(".yaml") and "/" in word):
            assert (ROOT / name).exists(), line
        if (
            words[2] == "trainer"
            and len(words) > 3
            and words[3].endswith(".yaml")
            and "/" in words[3]
            and "VALUE" not in line
        ):
            parse(Recipe, words[4:], prog="trainer", recipe=ROOT / words[3])


@pytest.mark.parametrize("module", ["trainer", "trainer.sweep", "trainer.card", "workbench.convert", "analyses.cknna"])
def test_help_names_options_as_the_pages_do(module: str) -> None:
    """With underscores, and its examples a line each."""
    shown = run(module, "--help").stdout
    options = re.findall(r"^│ (--[\w.-]+)", shown, re.M)
    assert options
    assert not [name for name in options if "-" in name[2:]]
    assert len(re.findall(r"^    (?:python|accelerate) ", shown, re.M)) == shown.split("╭")[0].count(" -m ") - 1


def test_readme_python(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = blocks(README, "python")
    exec(compile(block, "README.md", "exec"), {})
    score, null = capsys.readouterr().out.split(maxsplit=1)
    assert 0 < float(score) < 1
    assert null.startswith("Null(mean=")


def test_probe_python(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = blocks(PAGES["howto/probe.md"], "python")
    monkeypatch.chdir(folder)
    exec(compile(block, "probe.md", "exec"), {})
    grid, shapes = capsys.readouterr().out.strip().splitlines()
    assert grid.startswith("(8, 8) (0.0, 0.0, 0.125, 0.125)")
    assert shapes.startswith("torch.Size([2, 64, 32]) torch.Size([1, 4, 1, ")


@pytest.mark.slow
def test_other_tools_python(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What nnsight and TransformerLens read is what `read` reads."""
    with_nnsight, with_lens = blocks(PAGES["howto/other_tools.md"], "python")
    monkeypatch.chdir(folder)
    scope: dict[str, Any] = {}
    (tmp_path / "other_tools.py").write_text(with_nnsight)
    exec(compile(with_nnsight, tmp_path / "other_tools.py", "exec"), scope)  # nnsight reads the source of a trace
    assert capsys.readouterr().out.strip() == "torch.Size([64, 32]) True"
    assert scope["logits"].isfinite().all()
    if importlib.util.find_spec("transformer_lens"):
        llava = build("llava", tmp_path / "llava")
        exec(compile(with_lens.replace("llava-hf/llava-1.5-7b-hf", str(llava)), "other_tools.md", "exec"), scope)
        assert capsys.readouterr().out.strip() == "True"


def test_read_run_python(
    runs_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    for path in runs_folder.glob("cknna-*"):
        if json.loads((path / "run.json").read_text())["config"]["limit"] == 6:
            shutil.copytree(path, tmp_path / "runs" / path.name)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    for block in blocks(PAGES["howto/read_run.md"], "python"):
        exec(compile(block, "read_run.md", "exec"), scope)
    assert set(scope["both"].runs) == {"baseline", "viral"}
    assert "Alignment by layer" in capsys.readouterr().out
    assert (scope["run"].tables["scores"].n_images == 6).all()


def cells(name: str) -> list[str]:
    content = json.loads((DOCS / "notebooks" / name).read_text())
    assert content["nbformat"] == 4
    assert not any(cell.get("outputs") for cell in content["cells"])
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "code"]


def run_notebook(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(folder)
    scope: dict[str, Any] = {}
    for number, cell in enumerate(cells(name)):
        exec(compile(cell, f"{name}, cell {number}", "exec"), scope)
    return scope


@pytest.mark.slow
def test_probe_notebook(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scope = run_notebook("probe_a_model.ipynb", folder, monkeypatch)
    scores = scope["both"].tables["scores"]
    assert scope["states"].shape == (4, 64, 32)
    assert list(scope["both"].runs) == ["baseline", "viral"]
    assert "Alignment by layer" in scope["figures"]
    assert set(scores.layer) == {0, 1, 2, 3}
    assert (scores.n_images == 12).all()


@pytest.mark.slow
def test_alignment_notebook(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both losses are trained: the heads and the language model move, and the alignment loss falls."""
    scope = run_notebook("align_your_loop.ipynb", folder, monkeypatch)
    losses = [alignment for _, alignment in scope["history"]]
    assert len(losses) > 8
    assert losses[-1] < losses[0] - 0.05
    assert all(-1 <= loss <= 1 for loss in losses)
    assert not scope["alignment"]._handles


ALIGNMENT = PAGES["concepts/alignment_loss.md"]


@pytest.mark.slow
def test_alignment_flags() -> None:
    """Every variant of the table is a recipe, and no two are the same."""
    table = ALIGNMENT.split("## Rivals")[0]
    rows = [shlex.split(flags) for flags in re.findall(r"^\|[^|]*\| `(--[^`]*)` \|$", table, re.M)]
    base = ROOT / "trainer" / "recipes" / "shapes_viral.yaml"
    recipes = [parse(Recipe, flags, prog="trainer", recipe=base) for flags in rows]
    plain = parse(Recipe, [], prog="trainer", recipe=base)
    assert len(rows) == 22
    assert [r for r in recipes if r == plain] == [recipes[1]]
    assert len({repr(r) for r in recipes}) == 22


@pytest.mark.slow
def test_own_loop_python(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop of one's own and the Trainer of one's own, as they stand; both move the head."""
    loop, trainer = blocks(PAGES["howto/own_loop.md"], "python")
    monkeypatch.chdir(folder)
    scope: dict[str, Any] = {}
    exec(
        compile(
            loop.replace("for sample", "before = [p.clone() for p in alignment.parameters()]\nfor sample"),
            "own_loop.md",
            "exec",
        ),
        scope,
    )
    steps = [list(map(float, line.split())) for line in capsys.readouterr().out.strip().splitlines()]
    assert len(steps) > 4
    assert all(lm - 0.5 <= loss <= lm + 0.5 for lm, loss in steps)
    assert sum(loss != lm for lm, loss in steps) > len(steps) / 2  # rounded, a cosine near 0 can vanish in a step
    middle = [p.detach().clone() for p in scope["alignment"].parameters()]
    assert all(not torch.equal(a, b) for a, b in zip(scope["before"], middle, strict=True))
    exec(compile(trainer.replace('"runs/own"', repr(str(tmp_path))), "own_loop.md", "exec"), scope)
    assert all(not torch.equal(a, b) for a, b in zip(middle, scope["alignment"].parameters(), strict=True))


@pytest.mark.slow
def test_pretrained(folder: Path, tmp_path: Path) -> None:
    """The recipe of the page as it stands."""
    page = PAGES["howto/pretrained.md"]
    (block,) = blocks(page, "yaml")
    assert commands(page) == ["python -m trainer mine.yaml --output_dir runs/mine"]
    (tmp_path / "mine.yaml").write_text(block)
    done = run(
        "trainer",
        str(tmp_path / "mine.yaml"),
        "--output_dir",
        str(tmp_path / "mine"),
        "--log_every",
        "2",
        "--save_every",
        "4",
        cwd=folder,
    )
    assert "accuracy" in done.stdout
    assert (tmp_path / "mine" / "alignment_head.safetensors").exists()
