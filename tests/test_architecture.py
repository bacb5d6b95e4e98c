"""Imports run one way, and heavy libraries stay where the design puts them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "workbench": {"workbench"},
    "analyses": {"analyses", "workbench"},
    "trainer": {"trainer", "workbench"},
    "app.py": {"workbench"},
}
ONLY_IN = {
    "streamlit": ("app.py", "workbench/dashboard/"),
    "nnsight": ("workbench/capture.py",),
    "peft": ("trainer/lora.py",),
    "plotly": ("workbench/figures/", "workbench/analysis.py", "workbench/dashboard/", "analyses/"),
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
    own = {module.split(".")[0] for module in imports(file)} & {"workbench", "analyses", "trainer", "app", "tests", "benchmarks"}
    assert own <= ALLOWED[top], f"{name} imports {own - ALLOWED[top]}"
    for module in imports(file):
        if top == "analyses" and module.startswith("analyses."):
            raise AssertionError(f"{name} imports another analysis: {module}")
        homes = ONLY_IN.get(module.split(".")[0])
        assert homes is None or name.startswith(homes), f"{name} imports {module}"
        if name.startswith("workbench/") and not name.startswith("workbench/dashboard/"):
            assert not module.startswith("workbench.dashboard"), f"{name} imports the dashboard"


def test_listing_runs_does_not_import_torch() -> None:
    """The dashboard's first page must be there within two seconds."""
    import subprocess
    import sys

    code = "import sys, workbench.runs, workbench.figures, workbench.dashboard.runs_page; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"
