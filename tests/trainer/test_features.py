"""Frozen features: what is stored equals what was computed, nothing is computed twice, damage is named, and only what
is asked for is read."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.conftest import ROOT, SMALL_VIRAL, recipe, run
from trainer.alignment_config import AlignmentConfig
from trainer.model_config import ModelConfig
from trainer.recipe import DataConfig, OptimConfig, Recipe
from trainer.targets import feature_store
from trainer.targets.feature_store import frozen_features
from trainer.targets.features import DerivedFeatures, Features, shuffle_images
from workbench.data import Dataset, Sample, load_data
from workbench.errors import ConfigError, RunError
from workbench.files import cache_folder, locked

TINY = Recipe(
    model=ModelConfig(layers=3, width=32, ffn=64),
    data=DataConfig(limit_train=24, limit_val=8),
    alignment=AlignmentConfig(objective="cosine", layer=(2,), hidden=16, images="others", center=True),
)


class Network:
    """A deterministic stand-in for a frozen network that remembers which images it saw; (image, 3 tokens, d)."""

    def __init__(self, scale: float = 1.0, d: int = 5) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weight = scale * torch.randn(4 * 4, d, generator=generator)
        self.seen: list[bytes] = []

    def __call__(self, images: list[Image.Image]) -> torch.Tensor:
        self.seen += [image.tobytes() for image in images]
        pixels = [torch.from_numpy(np.array(image, dtype=np.float32)) / 255 for image in images]
        # one by one: no batch changes a bit
        return torch.stack([torch.einsum("hwc,hwd->cd", one, self.weight.view(4, 4, -1)) for one in pixels])


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8))


def world(seeds: list[int], name: str = "toy") -> Dataset:
    """One question for each image; image i is drawn from seeds[i]."""
    samples = [Sample(f"{i}", f"image-{i}", lambda seed=seed: picture(seed)) for i, seed in enumerate(seeds)]
    return Dataset(name, samples, f"{name}-{feature_store.content_hash(*seeds)}")


def direct(data: Dataset, network: Network) -> torch.Tensor:
    return network([scene[0].image for scene in data.scenes])


def shards() -> list[Path]:
    return sorted(
        cache_folder("features").glob("*/*.safetensors"), key=lambda path: (path.parent.name == "images", path)
    )


def stored(data: Dataset, network: Network, key: tuple[object, ...] = ("a", (3, 1))) -> Features:
    return frozen_features(data, key, network, what="toy net")


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A cache of its own with four images a shard, computed two by two."""
    if "real_cache" not in request.keywords:
        monkeypatch.setenv("VIRAL_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(feature_store, "SHARD", 4)
        monkeypatch.setattr(feature_store, "BATCH", 2)


def test_what_is_read_is_bitwise_what_was_computed_once() -> None:
    data, network = world(list(range(10))), Network()
    first = stored(data, network)
    assert len(network.seen) == 10
    assert len(shards()) == 4
    again = Network()
    second = stored(data, again)
    assert len(again.seen) == 2, "opening computes two images again, and compares"
    for ready in (first, second):
        assert ready.shape == (10, 3, 5)
        assert len(ready) == 10
        assert torch.equal(ready.rows(range(10)), direct(data, Network()))
        assert torch.equal(ready.rows([7, 0, 7]), direct(data, Network())[[7, 0, 7]])
        assert torch.equal(ready[4], direct(data, Network())[4])
    assert torch.allclose(second.mean(), direct(data, Network()).mean((0, 1)), atol=1e-6)


def test_a_whole_store_is_only_read() -> None:
    """So it may lie on a disk that cannot be written; and its images are not decoded again but for the two that are
    checked."""
    data = world(list(range(9)))
    stored(data, Network())
    root = cache_folder("features")
    # a lock would change its folder's time
    before = {path: path.stat().st_mtime_ns for path in [root, *root.rglob("*")]}
    loads = []
    counted = [
        replace(sample, load=lambda sample=sample: (loads.append(sample.id), sample.load())[1]) for sample in data
    ]
    stored(Dataset(data.name, counted, data.fingerprint), Network())
    assert before == {path: path.stat().st_mtime_ns for path in [root, *root.rglob("*")]}
    assert len(loads) == 2


def test_identical_images_are_computed_once_within_and_between_data_sets() -> None:
    network = Network()
    first = stored(world([1, 2, 1, 1, 3, 2]), network)
    assert len(network.seen) == 3
    assert torch.equal(first[0], first[3])
    assert torch.equal(first[1], first[5])
    assert not torch.equal(first[0], first[1])
    network = Network()
    second = stored(world([3, 9, 1], name="other"), network)
    # 9, and the two known ones that are checked
    assert network.seen.count(picture(9).tobytes()) == 1
    assert len(network.seen) == 3
    assert torch.equal(second.rows(range(3)), direct(world([3, 9, 1]), Network()))


@pytest.mark.parametrize("key", [("b", (3, 1)), ("a", (1, 3))])
def test_another_fingerprint_or_geometry_is_another_store(key: tuple[object, ...]) -> None:
    data, network = world([1, 2, 3]), Network(scale=2)
    stored(data, Network())
    assert torch.equal(stored(data, network, key).rows(range(3)), direct(data, Network(scale=2)))
    assert len(network.seen) == 3
    assert torch.equal(stored(data, Network()).rows(range(3)), direct(data, Network()))


@pytest.mark.parametrize(
    ("network", "why"), [(Network(scale=1.03), "differ by 0.029"), (Network(d=6), "they are 3 x 5 and should be 3 x 6")]
)
def test_a_network_that_says_something_else_under_the_same_key_is_found(network: Network, why: str) -> None:
    data = world(list(range(6)))
    stored(data, Network())
    with pytest.raises(
        RunError, match=r"features in .* are not what toy net computes now .*: delete that folder"
    ) as error:
        stored(data, network)
    assert why in str(error.value)
    assert str(shards()[0].parent) in str(error.value)


def test_pictures_that_changed_behind_the_same_fingerprint_are_found() -> None:
    data, changed = world([1, 2, 3]), world([4, 5, 6])
    stored(data, Network())
    with pytest.raises(
        RunError, match=r"image image-\d of toy is not the one that was hashed in .*images.*: delete that file"
    ):
        stored(Dataset("toy", changed.samples, data.fingerprint), Network())


def test_replaced_pixels_of_the_same_size_are_computed_anew(tmp_path: Path) -> None:
    """In files of as many bytes, with the old time of change: 20 of 20 openings give the features of what is there now,
    in the order of now."""
    for number in range(6):
        picture(number).save(tmp_path / f"{number}.bmp")
    for opening in range(20):
        file = tmp_path / f"{opening % 6}.bmp"
        times = file.stat().st_atime_ns, file.stat().st_mtime_ns
        picture(100 + opening).save(file)
        os.utime(file, ns=times)
        data = load_data(f"folder:{tmp_path}")
        assert torch.equal(stored(data, Network()).rows(range(6)), direct(data, Network()))
    (tmp_path / "0.bmp").rename(tmp_path / "9.bmp")
    data = load_data(f"folder:{tmp_path}")
    assert torch.equal(stored(data, Network()).rows(range(6)), direct(data, Network()))


@pytest.mark.slow
def test_no_flipped_byte_gives_other_features(capfd: pytest.CaptureFixture[str]) -> None:
    """Wherever it lies, the error names the file, or the features are right all the same (a name in the header, an
    image's hash: computed anew)."""
    data = world(list(range(4)))
    truth = stored(data, Network()).rows(range(4))
    path, whole = shards()[0], shards()[0].read_bytes()
    named = right = 0
    for position in [*range(0, len(whole), 5), *range(len(whole) - 240, len(whole))]:
        for other in set(shards()) - {path}:
            other.unlink()
        damaged = bytearray(whole)
        damaged[position] ^= 0x10
        path.write_bytes(bytes(damaged))
        try:
            assert torch.equal(stored(data, Network()).rows(range(4)), truth), position
            right += 1
        except RunError as error:
            assert f"feature cache {path} is damaged" in str(error) and "delete that file" in str(error), position
            named += 1
    assert named > 240
    assert right > 10
    path.unlink()
    assert torch.equal(stored(data, Network()).rows(range(4)), truth), "what the message advises helps"


def test_a_cut_shard_is_named_and_only_the_shard_that_is_asked_for_is_read() -> None:
    data = world(list(range(12)))
    ready, truth = stored(data, Network()), direct(world(list(range(12))), Network())
    by_image = {
        path: [i for i in range(12) if ready._records[i][0] == path]
        for path in shards()
        if path.parent.name != "images"
    }
    good, bad, _ = by_image
    content = bytearray(bad.read_bytes())
    content[content.find(truth[by_image[bad][3]].numpy().tobytes()) + 10] ^= 1  # the last of its four records
    bad.write_bytes(bytes(content))
    for index in by_image[good] + by_image[bad][:3]:
        assert torch.equal(ready[index], truth[index])
    with pytest.raises(
        RunError, match=f"{bad.name} is damaged .record 3 does not match its checksum.: delete that file"
    ):
        ready.rows(range(12))
    bad.write_bytes(bytes(content[:-30]))
    with pytest.raises(RunError, match=f"{bad.name} is damaged"):
        stored(data, Network())


READER = """
from pathlib import Path
import numpy as np, torch
import tests.trainer.test_features as t
from trainer.targets import feature_store
feature_store.SHARD, feature_store.BATCH = 8, 4

def memory():
    lines = Path("/proc/self/status").read_text().splitlines()
    return [int(line.split()[1]) / 1024 for line in lines if line.startswith(("RssAnon", "RssFile"))]

data = t.world(list(range(32)))
wide = lambda images: torch.stack([torch.full((512, 1024), float(np.asarray(image)[0, 0, 0])) for image in images])
t.stored(data, wide)
ready = t.stored(data, wide)
before = memory()
ready[20].sum()
one = memory()
ready.mean()
print(sum(one) - sum(before), memory()[0] - before[0])
"""


@pytest.mark.slow
def test_reading_one_image_does_not_read_the_store() -> None:
    """64 MiB on disk; the memory that one image takes, and the memory of its own that a process holds on to after a
    pass over all images (MiB).

    A process of its own, whose freed memory goes back at once: otherwise the allocator keeps tens of MiB, as many as
    what ran before left room for.
    """
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    out = subprocess.run(
        [sys.executable, "-c", READER], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout
    one, whole = map(float, out.split())
    assert one < 12 and whole < 12, out  # pages of the file itself are the kernel's to take back


WORKER = """
import sys, time
import tests.trainer.test_features as t
from trainer.targets import feature_store
feature_store.SHARD, feature_store.BATCH = 4, 2
network = t.Network()
def slow(images):
    time.sleep(0.05)
    return network(images)
print("imported", flush=True)
sys.stdin.readline()
ready = t.stored(t.world(list(range(40))), slow)
print(len(network.seen), t.torch.equal(ready.rows(range(40)), t.direct(t.world(list(range(40))), t.Network())))
"""


def worker() -> subprocess.Popen[str]:
    """A process that waits for a line, fills the store of `world(range(40))`, and prints how many images it computed
    and whether all are right."""
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "imported\n"
    return process


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


@pytest.mark.slow
def test_killed_in_the_middle_goes_on_from_the_whole_shards() -> None:
    process = worker()
    go(process)
    folder = cache_folder("features")
    deadline = time.monotonic() + 120
    while len(list(folder.glob("[!i]*/*.safetensors"))) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    (store,) = [path for path in folder.iterdir() if path.name != "images"]
    whole = len(list(store.glob("*.safetensors")))
    assert 3 <= whole < 10
    out, err = worker().communicate("\n")
    assert out.split() == [str(40 - 4 * whole + 2), "True"], err  # two are the check of what was there
    assert len(list(store.glob("*.safetensors"))) == 10
    assert not list(store.glob(".*.safetensors*"))


@pytest.mark.slow
def test_processes_side_by_side_share_the_work() -> None:
    pair = [worker(), worker()]
    for process in pair:
        go(process)
    results = [process.communicate() for process in pair]
    counts = [int(out.split()[0]) for out, _ in results]
    assert all(out.split()[1] == "True" for out, _ in results), results
    # no image twice; two are the check, where one came after the other's first shard
    assert sum(counts) in (40, 42) and min(counts) >= 8, counts
    (store,) = [path for path in cache_folder("features").iterdir() if path.name != "images"]
    assert len(list(store.glob("*"))) == 10
    assert not list(store.glob(".*"))
    assert torch.equal(
        stored(world(list(range(40))), Network()).rows(range(40)), direct(world(list(range(40))), Network())
    )


def test_a_lock_is_held_by_one(tmp_path: Path) -> None:
    with locked(tmp_path / "lock") as one, locked(tmp_path / "lock") as two:
        assert (one, two) == (True, False)
    with locked(tmp_path / "lock") as one:
        assert one
    assert not (tmp_path / "lock").exists()


def test_features_that_are_not_finite_are_not_stored() -> None:
    with pytest.raises(RunError, match="toy net returned features that are not finite for images of toy"):
        frozen_features(
            world([1, 2]), ("a",), lambda images: torch.full((len(images), 2, 2), float("nan")), what="toy net"
        )
    assert [path.parent.name for path in shards()] == ["images"]


def test_another_order_and_less_a_mean() -> None:
    data = world([1, 2, 3])
    ready, truth = stored(data, Network()), direct(data, Network())
    swapped = DerivedFeatures(DerivedFeatures(ready, minus=ready.mean()), order=[2, 0, 1])
    assert torch.allclose(swapped.rows([0, 1]), truth[[2, 0]] - truth.mean((0, 1)), atol=1e-6)
    assert swapped.shape == ready.shape
    assert swapped.mean().abs().max() < 1e-6


@given(st.lists(st.integers(0, 6), min_size=1, max_size=30), st.integers(0, 99))
def test_other_images_are_all_of_them_and_never_the_same_picture(pictures: list[int], seed: int) -> None:
    most = max(pictures.count(picture) for picture in pictures)
    if 2 * most > len(pictures):
        with pytest.raises(
            ConfigError,
            match=f"but {most} of the {len(pictures)} training images are the same image: expected at most half",
        ):
            shuffle_images(pictures, seed)
        return
    others = shuffle_images(pictures, seed)
    assert sorted(others) == list(range(len(pictures)))
    assert others == shuffle_images(pictures, seed)
    assert all(pictures[other] != own for other, own in zip(others, pictures, strict=True))


@pytest.mark.slow
@pytest.mark.real_cache
def test_computed_at_every_step_equals_cached_within_noise() -> None:
    """Real networks: inputs, targets, and both losses and gradients of a training step; the frozen tower stays in eval
    mode."""
    from trainer.setups.packed import PackedSetup
    from trainer.setups.packed_data import collate

    both = []
    for mode in ("cache", "compute"):
        ready = PackedSetup.from_recipe(replace(TINY, data=replace(TINY.data, features=mode)))
        ready.model.train()
        batch = collate(ready.train.__getitems__([3, 8, 1]))
        output = ready.model(**batch)
        (output.lm_loss + 0.5 * output.alignment_loss).backward()
        gradient = ready.model.base.model.multi_modal_projector.linear_1.weight.grad
        both.append(
            (
                batch["connector_inputs"],
                batch["targets"]["efficientnet-lite0"],
                output.lm_loss.detach(),
                output.alignment_loss.detach(),
                gradient,
            )
        )
        tower = ready.model.base.model.vision_tower
        assert not (mode == "compute" and tower.training)
        assert all(p.grad is None for p in tower.parameters())
    for one, other in zip(*both, strict=True):
        assert one.norm() > 0
        assert (one - other).norm() / one.norm() < 1e-5


def test_a_full_disk_is_one_sentence_and_leaves_nothing() -> None:
    """A limit on the size of files stands for the full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(RunError, match=r"cannot write .*/features/\w+/\w+.safetensors: "):
            stored(world([1, 2, 3, 4]), Network(d=5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.parent.name for path in shards()] == ["images"]
    assert not list(cache_folder("features").rglob(".*"))


@pytest.fixture
def empty_cache(tmp_path: Path) -> Path:
    """A cache that holds the real weights and no features."""
    own = tmp_path / "empty"
    own.mkdir()
    (own / "weights").symlink_to(cache_folder("weights"))
    return own


@pytest.mark.slow
@pytest.mark.real_cache
def test_a_cache_that_cannot_be_written_is_one_sentence(empty_cache: Path, tmp_path: Path) -> None:
    (empty_cache / "features").write_text("")
    words = ["trainer", recipe("viral"), "--stage1", "None", *SMALL_VIRAL, "--output_dir", str(tmp_path / "out")]
    done = run(*words, code=2, VIRAL_CACHE=str(empty_cache))
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith(f"error: cannot make folder {empty_cache}/features")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.real_cache
def test_a_whole_training_without_a_cache(empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`data.features: compute` trains to the end and writes no feature to the disk."""
    from trainer.run import train

    monkeypatch.setenv("VIRAL_CACHE", str(empty_cache))
    few = replace(
        TINY,
        data=DataConfig(limit_train=8, limit_val=4, features="compute"),
        optim=OptimConfig(steps=3, batch_size=4),
        output_dir=tmp_path / "out",
    )
    train(few, [])
    assert json.loads((tmp_path / "out" / "training.json").read_text())["recipe"]["data"]["features"] == "compute"
    # hashes, by which the control tells pictures apart
    assert [path.name for path in (empty_cache / "features").iterdir()] == ["images"]
