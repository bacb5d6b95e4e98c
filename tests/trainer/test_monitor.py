"""What is watched while training, and the card of the model: by independent computations, on one small run in this
process."""

from __future__ import annotations

import base64
import json
import os
import shutil
import sys
import termios
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageTextToText, TrainerState, TrainingArguments

from tests.conftest import run
from trainer.alignment import Alignment
from trainer.alignment_config import AlignmentConfig
from trainer.card import _without_folders, card, origins
from trainer.hub import uploaded_files
from trainer.loop import build_trainer
from trainer.model_config import ModelConfig
from trainer.monitor import progress as progress_log
from trainer.monitor import warnings as early
from trainer.monitor.cknna import build_cknna_monitor
from trainer.monitor.guards import check_token_counts
from trainer.monitor.warnings import EarlyWarnings
from trainer.objectives import AlignmentHead
from trainer.recipe import DataConfig, MonitorConfig, OptimConfig, Recipe
from trainer.run import train
from trainer.setups.packed import PackedSetup
from trainer.setups.packed_data import collate
from trainer.setups.packing import Packing
from workbench import MLLM, cknna, load_data, load_vfm
from workbench.capture.hidden_states import read
from workbench.errors import ConfigError, DataError, RunError
from workbench.spatial.vfm_patches import patches_under
from workbench.stats import bootstrap_ci
from workbench.training_folder import MEAN, cknna_log, score_log, training_record
from workbench.yaml_config import as_mapping

TINY = Recipe(
    log_every=2,
    eval_every=5,
    save_every=4,
    model=ModelConfig(layers=3, width=32, ffn=64, vision_encoder_features=(0, 1)),
    data=DataConfig(limit_train=24, limit_val=8),
    optim=OptimConfig(steps=8, batch_size=4, warmup=2),
    alignment=AlignmentConfig(objective="cosine", layer=(2,), hidden=16),
    monitor=MonitorConfig(cknna_images=5, head_steps=3),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("monitor") / "viral"
    train(replace(TINY, output_dir=target), ["test"])
    return target


@pytest.mark.slow
def test_every_evaluation_is_made_once_and_no_head_is_warned_of(folder: Path) -> None:
    log = pd.read_parquet(folder / "training.parquet")
    assert log["accuracy/mean"].dropna().index.size == 2
    assert log.loc[log["accuracy/mean"].notna(), "step"].tolist() == [
        5,
        8,
    ]
    assert training_record(folder)["warnings"] == []
    assert "warning" not in log


def test_accuracy_in_the_log_has_what_the_last_table_has(folder: Path) -> None:
    table = pd.read_parquet(folder / "accuracy.parquet").set_index("category")
    log = pd.read_parquet(folder / "training.parquet")
    for category, row in table.iterrows():
        own = score_log(log, f"accuracy/{'mean' if category == MEAN else category}")
        last = own.iloc[-1]
        assert own["step"].tolist() == [5, 8]
        assert last["score"] == row["accuracy"]
        assert (last["n"], last["chance"]) == (row["n"], row["chance"])
        assert (last["low"], last["high"]) == (row["low"], row["high"])
        assert 0 <= last["low"] <= last["score"] <= last["high"] <= 1
    assert MEAN in table.index
    assert table.loc[MEAN, "accuracy"] == pytest.approx(table.drop(index=MEAN)["accuracy"].mean())
    before = score_log(log[["step", "accuracy/mean"]], "accuracy/mean")  # a log from before there were intervals
    assert before["score"].notna().all()
    assert before[["low", "high", "chance", "n"]].isna().all(axis=None)


def test_cknna_in_the_log_is_that_of_the_stored_model(folder: Path) -> None:
    """The last row against the plain path: the folder loaded by transformers, its hidden states read, the VFM's
    patches, the metric image by image."""
    mllm, vfm = MLLM.load(str(folder)), load_vfm("efficientnet-lite0")
    scenes = load_data("shapes:val", limit=5).scenes
    batch = mllm.encode([scene[0].image for scene in scenes], [scene[0].question for scene in scenes])
    patches = patches_under(vfm, [scene[0].image for scene in scenes], mllm.visual_tokens(batch))
    values = [
        cknna(own.values[0], other[0], k=10) for own, other in zip(read(mllm, batch, layers=[2]), patches, strict=True)
    ]
    table = cknna_log(folder)
    assert table["step"].tolist() == [5, 8]
    assert set(table["of"]) == {"layer 2, efficientnet-lite0"}
    last = table.iloc[-1]
    assert last["score"] == pytest.approx(np.mean(values), abs=1e-5)
    interval = bootstrap_ci(values, seed=0)
    assert (last["low"], last["high"]) == pytest.approx((interval.low, interval.high), abs=1e-5)
    assert (last["n"], last["k"], last["n_images"]) == (64, 10, 5)
    assert 0 < last["null_mean"] < last["null_q95"] < last["score"]
    record = training_record(folder)["cknna"]
    assert record["layers"] == [2]
    assert record["n"] == 64
    assert record["permutations"] == 20
    assert record["vfm_fingerprint"] == vfm.record()["vfm_fingerprint"]


@pytest.mark.slow
def test_a_baseline_is_measured_in_its_middle_layer_and_goes_on_without_a_vfm(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plain = replace(TINY, alignment=AlignmentConfig())
    prepared = PackedSetup.from_recipe(plain)
    subset, said = build_cknna_monitor(plain, prepared)
    assert subset is not None
    assert subset.layers == [1]
    assert said == []
    few = replace(plain, monitor=MonitorConfig(k=64))
    assert build_cknna_monitor(few, prepared)[1] == [
        "CKNNA is not measured during training: monitor.k is 64: expected less than 64, the visual tokens of an image"
    ]
    lacking = replace(plain, alignment=AlignmentConfig(vfm=("nowhere",)))
    assert build_cknna_monitor(lacking, replace(prepared, recipe=lacking))[0] is None
    assert build_cknna_monitor(replace(plain, monitor=MonitorConfig(cknna_images=0)), prepared) == (None, [])


@pytest.mark.slow
def test_a_head_that_stands_still_is_named_in_log_and_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With weight 0 its gradient is zero and weight decay alone moves its matrices; that is no movement."""
    recipe = replace(
        TINY,
        output_dir=tmp_path / "out",
        alignment=replace(TINY.alignment, weight=0.0, layer=(2, 3)),
        monitor=MonitorConfig(0, head_steps=3),
    )
    train(recipe, ["test"])
    said = training_record(tmp_path / "out")["warnings"]
    assert [s.split(" tensors")[0] for s in said] == [
        f"step 4: the alignment head of layer {n} with efficientnet-lite0 does not move: 3 of its 6" for n in (2, 3)
    ]
    assert pd.read_parquet(tmp_path / "out" / "training.parquet")["warning"].notna().sum() == 2
    assert capsys.readouterr().err.count("warning: the alignment head") == 2


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 4])
def test_a_resumed_run_warns_of_a_head_when_the_uninterrupted_one_does(tmp_path: Path, step: int) -> None:
    """Resumed before the warning, and after it: the same rows at the same steps."""
    alignment, saved = replace(TINY.alignment, weight=0.0), {"save_every": 2, "keep_checkpoints": None}
    recipe = replace(
        TINY, output_dir=tmp_path / "whole", alignment=alignment, monitor=MonitorConfig(0, head_steps=3), **saved
    )  # type: ignore[arg-type]
    train(recipe, ["test"])
    cut = tmp_path / "cut"  # what a run leaves that is killed after this checkpoint
    shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", cut / f"checkpoint-{step}")
    shutil.copy(tmp_path / "whole" / "recipe.yaml", cut)
    train(replace(recipe, output_dir=cut, resume=True), ["test"])
    pd.testing.assert_frame_equal(
        *(pd.read_parquet(tmp_path / name / "training.parquet").drop(columns="seconds") for name in ("whole", "cut"))
    )
    assert training_record(cut)["warnings"] == training_record(tmp_path / "whole")["warnings"] != []


@pytest.mark.parametrize("moved", [True, False])
def test_a_head_is_compared_with_what_it_was_before_the_checkpoint(moved: bool) -> None:
    """Moved before the checkpoint and still after it is no reason to warn, and the steps that the sentence counts are
    those it compares."""
    model, state = nn.Module(), TrainerState(max_steps=9)
    model.alignment = Alignment({(1, None): 4}, {"vfm": 3}, "cosine", "each", 2)
    args = TrainingArguments(report_to=[])
    for step in range(3):
        warnings = EarlyWarnings(3, (), lambda: True)  # one for each step: the run is killed after it
        warnings.on_train_begin(args, state, None, model=model)
        if moved and step == 0:
            with torch.no_grad():
                for p in model.parameters():
                    p += 1
        state.global_step += 1
        warnings.on_step_end(args, state, None, model=model)
        state.stateful_callbacks = {"EarlyWarnings": json.loads(json.dumps(warnings.state()))}
    said = [row["warning"] for row in state.log_history]
    assert not said if moved else len(said) == 1 and "6 of its 6 tensors are as they were 3 steps ago" in said[0]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_with_its_batch(tmp_path: Path) -> None:
    recipe = replace(
        TINY,
        output_dir=tmp_path / "out",
        optim=replace(TINY.optim, learning_rate=1e30, warmup=0, max_grad_norm=1e30),
        save_every=2,
    )
    with pytest.raises(RunError, match=r"lm_loss is (nan|inf).* at step \d: training stopped") as stopped:
        train(recipe, ["test"])
    (file,) = (tmp_path / "out").glob("not_finite-step-*.safetensors")
    batch = load_file(file)
    assert str(file) in str(stopped.value)
    assert not (tmp_path / "out" / "training.json").exists()
    assert batch["input_ids"].shape[0] == 4
    assert batch["targets.efficientnet-lite0"].shape == (4, 64, 112)
    known = {
        tuple(ids[ids != 0].tolist())
        for ids in (PackedSetup.from_recipe(recipe).train[i]["input_ids"] for i in range(24))
    }
    assert {tuple(ids[ids != 0].tolist()) for ids in batch["input_ids"]} <= known


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 3])
def test_a_gradient_that_is_not_finite_stops_before_a_checkpoint_has_it(step: int, tmp_path: Path) -> None:
    """The loss of the step, which may be the last one, is finite."""
    recipe = replace(
        TINY,
        output_dir=tmp_path / "out",
        optim=replace(TINY.optim, steps=3, batch_size=2, accumulation=2),
        log_every=1,
        eval_every=3,
        save_every=1,
    )
    trainer, seen = build_trainer(recipe, PackedSetup.from_recipe(recipe)), []

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        seen.append(gradient)
        return gradient * (float("nan") if len(seen) == 2 * step else 1.0)

    trainer.setup.model.base.model.multi_modal_projector.linear_1.weight.register_hook(spoil)
    with pytest.raises(
        RunError, match=rf"grad_norm is nan at step {step}: training stopped before a checkpoint could store it"
    ):
        trainer.run()
    assert sorted(int(p.name.split("-")[1]) for p in (tmp_path / "out").glob("checkpoint-*")) == list(range(1, step))
    batch = load_file(tmp_path / "out" / f"not_finite-step-{step}.safetensors")
    assert batch["0.input_ids"].shape[0] == batch["1.input_ids"].shape[0] == 2


def test_counts_that_differ_are_an_error_and_never_skipped() -> None:
    prepared = PackedSetup.from_recipe(TINY)
    token = prepared.processor.image_token_id
    check, items = check_token_counts(collate, token), [prepared.train[i] for i in range(2)]
    assert torch.equal(check(items)["input_ids"], collate(items)["input_ids"])
    short = items[1] | {"connector_inputs": items[0]["connector_inputs"]} | {"input_ids": items[1]["input_ids"].clone()}
    short["input_ids"][(short["input_ids"] == token).nonzero()[0]] = 7
    with pytest.raises(DataError, match="sample 1 of a batch has 63 visual tokens in its text and 64 of its image"):
        check([items[0], short])
    with pytest.raises(DataError, match="has 64 visual tokens in its text and 63 of its target efficientnet-lite0"):
        check([item | {"targets": {name: value[:-1] for name, value in item["targets"].items()}} for item in items])


def test_a_tracker_without_its_package_is_one_sentence_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress_log.check_trackers(["tensorboard"])
    monkeypatch.setitem(progress_log.PACKAGES, "wandb", "no_such_tracker")
    with pytest.raises(ConfigError, match="report_to is wandb, which needs the package no_such_tracker"):
        train(replace(TINY, output_dir=tmp_path / "out", report_to=("wandb",)), ["test"])
    (tmp_path / "no_such_tracker").mkdir()  # what a tracker leaves in the working folder
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="no_such_tracker"):
        progress_log.check_trackers(["wandb"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_a_bar_with_both_losses_on_a_terminal_and_a_line_elsewhere(
    terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outer, inner = os.openpty() if terminal else os.pipe()
    if terminal:
        termios.tcsetwinsize(inner, (24, 120))
    with os.fdopen(inner, "w", buffering=1) as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        progress, state = progress_log.Progress(tmp_path / "name", 3), TrainerState(max_steps=3)
        progress.on_train_begin(None, state, None)  # type: ignore[arg-type]
        for state.global_step in (1, 2, 3):
            progress.on_step_end(None, state, None)  # type: ignore[arg-type]
            state.log_history.append({"lm_loss": 2.5, "alignment_loss": -0.25, "step": state.global_step})
            progress.on_log(None, state, None, logs=state.log_history[-1])  # type: ignore[arg-type]
        progress.close()
        stream.flush()
        said = os.read(outer, 100_000).decode()
    monkeypatch.undo()
    assert (
        ("\r" in said and "3/3" in said and "lm=2.500" in said and "align=-0.250" in said)
        if terminal
        else "name: step 3/3  lm 2.500  align -0.250" in said
    )
    assert len(pd.read_parquet(tmp_path / "name" / "training.parquet")) == 3


def test_heads_of_one_layer_and_of_several_have_names() -> None:
    class Model(torch.nn.Module):
        def __init__(self, sharing: str, count: int) -> None:
            super().__init__()
            self.alignment = torch.nn.Module()
            self.alignment.sharing, self.alignment.sites = sharing, ((2, None), (3, None))
            self.alignment.dims = {"a": 4, "b": 4}
            self.alignment.heads = torch.nn.ModuleList(AlignmentHead(4, 4, 4) for _ in range(count))

    assert [name for name, _ in early._heads(Model("each", 4))] == [
        "layer 2 with a",
        "layer 2 with b",
        "layer 3 with a",
        "layer 3 with b",
    ]
    assert [name for name, _ in early._heads(Model("shared", 2))] == ["all layers with a", "all layers with b"]
    assert list(early._heads(Model("none", 0))) == []
    assert list(early._heads(torch.nn.Linear(1, 1))) == []


# --- the card -------------------------------------------------------------------------------------


def test_the_card_says_what_is_in_the_folder(folder: Path) -> None:
    text = (folder / "README.md").read_text()
    assert text.startswith("---\n")
    assert "base_model:\n- facebook/dinov2-small\n" in text
    assert "pipeline_tag: image-text-to-text" in text
    record = training_record(folder)
    for part in (
        "DINOv2 itself is Apache-2.0",
        record["tower_fingerprint"],
        record["vfm_fingerprint"],
        record["data"],
        "L_LM + 0.5 * L_VRA",
        "seed 0",
    ):
        assert part in text, part
    accuracy = pd.read_parquet(folder / "accuracy.parquet").set_index("category").loc["exist"]
    interval = f"{accuracy['low']:.3f} to {accuracy['high']:.3f}"
    asked = f"{accuracy['n']:.0f} questions, {accuracy['n_images']:.0f} images" + (
        ", too few to say much" if accuracy["few"] else ""
    )
    row = f"| accuracy, exist | {accuracy['accuracy']:.3f} | {interval} | 0.500 | {asked} |"
    assert row in text
    assert "| CKNNA, layer 2, efficientnet-lite0, k = 10 |" in text
    assert "64 tokens, 5 images" in text
    scope: dict[str, object] = {"FOLDER_OR_NAME": str(folder)}
    (code,) = text.split("```python\n")[1:]
    exec(compile(code.split("```")[0], "README.md", "exec"), scope)
    assert isinstance(scope["model"], AutoModelForImageTextToText.from_pretrained(folder).__class__)


def test_no_private_path_is_in_the_card_or_in_what_is_sent(folder: Path) -> None:
    record = json.loads(json.dumps(training_record(folder)))
    record["recipe"] |= {"output_dir": "/home/secret/runs/mine", "start": "/home/secret/runs/stage1"}
    record["recipe"]["data"] |= {"train": "folder:/home/secret/photos", "val": "folder:secret/other/val"}
    record["warnings"] = ["CKNNA is not measured during training: /home/secret/vfm has no model.safetensors"]
    record["argv"] = ["/home/secret/trainer"]
    text = card(record, pd.read_parquet(folder / "evaluation.parquet"), cknna_log(folder))
    assert "secret" not in text
    assert "# mine\n" in text
    assert "folder:photos" in text
    assert "| start | stage1 |" in text
    assert "facebook/dinov2-small" in text
    names = uploaded_files(folder)
    assert {
        "README.md",
        "model.safetensors",
        "alignment_head.safetensors",
        "config.json",
        "tokenizer.json",
        "accuracy.parquet",
    } <= set(names)
    assert not {"recipe.yaml", "training.json", "training.parquet", "evaluation.parquet"} & set(names)
    private = [str(folder.parent).encode(), os.environ.get("VIRAL_CACHE", str(Path.home())).encode()]
    assert not [name for name in names for path in private if path in (folder / name).read_bytes()]


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("hf:/home/secret/rows?split=train", "hf:rows?split=train"),
        ("hf:../secret/rows.parquet", "hf:rows.parquet"),
        ("llava_json:/a/x.json?images=/b/pics&split=val&held=5", "llava_json:x.json?images=pics&split=val&held=5"),
        ("photos:val:/home/secret/cuts", "photos:val:cuts"),
        ("timm:/home/secret/w", "timm:w"),
        ("hf:facebook/dinov2-base", "hf:facebook/dinov2-base"),
        ("timm:timm/vit_base.dino", "timm:timm/vit_base.dino"),
        ("hf:some-one/rows?split=val", "hf:some-one/rows?split=val"),
        ("openai/clip-vit-large-patch14-336", "openai/clip-vit-large-patch14-336"),
        ("shapes:val", "shapes:val"),
    ],
)
def test_a_name_in_the_card_keeps_its_last_part_split_and_options(written: str, shown: str) -> None:
    assert _without_folders(written) == shown


def test_a_residual_model_says_that_it_needs_mllm_load(folder: Path) -> None:
    record = json.loads(json.dumps(training_record(folder)))
    record["recipe"]["alignment"] |= {"objective": "none", "residual": "encoder"}
    text = card(record, pd.read_parquet(folder / "evaluation.parquet"), cknna_log(folder))
    assert "MLLM.load(FOLDER_OR_NAME)" in text
    assert "AutoModel" not in text
    assert "another model" in text
    assert "alignment target" not in text


def test_the_card_names_hub_ids_whole_and_what_a_folder_came_from(folder: Path, tmp_path: Path) -> None:
    first = as_mapping(
        Recipe(
            model=ModelConfig(
                kind="assembled", vision_encoder="google/siglip2-so400m-patch16-384", language="lmsys/vicuna-7b-v1.5"
            )
        )
    )
    (tmp_path / "stage1").mkdir()
    (tmp_path / "stage1" / "training.json").write_text(json.dumps({"recipe": first, "origins": origins(first)}))
    record = json.loads(json.dumps(training_record(folder))) | {"model_fingerprint": "abc"}
    del record["origins"]
    record["recipe"] |= {"model": as_mapping(ModelConfig(name=str(tmp_path / "stage1")))}
    text = card(record, pd.read_parquet(folder / "evaluation.parquet"), cknna_log(folder))
    assert "base_model:\n- google/siglip2-so400m-patch16-384\n- lmsys/vicuna-7b-v1.5\n" in text
    assert str(tmp_path) not in text
    assert "| model | stage1 | a training of this workbench | abc |" in text
    assert "| language model of stage1 | lmsys/vicuna-7b-v1.5 | the hub |" in text
    record["recipe"] |= {"model": as_mapping(ModelConfig(name="llava-hf/llava-1.5-7b-hf", revision="a272c74"))}
    text = card(record, pd.read_parquet(folder / "evaluation.parquet"), cknna_log(folder))
    assert "base_model:\n- llava-hf/llava-1.5-7b-hf\n" in text
    assert "  name: llava-hf/llava-1.5-7b-hf\n  revision: a272c74\n" in text


def test_a_control_is_not_presented_as_viral(folder: Path) -> None:
    record = json.loads(json.dumps(training_record(folder)))
    record["recipe"]["alignment"] |= {"images": "others", "schedule": "linear"}
    text = card(record, pd.read_parquet(folder / "evaluation.parquet"), cknna_log(folder))
    assert "as a control of VIRAL" in text
    assert "control: shuffled targets" in text
    assert "L_LM + lambda(step) * L_VRA" in text


def test_a_push_that_cannot_be_is_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, message in (("me/x", "HF_HUB_OFFLINE is set"), ("a b/c", "expected a name such as NAME/MODEL")):
        with pytest.raises(ConfigError, match=message):
            train(replace(TINY, output_dir=tmp_path / "out", push_to_hub=name), ["test"])
    assert not (tmp_path / "out").exists()


@pytest.fixture
def hub() -> Iterator[tuple[str, dict[str, object]]]:
    """A hub that takes everything, on this machine: the real client's requests are what is looked at."""
    seen: dict[str, object] = {"files": {}}

    class Hub(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            size = self.headers.get("Content-Length")
            body = self.rfile.read(int(size)) if size else self._chunks()
            address = f"http://{self.headers['Host']}"
            answer: object = {}
            if self.path == "/api/repos/create":
                seen["create"], seen["token"] = json.loads(body), self.headers["Authorization"]
                answer = {"url": f"{address}/me/mine", "id": "0", "name": "me/mine"}
            elif "/preupload/" in self.path:
                answer = {
                    "files": [
                        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                        for f in json.loads(body)["files"]
                    ]
                }
            elif "/commit/" in self.path:
                rows = [json.loads(line) for line in body.decode().splitlines()]
                seen["files"] = {
                    r["value"]["path"]: base64.b64decode(r["value"]["content"]) for r in rows if r["key"] == "file"
                }
                answer = {
                    "success": True,
                    "commitOid": "0" * 40,
                    "commitUrl": f"{address}/me/mine/commit/{'0' * 40}",
                    "hookOutput": "",
                }
            self._send(answer)

        def do_GET(self) -> None:
            self._send({"id": "me/mine", "sha": "0" * 40, "siblings": [], "private": True})

        def _chunks(self) -> bytes:
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            return b"".join(parts)

        def _send(self, answer: object) -> None:
            data = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", seen
    server.shutdown()


@pytest.mark.slow
def test_push_sends_model_and_card_and_nothing_else(folder: Path, hub: tuple[str, dict[str, object]]) -> None:
    address, seen = hub
    done = run(
        "trainer.card",
        str(folder),
        "--push_to_hub",
        "me/mine",
        HF_ENDPOINT=address,
        HF_HUB_OFFLINE="0",
        HF_TOKEN="hf_none",
        HF_HUB_DISABLE_XET="1",
    )
    assert done.stdout.strip() == f"{address}/me/mine"
    assert seen["create"]["name"] == "mine"
    assert seen["create"]["visibility"] == "private"
    assert seen["token"] == "Bearer hf_none"
    assert seen["files"] == {name: (folder / name).read_bytes() for name in uploaded_files(folder)}


@pytest.mark.parametrize("weight", [0.0, 0.5])
@pytest.mark.parametrize("fault", ["features ignored", "attention cut", None])
def test_a_model_that_ignores_its_image_is_refused_at_the_first_step(
    fault: str | None, weight: float, tmp_path: Path
) -> None:
    """Also where the alignment loss depends on the image: answers that cannot attend to it cannot use it."""
    recipe = replace(TINY, output_dir=tmp_path, monitor=replace(TINY.monitor, cknna_images=0))
    recipe = replace(recipe, alignment=replace(TINY.alignment, weight=weight))
    trainer = build_trainer(recipe, PackedSetup.from_recipe(recipe))
    model = trainer.setup.model.train()
    batch = trainer.setup.collate([trainer.setup.train[i] for i in range(4)])
    visual = Packing.of(batch["segments"]).flat(batch["input_ids"]) == model.config.image_token_id
    language = model.base.model.language_model
    if fault == "features ignored":
        language.layers[0].register_forward_pre_hook(
            lambda _, args: (args[0].masked_fill(visual[..., None], 0), *args[1:])
        )
    elif fault == "attention cut":
        for layer in language.layers:
            for part in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                part.register_forward_hook(lambda _, args, output: output.masked_fill(visual[..., None], 0))
    (batch,), items = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    if fault is not None:
        with pytest.raises(RunError, match="the language-model loss of step 1 does not depend on the images"):
            trainer.compute_loss(model, batch, num_items_in_batch=items)
        return
    loss = trainer.compute_loss(model, batch, num_items_in_batch=items)
    assert all(p.grad is None for p in model.parameters())
    loss.backward()
    assert model.base.model.multi_modal_projector.linear_1.weight.grad.any()
    assert not model.base.model.multi_modal_projector._forward_hooks  # it is checked once
