"""The size of an encoder and a predictor, read off their tensors, and whether they are all there.

Everything but the number of heads shows in the shapes. Positions are fixed, so they are checked against their formula,
which also tells the grid, and are computed again for any other.

Shapes: N patches, D encoder width, P predictor width.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ijepa_ds.errors import UserError
from ijepa_ds.method.encoder import NAMED_DIMENSIONS, Dimensions, VisionTransformer
from ijepa_ds.method.positions import sine_cosine_positions
from ijepa_ds.method.predictor import Predictor

POSITIONS_TOLERANCE = 1e-5
Shapes = Mapping[str, tuple[int | None, ...]]  # by name; None: any length


@dataclass(frozen=True)
class TensorSizes:
    """What the shapes of an encoder's or a predictor's tensors tell.

    ``outer``: an encoder's patch size in pixels; of a predictor the encoder's width.
    """

    width: int
    depth: int
    hidden: int
    outer: int


def tensor_sizes(weights: dict[str, Tensor], *, predictor: bool = False) -> TensorSizes | None:
    """Sizes of an encoder under timm's names, or of a predictor under the released code's; None where they are none.

    The most frequent width and hidden width count, so that one misshapen tensor is named and not the others.
    """
    prefix = "predictor_" if predictor else ""
    outermost, axis = ("predictor_embed.weight", 1) if predictor else ("patch_embed.proj.weight", 3)
    depth, widths, hidden = 0, list[int](), list[int]()
    for name, tensor in weights.items():
        block = re.fullmatch(rf"{prefix}blocks\.(\d+)\.(.+)", name)
        if block and tensor.ndim == 1:
            depth = max(depth, int(block[1]) + 1)
            widths += tensor.shape if block[2] in ("norm1.weight", "norm2.weight") else ()
            hidden += tensor.shape if block[2] == "mlp.fc1.bias" else ()
        elif name == f"{prefix}norm.weight" and tensor.ndim == 1:
            widths += tensor.shape
    outer = weights.get(outermost)
    if not widths or not hidden or outer is None or outer.ndim <= axis or depth > len(weights):
        return None
    width = statistics.mode(widths)
    if width < 4 or width % 4 or outer.shape[axis] < 1 or min(hidden) < 1:
        return None  # no 2-D sine-cosine positions of this width
    return TensorSizes(width, depth, statistics.mode(hidden), outer.shape[axis])


def expected_shapes(sizes: TensorSizes, *, predictor: bool = False) -> Shapes:
    """Shapes of all tensors of these sizes, with positions of any grid; a predictor's MLPs are 4 times its width."""
    network: nn.Module
    with torch.device("meta"):
        if predictor:
            network = Predictor((1, 1), sizes.outer, width=sizes.width, depth=sizes.depth, heads=1)
        else:
            dimensions = Dimensions(sizes.width, sizes.depth, 1, sizes.hidden)
            network = VisionTransformer((sizes.outer, sizes.outer), sizes.outer, dimensions)
    return {
        **shapes_of(network.state_dict()),
        "predictor_pos_embed" if predictor else "pos_embed": (1, None, sizes.width),
    }


def shapes_of(weights: Mapping[str, Tensor]) -> Shapes:
    """Name -> shape of each tensor."""
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def shape_differences(shapes: Shapes, expected: Shapes) -> list[str]:
    """What is missing, unknown or of another shape, a line each; one line for what several blocks have alike."""
    names_of: dict[tuple[str, str], list[str]] = {}
    for name in [*expected, *(name for name in shapes if name not in expected)]:
        if name not in shapes:
            difference = "is missing"
        elif name not in expected:
            difference = "is unknown"
        elif not _fits(shapes[name], expected[name]):
            difference = f"is {_show(shapes[name])}, not {_show(expected[name])}"
        else:
            continue
        names_of.setdefault((re.sub(r"blocks\.\d+\.", "blocks.*.", name), difference), []).append(name)
    return [
        f"{names[0]} {difference}" if len(names) == 1 else f"{pattern} {difference}, in {len(names)} blocks"
        for (pattern, difference), names in names_of.items()
    ]


def grid_of_positions(table: Tensor, source: str) -> tuple[int, int]:
    """(rows, columns) of the grid whose fixed positions [1, N, D] are; refuses others.

    Squares are tried first. The tolerance is 1e-5, or the resolution of a 16-bit table.
    """
    number, width = table.shape[1:]
    tolerance = max(POSITIONS_TOLERANCE, torch.finfo(table.dtype).eps)
    sides = [rows for rows in range(1, number + 1) if number % rows == 0]
    for rows in sorted(sides, key=lambda rows: abs(rows - number // rows)):
        grid = (rows, number // rows)
        if (sine_cosine_positions(width, grid) - table[0].float()).abs().max() <= tolerance:
            return grid
    raise UserError(
        f"{source} has other positions than the fixed sine-cosine ones of I-JEPA on any grid of {number} patches (a "
        "learned table?), so it cannot be used here; give an I-JEPA encoder"
    )


def attention_heads(width: int, given: int | None, source: object) -> int:
    """The number of attention heads: ``given``, else that of the named size of this width."""
    if given is None:
        named = {dimensions.width: dimensions.heads for dimensions in NAMED_DIMENSIONS.values()}
        if width not in named:
            raise UserError(
                f"{source} has a width of {width}, which is none of the named sizes, and heads cannot be read off "
                "tensors; give their number with --heads or a configuration with --config"
            )
        return named[width]
    if given < 1 or width % given:
        raise UserError(f"--heads {given} does not divide the width of {width} of {source}; give a number that does")
    return given


def name_of(dimensions: Dimensions) -> str | None:
    """tiny to giant, if these are the dimensions of one."""
    return next((name for name, named in NAMED_DIMENSIONS.items() if named == dimensions), None)


def _fits(shape: tuple[int | None, ...], expected: tuple[int | None, ...]) -> bool:
    return len(shape) == len(expected) and all(b in (None, a) for a, b in zip(shape, expected, strict=True))


def _show(shape: tuple[int | None, ...]) -> str:
    return f"[{', '.join('any' if side is None else str(side) for side in shape)}]"
