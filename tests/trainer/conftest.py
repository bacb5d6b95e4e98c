"""Fixtures that several tests of the trainer share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import build


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llava", tmp_path_factory.mktemp("llava"))
