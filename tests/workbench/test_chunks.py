"""The loop of an analysis: chunks are stored as they are done, taken over, shared by processes, and change no bit of a
result."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image

from tests.conftest import Process, start
from tests.tiny import build
from workbench.analysis.chunks import PART_FILE, Chunk, Chunks, Part, chunked, identity, joined, stacked
from workbench.data.base import Object, Sample, load_data
from workbench.errors import RunError
from workbench.ranks import Ranks

DEPENDS = ("an origin",)


def squares(chunk: Chunk[int]) -> Part:
    numbers = torch.tensor([float(item) for _, items in chunk.batches() for item in items])
    return Part(
        {"rows": pd.DataFrame({"at": range(chunk.start, chunk.start + len(chunk)), "value": numbers.numpy()})},
        {"squares": numbers**2},
        {"n": len(chunk)},
    )


class Counted:
    """`squares`, and how often it was called."""

    def __init__(self) -> None:
        self.starts: list[int] = []

    def __call__(self, chunk: Chunk[int]) -> Part:
        self.starts.append(chunk.start)
        return squares(chunk)


def mapped(chunks: Chunks, items: Sequence[int], fn: object, *, size: int = 4, keep: bool = True) -> list[Part]:
    return chunks.map("squares", chunked(items, 2, size), fn, DEPENDS, keep, "squares")  # type: ignore[arg-type]


def test_chunks_are_whole_batches_and_cover_every_item_once() -> None:
    for batch_size, sizes in ((32, [32, 32, 6]), (8, [32, 32, 6]), (24, [48, 22]), (64, [64, 6])):
        chunks = chunked(range(70), batch_size)
        assert [len(chunk) for chunk in chunks] == sizes
        assert [item for chunk in chunks for _, items in chunk.batches() for item in items] == list(range(70))
        assert all(len(items) == batch_size for chunk in chunks[:-1] for _, items in chunk.batches())
        assert [first for chunk in chunks for first, _ in chunk.batches()] == list(range(0, 70, batch_size))


def test_parts_come_back_as_they_were_and_nothing_is_computed_twice(tmp_path: Path) -> None:
    fn, memory = Counted(), mapped(Chunks(), range(10), squares)
    stored = mapped(Chunks(tmp_path, "q"), range(10), fn)
    assert fn.starts == [0, 4, 8]
    assert [part.record for part in stored] == [{"n": 4}, {"n": 4}, {"n": 2}]
    pd.testing.assert_frame_equal(joined(stored, "rows"), joined(memory, "rows"))
    assert torch.equal(stacked(stored, "squares"), stacked(memory, "squares"))
    assert stacked(stored, "squares").tolist() == [float(n**2) for n in range(10)]
    mapped(Chunks(tmp_path, "q"), range(10), fn)
    assert fn.starts == [0, 4, 8]


def test_more_items_take_over_the_chunks_that_have_the_same_ones(tmp_path: Path) -> None:
    fn = Counted()
    mapped(Chunks(tmp_path, "q"), range(10), fn)
    more = mapped(Chunks(tmp_path, "q"), range(15), fn)
    assert fn.starts == [0, 4, 8, 8, 12]  # the last chunk had two items, and has four now
    assert stacked(more, "squares").tolist() == [float(n**2) for n in range(15)]
    mapped(Chunks(tmp_path, "another question"), range(4), fn)
    mapped(Chunks(tmp_path, "q"), [0, 1, 2, 5], fn)
    assert fn.starts[5:] == [0, 0]


def test_an_error_keeps_the_chunks_before_it(tmp_path: Path) -> None:
    def fails(chunk: Chunk[int]) -> Part:
        if chunk.start == 8:
            raise RunError("the disk is full")
        return squares(chunk)

    with pytest.raises(RunError, match="disk is full"):
        mapped(Chunks(tmp_path, "q"), range(12), fails)
    assert not list(tmp_path.glob(".*"))  # no lock, nothing half written
    fn = Counted()
    assert len(mapped(Chunks(tmp_path, "q"), range(12), fn)) == 3
    assert fn.starts == [8]


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: (f / PART_FILE).write_text("{"),
        lambda f: (f / "rows.parquet").unlink(),
        lambda f: (f / "tensors.safetensors").write_bytes(b"no"),
    ],
)
def test_a_damaged_chunk_is_computed_again_and_named(
    tmp_path: Path, damage: object, caplog: pytest.LogCaptureFixture
) -> None:
    fn = Counted()
    mapped(Chunks(tmp_path, "q"), range(8), fn)
    folder = next(path for path in tmp_path.iterdir() if path.name.startswith("squares-4-"))
    damage(folder)  # type: ignore[operator]
    with caplog.at_level(logging.WARNING):
        parts = mapped(Chunks(tmp_path, "q"), range(8), fn)
    assert fn.starts == [0, 4, 4]
    assert stacked(parts, "squares").tolist() == [float(n**2) for n in range(8)]
    assert f"{folder} is damaged" in caplog.text


def test_parts_that_are_not_kept_are_removed_when_the_run_is_stored(tmp_path: Path) -> None:
    chunks = Chunks(tmp_path, "q")
    mapped(chunks, range(8), squares, keep=False)
    assert len(list(tmp_path.iterdir())) == 2
    chunks.clean()
    assert not list(tmp_path.iterdir())


def _slowly(chunk: Chunk[int]) -> Part:
    with (Path(os.environ["LOG"]) / f"{chunk.start}-{os.getpid()}").open("w"):
        time.sleep(0.05)
    return squares(chunk)


def _rank(folder: Path, rank: int, count: int, queue: object) -> None:
    parts = mapped(Chunks(folder, "q", Ranks(rank, count)), range(40), _slowly)
    queue.put((rank, stacked(parts, "squares").tolist()))  # type: ignore[attr-defined]


def test_processes_share_the_chunks_and_all_have_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks of one launch, or two launches of the same question."""
    (tmp_path / "log").mkdir()
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    ranks = [context.Process(target=_rank, args=(tmp_path / "chunks", rank, 2, queue)) for rank in range(2)]
    for process in ranks:
        process.start()
    results = dict(queue.get(timeout=60) for _ in ranks)
    for process in ranks:
        process.join()
    assert results[0] == results[1] == [float(n**2) for n in range(40)]
    done = [path.name.split("-") for path in (tmp_path / "log").iterdir()]
    # each once, by both
    assert sorted(int(start) for start, _ in done) == list(range(0, 40, 4))
    assert len({pid for _, pid in done}) == 2


def test_ranks_are_those_of_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for names in (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")):
        for name in names:
            monkeypatch.delenv(name, raising=False)
    assert Ranks.here() == Ranks(0, 1, 0)
    assert Ranks.here().main
    for name, value in zip(("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"), "352", strict=True):
        monkeypatch.setenv(name, value)
    assert Ranks.here() == Ranks(3, 5, 2)
    assert not Ranks.here().main
    for name, value in zip(("RANK", "WORLD_SIZE", "LOCAL_RANK"), "120", strict=True):
        monkeypatch.setenv(name, value)
    assert Ranks.here() == Ranks(1, 2, 0)
    assert [Ranks(rank, 3).rotated(range(6)) for rank in range(3)] == [
        [0, 1, 2, 3, 4, 5],
        [2, 3, 4, 5, 0, 1],
        [4, 5, 0, 1, 2, 3],
    ]


def test_an_item_is_known_by_all_that_it_says() -> None:
    def sample(**more: object) -> Sample:
        return Sample(
            **(
                {
                    "id": "a",
                    "image_id": "i",
                    "load": lambda: Image.new("RGB", (1, 1)),
                    "question": "q",
                    "options": ("x", "y"),
                }
                | more
            )
        )  # type: ignore[arg-type]

    others = [
        sample(id="b"),
        sample(image_id="j"),
        sample(question="r"),
        sample(options=("y", "x")),
        sample(answer="x"),
        sample(category="c"),
    ]
    others += [
        sample(objects=(Object("dog", (0, 0, 1, 1)),)),
        sample(objects=(Object("dog", (0, 0, 1, 0.5)),)),
        sample(text_only=0.5),
    ]
    assert identity(sample()) == identity(sample())
    assert len({str(identity(one)) for one in [sample(), *others]}) == len(others) + 1
    with pytest.raises(TypeError, match="is a object"):
        identity(object())


def test_scenes_keep_their_identity_under_another_limit() -> None:
    few, many, other = (load_data("shapes:val", limit=limit, seed=seed) for limit, seed in ((3, 0), (5, 0), (3, 1)))
    assert few.origin == many.origin != other.origin
    assert few.fingerprint != many.fingerprint
    assert identity(few.scenes) == identity(many.scenes[:3])


# --- the real command -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llava", tmp_path_factory.mktemp("model") / "llava")


def words(model: Path, out: Path) -> list[str]:
    asked = [
        "--model",
        str(model),
        "--data",
        "shapes:val",
        "--vfm",
        "efficientnet-lite0",
        "--null",
        "10",
        "--k",
        "3",
        "--layers",
        "1",
        "2",
    ]
    return [*asked, "--output_dir", str(out), "--limit", "14", "--batch_size", "2"]


def scores(out: Path) -> pd.DataFrame:
    (folder,) = (path.parent for path in out.glob("cknna-*/run.json"))
    return pd.read_parquet(folder / "scores.parquet")


def started(model: Path, out: Path, **environment: str) -> Process:
    """The command in chunks of two images."""
    return start("tests.in_small_chunks", "cknna", *words(model, out), **environment)


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Uninterrupted, by one process."""
    out = tmp_path_factory.mktemp("whole")
    process = started(model, out / "runs")
    assert process.wait() == 0, process.err
    return out / "runs"


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bits(model: Path, whole: Path, tmp_path: Path) -> None:
    kills = 0
    while kills < 10:
        process, before = started(model, tmp_path / "runs"), len(list(tmp_path.glob("runs/.chunks/cknna/*-*")))
        while process.poll() is None and len(list(tmp_path.glob("runs/.chunks/cknna/*-*"))) < before + 3:
            time.sleep(0.01)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert process.returncode == 0
    assert kills >= 2
    pd.testing.assert_frame_equal(scores(tmp_path / "runs"), scores(whole), check_exact=True)


@pytest.mark.slow
def test_two_ranks_give_the_bits_of_one_and_one_of_them_speaks(model: Path, whole: Path, tmp_path: Path) -> None:
    ranks = [
        started(model, tmp_path / "runs", RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank)) for rank in range(2)
    ]
    assert [process.wait() for process in ranks] == [0, 0], [process.err for process in ranks]
    assert "cknna-" in ranks[0].out
    assert not ranks[1].out
    pd.testing.assert_frame_equal(scores(whole), scores(tmp_path / "runs"), check_exact=True)
    (record,) = (json.loads(path.read_text()) for path in (tmp_path / "runs").glob("cknna-*/run.json"))
    assert record["processes"] == 2
