"""Every command in the README and the pages is run: as it stands, but on the small models and with small settings."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from skimage import data as photographs

from tests.conftest import ROOT, SMALL, SMALL_VIRAL, run
from trainer.recipe import Recipe
from workbench.cli import parse

README = (ROOT / "README.md").read_text()


def commands(page: str) -> list[str]:
    return [line for block in re.findall(r"```bash\n(.*?)```", page, re.S) for line in block.splitlines() if line.strip()]


OF_PAGES = [line for name in ("cluster", "monitor", "worlds") for line in commands((ROOT / "docs" / f"{name}.md").read_text())]
COMMANDS = [*commands(README), *(line for line in OF_PAGES if "trainer.sweep" not in line)]  # tests/test_sweep.py reads every sweep
FEW = {
    "analyses.attention": ["--limit", "12", "--null", "10"],
    "analyses.cknna": ["--limit", "12", "--null", "10", "--k", "5"],
    "analyses.permutation": ["--limit", "3", "--permutations", "1", "--layers", "2"],
    "analyses.knockout": ["--limit", "3", "--layers", "2", "--width", "1"],
    "analyses.logit_lens": ["--limit", "12", "--null", "10", "--maps", "1"],
    "analyses.linear_probe": ["--limit", "20", "--controls", "1", "--folds", "2"],
    "analyses.all": ["--limit", "3", "--only", "cknna", "dynamics"],
    "analyses.dynamics": ["--limit", "3", "--permutations", "1", "--null", "10", "--k", "5"],
    "analyses.tokens": ["--limit", "3", "--null", "10", "--umap_images", "0"],
    "analyses.patching": ["--limit", "3", "--layers", "2"],
}


@pytest.fixture(scope="module")
def folder(runs_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder as the README assumes it: recipes, `photos`, and `runs` with a trained pair and their first stages."""
    root = tmp_path_factory.mktemp("readme")
    for name in ("trainer", "app.py", "analyses", "workbench", "viral_workbench.py", "benchmarks"):
        (root / name).symlink_to(ROOT / name)
    (root / "runs").symlink_to(runs_folder)
    (root / "photos").mkdir()
    Image.fromarray(photographs.astronaut()).save(root / "photos" / "astronaut.jpg")
    return root


@pytest.mark.parametrize("line", COMMANDS, ids=lambda line: " ".join(line.split()[2:5]))
def test_command(line: str, folder: Path, tmp_path: Path) -> None:
    words = shlex.split(line, comments=True)
    if words[0] == "streamlit":
        assert "streamlit run app.py" in line  # the browser test starts exactly this
        return
    start = folder / "runs" / "baseline"
    if words[:2] == ["accelerate", "launch"]:
        few = [*SMALL_VIRAL, "--optim.steps", "2", "--eval_every", "2", "--start", str(start), "--output_dir", str(tmp_path / "out")]
        assert "accuracy" in run("accelerate.commands.launch", *words[2:], *few, cwd=folder).stdout
        return
    assert words[:2] == ["python", "-m"]
    module, given = words[2], words[3:]
    given = [str(tmp_path / Path(word).name) if given[i - 1] == "--output_dir" and module != "analyses" else word for i, word in enumerate(given)]
    if module == "trainer":
        small = SMALL_VIRAL if "viral" in line else SMALL
        done = run(module, *given, *small, "--start", str(start), cwd=folder)
        assert ("visual tokens" if "--dry_run" in given else "accuracy") in done.stdout
    elif module == "trainer.sweep":
        sweep = tmp_path / "sweep.yaml"
        flags = " ".join(SMALL)
        sweep.write_text(
            f"seeds: [0, 1]\nvariants:\n  - 'stage1: trainer/recipes/shapes_stage1.yaml {flags}'\n"
            f"  - 'baseline: trainer/recipes/shapes_baseline.yaml --start {{output_dir}}/stage1-s{{seed}} {flags}'\n"
        )
        if "--report" in given:
            assert "no finished run" in run(module, str(sweep), *given[1:], cwd=folder, code=2).stderr
        else:
            assert "baseline" in run(module, str(sweep), *given[1:], cwd=folder).stdout
    elif "--push_to_hub" in given:  # where nobody is logged in
        assert "hub" in run(module, *given, cwd=folder, code=2).stderr
    elif module == "analyses.all":
        assert "report.html" in run(module, *given, *FEW[module], cwd=folder).stdout and (folder / "report.html").exists()
    elif module.startswith("analyses."):
        few = FEW[module][:4] if "photos" in line else FEW[module]
        assert f"{module.removeprefix('analyses.')}-" in run(module, *given, *few, cwd=folder).stdout
    else:
        assert run(module, *given, cwd=folder).stdout


@pytest.mark.parametrize("module", ["trainer", "trainer.sweep", "trainer.card", "workbench.convert", "analyses.cknna"])
def test_help_names_options_as_the_pages_do(module: str) -> None:
    """With underscores, and its examples a line each."""
    shown = run(module, "--help").stdout
    options = re.findall(r"^│ (--[\w.-]+)", shown, re.M)
    assert options and not [name for name in options if "-" in name[2:]]
    assert len(re.findall(r"^    (?:python|accelerate) ", shown, re.M)) == shown.split("╭")[0].count(" -m ") - 1


def test_readme_python(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(compile(block, "README.md", "exec"), {})
    score, null = capsys.readouterr().out.split(maxsplit=1)
    assert 0 < float(score) < 1 and null.startswith("Null(mean=")


def test_families_python(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "families.md").read_text(), re.S)
    monkeypatch.chdir(folder)
    exec(compile(block, "families.md", "exec"), {})
    grid, shapes = capsys.readouterr().out.strip().splitlines()
    assert grid.startswith("(8, 8) (0.0, 0.0, 0.125, 0.125)") and shapes.startswith("torch.Size([2, 64, 32]) torch.Size([1, 4, 1, ")


ALIGNMENT = (ROOT / "docs" / "alignment.md").read_text()


def test_alignment_flags() -> None:
    """Every variant of the table is a recipe, and no two are the same."""
    rows = [shlex.split(flags) for flags in re.findall(r"^\|[^|]*\| `(--[^`]*)` \|$", ALIGNMENT, re.M)]
    base = ROOT / "trainer" / "recipes" / "shapes_viral.yaml"
    recipes = [parse(Recipe, flags, prog="trainer", recipe=base) for flags in rows]
    plain = parse(Recipe, [], prog="trainer", recipe=base)
    assert len(rows) == 19 and [r for r in recipes if r == plain] == [recipes[1]] and len({repr(r) for r in recipes}) == 19


def test_alignment_python(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop of one's own and the Trainer of one's own, as they stand; both move the head."""
    loop, trainer = re.findall(r"```python\n(.*?)```", ALIGNMENT, re.S)
    monkeypatch.chdir(folder)
    scope: dict[str, Any] = {}
    exec(compile(loop.replace("for sample", "before = [p.clone() for p in alignment.parameters()]\nfor sample"), "alignment.md", "exec"), scope)
    steps = [list(map(float, line.split())) for line in capsys.readouterr().out.strip().splitlines()]
    assert len(steps) > 4 and all(lm - 0.5 <= loss <= lm + 0.5 and loss != lm for lm, loss in steps)
    middle = [p.detach().clone() for p in scope["alignment"].parameters()]
    assert all(not torch.equal(a, b) for a, b in zip(scope["before"], middle, strict=True))
    exec(compile(trainer.replace('"runs/own"', repr(str(tmp_path))), "alignment.md", "exec"), scope)
    assert all(not torch.equal(a, b) for a, b in zip(middle, scope["alignment"].parameters(), strict=True))


def test_students(folder: Path, tmp_path: Path) -> None:
    """The recipe of the page as it stands."""
    page = (ROOT / "docs" / "students.md").read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", page, re.S)
    assert "python -m trainer mine.yaml --output_dir runs/mine" in page
    (tmp_path / "mine.yaml").write_text(block)
    done = run("trainer", str(tmp_path / "mine.yaml"), "--output_dir", str(tmp_path / "mine"), "--log_every", "2", "--save_every", "4", cwd=folder)
    assert "accuracy" in done.stdout and (tmp_path / "mine" / "alignment_head.safetensors").exists()


def test_everything_the_readme_and_contributing_name_exists() -> None:
    text = README + (ROOT / "CONTRIBUTING.md").read_text()
    for path in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`((?:workbench|trainer|analyses|tests|docs)/[\w./]+\.(?:py|md|yaml))`", text):
        assert (ROOT / path).exists(), path
