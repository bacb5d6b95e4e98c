"""Recipes, sweeps and launch files by name, from any folder; files of the user's are paths."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import ROOT, refused
from trainer.__main__ import read
from trainer.sweep.spec import Sweep
from workbench.cli import parse
from workbench.errors import ConfigError, UnknownNameError
from workbench.package_files import KINDS, LAUNCH_FILES, RECIPES, SWEEPS, Kind, first_sentence
from workbench.paths import main, path_of


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, from which all is asked."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.word)
def test_every_file_of_the_package_has_its_name(kind: Kind) -> None:
    files = sorted((ROOT / kind.package / kind.folder).glob("*.yaml"))
    assert list(kind.files().values()) == files
    assert [kind.find(file.stem) for file in files] == files
    # as the pages and the ledger write them
    assert [kind.find(f"{kind.package}/{kind.folder}/{file.name}") for file in files] == files


def test_a_path_is_the_users(elsewhere: Path) -> None:
    (elsewhere / "mine.yaml").write_text("seed: 5")
    (elsewhere / "shapes_viral").write_text("seed: 6")
    assert RECIPES.find("mine.yaml") == Path("mine.yaml")
    assert RECIPES.find("./shapes_viral") == Path("shapes_viral")
    # a file of that name in the current folder changes nothing
    assert RECIPES.find("shapes_viral") == ROOT / "trainer" / "recipes" / "shapes_viral.yaml"
    # whoever reads it says that it is not there
    assert RECIPES.find("other/shapes_viral.yaml") == Path("other/shapes_viral.yaml")
    (elsewhere / "trainer" / "recipes").mkdir(parents=True)
    (elsewhere / "trainer" / "recipes" / "shapes_viral.yaml").write_text("seed: 7")
    assert read(["trainer/recipes/shapes_viral.yaml"]).seed == 7
    assert read(["shapes_viral"]).seed == 0
    assert read(["mine.yaml"]).seed == 5
    with pytest.raises(
        ConfigError,
        match=r"no recipe trainer/recipes/shapes_stage1\.yaml: .*did you mean 'trainer/recipes/shapes_viral\.yaml'\?",
    ):
        # the current folder has recipes of its own: none of ours is taken for one of them
        read(["trainer/recipes/shapes_stage1.yaml"])


@pytest.mark.parametrize(
    ("kind", "word", "near"),
    [
        (RECIPES, "shapes_virl", "shapes_viral"),
        (RECIPES, "shapes_viral.yaml", "shapes_viral"),
        (RECIPES, "trainer/recipes/shapes_virl.yaml", "shapes_viral"),
        (RECIPES, "minee", "mine.yaml"),
        (SWEEPS, "dmeo", "demo"),
        (LAUNCH_FILES, "dpp", "ddp"),
    ],
)
def test_a_name_that_is_not_there_has_its_nearest(kind: Kind, word: str, near: str, elsewhere: Path) -> None:
    (elsewhere / "mine.yaml").write_text("")
    with pytest.raises(
        UnknownNameError,
        match=rf"^unknown {kind.word} '.*': expected one of .*or the path of a YAML file; did you mean '{near}'\?$",
    ) as error:
        kind.find(word)
    assert len(str(error.value)) < 300


def test_commands_say_the_nearest_name() -> None:
    assert refused("trainer", "shapes_virl").endswith("did you mean 'shapes_viral'?")
    assert refused("trainer.sweep", "shape_seeds").endswith("did you mean 'shapes_seeds'?")


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SWEEPS.files()))
def test_every_sweep_finds_its_recipes_from_everywhere(name: str) -> None:
    sweep = parse(Sweep, [], prog="sweep", recipe=SWEEPS.find(name))
    recipes = [job.recipe() for job in sweep.jobs()]
    assert recipes
    assert all(recipe.optim.steps > 0 for recipe in recipes)


def test_a_first_stage_is_found_beside_its_recipe() -> None:
    stage1 = read(["shapes_viral"]).stage1
    assert stage1 is not None
    assert stage1.is_file()
    assert stage1.parent == ROOT / "trainer" / "recipes"


def test_where_a_file_is(capsys: pytest.CaptureFixture[str]) -> None:
    main(["ddp", "sweep/demo"])
    assert (
        capsys.readouterr().out
        == f"{ROOT / 'trainer' / 'launch' / 'ddp.yaml'}\n{ROOT / 'trainer' / 'sweeps' / 'demo.yaml'}\n"
    )
    main([])
    listed = capsys.readouterr().out
    assert all(f"  {file.stem} " in listed for kind in KINDS for file in kind.files().values())
    assert "The two models of `viral demo`, baseline and VIRAL: one stage" in listed
    for word, near in (("dpp", "ddp"), ("sweep/dmeo", "sweep/demo")):
        with pytest.raises(UnknownNameError, match=rf"did you mean '{near}'\?"):
            path_of(word)


def test_a_name_of_two_kinds_must_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workbench.paths.KINDS", (RECIPES, Kind("copy", "copies", "trainer", "recipes")))
    with pytest.raises(
        ConfigError,
        match=r"'shapes_viral' is the name of several files: expected one of recipe/shapes_viral, copy/shapes_viral",
    ):
        path_of("shapes_viral")
    assert path_of("copy/shapes_viral") == path_of("recipe/shapes_viral")


def test_the_first_sentence_of_a_file(elsewhere: Path) -> None:
    file = elsewhere / "a.yaml"
    file.write_text("# One sentence\n# of two lines, 0.5 of it. Another.\nseed: 1 # no. 2\n")
    assert first_sentence(file) == "One sentence of two lines, 0.5 of it."
    file.write_text("seed: 1\n# late\n")
    assert first_sentence(file) == ""
