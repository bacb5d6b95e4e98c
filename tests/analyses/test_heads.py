"""The outputs of attention heads are those of plain transformers in every family, and their mutual kNN is that of a
naive loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForImageTextToText

from analyses.heads import ANALYSIS, differences, summary
from tests.students import noise_image, square_image
from tests.tiny import BUILDERS, build
from workbench.analysis.api import run_analysis
from workbench.attention_heads import attention_heads, output_projection
from workbench.capture.heads import read_heads
from workbench.data import load_data
from workbench.errors import ModelError
from workbench.mllm import MLLM
from workbench.runs import Run
from workbench.spatial.vfm_patches import patches_under
from workbench.vfm import load_vfm

VFM = "efficientnet-lite0"


def plain_outputs(model: Any, inputs: Any, layer: int) -> torch.Tensor:
    """(sample, position, head, width) of a plain transformers model, by a hook on o_proj of one block."""
    decoder = model.get_decoder()
    seen: list[torch.Tensor] = []
    attention = getattr(decoder, "model", decoder).layers[layer - 1].self_attn
    handle = attention.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    heads = model.config.get_text_config().num_attention_heads
    return seen[0].view(*seen[0].shape[:2], heads, -1)


@pytest.mark.parametrize("name", ["llava", pytest.param("qwen2_5_vl", id="grouped-query")])
def test_outputs_of_heads_are_those_of_plain_transformers(name: str, tmp_path: Path) -> None:
    check_family(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(BUILDERS) - {"llava", "qwen2_5_vl"}))
def test_outputs_of_heads_in_every_family(name: str, tmp_path: Path) -> None:
    check_family(name, tmp_path)


def check_family(name: str, folder: Path) -> None:
    path = build(name, folder)
    mllm = MLLM.load(str(path), validate=False)
    plain = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    batch = mllm.encode([noise_image(0, 160, 90), square_image(1)], ["what is this ?", "a red cat ?"])
    visual = mllm.visual_tokens(batch)
    heads = attention_heads(mllm.model, [mllm.n_layers, 1])
    count = mllm.config.get_text_config().num_attention_heads
    assert heads == [(layer, head) for layer in (1, mllm.n_layers) for head in range(count)]
    values = dict(zip(heads, read_heads(mllm, batch, visual, heads), strict=True))
    for layer in (1, mllm.n_layers):
        expected = plain_outputs(plain, batch.inputs, layer)
        for head in range(count):
            for row, sample in enumerate(visual):
                for part, tokens in zip(sample, values[layer, head][row], strict=True):
                    torch.testing.assert_close(tokens, expected[row, part.index, head], atol=1e-5, rtol=1e-4)


def test_a_block_without_o_proj_is_one_sentence() -> None:
    with pytest.raises(ModelError, match=r"block 3 has no attention module .*: expected self_attn with o_proj"):
        output_projection(torch.nn.Linear(2, 2), 3)


def naive_mutual_knn(x: np.ndarray, y: np.ndarray, k: int) -> float:
    shares = []
    for i in range(len(x)):
        neighbors = []
        for side in (x, y):
            cosines = [
                -np.inf if j == i else side[i] @ side[j] / np.sqrt((side[i] @ side[i]) * (side[j] @ side[j]))
                for j in range(len(side))
            ]
            neighbors.append(set(np.argsort(cosines)[::-1][:k].tolist()))
        shares.append(len(neighbors[0] & neighbors[1]) / k)
    return float(np.mean(shares))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    root = tmp_path_factory.mktemp("heads")
    one = build("llava", root / "one")
    other = MLLM.load(str(one), validate=False)
    with torch.no_grad():
        for block in other.decoder.layers:
            block.self_attn.q_proj.weight.mul_(3)
    options = {"data": "shapes:val", "limit": 4, "vfm": (VFM,), "layers": (1, 3), "k": 3, "null": 20}
    return {
        "a": run_analysis("heads", str(one), output_dir=root / "runs", **options),
        "b": run_analysis("heads", (other.model, other.processor), output_dir=root / "runs", **options),
    }


def test_scores_are_the_mutual_knn_of_a_naive_loop(runs: dict[str, Run]) -> None:
    table = runs["a"].tables["per_image"]
    mllm, vfm = MLLM.load(runs["a"].record["model"], validate=False), load_vfm(VFM)
    samples = [scene[0] for scene in load_data("shapes:val", limit=4).scenes]
    batch = mllm.encode([s.image for s in samples], [s.question for s in samples])
    visual = mllm.visual_tokens(batch)
    patches = patches_under(vfm, [s.image for s in samples], visual)
    for layer in (1, 3):
        outputs = plain_outputs(mllm.model, batch.inputs, layer)
        for head in range(outputs.shape[2]):
            rows = table[(table["layer"] == layer) & (table["head"] == head)].set_index("image_id")["value"]
            for n, sample in enumerate(samples):
                tokens = outputs[n, visual[n][0].index, head].double().numpy()
                expected = naive_mutual_knn(tokens, patches[n][0].double().numpy(), 3)
                assert rows[sample.image_id] == pytest.approx(expected, abs=1e-9)
    scores = runs["a"].tables["scores"]
    means = table.groupby(["layer", "head"])["value"].mean()
    assert scores.set_index(["layer", "head"])["score"].to_dict() == pytest.approx(means.to_dict())
    assert (scores["chance"] == 3 / 15).all()
    assert scores["null_mean"].between(0.12, 0.28).all()
    assert (scores["n"] == 16).all() and (scores["n_images"] == 4).all() and (scores["k"] == 3).all()
    assert ((scores["low"] <= scores["score"]) & (scores["score"] <= scores["high"])).all()


def test_two_models_are_compared_head_by_head(runs: dict[str, Run]) -> None:
    changes = differences(runs)
    values = {
        label: run.tables["per_image"].set_index(["layer", "head", "image_id"])["value"] for label, run in runs.items()
    }
    expected = (values["b"] - values["a"]).groupby(["layer", "head"]).mean()
    assert changes.set_index(["layer", "head"])["score"].to_dict() == pytest.approx(expected.to_dict())
    assert expected.abs().max() > 0
    drawn = ANALYSIS.figures(runs)
    assert list(drawn) == [f"Attention heads and {VFM}", f"Attention heads and {VFM}: difference"]
    both, difference = drawn.values()
    scores = runs["b"].tables["scores"].pivot(index="layer", columns="head", values="score")
    assert [trace.type for trace in both.data] == ["heatmap", "heatmap"]
    np.testing.assert_array_equal(both.data[1].z, scores.to_numpy())
    np.testing.assert_allclose(difference.data[0].z, expected.unstack().to_numpy())
    assert difference.layout.coloraxis.cmid == 0
    table = summary(runs)
    assert set(table["model"]) == {"a", "b"}
    least = table.loc[table[table["model"] == "a"].groupby("layer")["score"].idxmin()]
    assert least["score"].tolist() == scores_of(runs["a"]).groupby("layer")["score"].min().tolist()
    assert list(ANALYSIS.figures({"a": runs["a"]})) == [f"Attention heads and {VFM}"]


def test_heads_without_output_are_named_and_change_no_other(runs: dict[str, Run], tmp_path: Path) -> None:
    pruned = MLLM.load(runs["a"].record["model"], validate=False)
    values = pruned.decoder.layers[2].self_attn.v_proj
    with torch.no_grad():
        values.weight[: values.out_features // 2] = 0  # of two query heads
    options = {"data": "shapes:val", "limit": 4, "vfm": (VFM,), "layers": (1, 3), "k": 3, "null": 20}
    run = run_analysis("heads", (pruned.model, pruned.processor), output_dir=tmp_path, **options)
    before, after = (of.tables["scores"].set_index(["layer", "head"])["score"] for of in (runs["a"], run))
    assert list(after.index) == [place for place in before.index if place not in ((3, 0), (3, 1))]
    pd.testing.assert_series_equal(after, before[after.index])
    assert run.record["left_out"] == ["2 of 8 heads have no output (layer.head 3.0, 3.1)"]
    changes = differences({"a": runs["a"], "b": run})
    assert len(changes) == 6 and (changes["score"] == 0).all()
    assert ANALYSIS.figures({"a": runs["a"], "b": run})


def scores_of(run: Run) -> pd.DataFrame:
    return run.tables["scores"]
