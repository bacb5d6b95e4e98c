"""Child processes and the cores that they may use."""

from __future__ import annotations

import os

import pytest

from workbench.processes import cores


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux restricts a process to some cores")
def test_cores_of_others_do_not_count() -> None:
    ours = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(ours)})
        assert cores() == 1
    finally:
        os.sched_setaffinity(0, ours)
    assert cores() == len(ours)
