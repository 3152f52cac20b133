"""Blocks compiled by torch with static shapes: one region a network and kind of block, shared by all its blocks.

All of timm's blocks are one code object, and torch keeps what it compiled by code object: context encoder, target
encoder and predictor would fill one cache of eight entries, and once it has seen two shapes torch compiles for shapes
that change. So each region is a function of its own, and every shape is compiled for itself.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ijepa_ds.method.blocks import (
    block_at,
    block_at_last,
    block_of_shared_context,
    block_of_shared_context_at_own,
    whole_block,
)
from ijepa_ds.method.encoder import VisionTransformer
from ijepa_ds.method.ijepa import IJEPA
from ijepa_ds.method.predictor import Predictor

_SPARE_SHAPES = 8  # of the limit at which torch gives a region up
_REGIONS: dict[str, tuple[Callable[..., Tensor], ...]] = {
    "context": (whole_block,),
    "target": (whole_block, block_at),
    "predictor": (block_of_shared_context, whole_block, block_at_last, block_of_shared_context_at_own),
}


def compile_blocks(model: IJEPA, target_encoder: VisionTransformer, *, num_shapes: int, backend: Any) -> None:
    """From now on the blocks run compiled, each shape from its first call on.

    Args:
        model: context encoder and predictor.
        target_encoder: it, too.
        num_shapes: the most shapes that a block is to be compiled for.
        backend: torch's, such as "inductor".
    """
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, num_shapes + _SPARE_SHAPES)
    networks: dict[str, VisionTransformer | Predictor] = {
        "context": model.context_encoder,
        "target": target_encoder,
        "predictor": model.predictor,
    }
    for name, network in networks.items():
        network.compiled = {function: _region(function, name, backend) for function in _REGIONS[name]}


def _region(function: Callable[..., Tensor], network: str, backend: Any) -> Callable[..., Tensor]:
    name = f"{network}_{function.__name__}"
    code = function.__code__.replace(co_name=name)  # equal code would share the cache
    return torch.compile(types.FunctionType(code, function.__globals__, name), backend=backend, dynamic=False)
