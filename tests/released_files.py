"""Files in the released code's format, from random weights: none can be downloaded for a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ijepa_ds.method.encoder import Dimensions, VisionTransformer
from ijepa_ds.method.predictor import Predictor

SMALL = Dimensions(32, 2, 2)


def released_checkpoint(
    image_size: tuple[int, int] = (32, 32),
    patch_size: int = 4,
    dimensions: Dimensions = SMALL,
    *,
    predictor_width: int = 16,
    predictor_depth: int = 2,
    seed: int = 0,
) -> dict[str, Any]:
    """The dictionary that the released training writes: no tensor of it is at its initial value, positions excepted."""
    draw = torch.Generator().manual_seed(seed)
    grid = image_size[0] // patch_size, image_size[1] // patch_size
    encoders = [VisionTransformer(image_size, patch_size, dimensions) for _ in range(2)]
    predictor = Predictor(grid, dimensions.width, width=predictor_width, depth=predictor_depth, heads=dimensions.heads)
    for module in (*encoders, predictor):
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    context, target = encoders
    trained = [*context.parameters(), *predictor.parameters()]
    return {
        "encoder": _under_module(context),
        "predictor": _under_module(predictor),
        "target_encoder": _under_module(target),
        "opt": {
            "state": {i: {"step": torch.tensor(3.0), "exp_avg": torch.zeros_like(p)} for i, p in enumerate(trained)},
            "param_groups": [{"lr": np.float64(1e-3), "betas": (0.9, 0.999), "WD_exclude": True, "foreach": None}],
        },
        "scaler": {"scale": 65536.0, "growth_interval": 2000, "_growth_tracker": 0},
        "epoch": 7,
        "loss": np.float32(0.25),
        "batch_size": 128,
        "world_size": 16,
        "lr": 0.001,
    }


def save_released(path: Path, content: dict[str, Any] | None = None, **sizes: Any) -> Path:
    """The same as a file."""
    torch.save(released_checkpoint(**sizes) if content is None else content, path)
    return path


def _under_module(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A state dict as of a module that DistributedDataParallel wraps: an OrderedDict, versions attached."""
    return torch.nn.ModuleDict({"module": module}).state_dict()
