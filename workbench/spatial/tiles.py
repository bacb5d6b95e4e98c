"""The visual tokens of an image by tile: by the piece of the image that the vision encoder saw by itself.

In most families a patch grid is one tile or the whole image. LLaVA-NeXT and LLaVA-OneVision put the tiles of an image
together to one grid at high resolution, without its padding; it is cut into its tiles again here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from workbench.errors import DataError
from workbench.mllm.family import VisualTokens


def by_tile(places: Sequence[Sequence[VisualTokens]]) -> list[list[VisualTokens]]:
    """Return the visual tokens of each image, one part for each tile, in the order of the grids that they come from.

    The tokens remain the same and none is lost, but their order changes where a grid spans several tiles. A tile that
    is all padding has no tokens and no part.

    Args:
        places: [image][part], as `MLLM.token_grids` returns them.

    Raises:
        DataError: a grid spans several tiles and its tokens are interpolated between them.
    """
    return [[tile for part in parts for tile in _tiles(part)] for parts in places]


def _tiles(part: VisualTokens) -> Iterator[VisualTokens]:
    """Yield the tiles of one part: the part itself if it is one tile."""
    if part.rows is not None and (part.rows < 0).any():
        raise DataError(
            f"a grid of {part.grid} visual tokens is interpolated from the tiles of a large image, so no token belongs"
            " to one tile: expected smaller images, or by grid"
        )
    if part.tile_starts is None or part.grid is None or part.spans is None or part.rows is None:
        yield part
        return
    (height, width), (tops, lefts) = part.grid, part.tile_starts
    index, rows = part.index.view(height, width), part.rows.view(height, width)
    for top, bottom in pairwise((*tops, height)):
        for left, right in pairwise((*lefts, width)):
            spans = part.spans[0][top:bottom], part.spans[1][left:right]
            (y, below), (x, beyond) = ((float(span[0, 0]), float(span[-1, 1])) for span in spans)
            yield VisualTokens(
                index[top:bottom, left:right].flatten(),
                (bottom - top, right - left),
                (x, y, beyond, below),
                part.image,
                rows[top:bottom, left:right].flatten(),
                spans,
                part.fill,
            )
