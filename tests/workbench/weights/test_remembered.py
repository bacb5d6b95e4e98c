"""The fingerprint of a large model is remembered as long as its files do not change, and no longer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import build
from workbench.errors import WeightsError
from workbench.files import cache_folder
from workbench.mllm import MLLM
from workbench.weights import remembered


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small model that counts as large, in a cache of its own."""
    monkeypatch.setenv("VIRAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remembered, "LARGE", 0)
    monkeypatch.setattr(remembered, "RECENT", 0)
    return build("llava", tmp_path / "llava")


def load(model: Path, **options: str) -> str:
    return MLLM.load(str(model), validate=False, **options).fingerprint  # type: ignore[arg-type]


def test_it_is_computed_once_and_again_for_other_tensors(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "LARGE", 2**60)
    computed = load(model)
    monkeypatch.setattr(remembered, "LARGE", 0)
    assert load(model) == computed
    half = load(model, dtype="bfloat16")
    assert half != computed
    with monkeypatch.context() as patch:
        patch.setattr("workbench.mllm.base.fingerprint", lambda _: pytest.fail("computed again"))
        assert load(model) == computed
        assert load(model, dtype="bfloat16") == half
    # the same size, and the time of its last change put back
    file = model / "model.safetensors"
    content, before = bytearray(file.read_bytes()), file.stat()
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert load(model) != computed


def test_a_remembered_fingerprint_is_checked_on_demand(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed = load(model)
    monkeypatch.setenv(remembered.CHECK, "1")
    assert load(model) == computed
    (store,) = cache_folder("fingerprints").iterdir()
    store.write_text(store.read_text().replace('"fingerprint": "', '"fingerprint": "0'))
    with pytest.raises(WeightsError, match=f"but {store} remembers 0"):
        load(model)
    store.write_text("{")  # damaged: as if there were none
    monkeypatch.delenv(remembered.CHECK)
    assert load(model) == computed


def test_files_that_have_just_changed_are_not_remembered(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "RECENT", 3600 * 10**9)
    load(model)
    assert not [*cache_folder("fingerprints").iterdir()]


def test_a_file_that_changes_while_it_is_loaded_is_neither_remembered_nor_looked_up(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the new file would have the fingerprint of the old one's tensors for good."""
    from workbench.mllm import base

    file, load_model = model / "model.safetensors", base.load_model

    def replaced_meanwhile(*words: Any, **options: Any) -> Any:
        loaded = load_model(*words, **options)
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        (model / "new").write_bytes(content)
        (model / "new").replace(file)  # the loaded tensors stay those of the old file
        return loaded

    with monkeypatch.context() as patch:
        patch.setattr(base, "load_model", replaced_meanwhile)
        old = load(model)
    assert not [*cache_folder("fingerprints").iterdir()]
    new = load(model)
    assert new != old
    assert load(model) == new
