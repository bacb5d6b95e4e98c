"""Is the family right about this model? Checked causally, with a few drawn images: one pass of the model and two of its
encoder."""

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
from workbench.mllm.family import Batch, VisualTokens
from workbench.weights.pretrained import call

SIZE = (400, 300)  # width, height in pixels: not square, so that exchanged rows and columns show
QUESTION = "what is this ?"
CELLS = 3  # painted in each raster, one at a time
PEAKS = 2  # of them must move their token more than the tokens around it: a raster that is one column off has none


def validate(mllm: Any, size: tuple[int, int] = SIZE) -> None:
    """Check that the visual tokens of an `MLLM` sit where its family says, for images of `size` (width, height) in
    pixels.

    1. Every position given holds the image placeholder, and grids multiply to the number of tokens
       (`MLLM.visual_tokens`).
    2. The first block receives, at the visual positions, exactly what the projector returned.
    3. Another image changes the hidden states at those positions, leaves the text before them as it was, and changes no
       other projected token.
    4. Painting one grid cell's pixels, for three cells, changes that cell's token more than nine in ten of the tokens
       of its raster (attention in the tower spreads a change over all tokens, but not evenly) and, for two of them,
       more than the tokens around it: at the projector's output and at the connector's input.

    Raises:
        ModelError: names the check that failed, and the fault where it can be told.
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

    projected, tower = encoder_output(mllm, batch)
    positions = [row.nonzero().flatten().cpu() for row in batch.inputs["attention_mask"]]
    received, given = _ends(mllm, batch, positions)
    if not all(torch.isfinite(values).all() for values in (tower, *projected, *received, *given)):
        raise ModelError(
            f"{mllm.name} computes values that are not finite in {mllm.model.dtype}: expected bfloat16 or float32 to be"
            " wide enough"
        )
    ours = torch.isin(positions[0], visual)
    order = visual.argsort().argsort()  # the family's order, which is not the sequence's where tiles interleave
    embedded = received[0][ours][order]
    expected = projected[0][_among_placeholders(mllm, batch, 0, visual)]
    if (embedded - expected).abs().max() > 1e-3 * expected.abs().max():
        raise ModelError(
            f"{mllm.name}: what the language model receives at the visual positions is not the projector's output; "
            f"family '{mllm.family.name}' is wrong about positions"
        )
    if len(projected[0]) == len(projected[1]):
        left_out = (projected[0] - projected[1]).abs().amax(-1) > 0  # a newline vector is the same in every image
        left_out[_among_placeholders(mllm, batch, 0, visual)] = False
        if left_out.any():
            raise ModelError(
                f"{mllm.name}: family '{mllm.family.name}' leaves out {int(left_out.sum())} visual tokens that depend"
                " on the image"
            )
    first, second = given
    before = positions[0] < visual.min()
    if before.any() and not torch.allclose(first[before], second[before], atol=1e-4, rtol=1e-3):
        raise ModelError(
            f"{mllm.name}: another image changed the text before the visual tokens; family '{mllm.family.name}' starts"
            " them too late"
        )
    if ((first - second)[ours].abs().amax(-1) == 0).any():
        raise ModelError(
            f"{mllm.name}: another image left a visual token unchanged; family '{mllm.family.name}' is wrong about"
            " positions"
        )
    _check_rasters(mllm, plain, tokens[0], projected[0], tower)


def encoder_output(mllm: Any, batch: Batch) -> tuple[list[Float[Tensor, "token d"]], Float[Tensor, "row features"]]:
    """The projected tokens of each sample, special ones such as newlines included, in the order of their positions; and
    the connector's input."""

    def misfit(error: Exception) -> ModelError:
        what = f"what its processor makes of an image does not fit its vision encoder ({one_line(error, 120)})"
        return ModelError(f"{mllm.name}: {what}: expected the model's own processor")

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
    merged = mllm.family.rows_per_token(mllm.config)
    return list(flat.split(counts)), rows[0].reshape(-1, rows[0].shape[-1] * merged).float().cpu()


def _ends(mllm: Any, batch: Batch, positions: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """What the first block receives and what the last one gives at `positions` of each sample (token, d), in one
    forward pass."""
    ends: dict[str, Tensor] = {}
    blocks = mllm.decoder.layers

    def first(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        ends["received"] = args[0] if args else kwargs["hidden_states"]

    def last(_: nn.Module, __: object, output: Tensor) -> None:
        ends["given"] = output

    handles = [blocks[0].register_forward_pre_hook(first, with_kwargs=True), blocks[-1].register_forward_hook(last)]
    try:
        with mllm.lock, torch.inference_mode():
            mllm.model(**batch.inputs, use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    received, given = (
        [row[index.to(row.device)].float().cpu() for row, index in zip(ends[name], positions, strict=True)]
        for name in ("received", "given")
    )
    return received, given


def _among_placeholders(mllm: Any, batch: Batch, sample: int, index: Tensor) -> Tensor:
    """Where each position of `index` stands among all placeholders of a sample."""
    placeholders = (batch.inputs["input_ids"][sample] == mllm.config.image_token_id).nonzero().flatten().cpu()
    return torch.searchsorted(placeholders, index.cpu())


def _check_rasters(mllm: Any, plain: Image.Image, parts: list[VisualTokens], projected: Tensor, tower: Tensor) -> None:
    """Paint a cell of every raster, another one in each, and see whose tokens move; rasters that overlap take turns."""
    turns = [(numbers, attempt) for numbers in _apart(parts) for attempt in range(CELLS)]
    if not turns:
        return
    pictures, targets = [], []
    for numbers, attempt in turns:
        picture = plain.copy()
        cells = {number: _target(parts[number], number, attempt) for number in numbers}
        for number, cell in cells.items():
            _paint(picture, parts[number].token_box(*cell))
        pictures.append(picture)
        targets.append(cells)
    painted = mllm.encode(pictures, [QUESTION] * len(pictures))
    found, features = encoder_output(mllm, painted)
    per_image = len(features) // len(turns)
    rows = [part.rows for part in parts]
    peaks: Counter[tuple[int, str]] = Counter()
    for turn, cells in enumerate(targets):
        moved = (found[turn] - projected).norm(dim=-1)
        by_part = [moved[_among_placeholders(mllm, painted, turn, part.index)] for part in parts]
        for number in cells:
            peaks[number, OUTPUT] += _check_cell(mllm, parts, number, cells, by_part, OUTPUT)
        if all(own is not None and (own >= 0).all() for own in rows):
            moved = (features[turn * per_image : (turn + 1) * per_image] - tower[:per_image]).norm(dim=-1)
            for number in cells:
                peaks[number, INPUT] += _check_cell(
                    mllm, parts, number, cells, [moved[own] for own in rows if own is not None], INPUT
                )
    for (number, where), found_peaks in peaks.items():
        if found_peaks < PEAKS:
            raise ModelError(
                f"{mllm.name}: painting cells of raster {number} changed neighbours at {where} more than their tokens"
                f" ({CELLS - found_peaks} of {CELLS}); family '{mllm.family.name}' is wrong about the raster, which"
                " looks shifted"
            )


def _apart(parts: list[VisualTokens]) -> list[list[int]]:
    """Group the rasters so that the boxes within a group do not overlap."""
    turns: list[list[int]] = []
    for number in (n for n, part in enumerate(parts) if part.grid is not None):
        left, top, right, bottom = parts[number].box
        for turn in turns:
            boxes = [parts[other].box for other in turn]
            if not any(
                left < b[2] - 1e-6 and b[0] < right - 1e-6 and top < b[3] - 1e-6 and b[1] < bottom - 1e-6 for b in boxes
            ):
                turn.append(number)
                break
        else:
            turns.append([number])
    return turns


def _target(part: VisualTokens, number: int, attempt: int) -> tuple[int, int]:
    """A cell with as much of the image in it as any, that a raster running by columns would put elsewhere; another one
    for each raster."""
    assert part.grid is not None
    rows, columns = part.grid
    cells = [(row, column) for row in range(rows) for column in range(columns)]
    within = [_inside(part.token_box(*cell)) for cell in cells]
    cells = [cell for cell, area in zip(cells, within, strict=True) if area > 0.99 * max(within)]
    apart = [abs((column * rows + row) - (row * columns + column)) for row, column in cells]
    cells = [cell for cell, distance in zip(cells, apart, strict=True) if 2 * distance >= max(apart)]
    return cells[int(np.random.default_rng([number, attempt]).integers(len(cells)))]


def _inside(box: tuple[float, float, float, float]) -> float:
    """The area of a box that lies in the image; models that pad have cells beyond it."""
    left, top, right, bottom = (min(max(v, 0.0), 1.0) for v in box)
    return (right - left) * (bottom - top)


def _paint(image: Image.Image, box: tuple[float, float, float, float]) -> None:
    # models that pad have cells that reach beyond the image
    left, top, right, bottom = (min(max(v, 0.0), 1.0) for v in box)
    # its inner half, so that resampling does not carry it into its neighbours
    x, y = (right - left) / 4, (bottom - top) / 4
    left, top, right, bottom = (
        round(v * side) for v, side in zip((left + x, top + y, right - x, bottom - y), image.size * 2, strict=True)
    )
    image.paste((255, 0, 0), (left, top, max(right, left + 1), max(bottom, top + 1)))


OUTPUT, INPUT = "the projector's output", "the connector's input"
Cells = dict[int, tuple[int, int]]


def _check_cell(
    mllm: Any, parts: list[VisualTokens], number: int, targets: Cells, moved: list[Tensor], where: str
) -> bool:
    """Raise unless the painted cell's token moved more than nine in ten; return whether it moved most among those
    around it."""
    grid, cell, own = parts[number].grid, targets[number], moved[number]
    assert grid is not None
    value = own[cell[0] * grid[1] + cell[1]]
    if value > 0 and value >= own.quantile(0.9):
        around = own.view(grid)[max(0, cell[0] - 1) : cell[0] + 2, max(0, cell[1] - 1) : cell[1] + 2]
        return bool(value >= around.max())
    raise ModelError(
        f"{mllm.name}: painting cell {cell} of raster {number} changed other tokens at {where} more than its own"
        f" ({_fault(grid, number, targets, moved)}); family '{mllm.family.name}' is wrong about the raster"
    )


def _fault(grid: tuple[int, int], number: int, targets: Cells, moved: list[Tensor]) -> str:
    """What would explain that another token moved most."""
    rows, columns = grid
    cell, own = targets[number], moved[number]
    if own.max() == 0:
        elsewhere = [other for other in targets if other != number and moved[other].max() > 0]
        return f"rasters {number} and {elsewhere[0]} look exchanged" if elsewhere else "no token of this raster changed"
    at = int(own.argmax())
    faults = []
    for other, target in targets.items():
        if (
            other != number
            and len(moved[other]) == len(own)
            and divmod(at, columns) == target
            and divmod(int(moved[other].argmax()), columns) == cell
        ):
            faults.append(f"rasters {number} and {other} look exchanged")
    if (at % rows, at // rows) == cell:
        faults.append("rows and columns look exchanged")
    if faults:
        return ", or ".join(faults)
    # if the grid were (columns, rows)
    place = tuple((i + 0.5) / n for i, n in zip(divmod(at, rows), (columns, rows), strict=True))
    wanted = tuple((i + 0.5) / n for i, n in zip(cell, grid, strict=True))
    if rows != columns and max(abs(a - b) for a, b in zip(place, wanted, strict=True)) < 1 / min(grid):
        return f"the grid looks like {(columns, rows)}, not {grid}"
    return f"most at cell {divmod(at, columns)}"
