"""The documentation as a site: every link leads somewhere, every page is shown, and what is made from the code is the
code's."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT
from tests.pages import DOCS, PAGES, README, blocks
from trainer.recipe import Recipe
from workbench.analysis.discover import analysis_files
from workbench.yaml_config import config_fields


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and the site make it."""
    return re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", re.sub(r"[`*]", "", heading).lower()).strip())


def test_every_link_leads_somewhere() -> None:
    texts = {ROOT / name: (ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md")} | {
        DOCS / name: text for name, text in PAGES.items()
    }
    followed = 0
    for page, text in texts.items():
        for target, anchor in re.findall(r"\]\(([^)#:]*)(#[^)]*)?\)", text):
            path = (page.parent / target).resolve() if target else page
            followed += 1
            if path == DOCS / "contributing.md":
                path = ROOT / "CONTRIBUTING.md"
            assert path.exists(), f"{page.name}: {target}"
            if anchor:
                assert anchor[1:] in map(slug, re.findall(r"^#+ (.*)$", path.read_text(), re.M)), (
                    f"{page.name}: {target}{anchor}"
                )
    assert followed > 100


def test_files_that_pages_and_code_name_exist() -> None:
    text = "\n".join([README, (ROOT / "CONTRIBUTING.md").read_text(), *PAGES.values()])
    for path in re.findall(r"`((?:workbench|trainer|analyses|tests|docs)/[\w./]+\.(?:py|md|yaml))`", text):
        assert (ROOT / path).exists(), path
    sources = [
        path
        for part in ("workbench", "trainer", "analyses", "benchmarks", "tests")
        for path in (ROOT / part).rglob("*.*")
        if path.suffix in (".py", ".yaml")
    ]
    for source in sources:
        for path in re.findall(r"docs/[\w/]+\.md", source.read_text()):
            assert (ROOT / path).exists(), f"{source}: {path}"


def pages_of(nav: Any) -> Iterator[str]:
    for entry in nav:
        for value in entry.values():
            yield from [value] if isinstance(value, str) else pages_of(value)


def test_the_site_shows_every_page_once() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    shown = [*pages_of(config["nav"]), *config.get("not_in_nav", "").split()]
    assert sorted(shown) == sorted(PAGES)


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_recipe_keys_are_those_of_the_code(hooks: ModuleType) -> None:
    """Every key once, with its default and the text below its field."""
    page = hooks.on_page_markdown(PAGES["reference/recipe.md"])
    assert sorted(re.findall(r"^\| `([\w.]+)` \|", page, re.M)) == sorted(key for key, _ in config_fields(Recipe))
    assert "| `alignment.weight` | float | `0.5` | lambda in L = L_LM + lambda * L_VRA. |" in page
    assert "| `alignment.objective` | none / cosine / relation / predict | `none` |" in page
    assert "| `data.train` | list of str | `shapes:train` |" in page


def test_options_and_names_are_those_of_the_code(hooks: ModuleType) -> None:
    options = hooks.on_page_markdown(PAGES["reference/commands.md"])
    assert "| `--limit` | int | `200` | Number of images. |" in options
    assert all(f"## `analyses.{name}`" in options for name in analysis_files())
    for path in re.findall(r"^::: (\S+)$", hooks.on_page_markdown(PAGES["reference/api.md"]), re.M):
        module, _, name = path.rpartition(".")
        assert getattr(import_module(module), name).__doc__, path


def test_pages_of_the_root_keep_their_links(hooks: ModuleType) -> None:
    for name in ("index.md", "contributing.md"):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", hooks.on_page_markdown(PAGES[name])):
            assert (DOCS / target).exists(), target
    assert "# Probe a model of your own" in hooks.on_page_markdown(PAGES["notebooks/probe_a_model.md"])


def test_citation_and_bibtex_name_the_same_paper() -> None:
    paper = yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]
    (bibtex,) = blocks(README, "bibtex")
    authors = " and ".join(f"{author['family-names']}, {author['given-names']}" for author in paper["authors"])
    assert authors in " ".join(bibtex.split())
    assert paper["title"] in bibtex
    assert "2509.07979" in bibtex
    assert "2509.07979" in paper["url"]
