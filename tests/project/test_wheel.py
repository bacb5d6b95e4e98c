"""The package as others get it: a wheel, installed beside its dependencies, used from an empty folder; and what is said
of a mixed installation."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from viral_workbench import PACKAGES, MixedInstallError, check_packages

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
PARTS = (*PACKAGES, "viral_workbench.py", "pyproject.toml", "README.md", "LICENSE")
SMALL = [
    "--optim.steps",
    "2",
    "--optim.batch_size",
    "4",
    "--data.limit_train",
    "8",
    "--data.limit_val",
    "4",
    "--log_every",
    "2",
    "--eval_every",
    "2",
]
SMALL += [
    "--save_every",
    "2",
    "--model.layers",
    "2",
    "--model.width",
    "32",
    "--model.ffn",
    "64",
    "--alignment.layer",
    "1",
    "--alignment.hidden",
    "16",
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since a build leaves files beside what it builds; no network."""
    source = tmp_path_factory.mktemp("source")
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(
            ROOT / part,
            source / part,
            **({"ignore": shutil.ignore_patterns("__pycache__")} if (ROOT / part).is_dir() else {}),
        )  # type: ignore[operator]
    pip("wheel", "--no-build-isolation", "--wheel-dir", str(source / "dist"), str(source))
    (built,) = (source / "dist").iterdir()
    return built


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel installed into a folder, before this environment's packages on the path."""
    site = tmp_path_factory.mktemp("site")
    pip("install", "--target", str(site), str(wheel))
    return site


def pip(command: str, *words: str) -> None:
    options = ["--no-deps", "--no-index", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", command, *options, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def environment(site: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}


def viral(site: Path, folder: Path, *words: str, code: int = 0) -> str:
    """What the command `viral` of the installed package prints, called in `folder`."""
    done = subprocess.run(
        [site / "bin" / "viral", *words], cwd=folder, env=environment(site), capture_output=True, text=True, check=False
    )
    assert done.returncode == code, f"{words}:\n{done.stdout}\n{done.stderr}"
    return done.stdout if code == 0 else done.stderr


@pytest.mark.slow
def test_the_wheel_holds_what_the_checkout_holds(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    files = {
        str(file.relative_to(ROOT))
        for package in PACKAGES
        for file in (ROOT / package).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert {name for name in names if ".dist-info/" not in name} == files | {"viral_workbench.py"}
    kinds = {"recipes": 20, "sweeps": 15, "launch": 4}
    assert all(
        len([name for name in names if name.startswith(f"trainer/{folder}/")]) >= count
        for folder, count in kinds.items()
    )
    assert {f"{package}/py.typed" for package in PACKAGES} | {
        "analyses/claims.yaml",
        "workbench/dashboard/served/.streamlit/config.toml",
    } <= names


@pytest.mark.slow
def test_it_works_in_an_empty_folder(site: Path, tmp_path: Path) -> None:
    """Version, training by a recipe's name, an analysis of what was trained, and the dashboard; a `trainer` of the
    user's own is not in the way."""
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "__init__.py").write_text(
        "raise SystemExit('the user's own trainer was run')\n".replace("user's", "users")
    )
    assert viral(site, tmp_path, "--version") == f"viral-workbench {VERSION}\n"
    assert viral(site, tmp_path, "path", "demo") == f"{site / 'trainer' / 'sweeps' / 'demo.yaml'}\n"
    said = viral(site, tmp_path, "train", "shapes_virl", code=2)
    assert said.startswith("error: unknown recipe 'shapes_virl'")
    assert said.endswith("did you mean 'shapes_viral'?\n")
    assert "accuracy" in viral(
        site, tmp_path, "train", "shapes_viral", "--stage1", "None", *SMALL, "--output_dir", "runs/viral"
    )
    record = json.loads((tmp_path / "runs" / "viral" / "training.json").read_text())
    assert record["packages"]["viral-workbench"] == VERSION
    assert (record["git"], record["dirty"]) == ("", False)
    asked = [
        "--model",
        "runs/viral",
        "--vfm",
        "dinov2-small",
        "--limit",
        "3",
        "--null",
        "10",
        "--k",
        "5",
        "--output_dir",
        "runs",
    ]
    assert "viral: runs/cknna-" in viral(site, tmp_path, "analyze", "cknna", *asked)
    (stored,) = (tmp_path / "runs").glob("cknna-*/run.json")
    record = json.loads(stored.read_text())
    assert record["packages"]["viral-workbench"] == VERSION
    assert (record["git"], record["dirty"]) == ("", False)
    with served(site, tmp_path) as address, urllib.request.urlopen(f"{address}/_stcore/health", timeout=30) as answer:
        assert answer.status == 200
        assert answer.read() == b"ok"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs", "trainer"]


def served(site: Path, folder: Path) -> Dashboard:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return Dashboard(site, folder, free.getsockname()[1])


class Dashboard:
    """`viral app`, until the block ends."""

    def __init__(self, site: Path, folder: Path, port: int) -> None:
        self.port = port
        words = [site / "bin" / "viral", "app", "--port", str(port)]
        self.process = subprocess.Popen(
            words, cwd=folder, env=environment(site), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )

    def __enter__(self) -> str:
        deadline = time.monotonic() + 120
        while True:
            with socket.socket() as asked:
                if not asked.connect_ex(("127.0.0.1", self.port)):
                    return f"http://127.0.0.1:{self.port}"
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                raise AssertionError(f"the dashboard did not start: {self.process.communicate()[1]}")
            time.sleep(0.1)

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(timeout=30)


@pytest.mark.slow
def test_the_installed_dashboard_is_for_this_machine_whatever_the_folder_says(site: Path, tmp_path: Path) -> None:
    """Streamlit reads a configuration beside the script last, and `viral app` gives the address as an option
    besides."""
    (tmp_path / ".streamlit").mkdir()
    (tmp_path / ".streamlit" / "config.toml").write_text('[server]\naddress = "0.0.0.0"\nfileWatcherType = "auto"\n')
    script = site / "workbench" / "dashboard" / "served" / "app.py"
    code = (
        "from streamlit import config; from streamlit.web.bootstrap import"
        f" load_config_options\nconfig._main_script_path = {str(script)!r};"
        " load_config_options({})\nprint(config.get_option('server.address'),"
        " config.get_option('server.fileWatcherType'), config.get_option('browser.gatherUsageStats'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(site), capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["127.0.0.1", "none", "False"]
    assert (ROOT / ".streamlit" / "config.toml").read_text() == (
        script.parent / ".streamlit" / "config.toml"
    ).read_text()
    assert (ROOT / "app.py").read_text().split('"""')[2] == script.read_text().split('"""')[2]


# --- mixed installations --------------------------------------------------------------------------


@pytest.fixture
def mixed(site: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the installation, to be spoilt."""
    copy = tmp_path / "mixed"
    shutil.copytree(site, copy)
    check_packages.cache_clear()
    yield copy
    check_packages.cache_clear()


def other(home: Path, package: str, files: dict[str, str]) -> None:
    """Install another distribution's package into the same folder, as pip does: over what is there."""
    info = home / f"{package}-3.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 3.0\n")
    (info / "RECORD").write_text("".join(f"{package}/{name},,\n" for name in files))
    for name, text in files.items():
        (home / package / name).write_text(text)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_that_was_written_over_is_refused(package: str, mixed: Path) -> None:
    other(mixed, package, {"__init__.py": "VERSION = 3\n", "fit.py": ""})
    with pytest.raises(MixedInstallError) as error:
        check_packages(mixed)
    said = str(error.value)
    assert said.startswith(
        f"{mixed / package / '__init__.py'} is not what viral-workbench installed, but belongs to {package}: expected"
        " an environment without"
    )
    done = subprocess.run(
        [mixed / "bin" / "viral", "--version"],
        cwd=mixed.parent,
        env=environment(mixed),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == f"error: {said}\n"


def test_a_package_that_shares_its_folder_is_warned_of(mixed: Path) -> None:
    """Ours was installed last, and works; the other one is broken."""
    init = (mixed / "trainer" / "__init__.py").read_text()
    other(mixed, "trainer", {"__init__.py": init, "fit.py": ""})
    code = "import workbench, trainer, analyses; from trainer.recipe import Recipe; print(Recipe().seed)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=mixed.parent,
        env=environment(mixed),
        capture_output=True,
        text=True,
        check=True,
    )
    warned = [line for line in done.stderr.splitlines() if "RuntimeWarning: " in line]
    assert done.stdout == "0\n"
    assert len(warned) == 1
    assert (
        f"{mixed / 'trainer' / 'fit.py'} is in a package of viral-workbench, but belongs to trainer: expected an"
        " environment without" in warned[0]
    )


def test_a_package_of_the_same_name_first_on_the_path_is_warned_of_and_never_run(mixed: Path, tmp_path: Path) -> None:
    (tmp_path / "mine" / "trainer").mkdir(parents=True)
    (tmp_path / "mine" / "trainer" / "__init__.py").write_text("")
    paths = environment(mixed) | {"PYTHONPATH": f"{tmp_path / 'mine'}{os.pathsep}{mixed}"}
    done = subprocess.run(
        [sys.executable, "-c", "from workbench import registry; print(1)"],
        cwd=tmp_path,
        env=paths,
        capture_output=True,
        text=True,
        check=True,
    )
    sentence = (
        f"the package 'trainer' of viral-workbench is in {mixed}, but an import finds"
        f" {tmp_path / 'mine' / 'trainer' / '__init__.py'}: expected no other"
    )
    assert done.stdout == "1\n"
    assert sentence in done.stderr
    done = subprocess.run(
        [mixed / "bin" / "viral", "train", "shapes_viral"],
        cwd=tmp_path,
        env=paths,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {sentence}")
    assert len(done.stderr.splitlines()) == 1


def test_a_whole_installation_and_a_checkout_are_silent(mixed: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_packages(ROOT)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import workbench"],
        env=environment(mixed),
        cwd=mixed.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert not done.stderr
