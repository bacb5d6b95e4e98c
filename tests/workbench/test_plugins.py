"""Another package adds a family, a VFM, a metric, a data set and an analysis by entry points; what cannot be loaded is
a sentence."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests import tiny
from tests.conftest import ROOT, refused, run
from workbench import plugins as module
from workbench.analysis.declaration import Where
from workbench.analysis.discover import analysis_names, load_analyses, load_analysis, words_of
from workbench.analysis.execution import execute
from workbench.data import DATASETS, load_data
from workbench.errors import PluginError, UnknownNameError
from workbench.metrics import METRICS, alignment_matrix
from workbench.mllm import FAMILIES
from workbench.mllm.family import family_of
from workbench.plugins import GROUPS, PREFIX, identities, identity
from workbench.registry import Registry
from workbench.runs import environment, run_key
from workbench.vfm import CATALOGUE, find_vfm, load_vfm
from workbench.weights.catalogue import CATALOGUE as WEIGHTS

POINTS = {
    "families": {"acme": "acme_viral.things:FAMILY"},
    "vfms": {"acme-colors": "acme_viral.things:COLORS"},
    "metrics": {
        "acme_cosine": "acme_viral.things:COSINE",
        "acme_broken": "acme_viral.broken:METRIC",
        "acme_missing": "acme_viral.things:NOTHING",
        "acme_other": "acme_viral.things:FAMILY",
        "cka": "acme_viral.things:COSINE",
    },
    "data": {"plain": "acme_viral.things:plain"},
    "analyses": {
        "acme_scores": "acme_viral.things:ANALYSIS",
        "acme_broken": "acme_viral.broken:ANALYSIS",
        "acme_wrong": "acme_viral.things:ANALYSIS",
    },
}
REGISTRIES: tuple[Registry[Any], ...] = (FAMILIES, CATALOGUE, METRICS, DATASETS)


def install(site: Path, points: dict[str, dict[str, str]], name: str = "acme-viral", version: str = "1.2") -> None:
    """What pip leaves of a package's metadata."""
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    groups = [
        f"[{PREFIX}{group}]\n" + "".join(f"{key} = {value}\n" for key, value in named.items())
        for group, named in points.items()
    ]
    (folder / "entry_points.txt").write_text("\n".join(groups))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path with the package installed; afterwards nothing knows of it."""
    site = tmp_path / "site"
    shutil.copytree(ROOT / "tests" / "plugin_package", site, ignore=shutil.ignore_patterns("__pycache__"))
    (site / "acme_viral" / "broken.py").write_text("import a_package_that_is_not_there\n")
    (site / "acme_viral" / "weights").mkdir()
    save_file({"scale": torch.tensor([1.0, 2.0, 3.0])}, site / "acme_viral" / "weights" / "model.safetensors")
    install(site, POINTS)
    before = [(registry, dict(registry._items), registry._loaded) for registry in (*REGISTRIES, WEIGHTS)]
    monkeypatch.syspath_prepend(str(site))
    _forget()
    for registry in REGISTRIES:
        registry._loaded = False
    yield site
    for registry, items, loaded in before:
        registry._items, registry._loaded, registry._broken = items, loaded, {}
    _forget()


def _forget() -> None:
    module.plugins.cache_clear()
    module._code_hash.cache_clear()
    for name in [name for name in sys.modules if name.startswith("acme_viral")]:
        del sys.modules[name]


def test_each_kind_works_by_its_name(site: Path) -> None:
    assert family_of(SimpleNamespace(architectures=["AcmeForConditionalGeneration"])).name == "acme"  # type: ignore[arg-type]
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    assert METRICS.get("acme_cosine")(x, x) == pytest.approx(1)
    assert METRICS.get("acme_cosine")(x, -x) == pytest.approx(-1)
    assert alignment_matrix({"a": x}, {"b": -x}, metric="acme_cosine").loc["a", "b"] == pytest.approx(-1)
    data = load_data("plain:", limit=3)
    assert len(data) == 3
    assert data.scenes[2][0].image.getpixel((0, 0)) == (64, 0, 191)
    features = load_vfm("acme-colors")([data.scenes[2][0].image]).values
    expected = torch.tensor([64, 0, 191]) / 255 * 2 - 1
    torch.testing.assert_close(
        features, (expected * torch.tensor([1.0, 2.0, 3.0])).expand(1, 2, 2, 3), atol=1e-6, rtol=0
    )


@pytest.mark.slow
def test_a_plugins_analysis_runs_as_any_other_and_its_key_knows_its_code(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.build("llava", tmp_path / "llava")
    where = Where(model=(str(model),), output_dir=tmp_path / "runs")
    analysis = load_analysis("acme_scores")
    (first,) = execute(
        analysis, analysis.config(data="plain:", limit=2), where, [*words_of("acme_scores"), "--limit", "2"]
    ).values()
    assert first.tables["scores"]["score"].tolist() == pytest.approx([1.0, 1.0])
    assert first.record["argv"][:4] == ["python", "-m", "analyses", "acme_scores"]
    assert first.record["packages"]["acme-viral"] == "1.2"
    (again,) = execute(analysis, analysis.config(data="plain:", limit=2), where, []).values()
    assert again.key == first.key
    assert len(list((tmp_path / "runs").glob("acme_scores-*"))) == 1
    (site / "acme_viral" / "__init__.py").write_text("# another line of code\n")
    module._code_hash.cache_clear()
    monkeypatch.setattr(sys.modules["acme_viral.things"], "METRICS", {"acme_cosine": lambda x, y: 7.0})
    (changed,) = execute(analysis, analysis.config(data="plain:", limit=2), where, []).values()
    assert changed.key != first.key
    assert changed.tables["scores"]["score"].tolist() == pytest.approx([7.0, 7.0]), "not the chunks of the old code"
    assert len(list((tmp_path / "runs").glob("acme_scores-*"))) == 2


def test_what_is_used_is_in_the_key_and_nothing_else(site: Path) -> None:
    def key(analysis: str, **config: object) -> str:
        return run_key(analysis, 1, config, "model", "data")

    with_plugin = [
        key("cknna", vfm=["acme-colors"]),
        key("cknna", metric="acme_cosine"),
        key("cknna", data="plain:"),
        key("acme_scores"),
    ]
    without = [key("cknna", vfm=["dinov2-small"], metric="cknna", data="shapes:val")]
    assert set(identities("cknna", {"vfm": ("acme-colors", "dinov2-small"), "data": "plain:x", "k": 3})) == {
        "acme-colors",
        "plain",
    }
    _, before = identity("vfms", "acme-colors"), find_vfm("acme-colors").identity()
    (site / "acme_viral-1.2.dist-info").rename(site / "acme_viral-1.3.dist-info")
    metadata = site / "acme_viral-1.3.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("Version: 1.2", "Version: 1.3"))
    module.plugins.cache_clear()
    after = [
        key("cknna", vfm=["acme-colors"]),
        key("cknna", metric="acme_cosine"),
        key("cknna", data="plain:"),
        key("acme_scores"),
    ]
    assert not set(with_plugin) & set(after)
    assert key("cknna", vfm=["dinov2-small"], metric="cknna", data="shapes:val") == without[0]
    assert find_vfm("acme-colors").identity() != before
    assert environment([])["packages"]["acme-viral"] == "1.3"


def test_what_is_ours_has_the_keys_that_it_had(site: Path) -> None:
    """No stored run is computed again because of plugins that it does not use."""
    import hashlib
    import json

    from workbench.hashing import libraries

    config = {"vfm": ["dinov2-small"], "data": "shapes:val", "limit": 200}
    written = hashlib.sha256(
        json.dumps(["cknna", 3, config, "m", "d", libraries()], sort_keys=True, default=str).encode()
    ).hexdigest()[:12]
    assert run_key("cknna", 3, config, "m", "d") == written
    assert identity("metrics", "cknna") == ""


BROKEN = [
    (
        "acme_broken",
        (
            r"plugin 'acme_broken' \(metrics\) of acme-viral 1\.2 cannot be loaded \(ModuleNotFoundError: No module"
            r" named 'a_package_that_is_not_there'\)"
        ),
    ),
    (
        "acme_missing",
        (
            r"plugin 'acme_missing' .* cannot be loaded \(AttributeError: .*NOTHING.*\): expected to import"
            r" acme_viral\.things:NOTHING"
        ),
    ),
    (
        "acme_other",
        (
            r"plugin 'acme_other' .* is a Family: expected a workbench\.metrics\.alignment\.Metric at"
            r" acme_viral\.things:FAMILY"
        ),
    ),
]


@pytest.mark.parametrize(("name", "message"), BROKEN)
def test_one_that_cannot_be_loaded_is_a_sentence_and_the_rest_works(
    name: str, message: str, site: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert "acme_cosine" in METRICS
        assert name not in METRICS
        assert "cknna" in METRICS
    # each once
    assert sorted(record.message.split("'")[1] for record in caplog.records) == [
        "acme_broken",
        "acme_missing",
        "acme_other",
        "cka",
    ]
    assert all(len(record.message) < 300 for record in caplog.records)
    with pytest.raises(PluginError, match=message):
        METRICS.get(name)
    with pytest.raises(UnknownNameError, match=r"did you mean 'acme_cosine'\?"):
        METRICS.get("acme_cosin")


def test_our_names_stay_ours(site: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert METRICS.get("cka").label == "unbiased CKA"
    with caplog.at_level(logging.WARNING):
        METRICS.names()
    assert METRICS.get("cka").label == "unbiased CKA"
    assert "plugin 'cka' (metrics) of acme-viral 1.2 has the name of a metric of viral-workbench" in caplog.text


def test_analyses_of_plugins_are_listed_and_named(site: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert analysis_names()[-3:] == ["acme_scores", "acme_broken", "acme_wrong"]
    with caplog.at_level(logging.WARNING):
        loaded = load_analyses()
    assert "acme_scores" in loaded
    assert "cknna" in loaded
    assert not {"acme_broken", "acme_wrong"} & set(loaded)
    assert (
        "plugin 'acme_wrong' (analyses) of acme-viral 1.2 calls itself 'acme_scores': expected the name of its entry"
        " point" in caplog.text
    )
    assert "plugin 'acme_broken' (analyses) of acme-viral 1.2 cannot be loaded" in refused(
        "analyses", "acme_broken", "--model", "a"
    )
    assert "plugin 'acme_broken'" in refused("analyses.all", "--only", "acme_broken", "--model", "a")
    assert refused("analyses", "acme_scores", "--modle", "a").endswith("did you mean '--model'?")
    assert refused("analyses", "acme_score").endswith("did you mean 'acme_scores'?")


def test_two_packages_with_one_name_are_told(site: Path) -> None:
    install(site, {"metrics": {"acme_cosine": "b_viral:COSINE"}}, name="b-viral")
    module.plugins.cache_clear()
    with pytest.raises(
        PluginError,
        match=(
            r"plugin 'acme_cosine' \(metrics\) of acme-viral 1\.2 is also one of b-viral: expected one package with"
            r" that name"
        ),
    ):
        METRICS.get("acme_cosine")


@pytest.mark.slow
def test_a_command_in_a_process_of_its_own_has_them(site: Path) -> None:
    done = run("analyses", PYTHONPATH=str(site))
    assert "acme_scores      How alike colors are" in done.stdout
    assert "cknna" in done.stdout
    warned = [line for line in done.stderr.splitlines() if "plugin 'acme_broken'" in line]
    assert len(warned) == 1
    assert "Traceback" not in done.stderr


def test_the_page_says_what_the_groups_are() -> None:
    page = (ROOT / "docs" / "howto" / "plugins.md").read_text()
    assert all(f"viral_workbench.{group}" in page for group in GROUPS)
