"""The script that plants faults: where it plants them, that a draw can be repeated, and that a fault is seen by the
tests of its module."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.planted_faults import run_tests
from benchmarks.planted_faults.draw import AREAS, drawn
from benchmarks.planted_faults.faults import faults_in, plant

PROGRAM = '''"""Einheit: 1 µm."""
def f(x: int = 3, *, axis=0):
    """No fault in 1 + 1 of a docstring."""
    if x < 2 and not x:  # µ
        raise ValueError(f"x is {x + 1}: expected {2 * x}")
    log.info("read %d of %d", x - 1, x)
    x += g(x, 1)
    return -x.mean(dim=-1) if x else h(x) + 0.5
'''


def planted(tmp_path: Path) -> set[tuple[int, str, str]]:
    """Each fault as (line, kind, the line with the fault in it)."""
    lines = set()
    for fault in faults_in(PROGRAM, "f.py"):
        (tmp_path / "f.py").write_text(PROGRAM)
        lines.add((fault.line, fault.kind, plant(fault, tmp_path).split("\n")[1]))
        changed = (tmp_path / "f.py").read_text().splitlines()
        assert [n for n, (a, b) in enumerate(zip(PROGRAM.splitlines(), changed, strict=True), 1) if a != b] == [
            fault.line
        ]
    return lines


def test_faults_are_where_numbers_are(tmp_path: Path) -> None:
    """None in docstrings, annotations, errors and log lines; bytes are counted where a line has more of them than
    characters."""
    found = planted(tmp_path)
    assert {line for line, _, _ in found} == {2, 4, 7, 8}
    assert {text for line, kind, text in found if (line, kind) == (4, "comparison")} == {"if x <= 2 and not x:  # µ"}
    assert (4, "and / or", "if x < 2 or not x:  # µ") in found
    assert (
        4,
        "negation dropped",
        "if x < 2 and (x):  # µ",
    ) in found
    assert (4, "condition negated", "if not (x < 2 and not x):  # µ") in found
    assert (
        4,
        "constant",
        "if x < 3 and not x:  # µ",
    ) in found
    assert {text for line, kind, text in found if line == 7 and kind != "constant"} == {"pass", "x += g(1, x)"}
    last = {kind: text for line, kind, text in found if line == 8}
    assert last["another function"] == "return -x.sum(dim=-1) if x else h(x) + 0.5"
    assert last["operator"] == "return -x.mean(dim=-1) if x else h(x) - 0.5"
    assert last["branches exchanged"] == "return (h(x) + 0.5 if x else -x.mean(dim=-1))"
    assert last["another dim"] == "return -x.mean(dim=0) if x else h(x) + 0.5"


@pytest.mark.slow
def test_a_draw_is_shared_between_areas_and_can_be_repeated() -> None:
    faults = drawn(0, 16, list(AREAS))
    assert faults == drawn(0, 16, list(AREAS)) != drawn(1, 16, list(AREAS))
    assert faults[:6] == drawn(0, 6, list(AREAS))
    assert [area for area, _ in faults] == list(AREAS) * 2
    assert all(run_tests.tests_of(fault.file) for _, fault in faults)
    assert run_tests.tests_of("workbench/metrics/alignment.py")[0] == "tests/workbench/metrics/test_metrics.py"
    assert run_tests.tests_of("analyses/cknna/options.py")[0] == "tests/analyses/test_cknna.py"
    assert run_tests.tests_of("workbench/overview/story.py")[0] == "tests/workbench/overview/test_story.py"
    assert run_tests.tests_of("workbench/stats.py")[0] == "tests/workbench/test_stats.py"


@pytest.mark.slow
def test_outcomes_are_those_of_the_tests(tmp_path: Path) -> None:
    """A test that fails is named; a file that cannot be collected is a failure too; what passes has survived."""
    (tmp_path / "test_a.py").write_text(
        "def test_right():\n    assert True\n\ndef test_command():\n    assert False\n\ndef test_wrong():\n    assert"
        " False\n"
    )
    (tmp_path / "test_b.py").write_text("import nothing_of_this_name\n")
    (tmp_path / "test_c.py").write_text("import time\n\ndef test_for_ever():\n    time.sleep(60)\n")
    # the command's test comes last
    assert run_tests.tested(tmp_path, ["test_a.py"], tmp_path / "work", 60) == ("failed", "test_a.py::test_wrong")
    assert run_tests.tested(tmp_path, ["test_a.py::test_right"], tmp_path / "work", 60) == ("passed", "")
    assert run_tests.tested(tmp_path, ["test_b.py"], tmp_path / "work", 60) == ("failed", "collection of test_b.py")
    assert run_tests.tested(tmp_path, ["test_c.py"], tmp_path / "work", 4) == ("timeout", "")
    assert run_tests.tested(tmp_path, ["test_d.py"], tmp_path / "work", 60)[0] == "nothing run"


@pytest.mark.parametrize("area", list(AREAS))
def test_every_area_has_lines(area: str) -> None:
    assert len(drawn(0, 20, [area])) == 20
