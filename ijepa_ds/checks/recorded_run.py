"""A recorded training run of another implementation: initial weights, what went in, and what came out.

Two files: ``NAME.npz`` with arrays ``init/PART/TENSOR``, ``stepS/{images, context_masks, target_masks}``,
``step0/{target_features, context_features, predictions}`` and ``final/PART/TENSOR``; beside it ``NAME.json`` with the
sizes, the recipe and, per step, loss, learning rate, weight decay, momentum and gradient norms. Tensor names are the
released code's, which are ours.

Shapes: B images, N patches, K context tokens, M target blocks, T tokens of a target block, D encoder width.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ijepa_ds.errors import UserError
from ijepa_ds.method.encoder import Dimensions, VisionTransformer
from ijepa_ds.method.predictor import Predictor

_SCALARS = ("loss", "lr", "weight_decay", "momentum", "grad_norm_encoder", "grad_norm_predictor")
_KEYS = {
    "image_size": None,
    "patch_size": None,
    "encoder": ("dim", "depth", "heads"),
    "predictor": ("dim", "depth", "heads"),
    "batch_size": None,
    "targets": None,
    "iterations_per_epoch": None,
    "epochs": None,
    "warmup_epochs": None,
    "lr": ("start", "peak", "final"),
    "weight_decay": None,
    "ema": None,
    "steps": None,
}


@dataclass(frozen=True)
class Trace:
    """What was recorded. ``settings`` is the JSON file, ``arrays`` the NPZ file."""

    path: Path
    settings: dict[str, Any]
    arrays: dict[str, np.ndarray]

    @property
    def num_steps(self) -> int:
        return len(self.settings["steps"])

    @property
    def image_size(self) -> tuple[int, int]:
        """(rows, columns) in pixels."""
        return _pair(self.settings["image_size"])

    def recorded(self, step: int) -> dict[str, float]:
        """The scalars of a step."""
        return {name: float(self.settings["steps"][step][name]) for name in _SCALARS}

    def weights(self, when: str, part: str) -> dict[str, Tensor]:
        """State dict of ``part`` (encoder, predictor, target_encoder), ``when`` = "init" or "final", fp32."""
        return {name: self.tensor(key) for name, key in self._names(f"{when}/{part}/")}

    def tensor(self, key: str) -> Tensor:
        """An array as a tensor: floating ones in fp32, indices in int64."""
        found = torch.from_numpy(self.arrays[key])
        return found.float() if found.is_floating_point() else found.long()

    def build(self) -> tuple[VisionTransformer, Predictor]:
        """Encoder and predictor of the trace's sizes; weights as they are initialised here."""
        return _build(self.settings, self.mlp_ratio)

    @property
    def mlp_ratio(self) -> float:
        """Of the encoder's MLPs: not among the settings, so from a tensor."""
        return _mlp_ratio(self.settings, self.arrays)

    def _names(self, prefix: str) -> list[tuple[str, str]]:
        return [(key.removeprefix(prefix), key) for key in self.arrays if key.startswith(prefix)]


def read_trace(path: Path) -> Trace:
    """Read and check a trace; :class:`UserError` names everything that is missing, extra or misshapen."""
    settings = _read_settings(path.with_suffix(".json"))
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give the .npz of a trace") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, KeyError, AttributeError) as error:
        raise UserError(f"{path} is damaged or not an .npz file ({error}); copy it again") from None
    problems = _problems(settings, arrays)
    if problems:
        listing = "".join(f"\n  - {problem}" for problem in problems)
        raise UserError(f"{path} is not a trace that can be replayed:{listing}")
    return Trace(path, settings, arrays)


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: a trace's sizes stand in a .json beside its .npz") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); copy it again") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path} must hold one JSON object")
    missing = [key for key in _KEYS if key not in settings]
    for key, parts in _KEYS.items():
        found = settings.get(key, {})
        missing += [f"{key}.{part}" for part in parts or () if not isinstance(found, dict) or part not in found]
    steps = settings.get("steps", [])
    if not isinstance(steps, list) or (not steps and "steps" not in missing):
        raise UserError(f"{path}: steps must be a list of at least one recorded step")
    for index, step in enumerate(steps):
        absent = [name for name in _SCALARS if not isinstance(step, dict) or not _is_number(step.get(name))]
        missing += [f"steps[{index}].{name}" for name in absent]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; record the trace again")
    wrong = [key for key, valid in _VALID.items() if not valid(settings[key])]
    wrong += [f"{k}.{p}" for k in ("encoder", "predictor") for p in _KEYS[k] if not _is_count(settings[k][p])]
    wrong += [f"lr.{part}" for part in _KEYS["lr"] if not _is_number(settings["lr"][part])]
    if wrong:
        raise UserError(f"{path}: {', '.join(wrong)} hold no usable value; record the trace again")
    if settings.get("layer_norm_eps", 1e-6) != 1e-6:
        raise UserError(f"{path}: layer_norm_eps = {settings['layer_norm_eps']}, but I-JEPA's is 1e-6")
    if any(side % settings["patch_size"] for side in _pair(settings["image_size"])):
        raise UserError(f"{path}: patch_size = {settings['patch_size']} does not divide image_size")
    return settings


def _problems(settings: dict[str, Any], arrays: dict[str, np.ndarray]) -> list[str]:
    try:
        ratio = _mlp_ratio(settings, arrays)
        with torch.device("meta"):
            encoder, predictor = (part.state_dict() for part in _build(settings, ratio))
    except ValueError as error:
        return [f"its sizes are impossible: {error}"]
    expected = {
        f"{when}/{part}/{name}": tuple(tensor.shape)
        for when, part, state in (
            ("init", "encoder", encoder),
            ("init", "predictor", predictor),
            ("final", "encoder", encoder),
            ("final", "predictor", predictor),
            ("final", "target_encoder", encoder),
        )
        for name, tensor in state.items()
    }
    batch, targets, width = settings["batch_size"], settings["targets"], settings["encoder"]["dim"]
    patches = encoder["pos_embed"].shape[1]
    for step in range(len(settings["steps"])):
        expected[f"step{step}/images"] = (batch, 3, *_pair(settings["image_size"]))
        expected[f"step{step}/context_masks"] = (1, batch, None)  # None: any length
        expected[f"step{step}/target_masks"] = (targets, batch, None)
    expected["step0/target_features"] = (batch, patches, width)
    expected["step0/context_features"] = (batch, _last(arrays, "step0/context_masks"), width)
    expected["step0/predictions"] = (targets * batch, _last(arrays, "step0/target_masks"), width)

    problems = [f"missing: {name}" for name in expected if name not in arrays]
    problems += [f"unknown: {name}" for name in arrays if name not in expected]
    for name, shape in expected.items():
        if name not in arrays:
            continue
        found = arrays[name]
        fits = len(found.shape) == len(shape) and all(b in (None, a) for a, b in zip(found.shape, shape, strict=True))
        if not fits:
            problems.append(f"{name} has shape {_show(found.shape)}, not {_show(shape)}")
        elif name.endswith("_masks"):
            if found.dtype.kind not in "iu" or not found.size or found.min() < 0 or found.max() >= patches:
                problems.append(f"{name} must hold numbers of patches from 0 to {patches - 1}")
        elif found.dtype.kind != "f" or not np.isfinite(found).all():
            problems.append(f"{name} must hold finite numbers")
    return problems


def _build(settings: dict[str, Any], mlp_ratio: float) -> tuple[VisionTransformer, Predictor]:
    encoder, predictor = settings["encoder"], settings["predictor"]
    for name, part in (("encoder", encoder), ("predictor", predictor)):
        if part["dim"] % part["heads"] or part["dim"] % 4:
            raise ValueError(f"{name}.dim = {part['dim']} does not divide by its {part['heads']} heads and by 4")
    dimensions = Dimensions(encoder["dim"], encoder["depth"], encoder["heads"], mlp_ratio)
    context_encoder = VisionTransformer(_pair(settings["image_size"]), settings["patch_size"], dimensions)
    return context_encoder, Predictor(
        context_encoder.grid,
        encoder["dim"],
        width=predictor["dim"],
        depth=predictor["depth"],
        heads=predictor["heads"],
    )


def _mlp_ratio(settings: dict[str, Any], arrays: dict[str, np.ndarray]) -> float:
    hidden = arrays.get("init/encoder/blocks.0.mlp.fc1.bias")
    return 4.0 if hidden is None or hidden.ndim != 1 else len(hidden) / settings["encoder"]["dim"]


def _last(arrays: dict[str, np.ndarray], name: str) -> int | None:
    return arrays[name].shape[-1] if name in arrays and arrays[name].ndim else None


def _pair(size: int | list[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_list_of(valid: Any, value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(valid, value))


_VALID = {
    "image_size": lambda value: _is_count(value) or _is_list_of(_is_count, value),
    "patch_size": _is_count,
    "batch_size": _is_count,
    "targets": _is_count,
    "iterations_per_epoch": _is_count,
    "epochs": _is_number,
    "warmup_epochs": _is_number,
    "weight_decay": lambda value: _is_list_of(_is_number, value),
    "ema": lambda value: _is_list_of(_is_number, value),
}


def _show(shape: tuple) -> str:
    return "[" + ", ".join("any" if side is None else str(side) for side in shape) + "]"
