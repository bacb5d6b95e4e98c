"""The encoder's features of a visual token are those of its place in the image, in every family, by grid and tile."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tests.tiny import BUILDERS, build
from workbench.errors import DataError, ModelError
from workbench.mllm import MLLM, VisualTokens
from workbench.mllm.family import final_norm_of
from workbench.spatial.grids import token_centers
from workbench.spatial.tiles import by_tile
from workbench.spatial.within_image import read_by_grid

JOINED = ("llava_next", "llava_onevision")  # families that join the tiles of an image to one grid
SIZES = [(180, 120), (100, 180), (120, 120)]
SMALL = [(110, 52), (52, 112), (60, 60)]  # of which LLaVA-OneVision does not interpolate the tokens


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


LOADED: dict[str, MLLM] = {}


@pytest.fixture(params=list(BUILDERS))
def transparent(request: pytest.FixtureRequest, folders: Path) -> MLLM:
    """A model whose vision encoder returns the mean color of each patch, in its first three channels."""
    if request.param not in LOADED:
        mllm = MLLM.load(str(build(request.param, folders / request.param)))
        LOADED[request.param] = mllm
        _make_transparent(mllm)
    return LOADED[request.param]


@torch.no_grad()
def _make_transparent(mllm: MLLM) -> None:
    inner = mllm.model.model
    tower = next(getattr(inner, name) for name in ("vision_tower", "visual", "vision_model") if hasattr(inner, name))
    for name, value in tower.named_parameters():
        if "position" in name or "pos_embed" in name:
            value.zero_()
    for module in tower.modules():
        if isinstance(module, nn.Linear | nn.Embedding):  # blocks then add nothing to their input
            for value in module.parameters(recurse=False):
                value.zero_()
        elif "Norm" in type(module).__name__:
            module.forward = lambda x, *_: x.contiguous()
        elif isinstance(module, nn.Conv2d | nn.Conv3d):
            module.weight.zero_()
            for channel in range(3):
                module.weight[channel, channel] = 1 / module.weight[channel, channel].numel()
            if module.bias is not None:
                module.bias.zero_()


def shown(mllm: MLLM, number: int) -> Image.Image:
    return gradient(*(SMALL if mllm.family.name == "llava_onevision" else SIZES)[number])


def gradient(width: int, height: int) -> Image.Image:
    """An image that codes its places: red grows from left to right, green from top to bottom."""
    y, x = np.mgrid[:height, :width] + 0.5
    return Image.fromarray(np.stack([255 * x / width, 255 * y / height, 0 * x], axis=-1).round().astype(np.uint8))


def coded_places(mllm: MLLM, features: Tensor) -> np.ndarray:
    """x and y that the encoder's features of each visual token code, (token, 2): the mean of its patches."""
    width = 32  # of the encoder
    color = features.reshape(len(features), -1, width)[:, :, :2].mean(dim=1).numpy()
    images = mllm.processor.image_processor
    return color * np.array(images.image_std)[:2] + np.array(images.image_mean)[:2]


def inside(parts: list[VisualTokens]) -> Iterator[bool]:
    """Whether all of each token's patch lies in the image."""
    for part in parts:
        assert part.grid is not None
        for row in range(part.grid[0]):
            for column in range(part.grid[1]):
                left, top, right, bottom = part.token_box(row, column)
                yield left >= 0 and top >= 0 and right <= 1 and bottom <= 1


@pytest.mark.parametrize("size", range(3))
def test_features_come_back_at_the_place_that_they_code(transparent: MLLM, size: int) -> None:
    # two images, so that rows are counted over the whole batch
    images = [gradient(60, 60), shown(transparent, size)]
    batch = transparent.encode(images, ["what is this ?", "yes"])
    grids = transparent.token_grids(batch)
    for places in (grids, by_tile(grids)):
        hidden, features = read_by_grid(transparent, batch, places, [0], encoder=True)
        assert features is not None
        for parts, of_image, tokens in zip(places, features, hidden[0], strict=True):
            assert [len(part.index) for part in parts] == [len(tile) for tile in of_image] == [*map(len, tokens)]
            kept = np.array(list(inside(parts)))
            assert kept.any()
            coded = np.concatenate([coded_places(transparent, tile) for tile in of_image])
            # no neighbor's: the finest grids here have a patch every 0.04
            assert np.abs(coded - token_centers(parts))[kept].max() < 0.02


@pytest.mark.parametrize("size", range(3))
def test_hidden_states_by_tile_are_those_of_the_same_positions(transparent: MLLM, size: int) -> None:
    batch = transparent.encode([shown(transparent, size)], ["what is this ?"])
    with torch.inference_mode():
        theirs = transparent.model(**batch.inputs, output_hidden_states=True).hidden_states
    places, last = by_tile(transparent.token_grids(batch)), transparent.n_layers
    (first, before), features = read_by_grid(transparent, batch, places, [0, last])
    (after,), _ = read_by_grid(transparent, batch, places, [last], final_norm=True)
    assert features is None
    norm = final_norm_of(transparent.decoder)
    for number, part in enumerate(places[0]):
        assert torch.allclose(first[0][number], theirs[0][0, part.index], atol=1e-6)
        assert torch.allclose(norm(before[0][number]), theirs[-1][0, part.index], atol=1e-5)
        assert torch.allclose(after[0][number], theirs[-1][0, part.index], atol=1e-6)


def test_tiles_are_the_parts_that_the_encoder_saw(transparent: MLLM) -> None:
    """They hold every token once, and cover the image without gaps; each comes from one row of pixel values."""
    name = transparent.family.name
    batch = transparent.encode([shown(transparent, 0)], ["what is this ?"])
    (parts,), (tiles,) = (places := transparent.token_grids(batch)), by_tile(places)
    assert sorted(torch.cat([tile.index for tile in tiles]).tolist()) == sorted(
        torch.cat([part.index for part in parts]).tolist()
    )
    if name not in JOINED:
        assert tiles == parts
        return
    encoder_tiles = batch.inputs["pixel_values"].shape[1]
    assert len(parts) == 2
    assert len(tiles) == encoder_tiles > 2
    patches = len(parts[0].index)
    for number, tile in enumerate(tiles):
        assert tile.rows is not None
        assert (tile.rows // patches == number).all()
        assert tile.grid is not None
        assert tile.grid[0] * tile.grid[1] == len(tile.index)
    area = sum((t.box[2] - t.box[0]) * (t.box[3] - t.box[1]) for t in tiles[1:])
    left, top, right, bottom = parts[1].box
    assert area == pytest.approx((right - left) * (bottom - top), rel=0.15 if name == "llava_onevision" else 1e-6)


def test_tokens_between_tiles_belong_to_no_tile(folders: Path) -> None:
    name = "llava_onevision"
    mllm = LOADED.get(name) or MLLM.load(str(build(name, folders / name)))
    batch = mllm.encode([gradient(400, 300)], ["what is this ?"])
    grids = mllm.token_grids(batch)
    with pytest.raises(DataError, match=r"a grid of \(\d+, \d+\) visual tokens is interpolated .* or by grid"):
        by_tile(grids)
    with pytest.raises(ModelError, match="its tokens mix several encoder features"):
        read_by_grid(mllm, batch, grids, [0], encoder=True)
