"""The size of an encoder and a predictor, read off their tensors, and whether they are all there.

Everything but the number of heads shows in the shapes. Positions are fixed, so they are checked against their formula,
which also tells the grid, and are computed again for any other.

Shapes: N patches, D encoder width, P predictor width.
"""

from __future__ import annotations

import math
import re
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor

from ijepa_ds.errors import UserError
from ijepa_ds.method.encoder import NAMED_DIMENSIONS, Dimensions, VisionTransformer
from ijepa_ds.method.positions import sine_cosine_positions
from ijepa_ds.method.predictor import Predictor

POSITIONS_TOLERANCE = 1e-5


@dataclass(frozen=True)
class TensorSizes:
    """What the shapes of an encoder's or a predictor's tensors tell; ``outer`` is the patch size in pixels of an
    encoder, the encoder's width for a predictor."""

    width: int
    depth: int
    hidden: int
    outer: int


def encoder_sizes(weights: dict[str, Tensor]) -> TensorSizes | None:
    """Sizes of an encoder under timm's names; None where these tensors are no encoder."""
    return _sizes(weights, "blocks", "norm", "patch_embed.proj.weight", 3)


def predictor_sizes(weights: dict[str, Tensor]) -> TensorSizes | None:
    """Sizes of a predictor under the released code's names; None where these tensors are none."""
    return _sizes(weights, "predictor_blocks", "predictor_norm", "predictor_embed.weight", 1)


def encoder_problems(weights: dict[str, Tensor], sizes: TensorSizes) -> list[str]:
    """All missing, extra and misshapen tensors of an encoder; its positions are left to :func:`grid_of_positions`."""
    dimensions = Dimensions(sizes.width, sizes.depth, 1, mlp_ratio(sizes.width, sizes.hidden))
    with torch.device("meta"):
        expected = VisionTransformer((sizes.outer, sizes.outer), sizes.outer, dimensions).state_dict()
    return _differences(weights, expected, "pos_embed")


def predictor_problems(weights: dict[str, Tensor], sizes: TensorSizes) -> list[str]:
    """The same for a predictor, whose MLP is always four times as wide as itself."""
    with torch.device("meta"):
        expected = Predictor((1, 1), sizes.outer, width=sizes.width, depth=sizes.depth, heads=1).state_dict()
    return _differences(weights, expected, "predictor_pos_embed")


def grid_of_positions(table: Tensor) -> tuple[int, int] | None:
    """(rows, columns) of the grid whose fixed positions [1, N, D] are; None if they are those of no grid.

    Squares are tried first. The tolerance is 1e-5, or the resolution of a 16-bit table.
    """
    number, width = table.shape[1:]
    tolerance = max(POSITIONS_TOLERANCE, torch.finfo(table.dtype).eps)
    sides = [rows for rows in range(1, number + 1) if number % rows == 0]
    for rows in sorted(sides, key=lambda rows: abs(rows - number // rows)):
        grid = (rows, number // rows)
        if (sine_cosine_positions(width, grid) - table[0].float()).abs().max() <= tolerance:
            return grid
    return None


def heads_of_width(width: int, heads: int | None, source: object) -> int:
    """The number of attention heads: ``heads`` if given, else that of the named size of this width."""
    if heads is None:
        named = {dimensions.width: dimensions.heads for dimensions in NAMED_DIMENSIONS.values()}
        if width not in named:
            raise UserError(
                f"{source} has a width of {width}, which is none of the named sizes, and heads cannot be read off "
                "tensors; give their number with --heads or a configuration with --config"
            )
        heads = named[width]
    if heads < 1 or width % heads:
        raise UserError(f"--heads {heads} does not divide the width of {width} of {source}; give a number that does")
    return heads


def mlp_ratio(width: int, hidden: int) -> float:
    """The ratio from which ``int(width * ratio)`` gives exactly ``hidden``."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def name_of(dimensions: Dimensions) -> str | None:
    """tiny to giant, if these are the dimensions of one."""
    for name, named in NAMED_DIMENSIONS.items():
        same = (named.width, named.depth, named.heads) == (dimensions.width, dimensions.depth, dimensions.heads)
        if same and int(named.width * named.mlp_ratio) == int(dimensions.width * dimensions.mlp_ratio):
            return name
    return None


def _sizes(weights: dict[str, Tensor], blocks: str, norm: str, outermost: str, axis: int) -> TensorSizes | None:
    """The most frequent width and hidden width, so that one misshapen tensor is named and not the others."""
    depth, widths, hidden = 0, [], []
    for name, tensor in weights.items():
        block = re.fullmatch(rf"{blocks}\.(\d+)\.(.+)", name)
        if block and tensor.ndim == 1:
            depth = max(depth, int(block[1]) + 1)
            widths += tensor.shape if block[2] in ("norm1.weight", "norm2.weight") else ()
            hidden += tensor.shape if block[2] == "mlp.fc1.bias" else ()
        elif name == f"{norm}.weight" and tensor.ndim == 1:
            widths += tensor.shape
    outer = weights.get(outermost)
    if not widths or not hidden or outer is None or outer.ndim <= axis or depth > len(weights):
        return None
    width = statistics.mode(widths)
    if width < 4 or width % 4 or outer.shape[axis] < 1 or min(hidden) < 1:
        return None  # no 2-D sine-cosine positions of this width
    return TensorSizes(width, depth, statistics.mode(hidden), outer.shape[axis])


def _differences(weights: dict[str, Tensor], expected: dict[str, Tensor], positions: str) -> list[str]:
    problems = [f"{name} is missing" for name in expected if name not in weights]
    for name, tensor in weights.items():
        if name not in expected:
            problems.append(f"{name} is none of I-JEPA's tensors")
        elif name == positions:
            width = expected[name].shape[-1]
            if tensor.ndim != 3 or tensor.shape[0] != 1 or tensor.shape[1] < 1 or tensor.shape[2] != width:
                problems.append(f"{name} is {list(tensor.shape)}, not [1, patches, {width}]")
        elif tensor.shape != expected[name].shape:
            problems.append(f"{name} is {list(tensor.shape)}, not {list(expected[name].shape)}")
    return problems
