"""Encoders from files of other projects: the released code's checkpoints, timm's state dicts, transformers' folders.

A file is read without executing anything in it, its tensors are checked one by one, and its sizes are read off them.
Which encoder a file holds matters: I-JEPA is evaluated by its TARGET encoder, and files that other tools have made of
released checkpoints often hold the context encoder without saying so.

Shapes: N patches, D encoder width.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ijepa_ds.errors import UserError
from ijepa_ds.exchange.safe_load import read_pickle, read_safetensors, tensor_problems
from ijepa_ds.exchange.sizes import (
    TensorSizes,
    encoder_problems,
    encoder_sizes,
    grid_of_positions,
    heads_of_width,
    mlp_ratio,
    predictor_problems,
    predictor_sizes,
)
from ijepa_ds.exchange.tensor_names import from_reference, from_transformers
from ijepa_ds.method.encoder import Dimensions
from ijepa_ds.method.positions import sine_cosine_positions

Role = Literal["target", "context", "unknown"]
ROLE_KEYS = {"target": "target_encoder", "context": "encoder"}  # of the released code's checkpoints


@dataclass(frozen=True)
class ForeignEncoder:
    """An encoder under timm's names, fp32, complete and finite.

    ``weights`` lack the positions, which are fixed: see :meth:`state_dict`. ``grid``: rows and columns of patches that
    it was stored with.
    """

    source: str
    format: Literal["reference", "timm", "transformers"]
    role: Role
    weights: dict[str, Tensor]
    dimensions: Dimensions
    patch_size: int
    grid: tuple[int, int]

    def state_dict(self, grid: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """What ``VisionTransformer.load_state_dict`` takes, positions computed for ``grid`` (default: its own)."""
        positions = sine_cosine_positions(self.dimensions.width, grid or self.grid)[None]
        return {"pos_embed": positions, **self.weights}

    def say(self) -> str:
        """What it is, in a line."""
        size = self.dimensions
        kind = {"unknown": "an encoder that does not say whether it is the target or the context encoder"}
        return (
            f"{self.source}: {kind.get(self.role, f'the {self.role.upper()} encoder')} ({self.format} format), "
            f"width {size.width}, depth {size.depth}, {size.heads} heads, patches of {self.patch_size} px on a grid of "
            f"{self.grid[0]} x {self.grid[1]}"
        )


@dataclass(frozen=True)
class ReferenceCheckpoint:
    """A released-format checkpoint whole: both encoders and the predictor, complete, finite and of matching sizes."""

    target: ForeignEncoder
    context: ForeignEncoder
    predictor: dict[str, Tensor]  # the released code's names, without positions
    predictor_sizes: TensorSizes
    epoch: int | None

    def with_heads(self, heads: int) -> ReferenceCheckpoint:
        """The same with another number of attention heads, which no tensor shows."""

        def change(encoder: ForeignEncoder) -> ForeignEncoder:
            return replace(encoder, dimensions=replace(encoder.dimensions, heads=heads))

        return replace(self, target=change(self.target), context=change(self.context))


def read_encoder(
    path: str | Path, *, encoder: Literal["target", "context"] | None = None, heads: int | None = None
) -> ForeignEncoder:
    """The encoder of a ``.pth.tar`` or ``.pth`` file, a ``.safetensors`` file or a transformers folder.

    Args:
        encoder: which of the two, where the file holds both (default: the target encoder). Of a file with one encoder
            that says what it is, only that one can be asked for.
        heads: number of attention heads, where neither a named width nor a transformers configuration tells it.

    Raises:
        UserError: a damaged file, one that carries code, or one whose tensors are not those of an I-JEPA encoder: all
            missing, extra and misshapen tensors are named; heads that nothing tells; another encoder than asked for.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; give a .pth.tar, a .safetensors or a transformers folder")
    if path.is_dir():
        weights, role, config = _read_transformers(path)
        if heads not in (None, config["num_attention_heads"]):
            raise UserError(f"--heads {heads} is not the {config['num_attention_heads']} of {path}; leave it out")
        found = _check_encoder(weights, str(path), "transformers", role, config["num_attention_heads"])
        _check_against_config(found, config, path)
    elif path.suffix == ".safetensors":
        weights, metadata = read_safetensors(path)
        found = _check_encoder(weights, str(path), "timm", _role(metadata.get("encoder")), heads)
    else:
        content = read_pickle(path)
        if "encoder" in content or "target_encoder" in content:
            role = encoder or "target"
            weights = _part(content, ROLE_KEYS[role], path)
            return _check_encoder(weights, f"{path}, {ROLE_KEYS[role]}", "reference", role, heads)
        found = _check_encoder(from_reference(content), str(path), "timm", "unknown", heads)
    if encoder is not None and found.role not in (encoder, "unknown"):
        raise UserError(f"{path} holds the {found.role} encoder, not the {encoder} encoder; ask for what it holds")
    return found


def read_reference(path: str | Path, *, heads: int | None = None) -> ReferenceCheckpoint:
    """All that a run needs from a released-format checkpoint; :class:`UserError` names every problem of its tensors.

    ``heads``: as for :func:`read_encoder`.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is not a file; give a checkpoint in the released code's format, a .pth.tar")
    content = {} if path.suffix == ".safetensors" else read_pickle(path)
    lacking = [key for key in ("encoder", "predictor", "target_encoder") if not isinstance(content.get(key), dict)]
    if lacking:
        raise UserError(
            f"{path} lacks {', '.join(lacking)}: a run goes on from both encoders and the predictor of a checkpoint in "
            "the released code's format; a single encoder can only be evaluated"
        )
    parts = {key: _part(content, key, path) for key in ("encoder", "target_encoder", "predictor")}
    sizes, problems = {}, []
    for key, tensors in parts.items():
        sizes[key], found = _inspect(tensors, predictor=key == "predictor")
        problems += [f"{key}: {problem}" for problem in found]
    if all(sizes.values()):
        if sizes["encoder"] != sizes["target_encoder"]:
            problems.append("encoder and target_encoder differ in size")
        if sizes["predictor"].outer != sizes["encoder"].width:
            problems.append(
                f"predictor: predictor_embed takes features of width {sizes['predictor'].outer}, the encoder's are "
                f"{sizes['encoder'].width} wide"
            )
    _refuse(problems, str(path))
    context, target = (
        _check_encoder(parts[ROLE_KEYS[role]], f"{path}, {ROLE_KEYS[role]}", "reference", role, heads)
        for role in ("context", "target")
    )
    predictor = {
        name: tensor.detach().float() for name, tensor in parts["predictor"].items() if name != "predictor_pos_embed"
    }
    grids = {context.grid, target.grid, _grid(parts["predictor"]["predictor_pos_embed"], f"{path}, predictor")}
    if len(grids) > 1:
        raise UserError(f"{path} has positions of several grids ({grids}) in its parts; get a file of one training")
    epoch = content.get("epoch")
    return ReferenceCheckpoint(
        target, context, predictor, sizes["predictor"], epoch if isinstance(epoch, int) else None
    )


def _check_encoder(
    weights: dict[str, Any], source: str, file_format: str, role: Role, heads: int | None
) -> ForeignEncoder:
    sizes, problems = _inspect(weights)
    _refuse(problems, source)
    grid = _grid(weights["pos_embed"], source)
    dimensions = Dimensions(
        sizes.width, sizes.depth, heads_of_width(sizes.width, heads, source), mlp_ratio(sizes.width, sizes.hidden)
    )
    own = {name: tensor.detach().float().contiguous() for name, tensor in weights.items() if name != "pos_embed"}
    return ForeignEncoder(source, file_format, role, own, dimensions, sizes.outer, grid)


def _grid(table: Tensor, source: str) -> tuple[int, int]:
    grid = grid_of_positions(table)
    if grid is None:
        raise UserError(
            f"{source} has other positions than the fixed sine-cosine ones of I-JEPA on any grid of {table.shape[1]} "
            "patches (a learned table?), so it cannot be used here; give an I-JEPA encoder"
        )
    return grid


def _read_transformers(folder: Path) -> tuple[dict[str, Tensor], Role, dict[str, Any]]:
    """Weights under timm's names, which encoder they are, and config.json."""
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}; give a folder that transformers has saved an IJepaModel to")
    try:
        config = json.loads((folder / "config.json").read_text())
        if not isinstance(config, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'} cannot be read ({error}); get it again") from None
    # Where the file lacks a key, transformers takes its default.
    config = {"num_attention_heads": 12, "hidden_act": "gelu", "qkv_bias": True, **config}
    if (config.get("model_type"), config["hidden_act"], config["qkv_bias"]) != ("ijepa", "gelu", True):
        raise UserError(f"{folder / 'config.json'} is not of an I-JEPA encoder (model_type ijepa, gelu, qkv_bias true)")
    if not isinstance(config["num_attention_heads"], int):
        raise UserError(f"{folder / 'config.json'}: num_attention_heads must be a whole number; get the folder again")
    weights, metadata = read_safetensors(folder / "model.safetensors")
    prefix = "ijepa." if any(name.startswith("ijepa.") for name in weights) else ""  # of models with a head
    weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    return from_transformers(weights), _role(metadata.get("encoder") or config.get("ijepa_encoder")), config


def _check_against_config(found: ForeignEncoder, config: dict[str, Any], folder: Path) -> None:
    sizes = found.dimensions
    tensors = {
        "hidden_size": sizes.width,
        "num_hidden_layers": sizes.depth,
        "intermediate_size": int(sizes.width * sizes.mlp_ratio),
        "patch_size": found.patch_size,
    }
    wrong = [f"{key} = {config[key]}, {value} in the tensors" for key, value in tensors.items() if key in config
             and config[key] not in (value, [value, value])]  # fmt: skip
    if wrong:
        raise UserError(f"{folder / 'config.json'} does not fit its weights: {'; '.join(wrong)}; get the folder again")


def _role(text: Any) -> Role:
    """From metadata such as "target (the moving average, ...)"."""
    first = str(text).split(" ")[0]
    return first if first in ("target", "context") else "unknown"


def _part(content: dict[str, Any], key: str, path: Path) -> dict[str, Any]:
    if not isinstance(content.get(key), dict):
        raise UserError(f"{path} has no state dict under '{key}'; it holds {', '.join(map(str, content))[:200]}")
    return from_reference(content[key])


def _inspect(weights: dict[str, Any], *, predictor: bool = False) -> tuple[TensorSizes | None, list[str]]:
    """Sizes, and all problems, of an encoder's or a predictor's state dict; no sizes only with a problem."""
    problems = tensor_problems(weights)
    tensors = {name: value for name, value in weights.items() if isinstance(value, Tensor)}
    sizes = (predictor_sizes if predictor else encoder_sizes)(tensors)
    if sizes is None:
        return None, [*problems, "its tensors are too few, or not of the shapes, to tell a size"]
    found = (predictor_problems if predictor else encoder_problems)(tensors, sizes)
    return sizes, problems + [one for one in found if one.removesuffix(" is missing") not in weights]


def _refuse(problems: list[str], source: str) -> None:
    if problems:
        lines = "".join(f"\n  - {problem}" for problem in problems)
        raise UserError(
            f"{source} does not hold what I-JEPA's weights must be, {len(problems)} problems; get the file again, or "
            f"from a tool that keeps all tensors:{lines}"
        )
