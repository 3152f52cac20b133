"""A recorded training run of another implementation: initial weights, what went in, and what came out.

Two files: ``NAME.npz`` with arrays ``init/PART/TENSOR``, ``stepS/{images, context_masks, target_masks}``,
``step0/{target_features, context_features, predictions}`` and ``final/PART/TENSOR``; beside it ``NAME.json`` with the
sizes, the recipe and, per step, loss, learning rate, weight decay, momentum and gradient norms. Tensor names are the
released code's, which are ours.

Shapes: B images, N patches, K context tokens, M target blocks, T tokens of a target block, D encoder width.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import ConfigDict, Field, model_validator
from torch import Tensor

from ijepa_ds.errors import UserError, listing
from ijepa_ds.exchange.sizes import Shapes, shape_differences, shapes_of
from ijepa_ds.method.encoder import Dimensions, VisionTransformer
from ijepa_ds.method.predictor import Predictor
from ijepa_ds.validation import Checked, Count, ImageSize, Pair, must, read_json


class _Recorded(Checked):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=True)  # a run may have recorded more, and NaN


class Network(_Recorded):
    """Sizes of the encoder or the predictor."""

    dim: Count
    depth: Count
    heads: Count


class Rates(_Recorded):
    """The learning rate at the start, after the warm-up and at the end."""

    start: float
    peak: float
    final: float


class Step(_Recorded):
    """The scalars of a step."""

    loss: float
    lr: float
    weight_decay: float
    momentum: float
    grad_norm_encoder: float
    grad_norm_predictor: float


_DIVIDES = must(lambda part: part.dim % part.heads == part.dim % 4 == 0, "must have a dim that its heads and 4 divide")


class Settings(_Recorded):
    """The JSON file: sizes, recipe and steps."""

    image_size: ImageSize
    patch_size: Count
    encoder: Annotated[Network, _DIVIDES]
    predictor: Annotated[Network, _DIVIDES]
    batch_size: Count
    targets: Count
    iterations_per_epoch: Count
    epochs: float
    warmup_epochs: float
    ipe_scale: float = 1.0
    lr: Rates
    weight_decay: Pair[float]
    ema: Pair[float]
    layer_norm_eps: Annotated[float, must(lambda eps: eps == 1e-6, "is not 1e-6, which is I-JEPA's")] = 1e-6
    dtype: str = "float32"
    steps: list[Step] = Field(min_length=1)

    @model_validator(mode="after")
    def _patches_fill_the_image(self) -> Settings:
        if any(side % self.patch_size for side in self.image_size):
            raise ValueError(f"patch_size = {self.patch_size} does not divide image_size = {list(self.image_size)}")
        return self


@dataclass(frozen=True)
class Trace:
    """A recorded run: ``settings`` is its JSON file, ``arrays`` its NPZ file."""

    path: Path
    settings: Settings
    arrays: dict[str, np.ndarray]

    def weights(self, when: str, part: str) -> dict[str, Tensor]:
        """State dict of ``part`` (encoder, predictor, target_encoder), ``when`` = "init" or "final", fp32."""
        prefix = f"{when}/{part}/"
        return {key.removeprefix(prefix): self.tensor(key) for key in self.arrays if key.startswith(prefix)}

    def tensor(self, key: str) -> Tensor:
        """An array as a tensor: floating ones in fp32, indices in int64."""
        tensor = torch.from_numpy(self.arrays[key])
        return tensor.float() if tensor.is_floating_point() else tensor.long()

    def build(self) -> tuple[VisionTransformer, Predictor]:
        """Encoder and predictor of the trace's sizes; weights as they are initialised here.

        The hidden width of the encoder's MLPs is not among the settings; it is that of a tensor.
        """
        encoder, predictor = self.settings.encoder, self.settings.predictor
        hidden = self.arrays.get("init/encoder/blocks.0.mlp.fc1.bias", np.empty(()))
        dimensions = Dimensions(encoder.dim, encoder.depth, encoder.heads, len(hidden) if hidden.ndim == 1 else 0)
        context_encoder = VisionTransformer(self.settings.image_size, self.settings.patch_size, dimensions)
        return context_encoder, Predictor(
            context_encoder.grid, encoder.dim, width=predictor.dim, depth=predictor.depth, heads=predictor.heads
        )


def read_trace(path: Path) -> Trace:
    """Read and check a trace; :class:`UserError` names everything that is missing, extra or misshapen."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give the .npz of a trace") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, KeyError, AttributeError) as error:
        raise UserError(f"{path} is damaged or not an .npz file ({error}); copy it again") from None
    settings = read_json(Settings, path.with_suffix(".json"), "is not of a trace that can be replayed", nan=True)
    trace = Trace(path, settings, arrays)
    problems = _problems(trace)
    if problems:
        raise UserError(f"{path} is not a trace that can be replayed:{listing(problems)}")
    return trace


def _problems(trace: Trace) -> list[str]:
    settings, arrays = trace.settings, trace.arrays
    with torch.device("meta"):
        networks = trace.build()
    encoder, predictor = (shapes_of(network.state_dict()) for network in networks)
    parts = {
        "init/encoder": encoder,
        "init/predictor": predictor,
        "final/encoder": encoder,
        "final/predictor": predictor,
        "final/target_encoder": encoder,
    }
    expected = {f"{part}/{name}": shape for part, shapes in parts.items() for name, shape in shapes.items()}
    batch, targets, width = settings.batch_size, settings.targets, settings.encoder.dim
    patches = networks[0].grid[0] * networks[0].grid[1]
    for step in range(len(settings.steps)):
        expected[f"step{step}/images"] = (batch, 3, *settings.image_size)
        expected[f"step{step}/context_masks"] = (1, batch, None)
        expected[f"step{step}/target_masks"] = (targets, batch, None)
    expected["step0/target_features"] = (batch, patches, width)
    expected["step0/context_features"] = (batch, _last(arrays, "step0/context_masks"), width)
    expected["step0/predictions"] = (targets * batch, _last(arrays, "step0/target_masks"), width)
    shapes: Shapes = {name: array.shape for name, array in arrays.items()}
    problems = shape_differences(shapes, expected)
    for name, array in arrays.items():
        if name.endswith("_masks"):
            if array.dtype.kind not in "iu" or not array.size or array.min() < 0 or array.max() >= patches:
                problems.append(f"{name} must hold numbers of patches from 0 to {patches - 1}")
        elif array.dtype.kind != "f" or not np.isfinite(array).all():
            problems.append(f"{name} must hold finite numbers")
    return problems


def _last(arrays: dict[str, np.ndarray], name: str) -> int | None:
    return arrays[name].shape[-1] if name in arrays and arrays[name].ndim else None
