"""Pictures that show what a run does: its masks, and what its features see. uint8 numpy [H, W, 3], RGB.

Shapes: B images, N patches, K context tokens, M target blocks, T tokens of a target block, D encoder width.
Patch n of a grid of (rows, cols) patches lies in row n // cols and column n % cols. Images are uint8 [B, H, W, 3] with
H and W multiples of the grid's rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

PANEL_PIXELS = 192  # smaller images are enlarged by the largest whole factor that stays within this
GAP_PIXELS = 4  # between the panels of one image; cells are 3 times as far apart
BACKGROUND = np.array([255, 255, 255], np.float32)
HIDDEN = np.array([112, 112, 116], np.float32)  # hidden patches fade to mid-grey, apart from dark and from light images
HIDDEN_STRENGTH = 0.85
TINT_STRENGTH = 0.45
# Okabe and Ito's colours, distinct for colour-blind readers too (black and grey left out).
BLOCK_COLOURS = np.array(
    [[230, 159, 0], [86, 180, 233], [0, 158, 115], [204, 121, 167], [240, 228, 66], [0, 114, 178], [213, 94, 0]],
    np.float32,
)


def draw_masks(
    images: np.ndarray, context_block: np.ndarray, target_blocks: np.ndarray, *, grid: tuple[int, int]
) -> np.ndarray:
    """One sheet, a cell per image: the image | what the context encoder sees | the target blocks, a colour each.

    ``context_block`` [B, K] and ``target_blocks`` [M, B, T] are patch indices; one that lies outside the grid is a
    ValueError.
    """
    images, context_block, target_blocks = np.asarray(images), np.asarray(context_block), np.asarray(target_blocks)
    _check_grid(images, grid)
    cells = []
    for b, image in enumerate(_enlarge(images)):
        context = _patch_mask(context_block[b], grid)
        blocks = [_patch_mask(block, grid) for block in target_blocks[:, b]]
        cells.append([image, _dim_hidden(image, context), _tint_blocks(image, blocks)])
    return _sheet(cells)


def feature_sheet(images: np.ndarray, tokens: Tensor, *, grid: tuple[int, int]) -> np.ndarray:
    """One sheet, a cell per image: the image | the first three principal components of its ``tokens`` [B, N, D]."""
    images = np.asarray(images)
    _check_grid(images, grid)
    enlarged = _enlarge(images)
    components = pca_rgb(tokens, grid=grid, size=enlarged.shape[1:3])
    return _sheet([[image, component] for image, component in zip(enlarged, components, strict=True)])


@torch.no_grad()
def pca_rgb(tokens: Tensor, *, grid: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """The first three principal components over all tokens of the batch as red, green and blue.

    Colours mean the same in every image of the batch, nothing across batches or steps. Each component is stretched from
    its 1st to its 99th percentile; its sign is the one that makes its largest loading positive. A component without
    variance is mid-grey, and so is the whole picture where a token is not finite.

    ``tokens`` [B, N, D] may have any float dtype and device. A patch is enlarged to ``size`` (height, width in pixels)
    as it is (nearest), so that patches can be told apart: uint8 [B, H, W, 3].
    """
    rows, cols = grid
    batch, num_patches, width = tokens.shape
    if num_patches != rows * cols:
        raise ValueError(f"{num_patches} tokens an image do not fill a grid of {rows} x {cols} patches")
    flat = tokens.reshape(-1, width).float().cpu()
    flat = flat - flat.mean(dim=0)  # [B * N, D]
    colours = torch.full((len(flat), 3), 0.5)
    if torch.isfinite(flat).all():
        # eigh sorts ascending: the last three columns, the strongest first.
        _, directions = torch.linalg.eigh((flat / flat.abs().amax().clamp_min(1e-30)).T.double().cov())
        directions = directions[:, -3:].flip(1).float()  # [D, 3], fewer columns where D < 3
        directions = directions * _signs(directions)
        projected = flat @ directions  # [B * N, 3]
        low, high = _percentiles(projected, 0.01), _percentiles(projected, 0.99)
        # Rounding noise is no variance: a component this far below the features' size has no colour.
        has_variance = (high - low) > 1e-5 * flat.abs().amax()
        stretched = ((projected - low) / (high - low).clamp_min(1e-30)).clamp(0, 1)
        colours[:, : projected.shape[1]] = torch.where(has_variance, stretched, 0.5)
    patches = (colours * 255).round().to(torch.uint8).numpy().reshape(batch, rows, cols, 3)
    row_of_pixel = np.arange(size[0]) * rows // size[0]
    col_of_pixel = np.arange(size[1]) * cols // size[1]
    return patches[:, row_of_pixel][:, :, col_of_pixel]


def _signs(directions: Tensor) -> Tensor:
    """+1 or -1 for each column of ``directions`` [D, 3], so that its entry of largest magnitude becomes positive."""
    largest = directions.abs().argmax(dim=0, keepdim=True)
    return torch.where(directions.gather(0, largest) < 0, -1.0, 1.0)


def _percentiles(values: Tensor, share: float) -> Tensor:
    """The value of each column that ``share`` of the rows lie below; a sort, as torch.quantile refuses long inputs."""
    return values.sort(dim=0).values[round(share * (len(values) - 1))]


def _check_grid(images: np.ndarray, grid: tuple[int, int]) -> None:
    height, width = images.shape[1:3]
    if height % grid[0] or width % grid[1]:
        raise ValueError(f"images of {height} x {width} pixels do not divide into {grid[0]} x {grid[1]} patches")


def _patch_mask(indices: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """bool [rows, cols], true at ``indices``."""
    num_patches = grid[0] * grid[1]
    if indices.size and (indices.min() < 0 or indices.max() >= num_patches):
        raise ValueError(f"patch index {indices.min()} or {indices.max()} lies outside a grid of {num_patches} patches")
    mask = np.zeros(num_patches, bool)
    mask[indices] = True
    return mask.reshape(grid)


def _to_pixels(mask: np.ndarray, image: np.ndarray) -> np.ndarray:
    """bool [rows, cols] -> bool [H, W]."""
    return np.kron(mask, np.ones((image.shape[0] // mask.shape[0], image.shape[1] // mask.shape[1]), bool))


def _dim_hidden(image: np.ndarray, visible: np.ndarray) -> np.ndarray:
    faded = image * (1 - HIDDEN_STRENGTH) + HIDDEN * HIDDEN_STRENGTH
    return np.where(_to_pixels(visible, image)[..., None], image, faded).astype(np.uint8)


def _tint_blocks(image: np.ndarray, blocks: Sequence[np.ndarray]) -> np.ndarray:
    """The image with every block in its colour (the mean colour where blocks overlap) and a line around it."""
    areas = [_to_pixels(block, image) for block in blocks]
    colours = [BLOCK_COLOURS[m % len(BLOCK_COLOURS)] for m in range(len(blocks))]
    colour_sum, coverage = np.zeros(image.shape, np.float32), np.zeros((*image.shape[:2], 1), np.float32)
    for area, colour in zip(areas, colours, strict=True):
        colour_sum[area] += colour
        coverage[area] += 1
    tinted = image * (1 - TINT_STRENGTH) + colour_sum / np.maximum(coverage, 1) * TINT_STRENGTH
    drawn = np.where(coverage > 0, tinted, image * 0.8)  # the rest a little darker, so that light blocks stand out
    for area, colour in zip(areas, colours, strict=True):
        drawn[_outline(area, thickness=max(2, image.shape[0] // 96))] = colour
    return drawn.astype(np.uint8)


def _outline(area: np.ndarray, *, thickness: int) -> np.ndarray:
    """The pixels of ``area`` [H, W] no further than ``thickness`` from its edge or the image's."""
    inside = area
    for _ in range(thickness):
        padded = np.pad(inside, 1)
        inside = inside & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return area & ~inside


def _enlarge(images: np.ndarray) -> np.ndarray:
    """[B, H, W, 3] with every pixel repeated a whole number of times, as far as a panel has room."""
    factor = max(1, PANEL_PIXELS // max(images.shape[1:3]))
    return images.repeat(factor, axis=1).repeat(factor, axis=2)


def _sheet(cells: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """Cells of equal panels, row by row; 1, 2, 4 ... cells wide, so that many images still make a landscape picture."""
    columns = 2 ** max(0, round(math.log2(len(cells) / 2) / 2))
    rows = math.ceil(len(cells) / columns)
    height, width = cells[0][0].shape[:2]
    cell_width = len(cells[0]) * (width + GAP_PIXELS) - GAP_PIXELS
    step_y, step_x = height + 3 * GAP_PIXELS, cell_width + 3 * GAP_PIXELS
    sheet = np.empty((rows * step_y + 3 * GAP_PIXELS, columns * step_x + 3 * GAP_PIXELS, 3), np.uint8)
    sheet[:] = BACKGROUND
    for index, panels in enumerate(cells):
        top = 3 * GAP_PIXELS + index // columns * step_y
        for p, panel in enumerate(panels):
            left = 3 * GAP_PIXELS + index % columns * step_x + p * (width + GAP_PIXELS)
            sheet[top : top + height, left : left + width] = panel
    return sheet
