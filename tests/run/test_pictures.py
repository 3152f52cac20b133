"""The pictures show the patches they are told to."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ijepa_ds.run.pictures import BLOCK_COLOURS, draw_masks, feature_sheet, pca_rgb

GRID = (4, 4)


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)


def panels(sheet: np.ndarray, *, num_panels: int, size: int = 192, margin: int = 12, gap: int = 4) -> list[np.ndarray]:
    """The panels of the first cell of a sheet."""
    return [
        sheet[margin : margin + size, left : left + size]
        for left in range(margin, margin + num_panels * size, size + gap)
    ]


def test_the_three_panels_show_image_context_and_targets(images):
    context_block = np.array([[0, 5], [1, 2], [3, 4]])
    target_blocks = np.array([[[10, 11, 14, 15]] * 3, [[2, 3, 6, 7]] * 3])
    original, context, targets = panels(draw_masks(images, context_block, target_blocks, grid=GRID), num_panels=3)
    enlarged = images[0].repeat(6, axis=0).repeat(6, axis=1)
    assert (original == enlarged).all()

    def patch(panel: np.ndarray, n: int) -> np.ndarray:
        row, col = divmod(n, 4)
        return panel[row * 48 : row * 48 + 48, col * 48 : col * 48 + 48]

    for n in range(16):
        assert (patch(context, n) == patch(enlarged, n)).all() == (n in (0, 5))
    assert (patch(targets, 10)[0, 0] == BLOCK_COLOURS[0]).all() and (
        patch(targets, 7)[-1, -1] == BLOCK_COLOURS[1]
    ).all()
    assert not (patch(targets, 10)[-1, -1] == BLOCK_COLOURS[0]).all()  # the line goes around the block, not the patch


def test_rectangular_grids_count_along_rows():
    image = np.full((1, 16, 32, 3), 200, np.uint8)  # 2 x 4 patches of 8 pixels
    sheet = draw_masks(image, np.array([[4]]), np.array([[[3]]]), grid=(2, 4))
    context = sheet[12 : 12 + 96, 12 + 192 + 4 : 12 + 192 + 4 + 192]
    assert (context[48:, :48] == 200).all() and (context[:48, 144:] != 200).all()


def test_every_image_gets_its_cell_and_large_ones_keep_their_size():
    for batch in (1, 4, 7, 16):
        images = np.zeros((batch, 224, 224, 3), np.uint8)
        sheet = draw_masks(images, np.zeros((batch, 1), int), np.zeros((1, batch, 1), int), grid=(16, 16))
        assert sheet.dtype == np.uint8 and (sheet[12:-12, 12:-12] == 255).mean() < 0.5
        assert sheet.shape[0] % (224 + 12) == 12


@pytest.mark.parametrize("index", [-1, 16])
def test_an_index_outside_the_grid_is_refused(images, index):
    with pytest.raises(ValueError, match="outside a grid of 16 patches"):
        draw_masks(images, np.full((3, 1), index), np.zeros((1, 3, 1), int), grid=GRID)


def test_an_image_that_does_not_divide_is_refused(images):
    with pytest.raises(ValueError, match="32 x 32 pixels do not divide into 5 x 5"):
        draw_masks(images, np.zeros((3, 1), int), np.zeros((1, 3, 1), int), grid=(5, 5))


def test_equal_tokens_get_equal_colours_and_the_first_component_is_red():
    tokens = torch.zeros(2, 16, 8)
    tokens[:, :8] = torch.linspace(1, 2, 8)  # two kinds of patch: one component
    rgb = pca_rgb(tokens, grid=GRID, size=(8, 8))
    assert rgb.shape == (2, 8, 8, 3) and rgb.dtype == np.uint8
    assert (rgb[:, :4, :, 0] == 255).all() and (rgb[:, 4:, :, 0] == 0).all()
    assert (rgb[..., 1:] == 128).all()  # no variance left


def test_pca_does_not_depend_on_the_solver_s_signs_or_the_scale():
    tokens = torch.randn(3, 16, 12, generator=torch.Generator().manual_seed(0))
    rgb = pca_rgb(tokens, grid=GRID, size=(4, 4)).astype(int)
    assert abs(pca_rgb(tokens * 100 + 3, grid=GRID, size=(4, 4)) - rgb).max() <= 1
    assert abs(pca_rgb(tokens.flip(0), grid=GRID, size=(4, 4))[::-1] - rgb).max() <= 1


def test_pca_takes_bfloat16_few_features_and_tokens_that_are_not_finite():
    assert pca_rgb(torch.randn(2, 16, 2).bfloat16(), grid=GRID, size=(10, 6)).shape == (2, 10, 6, 3)
    assert (pca_rgb(torch.full((2, 16, 5), float("nan")), grid=GRID, size=(4, 4)) == 128).all()
    assert (pca_rgb(torch.ones(2, 16, 5), grid=GRID, size=(4, 4)) == 128).all()


def test_feature_sheet_puts_image_and_components_side_by_side(images):
    tokens = torch.randn(3, 16, 8)
    original, components = panels(feature_sheet(images, tokens, grid=GRID), num_panels=2)
    assert (original == images[0].repeat(6, axis=0).repeat(6, axis=1)).all()
    assert (components == pca_rgb(tokens, grid=GRID, size=(192, 192))[0]).all()
