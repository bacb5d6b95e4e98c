"""Compare alignment losses and gradients, attention of packed questions, and LoRA on a frozen bfloat16 base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu import models
from benchmarks.gpu.harness import Bench
from benchmarks.gpu.right_reading import at, relative
from trainer.aligned_model import AlignedMLLMForConditionalGeneration
from trainer.alignment import attach_alignment
from trainer.build.lora import add_lora
from trainer.model_config import LoraConfig
from trainer.objectives import cosine_loss, relation_loss
from trainer.setups.packing import Packing, packed_attention
from workbench.mllm import MLLM
from workbench.mllm.conversation import encode_conversations

TOLERANCES = {"float32": 1e-4, "autocast bfloat16": 0.06}  # relative
DIM, LAYERS = 24, (2, 3)


def run(bench: Bench) -> None:
    """Run all comparisons, on small models."""
    with bench.guard("losses alone"):
        _alone(bench)
    small = models.tiny_llava()
    with bench.guard("alignment in the model"):
        _in_model(bench, small)
    with bench.guard("packed questions"):
        _packed(bench)
    with bench.guard("LoRA on a frozen bfloat16 base"):
        _lora(bench, small)


def _alone(bench: Bench) -> None:
    """Compare each loss and its gradient on plain tensors."""
    losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cosine": cosine_loss, "relation": relation_loss}
    x, y = torch.randn(2, 200, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for name, loss in losses.items():
        wanted = _with_gradient(loss, x, y)
        for setting, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
            results = _with_gradient(loss, x.to(bench.device, dtype), y.to(bench.device, dtype))
            tolerance = 1e-5 if setting == "float32" else 0.02
            for what, result, expected in zip(("loss", "gradient"), results, wanted, strict=True):
                bench.error(f"{name}, {what}", relative(result, expected), tolerance, setting=setting)


def _with_gradient(loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_(True)
    value = loss(x, y)
    value.backward()
    assert x.grad is not None
    return value.reshape(1), x.grad


def _in_model(bench: Bench, small: MLLM) -> None:
    """Compare both losses of a batch of conversations, and the gradients of heads, projector and language model."""
    for objective in ("cosine", "relation"):
        wanted = _step(at(small, "cpu", torch.float64), objective, autocast=False)
        for setting, tolerance in TOLERANCES.items():
            with bench.guard(f"{objective} in the model", setting=setting):
                results = _step(at(small, bench.device, torch.float32), objective, autocast=setting != "float32")
                for what in wanted:
                    error = relative(results[what], wanted[what])
                    bench.error(f"{objective} in the model, {what}", error, tolerance, setting=setting)


def _step(mllm: MLLM, objective: Any, *, autocast: bool) -> dict[str, Tensor | list[Tensor]]:
    torch.manual_seed(0)
    alignment = attach_alignment(mllm, layers=LAYERS, dims={"vfm": DIM}, objective=objective, hidden=16)
    for head in alignment.heads:  # drawn on the CPU, so that they are the same everywhere
        for value in head.parameters():
            value.data = (torch.randn(value.shape, dtype=torch.float64) * value.shape[-1] ** -0.5).to(value)
    dtype = next(mllm.model.parameters()).dtype
    alignment.to(mllm.device, dtype)
    model = AlignedMLLMForConditionalGeneration(mllm, alignment).train()
    data = models.conversations(3, side=64, words=9).conversations
    batch, labels = encode_conversations(mllm, [c.images for c in data], [c.turns for c in data])
    visual = mllm.visual_tokens(batch)
    targets = {"vfm": [torch.randn(16, DIM, generator=torch.Generator().manual_seed(n)) for n in range(3)]}
    with torch.autocast(mllm.device.type, torch.bfloat16, enabled=autocast):
        output = model(labels=labels, visual=visual, targets=targets, **batch.inputs)
    assert output.alignment_loss is not None
    (output.lm_loss + 0.5 * output.alignment_loss).backward()
    parts = {"heads": alignment, "projector": mllm.projector, "block 1": mllm.decoder.layers[0]}
    gradients = {
        f"gradient of {name}": [torch.cat([p.grad.flatten() for p in part.parameters() if p.grad is not None])]
        for name, part in parts.items()
    }
    return {"lm_loss": output.lm_loss.reshape(1), "alignment_loss": output.alignment_loss.reshape(1), **gradients}


# --- the packed mask ------------------------------------------------------------------------------


def _packed(bench: Bench) -> None:
    """Compare attention of packed questions, values and gradients, with a softmax under their mask in float64."""
    segments = torch.tensor([[0] * 40 + [1] * 13 + [2] * 20 + [3] * 7, [0] * 40 + [1] * 9 + [2] * 11 + [-1] * 20])
    inputs = torch.randn(3, 2, 4, 80, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = _attended(inputs, segments, _masked)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        results = _attended(inputs.to(bench.device, dtype), segments.to(bench.device), _flat)
        setting = str(dtype).removeprefix("torch.")
        bench.error("packed questions", relative(results[:1], wanted[:1]), tolerance, setting=setting)
        bench.error("packed questions, gradients", relative(results[1:], wanted[1:]), tolerance, setting=setting)


def _attended(inputs: Tensor, segments: Tensor, attend: Callable[[Sequence[Tensor], Tensor], Tensor]) -> list[Tensor]:
    """Return the output (token, head, d) at the real tokens, and the gradients of query, key and value."""
    leaves = [values.clone().requires_grad_(True) for values in inputs]
    output = attend(leaves, segments)
    output.pow(2).sum().backward()
    return [output, *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def _masked(leaves: Sequence[Tensor], segments: Tensor) -> Tensor:
    query, key = segments[:, :, None], segments[:, None]
    later = torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool).triu(1)
    hidden = (later | ((key != 0) & (key != query)) | (query < 0)) & ~torch.eye(len(later), dtype=torch.bool)
    scores = (leaves[0] @ leaves[1].mT * leaves[0].shape[-1] ** -0.5).masked_fill(hidden[:, None], -torch.inf)
    return (scores.softmax(-1) @ leaves[2]).transpose(1, 2)[segments >= 0]


def _flat(leaves: Sequence[Tensor], segments: Tensor) -> Tensor:
    packing = Packing.of(segments)
    query, key, value = (packing.flat(values.transpose(1, 2)).transpose(1, 2) for values in leaves)
    return packed_attention(nn.Identity(), query, key, value, None, packing=packing)[0][0]


# --- LoRA -----------------------------------------------------------------------------------------


def _lora(bench: Bench, small: MLLM) -> None:
    """Compare LoRA under autocast, on a float32 and a bfloat16 base, with float64; check that a step keeps the base."""
    wanted = _adapted(at(small, "cpu", torch.float64), torch.float64, autocast=False)
    for dtype in (torch.float32, torch.bfloat16):
        setting = f"{str(dtype)[6:]} base"
        loss, gradient, held, full = _adapted(at(small, bench.device, torch.float32), dtype, autocast=True)
        bench.error("LoRA under autocast, loss", relative(loss, wanted[0]), 0.06, setting=setting)
        gradient_error = relative(gradient, wanted[1])
        bench.error("LoRA under autocast, gradient of the adapters", gradient_error, 0.2, setting=setting)
        bench.add(
            "LoRA: the base is as it was, adapters in float32",
            {"base": held, "adapters": full},
            setting=setting,
            passed=held and full,
        )


def _adapted(mllm: MLLM, base: torch.dtype, *, autocast: bool) -> tuple[Tensor, Tensor, bool, bool]:
    """Take one step with LoRA.

    Returns:
        The loss, the gradient of the adapters, whether the base is unchanged, and whether the adapters are float32.
    """
    mllm.model.requires_grad_(False)
    add_lora(mllm.model, LoraConfig(rank=4, alpha=4))
    torch.manual_seed(0)
    adapters = {name: p for name, p in mllm.model.named_parameters() if "lora_" in name}
    for value in adapters.values():
        value.data = (torch.randn(value.shape, dtype=torch.float64) * 0.1).to(value)
    for name, value in mllm.model.named_parameters():
        if name not in adapters:
            value.data = value.data.to(base)
    before = {name: value.detach().clone() for name, value in mllm.model.named_parameters() if name not in adapters}
    model = AlignedMLLMForConditionalGeneration(mllm).train()
    batch, labels = encode_conversations(mllm, [[models.image(0)]], [[("what is this ?", "a red cat")]])
    with torch.autocast(mllm.device.type, torch.bfloat16, enabled=autocast):
        loss = model(labels=labels, visual=(), **batch.inputs).lm_loss
    loss.backward()
    gradient = torch.cat([value.grad.flatten() for value in adapters.values() if value.grad is not None])
    torch.optim.AdamW(adapters.values(), lr=1e-3).step()
    held = all(torch.equal(value, before[name]) for name, value in mllm.model.named_parameters() if name in before)
    return loss.detach().reshape(1), gradient, held, {value.dtype for value in adapters.values()} == {torch.float32}
