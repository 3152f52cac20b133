"""The positions against the definition, one number at a time."""

from __future__ import annotations

import math

import pytest
import torch

from ijepa_ds.method.positions import sine_cosine_positions

GRIDS = [(1, 1), (2, 2), (3, 5), (5, 3), (1, 7), (16, 16), (37, 37)]


def naive(width: int, grid: tuple[int, int]) -> list[list[float]]:
    """Per patch: sines then cosines of the column, sines then cosines of the row (MAE's order, I-JEPA's too)."""
    quarter = width // 4
    table = []
    for row in range(grid[0]):
        for column in range(grid[1]):
            entry = []
            for coordinate in (column, row):
                for function in (math.sin, math.cos):
                    entry += [function(coordinate / 10000 ** (k / quarter)) for k in range(quarter)]
            table.append(entry)
    return table


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("width", [4, 20, 64])
def test_every_number_is_as_defined(width, grid):
    positions = sine_cosine_positions(width, grid)
    assert positions.dtype == torch.float32
    assert positions.shape == (grid[0] * grid[1], width)
    torch.testing.assert_close(positions, torch.tensor(naive(width, grid)), rtol=0, atol=2e-7)


def test_no_two_patches_share_a_position():
    positions = sine_cosine_positions(64, (14, 28))
    distances = torch.cdist(positions, positions) + torch.eye(14 * 28) * 1e9
    assert distances.min() > 0.1


def test_rows_and_columns_are_not_confused():
    """Transposing the grid swaps the two halves of the features."""
    wide = sine_cosine_positions(16, (2, 5)).reshape(2, 5, 2, 8)
    tall = sine_cosine_positions(16, (5, 2)).reshape(5, 2, 2, 8)
    assert torch.equal(wide, tall.transpose(0, 1).flip(2))
    assert (wide[0, :, 0] != wide[0, :1, 0]).any() and (wide[0, :, 1] == wide[0, :1, 1]).all()


@pytest.mark.parametrize("width", [1, 2, 6, 383])
def test_a_width_that_does_not_divide_by_four_is_refused(width):
    with pytest.raises(ValueError, match=f"{width} .*divide by 4"):
        sine_cosine_positions(width, (2, 2))
