"""Fixed 2-D sine-cosine positions, as in MAE and I-JEPA: half of the width encodes the column, half the row.

Shapes: N patches (row-major, n = row * columns + column), D width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _sine_cosine(width: int, coordinates: Tensor) -> Tensor:
    """coordinates [N] -> [N, width]: sines of all frequencies, then cosines."""
    frequencies = 10000.0 ** -(torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    angles = coordinates[:, None] * frequencies[None, :]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sine_cosine_positions(width: int, grid: tuple[int, int]) -> Tensor:
    """Positions of a grid of (rows, columns), float32 [N, D]; ``width`` must divide by 4.

    The first half of the features encodes the column, the second the row: the order of the reference code.
    """
    if width % 4:
        raise ValueError(f"a width of {width} cannot hold 2-D sine-cosine positions: it must divide by 4")
    rows, columns = torch.meshgrid(
        torch.arange(grid[0], dtype=torch.float64), torch.arange(grid[1], dtype=torch.float64), indexing="ij"
    )
    halves = [_sine_cosine(width // 2, columns.reshape(-1)), _sine_cosine(width // 2, rows.reshape(-1))]
    return torch.cat(halves, dim=1).float()
