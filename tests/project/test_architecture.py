"""Imports run one way, and heavy libraries stay where the design puts them."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
from streamlit.string_util import is_emoji

from tests.conftest import ROOT

ALLOWED = {
    "workbench": {"workbench"},
    "analyses": {"analyses", "workbench"},
    "trainer": {"trainer", "workbench"},
    "app.py": {"workbench"},
    "viral_workbench.py": {"workbench"},
}
TOPS = {"workbench", "analyses", "trainer", "app", "viral_workbench", "tests", "benchmarks"}
ONLY_IN = {
    "streamlit": ("app.py", "workbench/dashboard/"),
    "nnsight": ("workbench/capture/edit.py",),
    "peft": ("trainer/build/lora.py",),
    "plotly": ("workbench/figures/", "workbench/runs.py", "workbench/analysis/", "workbench/dashboard/", "analyses/"),
}
FILES = [f for top in ALLOWED for f in ([ROOT / top] if top.endswith(".py") else sorted((ROOT / top).rglob("*.py")))]


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_arrows(file: Path) -> None:
    name = str(file.relative_to(ROOT))
    top = name.split("/")[0]
    own = {module.split(".")[0] for module in imports(file)} & TOPS
    # the check of the installation
    checked = {"viral_workbench"} if name.count("/") == 1 and name.endswith("/__init__.py") else set()
    assert own <= ALLOWED[top] | checked, f"{name} imports {own - ALLOWED[top]}"
    for module in imports(file):
        if top == "analyses" and module.startswith("analyses."):  # an analysis may be a package
            assert module.split(".")[1] == name.split("/")[1], f"{name} imports another analysis: {module}"
        homes = ONLY_IN.get(module.split(".")[0])
        assert homes is None or name.startswith(homes), f"{name} imports {module}"
        if name.startswith("workbench/") and not name.startswith("workbench/dashboard/"):
            assert not module.startswith("workbench.dashboard"), f"{name} imports the dashboard"


def _module(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_no_two_files_import_each_other() -> None:
    """Nor do more of them in a circle, not even inside functions or for types alone; a package's `__init__`, which
    hands names on, is left out."""
    modules = {_module(file): file for file in FILES}
    arrows: dict[str, set[str]] = {}
    for name, file in modules.items():
        if file.name == "__init__.py":
            continue
        named = [
            f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in modules else node.module or ""
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        ]
        arrows[name] = {one for one in named if one in modules and modules[one].name != "__init__.py"}
    assert len(arrows) > 150
    assert sum(map(len, arrows.values())) > 500
    list(TopologicalSorter(arrows).static_order())  # raises CycleError with the circle


def test_only_one_file_imports_what_only_posix_has() -> None:
    posix = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
    importing = {_module(file) for file in FILES if posix & {name for name, _ in _imported(file)}}
    assert importing == {"workbench.files"}


@pytest.mark.slow
def test_listing_runs_does_not_import_torch() -> None:
    """The dashboard's first page must be there within two seconds."""
    import subprocess
    import sys

    code = "import sys, workbench.runs, workbench.figures, workbench.dashboard.home; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == "False"
    )


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[\s\[<>=!~;]", name)[0]).lower()


def _imported(file: Path) -> Iterator[tuple[str, bool]]:
    """The top-level modules that a file imports, and whether it does so when it is imported itself."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        names = (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        yield from ((name.split(".")[0], node in tree.body) for name in names)


@pytest.mark.slow
def test_every_import_is_declared() -> None:
    """What a module imports at once is a dependency; what a function imports may be an extra. Tests may use the extra
    `test` too."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {_normal(name) for name in project["dependencies"]}
    extra = {key: {_normal(name) for name in names} for key, names in project["optional-dependencies"].items()}
    optional = needed.union(*(names for key, names in extra.items() if key != "test"))
    homes, own = packages_distributions(), TOPS
    checked: dict[str, list[Path]] = {
        "product": FILES,
        "tests": sorted((ROOT / "tests").rglob("*.py")),
        "benchmarks": sorted((ROOT / "benchmarks").rglob("*.py")),
    }
    for kind, files in checked.items():
        for file in files:
            for module, at_once in _imported(file):
                if module in sys.stdlib_module_names or module in own:
                    continue
                allowed = optional | extra["test"] if kind != "product" else needed if at_once else optional
                assert allowed & set(map(_normal, homes.get(module, [module]))), (
                    f"{file.relative_to(ROOT)} imports {module}, which pyproject.toml does not declare"
                )


def test_every_dependency_has_a_lower_bound_that_this_environment_meets() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for line in [*project["dependencies"], *(line for lines in extras.values() for line in lines)]:
        name, _, bound = line.partition(">=")
        assert re.fullmatch(r"\d+(\.\d+){0,2}", bound), f"{line}: expected NAME>=MAJOR.MINOR"
        if line in [*extras["docs"], *extras["quantized"]]:
            continue  # installed by `make docs`, and by who asks for it
        assert tuple(map(int, version(name).split(".")[:3])) >= tuple(map(int, bound.split("."))), (
            f"{line}: {version(name)} is installed"
        )


def test_no_page_asks_a_font_server() -> None:
    """Streamlit fetches a page's `:material/` icon, which becomes its tab's, from a server of fonts."""
    for file in [*FILES, ROOT / ".streamlit" / "config.toml"]:
        text = file.read_text()
        assert not re.search(r":material/|fonts\.|googleapis|gstatic|jsdelivr|unpkg", text), file
    for icon in re.findall(r'icon="([^"]*)"', "".join(file.read_text() for file in FILES)):
        assert is_emoji(icon), icon  # drawn by the browser itself


def test_widgets_of_different_modules_have_different_keys() -> None:
    """A key is the place of a choice in the session and in the address: two pages that share it would overwrite it."""
    modules: dict[str, set[str]] = {}
    for file in sorted((ROOT / "workbench" / "dashboard").glob("*.py")):
        for key in re.findall(r'(?:\bkey=|\bchoices?\(|\bread_address\()"([\w-]+)"', file.read_text(encoding="utf-8")):
            modules.setdefault(key, set()).add(file.name)
    assert len(modules) > 30
    assert {key: names for key, names in modules.items() if len(names) > 1} == {}
