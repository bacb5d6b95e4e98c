"""Convert the weight files of packages to tensors under transformers' or timm's names."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from workbench.errors import WeightsError


def dinov2_from_onnx(file: Path, folder: Path) -> None:
    """Rebuild transformers' Dinov2Model from the ONNX graph of a saliency model with a ViT-S/14 backbone.

    Most parameters are named `backbone.*` in the graph. The weights of linear layers are unnamed inputs of the MatMul
    nodes `/backbone/<path>/MatMul`, and transposed. The position embedding is in two parts, the class token's and the
    37 x 37 grid's.

    Raises:
        WeightsError: the tensors do not fit Dinov2Model.
    """
    import onnx
    from onnx import numpy_helper
    from transformers import Dinov2Config, Dinov2Model

    graph = onnx.load(str(file)).graph
    arrays = {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in graph.initializer}
    state = {name.removeprefix("backbone."): value for name, value in arrays.items() if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in arrays:
            key = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".") + ".weight"
            state[key] = arrays[node.input[1]].T.contiguous()
    positions = [
        arrays["onnx::Concat_1957"],
        arrays["onnx::Reshape_1962"].reshape(1, -1, state["embeddings.cls_token"].shape[-1]),
    ]
    state["embeddings.position_embeddings"] = torch.cat(positions, dim=1)
    # only pre-training uses it, and the graph lacks it
    state["embeddings.mask_token"] = torch.zeros(1, state["embeddings.cls_token"].shape[-1])

    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, patch_size=14, image_size=518, layer_norm_eps=1e-6
    )
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config.architectures = ["Dinov2Model"]
    config.save_pretrained(folder)
    report: dict[str, object] = Dinov2Model.from_pretrained(folder, output_loading_info=True)[1]  # type: ignore[index]
    wrong = {kind: keys for kind, keys in report.items() if keys}
    if wrong:
        raise WeightsError(f"dinov2-small: the converted file does not fit transformers' Dinov2Model: {wrong}")


def efficientnet_from_pth(file: Path, folder: Path) -> None:
    """Rename the tensors of a PyTorch EfficientNet-Lite0 as timm's `tf_efficientnet_lite0` has them.

    Both have the same tensors in the same order.

    Raises:
        WeightsError: the shapes differ.
    """
    import timm

    state = torch.load(file, map_location="cpu", weights_only=True)
    target = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    if [tuple(v.shape) for v in state.values()] != [tuple(v.shape) for v in target.values()]:
        raise WeightsError(
            "efficientnet-lite0: the package's file has other shapes than timm's tf_efficientnet_lite0: expected the"
            " same"
        )
    save_file(
        {key: value.contiguous() for key, value in zip(target, state.values(), strict=True)},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    (folder / "config.json").write_text(json.dumps({"architecture": "tf_efficientnet_lite0"}))


def smollm2_from_gguf(file: Path, folder: Path) -> None:
    """Dequantize the 4-bit GGUF file into a transformers folder with its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dequantized = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = dequantized.config
    # the tensors in memory are plain float32, but transformers refuses to save them with this in the config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(dequantized.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
