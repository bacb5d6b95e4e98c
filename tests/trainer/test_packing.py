"""Packed questions without padding: the numbers of a padded batch under a block-diagonal mask, which is written out
here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from trainer.setups.packing import NAME, Packing, use_packed_attention
from workbench.errors import ConfigError

SEGMENTS = torch.tensor([[0, 0, 1, 1, 2, 3, 3, 3], [0, 0, 1, -1, -1, -1, -1, -1], [0, 0, 0, 1, 1, 1, 1, 2]])


def mask_of(segments: Tensor) -> Tensor:
    """(b, 1, s, s) bool by the definition: a token sees the prefix and its own question, up to itself; padding sees
    itself."""
    length = segments.shape[1]
    mask = torch.zeros(len(segments), 1, length, length, dtype=torch.bool)
    for row, of in enumerate(segments.tolist()):
        for query in range(length):
            for key in range(query + 1):
                mask[row, 0, query, key] = query == key or (of[query] >= 0 and of[key] in (0, of[query]))
    return mask


def positions_of(segments: Tensor) -> Tensor:
    """Each question's positions follow the prefix."""
    result = torch.zeros_like(segments)
    for row, of in enumerate(segments.tolist()):
        prefix, seen = of.count(0), {}
        for at, number in enumerate(of):
            seen[number] = seen.get(number, -1) + 1
            result[row, at] = seen[number] + (prefix if number > 0 else 0)
    return result


def test_the_layout_of_a_batch_is_read_off_its_segments() -> None:
    packing = Packing.of(SEGMENTS)
    assert packing.prefix.tolist() == [[0, 1, 0], [8, 9, 0], [11, 12, 13]]
    assert packing.in_prefix.tolist() == [[True, True, False]] * 2 + [[True] * 3]
    assert packing.questions.tolist() == [
        [[2, 3, 0, 0], [4, 0, 0, 0], [5, 6, 7, 0], [0] * 4],
        [[10, 0, 0, 0]] + [[0] * 4] * 3,
        [[14, 15, 16, 17], [18, 0, 0, 0], [0] * 4, [0] * 4],
    ]
    assert packing.image.tolist() == [0, 1, 2]
    both = torch.cat([packing.prefix.flatten(), packing.questions.flatten()])
    assert both[packing.place].tolist() == list(range(19))


def test_a_row_holds_four_questions_of_one_image() -> None:
    packing = Packing.of(torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, -1, -1, -1, -1], [0, -1, -1, -1, -1, -1]]))
    assert packing.questions[..., 0].tolist() == [[1, 2, 3, 4], [5, 0, 0, 0], [7, 0, 0, 0]]
    assert packing.image.tolist() == [0, 0, 1]


def padded(packing: Packing, flat: Tensor, fill: float = 0) -> Tensor:
    """The sequence (1, N, ...) as a padded batch (b, s, ...) again."""
    result = flat.new_full((*packing.real.shape, *flat.shape[2:]), fill)
    result[packing.real] = flat[0]
    return result


def test_values_go_into_the_sequence_and_back() -> None:
    packing, values = Packing.of(SEGMENTS), torch.arange(24.0).view(3, 8, 1).expand(3, 8, 2)
    flat = packing.flat(values)
    assert flat.shape == (1, 19, 2)
    assert flat[0, :, 0].tolist() == [*range(8), 8, 9, 10, *range(16, 24)]
    back = padded(packing, flat, fill=-1)
    assert torch.equal(back[SEGMENTS >= 0], values[SEGMENTS >= 0])
    assert (back[SEGMENTS < 0] == -1).all()


@pytest.mark.parametrize(
    "segments",
    [
        SEGMENTS,
        SEGMENTS[:1],
        torch.tensor([[0, 0, 0], [0, 0, 0]]),
        torch.tensor([[0, 1, 2, 3, 4, 5]]),
        torch.tensor([[0, 1, 2, 3, 4, 5, 5], [0, 0, 0, -1, -1, -1, -1], [0, 0, 1, 1, 2, -1, -1]]),
    ],
)
@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_packed_logits_and_gradients_are_those_of_the_padded_batch(kind: str, segments: Tensor) -> None:
    """In float64 (but for the norms, which transformers takes in float32), with shared key heads and without."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    model: torch.nn.Module
    if kind == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**sizes, num_key_value_heads=4, head_dim=8, initializer_range=0.3))
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, initializer_range=0.3))
    model = model.double().train()
    ids, positions, real = torch.randint(40, segments.shape), positions_of(segments), segments >= 0
    weight = torch.randn(*segments.shape, 40, dtype=torch.float64)

    def gradients(logits: Tensor) -> list[Tensor]:
        model.zero_grad()
        (logits.tanh() * weight)[real].sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = model(input_ids=ids, attention_mask=mask_of(segments), position_ids=positions, use_cache=False).logits
    expected = gradients(plain)
    model.set_attn_implementation(NAME)
    packing = Packing.of(segments)
    nothing = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    output = model(
        input_ids=packing.flat(ids),
        attention_mask=nothing,
        position_ids=packing.flat(positions),
        packing=packing,
        use_cache=False,
    ).logits
    packed = padded(packing, output)
    torch.testing.assert_close(packed[real], plain[real], atol=1e-6, rtol=1e-5)
    for found, wanted in zip(gradients(packed), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_without_a_packing_the_model_attends_as_ever() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    ).eval()
    inputs = {"input_ids": torch.randint(5, 40, (2, 6)), "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])}
    plain = model(**inputs).logits
    use_packed_attention(model)
    torch.testing.assert_close(model(**inputs).logits, plain, atol=0, rtol=0)


def test_blocks_that_do_not_see_everything_are_refused() -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(ConfigError, match="sliding_attention: expected full attention in every block"):
        use_packed_attention(Qwen2ForCausalLM(config))
