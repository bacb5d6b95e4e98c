"""Check causally that a family is right about a model: change an image and see which visual tokens change.

It costs one forward pass of the model and two of its vision encoder, on a few random images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from workbench.errors import ModelError, one_line
from workbench.mllm.family import Batch, Box, VisualTokens
from workbench.weights.pretrained import call

SIZE = (400, 300)  # width, height in pixels: not square, so that exchanged rows and columns show
QUESTION = "what is this ?"
PAINTED = 3  # tokens of each grid whose pixels are painted, one at a time
PEAKS = 2  # of these must change at least as much as the tokens around them; in a grid that is shifted, none does
OUTPUT, INPUT = "the projector's output", "the projector's input"
Targets = dict[int, tuple[int, int]]
"""The (row, column) of the painted token, by the number of its grid."""


def validate(mllm: Any, size: tuple[int, int] = SIZE) -> None:
    """Check that the visual tokens of an `MLLM` are where its family says.

    1. Every position that the family gives holds the image placeholder, and each grid has as many places as tokens
       (`MLLM.visual_tokens`).
    2. At the visual positions, the first block receives exactly what the projector returned.
    3. Another image changes the hidden states at those positions, leaves the text before them unchanged, and changes no
       projected token that the family leaves out.
    4. The pixels of one token are painted, for three tokens of each grid. Each time the token must change at
       least as much as nine in ten tokens of its grid (attention in the vision encoder spreads the change over all
       tokens, but not evenly), and two times out of three at least as much as every token around it. This holds for
       the projector's output and for its input.

    Args:
        size: width and height of the images, in pixels.

    Raises:
        ModelError: a check failed; the message says which, and the likely mistake of the family where it shows.
    """
    rng = np.random.default_rng(0)
    plain, other = (
        Image.fromarray(rng.integers(low, high, size=(size[1], size[0], 3), dtype=np.uint8))
        for low, high in ((90, 160), (0, 255))
    )
    batch = mllm.encode([plain, other], [QUESTION] * 2)
    tokens = mllm.visual_tokens(batch)
    if not all(tokens) or not all(len(part.index) for sample in tokens for part in sample):
        raise ModelError(f"{mllm.name}: family '{mllm.family.name}' finds no visual tokens for an image")
    visual = torch.cat([part.index for part in tokens[0]]).cpu()

    projected, features = encoder_output(mllm, batch)
    positions = [row.nonzero().flatten().cpu() for row in batch.inputs["attention_mask"]]
    first_input, last_output = _first_and_last(mllm, batch, positions)
    if not all(torch.isfinite(values).all() for values in (features, *projected, *first_input, *last_output)):
        raise not_finite(mllm)
    is_visual = torch.isin(positions[0], visual)
    order = visual.argsort().argsort()  # the family's order, which is not the sequence's where tiles interleave
    embedded = first_input[0][is_visual][order]
    expected = projected[0][_among_placeholders(mllm, batch, 0, visual)]
    if (embedded - expected).abs().max() > 1e-3 * expected.abs().max():
        raise ModelError(
            f"{mllm.name}: what the language model receives at the visual positions is not the projector's output; "
            f"family '{mllm.family.name}' is wrong about positions"
        )
    if len(projected[0]) == len(projected[1]):
        left_out = (projected[0] - projected[1]).abs().amax(-1) > 0  # newline vectors are the same in every image
        left_out[_among_placeholders(mllm, batch, 0, visual)] = False
        if left_out.any():
            raise ModelError(
                f"{mllm.name}: family '{mllm.family.name}' leaves out {int(left_out.sum())} visual tokens that depend"
                " on the image"
            )
    first_image, second_image = last_output
    before = positions[0] < visual.min()
    if before.any() and not torch.allclose(first_image[before], second_image[before], atol=1e-4, rtol=1e-3):
        raise ModelError(
            f"{mllm.name}: another image changed the text before the visual tokens; family '{mllm.family.name}' starts"
            " them too late"
        )
    if ((first_image - second_image)[is_visual].abs().amax(-1) == 0).any():
        raise ModelError(
            f"{mllm.name}: another image left a visual token unchanged; family '{mllm.family.name}' is wrong about"
            " positions"
        )
    _check_grids(mllm, plain, tokens[0], projected[0], features)


def not_finite(mllm: Any) -> ModelError:
    """Return the error of a model some of whose values overflow."""
    return ModelError(
        f"{mllm.name} computes values that are not finite in {mllm.model.dtype}: load it in bfloat16 or float32"
    )


def encoder_output(mllm: Any, batch: Batch) -> tuple[list[Float[Tensor, "_token d"]], Float[Tensor, "row features"]]:
    """Return the projector's output for each sample, and the projector's input for the whole batch.

    The output has all projected tokens in the order of their positions, special ones such as newlines included.
    """

    def misfit(error: Exception) -> ModelError:
        reason = f"what its processor makes of an image does not fit its vision encoder ({one_line(error, 120)})"
        return ModelError(f"{mllm.name}: {reason}: expected the model's own processor")

    rows: list[Tensor] = []
    handle = mllm.projector.register_forward_pre_hook(lambda _, args: rows.append(args[0]))
    try:
        with mllm.lock, torch.inference_mode():
            output = call(lambda: mllm.model.get_image_features(**batch.vision).pooler_output, misfit)
    finally:
        handle.remove()
    flat = torch.cat([part.reshape(-1, part.shape[-1]) for part in output]).float().cpu()
    counts = (batch.inputs["input_ids"] == mllm.config.image_token_id).sum(1).tolist()
    if sum(counts) != len(flat):
        raise ModelError(f"{mllm.name}: {sum(counts)} visual positions for {len(flat)} projected tokens")
    width = rows[0].shape[-1] * mllm.family.rows_per_token(mllm.config)
    return list(flat.split(counts)), rows[0].reshape(-1, width).float().cpu()


def _first_and_last(mllm: Any, batch: Batch, positions: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the first block's input and the last block's output at `positions` of each sample, each (token, d)."""
    states: dict[str, Tensor] = {}
    blocks = mllm.decoder.layers

    def keep_input(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        states["input"] = args[0] if args else kwargs["hidden_states"]

    def keep_output(_: nn.Module, __: object, output: Tensor) -> None:
        states["output"] = output

    handles = [
        blocks[0].register_forward_pre_hook(keep_input, with_kwargs=True),
        blocks[-1].register_forward_hook(keep_output),
    ]
    try:
        with mllm.lock, torch.inference_mode():
            mllm.model(**batch.inputs, use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    first_input, last_output = (
        [row[index.to(row.device)].float().cpu() for row, index in zip(states[name], positions, strict=True)]
        for name in ("input", "output")
    )
    return first_input, last_output


def _among_placeholders(mllm: Any, batch: Batch, sample: int, index: Tensor) -> Tensor:
    """Return the rank of each position of `index` among all placeholders of a sample."""
    placeholders = (batch.inputs["input_ids"][sample] == mllm.config.image_token_id).nonzero().flatten().cpu()
    return torch.searchsorted(placeholders, index.cpu())


def _check_grids(mllm: Any, plain: Image.Image, parts: list[VisualTokens], projected: Tensor, features: Tensor) -> None:
    """Paint the pixels of some tokens of every grid, and check that these tokens change most.

    Grids that do not overlap in the image are painted together, each at another token.

    Args:
        plain: the image without paint.
        parts: its visual tokens.
        projected: its projected tokens (token, d).
        features: the projector's input (row, features), of which the first rows belong to `plain`.
    """
    rounds = [(numbers, attempt) for numbers in _without_overlap(parts) for attempt in range(PAINTED)]
    if not rounds:
        return
    images, targets = [], []
    for numbers, attempt in rounds:
        image = plain.copy()
        painted = {number: _target(parts[number], number, attempt) for number in numbers}
        for number, token in painted.items():
            _paint(image, parts[number].token_box(*token))
        images.append(image)
        targets.append(painted)
    batch = mllm.encode(images, [QUESTION] * len(images))
    new_projected, new_features = encoder_output(mllm, batch)
    per_image = len(new_features) // len(rounds)
    rows = [part.rows for part in parts]
    peaks: Counter[tuple[int, str]] = Counter()
    for turn, painted in enumerate(targets):
        change = (new_projected[turn] - projected).norm(dim=-1)
        changes = [change[_among_placeholders(mllm, batch, turn, part.index)] for part in parts]
        for number in painted:
            peaks[number, OUTPUT] += _check_token(mllm, parts, number, painted, changes, OUTPUT)
        if all(part_rows is not None and (part_rows >= 0).all() for part_rows in rows):
            change = (new_features[turn * per_image : (turn + 1) * per_image] - features[:per_image]).norm(dim=-1)
            changes = [change[part_rows] for part_rows in rows if part_rows is not None]
            for number in painted:
                peaks[number, INPUT] += _check_token(mllm, parts, number, painted, changes, INPUT)
    for (number, where), count in peaks.items():
        if count < PEAKS:
            raise ModelError(
                f"{mllm.name}: painting tokens of grid {number} changed their neighbors more at {where}"
                f" ({PAINTED - count} of {PAINTED} times); family '{mllm.family.name}' is wrong about the grid, which"
                " looks shifted"
            )


def _without_overlap(parts: list[VisualTokens]) -> list[list[int]]:
    """Group the numbers of the grids so that the boxes within a group do not overlap."""
    groups: list[list[int]] = []
    for number in (number for number, part in enumerate(parts) if part.grid is not None):
        for group in groups:
            if not any(_overlap(parts[number].box, parts[other].box) for other in group):
                group.append(number)
                break
        else:
            groups.append([number])
    return groups


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] - 1e-6 and b[0] < a[2] - 1e-6 and a[1] < b[3] - 1e-6 and b[1] < a[3] - 1e-6


def _target(part: VisualTokens, number: int, attempt: int) -> tuple[int, int]:
    """Return the row and column of the token to paint, drawn anew for each grid and attempt.

    It is drawn among tokens that cover as much of the image as any other token does, and that a grid read by columns
    would put far away.
    """
    assert part.grid is not None
    rows, columns = part.grid
    tokens = [(row, column) for row in range(rows) for column in range(columns)]
    areas = [_area_inside(part.token_box(*token)) for token in tokens]
    tokens = [token for token, area in zip(tokens, areas, strict=True) if area > 0.99 * max(areas)]
    distances = [abs((column * rows + row) - (row * columns + column)) for row, column in tokens]
    tokens = [token for token, distance in zip(tokens, distances, strict=True) if 2 * distance >= max(distances)]
    return tokens[int(np.random.default_rng([number, attempt]).integers(len(tokens)))]


def _area_inside(box: Box) -> float:
    """Return the area of a box within the image; models that pad have tokens that reach beyond it."""
    left, top, right, bottom = (min(max(v, 0.0), 1.0) for v in box)
    return (right - left) * (bottom - top)


def _paint(image: Image.Image, box: Box) -> None:
    """Paint the inner half of a box red, so that resampling does not carry the paint into its neighbors."""
    left, top, right, bottom = (min(max(v, 0.0), 1.0) for v in box)
    x, y = (right - left) / 4, (bottom - top) / 4
    left, top, right, bottom = (
        round(v * side) for v, side in zip((left + x, top + y, right - x, bottom - y), image.size * 2, strict=True)
    )
    image.paste((255, 0, 0), (left, top, max(right, left + 1), max(bottom, top + 1)))


def _check_token(
    mllm: Any, parts: list[VisualTokens], number: int, targets: Targets, changes: list[Tensor], where: str
) -> bool:
    """Raise unless the painted token of a grid changed at least as much as nine in ten tokens of the grid.

    Args:
        number: of the grid.
        targets: the painted tokens.
        changes: how much each token changed, by grid.
        where: OUTPUT or INPUT.

    Returns:
        Whether it changed at least as much as every token around it.
    """
    grid, token, change = parts[number].grid, targets[number], changes[number]
    assert grid is not None
    value = change[token[0] * grid[1] + token[1]]
    if value > 0 and value >= change.quantile(0.9):
        around = change.view(grid)[max(0, token[0] - 1) : token[0] + 2, max(0, token[1] - 1) : token[1] + 2]
        return bool(value >= around.max())
    raise ModelError(
        f"{mllm.name}: painting token {token} of grid {number} changed other tokens more at {where}"
        f" ({_likely_mistake(grid, number, targets, changes)}); family '{mllm.family.name}' is wrong about the grid"
    )


def _likely_mistake(grid: tuple[int, int], number: int, targets: Targets, changes: list[Tensor]) -> str:
    """Return a mistake of the family that would explain why another token than the painted one changed most."""
    rows, columns = grid
    token, change = targets[number], changes[number]
    if change.max() == 0:
        elsewhere = [other for other in targets if other != number and changes[other].max() > 0]
        return f"grids {number} and {elsewhere[0]} look exchanged" if elsewhere else "no token of this grid changed"
    most = int(change.argmax())
    mistakes = []
    for other, target in targets.items():
        if (
            other != number
            and len(changes[other]) == len(change)
            and divmod(most, columns) == target
            and divmod(int(changes[other].argmax()), columns) == token
        ):
            mistakes.append(f"grids {number} and {other} look exchanged")
    if (most % rows, most // rows) == token:
        mistakes.append("rows and columns look exchanged")
    if mistakes:
        return ", or ".join(mistakes)
    # where the token would be if the grid were (columns, rows)
    place = tuple((i + 0.5) / n for i, n in zip(divmod(most, rows), (columns, rows), strict=True))
    wanted = tuple((i + 0.5) / n for i, n in zip(token, grid, strict=True))
    if rows != columns and max(abs(a - b) for a, b in zip(place, wanted, strict=True)) < 1 / min(grid):
        return f"the grid looks like {(columns, rows)}, not {grid}"
    return f"most at token {divmod(most, columns)}"
