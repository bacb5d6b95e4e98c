"""Images that are replaced by others of as many bytes: the targets are those of what is there, a resumed run stops, and
a running one stops too."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.students import FLAGS, VIRAL, noise_image, rows, write
from tests.tiny import build
from trainer.recipe import Recipe
from trainer.run import train
from trainer.setups.conversation import ConversationSetup
from workbench.cli import parse
from workbench.errors import RunError


@pytest.fixture
def flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A small LLaVA, and images as BMP, whose size in bytes follows from their size in pixels."""
    monkeypatch.setenv("VIRAL_CACHE", str(tmp_path / "cache"))
    file, val = (
        write(tmp_path / name, [as_bmp(row) for row in given])
        for name, given in (("w", rows(6, 1)), ("val", rows(1, 0)))
    )
    return [
        "--model.name",
        str(build("llava", tmp_path / "llava")),
        "--data.train",
        f"llava_json:{file}",
        "--data.val",
        f"llava_json:{val}",
        *FLAGS,
        *VIRAL,
    ]


def as_bmp(row: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(row).replace(".png", ".bmp"))  # type: ignore[no-any-return]


def replace_pixels(file: Path, seed: int) -> None:
    stat = file.stat()
    noise_image(seed).save(file)
    assert file.stat().st_size == stat.st_size
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def targets(flags: list[str], mode: str) -> list[torch.Tensor]:
    ready = ConversationSetup.from_recipe(parse(Recipe, [*flags, "--data.features", mode], prog="trainer"))
    batch = ready.collate(list(range(len(ready.train))))
    return [part for parts in batch["targets"]["efficientnet-lite0"] for part in parts]


@pytest.mark.slow
def test_targets_are_those_of_the_images_that_are_there(flags: list[str], tmp_path: Path) -> None:
    before = targets(flags, "cache")
    replace_pixels(tmp_path / "w" / "coco" / "1.bmp", 200)
    stored = targets(flags, "cache")
    torch.testing.assert_close(stored, targets(flags, "compute"), rtol=1e-3, atol=1e-3)
    assert [torch.allclose(a, b, atol=1e-2) for a, b in zip(before, stored, strict=True)] == [
        n != 1 for n in range(len(stored))
    ]


@pytest.mark.slow
def test_an_image_that_is_replaced_while_training_stops_it_by_name(flags: list[str], tmp_path: Path) -> None:
    ready = ConversationSetup.from_recipe(parse(Recipe, flags, prog="trainer"))
    ready.collate([3, 4])
    replace_pixels(tmp_path / "w" / "gqa" / "3.bmp", 200)
    ready.collate([4, 5])
    with pytest.raises(
        RunError, match=r"image 2 of conversation 4:3 of llava_json:.* has been replaced since the training began"
    ) as error:
        ready.collate([4, 3])
    assert len(str(error.value)) < 400


@pytest.mark.slow
def test_a_run_is_not_resumed_on_other_images(flags: list[str], tmp_path: Path) -> None:
    """A baseline's too, which computes no targets; the validation images are held to it as well."""
    flags = [
        *flags,
        "--alignment.objective",
        "none",
        "--optim.steps",
        "2",
        "--monitor.cknna_images",
        "0",
        "--eval_every",
        "2",
    ]
    done, cut = tmp_path / "done", tmp_path / "cut"
    train(parse(Recipe, [*flags, "--output_dir", str(done)], prog="trainer"), [])
    cut.mkdir()
    shutil.copytree(done / "checkpoint-2", cut / "checkpoint-2")
    shutil.copy(done / "recipe.yaml", cut)
    for file, source in ((tmp_path / "w" / "coco" / "5.bmp", "data"), (tmp_path / "val" / "coco" / "0.bmp", "val")):
        whole = file.read_bytes()
        replace_pixels(file, 200)
        with pytest.raises(RunError, match=f"was trained with the {source} fingerprint"):
            train(parse(Recipe, [*flags, "--resume", "--output_dir", str(cut)], prog="trainer"), [])
        file.write_bytes(whole)
