"""Encoders from files of other projects: the released code's checkpoints, timm's state dicts, transformers' folders.

A file is read without executing anything in it, its tensors are checked one by one, and its sizes are read off them.
Which encoder a file holds matters: I-JEPA is evaluated by its TARGET encoder, and files that other tools have made of
released checkpoints often hold the context encoder without saying so.

Shapes: N patches, D encoder width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict
from torch import Tensor

from ijepa_ds.errors import UserError, listing, some
from ijepa_ds.exchange.safe_load import read_pickle, read_safetensors, tensor_problems
from ijepa_ds.exchange.sizes import (
    TensorSizes,
    attention_heads,
    expected_shapes,
    grid_of_positions,
    shape_differences,
    shapes_of,
    tensor_sizes,
)
from ijepa_ds.exchange.tensor_names import from_reference, from_transformers
from ijepa_ds.method.encoder import Dimensions
from ijepa_ds.method.positions import sine_cosine_positions
from ijepa_ds.validation import Checked, Count, read_json

Format = Literal["reference", "timm", "transformers"]
Role = Literal["target", "context", "unknown"]
ROLE_KEYS: dict[Role, str] = {"target": "target_encoder", "context": "encoder"}  # of the released code's checkpoints


@dataclass(frozen=True)
class ForeignEncoder:
    """An encoder under timm's names, fp32, complete and finite.

    ``weights`` lack the positions, which are fixed: see :meth:`state_dict`. ``grid``: rows and columns of patches that
    it was stored with.
    """

    source: str
    format: Format
    role: Role
    weights: dict[str, Tensor]
    dimensions: Dimensions
    patch_size: int
    grid: tuple[int, int]

    def state_dict(self, grid: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """What ``VisionTransformer.load_state_dict`` takes, positions computed for ``grid`` (default: its own)."""
        positions = sine_cosine_positions(self.dimensions.width, grid or self.grid)[None]
        return {"pos_embed": positions, **self.weights}

    def describe(self) -> str:
        """Which encoder of which size, in a line."""
        size, grid = self.dimensions, self.grid
        unknown = "an encoder that does not say whether it is the target or the context encoder"
        return (
            f"{self.source}: {unknown if self.role == 'unknown' else f'the {self.role.upper()} encoder'} "
            f"({self.format} format), width {size.width}, depth {size.depth}, {size.heads} heads, patches of "
            f"{self.patch_size} px on a grid of {grid[0]} x {grid[1]}"
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
        """The checkpoint with another number of attention heads, which no tensor shows."""
        dimensions = replace(self.target.dimensions, heads=heads)  # both encoders have them
        target, context = (replace(encoder, dimensions=dimensions) for encoder in (self.target, self.context))
        return replace(self, target=target, context=context)


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
        foreign = _read_transformers(path, heads)
    elif path.suffix == ".safetensors":
        weights, metadata = read_safetensors(path)
        foreign = _check_encoder(weights, str(path), "timm", _role(metadata.get("encoder")), heads)
    else:
        content = read_pickle(path)
        if "encoder" in content or "target_encoder" in content:
            role = encoder or "target"
            weights = _part(content, ROLE_KEYS[role], path)
            return _check_encoder(weights, f"{path}, {ROLE_KEYS[role]}", "reference", role, heads)
        foreign = _check_encoder(from_reference(content), str(path), "timm", "unknown", heads)
    if encoder is not None and foreign.role not in (encoder, "unknown"):
        raise UserError(f"{path} holds the {foreign.role} encoder, not the {encoder} encoder; ask for what it holds")
    return foreign


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
    parts = {key: from_reference(content[key]) for key in ("encoder", "target_encoder", "predictor")}
    inspected = {key: _inspect(tensors, predictor=key == "predictor") for key, tensors in parts.items()}
    problems = [f"{key}: {problem}" for key, (_, its_problems) in inspected.items() for problem in its_problems]
    encoder, target_encoder, predictor = (sizes for sizes, _ in inspected.values())
    if encoder and target_encoder and predictor:
        if encoder != target_encoder:
            problems.append("encoder and target_encoder differ in size")
        if predictor.outer != encoder.width:
            problems.append(
                f"predictor: predictor_embed takes features of width {predictor.outer}, the encoder's are "
                f"{encoder.width} wide"
            )
    if problems or not predictor:
        raise _refusal(problems, str(path))
    context, target = (
        _check_encoder(parts[ROLE_KEYS[role]], f"{path}, {ROLE_KEYS[role]}", "reference", role, heads)
        for role in ("context", "target")
    )
    positions = parts["predictor"]["predictor_pos_embed"]
    grids = {context.grid, target.grid, grid_of_positions(positions, f"{path}, predictor")}
    if len(grids) > 1:
        raise UserError(f"{path} has positions of several grids ({grids}) in its parts; get a file of one training")
    epoch = content["epoch"] if isinstance(content.get("epoch"), int) else None
    return ReferenceCheckpoint(target, context, _floats(parts["predictor"], "predictor_pos_embed"), predictor, epoch)


def _check_encoder(
    weights: dict[str, Any], source: str, file_format: Format, role: Role, heads: int | None
) -> ForeignEncoder:
    sizes, problems = _inspect(weights)
    if sizes is None or problems:
        raise _refusal(problems, source)
    grid = grid_of_positions(weights["pos_embed"], source)
    heads = attention_heads(sizes.width, heads, source)
    dimensions = Dimensions(sizes.width, sizes.depth, heads, sizes.hidden)
    return ForeignEncoder(source, file_format, role, _floats(weights, "pos_embed"), dimensions, sizes.outer, grid)


def _floats(weights: dict[str, Tensor], positions: str) -> dict[str, Tensor]:
    """The weights in fp32 without their positions."""
    return {name: tensor.detach().float().contiguous() for name, tensor in weights.items() if name != positions}


class _TransformersConfig(Checked):
    """A transformers folder's config.json, as far as it matters here; what it lacks has the library's values."""

    model_config = ConfigDict(extra="allow")

    model_type: Literal["ijepa"]
    hidden_act: Literal["gelu"] = "gelu"
    qkv_bias: Literal[True] = True
    num_attention_heads: Count = 12


def _read_transformers(folder: Path, heads: int | None) -> ForeignEncoder:
    file = folder / "config.json"
    for path in (file, folder / "model.safetensors"):
        if not path.is_file():
            raise UserError(f"{folder} has no {path.name}; give a folder that transformers has saved an IJepaModel to")
    config = read_json(_TransformersConfig, file, "is not of an I-JEPA encoder")
    if heads not in (None, config.num_attention_heads):
        raise UserError(f"--heads {heads} is not the {config.num_attention_heads} of {folder}; leave it out")
    weights, metadata = read_safetensors(folder / "model.safetensors")
    prefix = "ijepa." if any(name.startswith("ijepa.") for name in weights) else ""  # of models with a head
    weights = from_transformers({name.removeprefix(prefix): tensor for name, tensor in weights.items()})
    given = config.model_dump()
    role = _role(metadata.get("encoder") or given.get("ijepa_encoder"))
    foreign = _check_encoder(weights, str(folder), "transformers", role, config.num_attention_heads)
    tensors = {
        "hidden_size": foreign.dimensions.width,
        "num_hidden_layers": foreign.dimensions.depth,
        "intermediate_size": foreign.dimensions.hidden,
        "patch_size": foreign.patch_size,
    }
    wrong = [
        f"{key} = {given[key]}, {value} in the tensors"
        for key, value in tensors.items()
        if given.get(key, value) not in (value, [value, value])
    ]
    if wrong:
        raise UserError(f"{file} does not fit its weights: {'; '.join(wrong)}; get the folder again")
    return foreign


def _role(text: object) -> Role:
    """The role that metadata such as "target (the moving average, ...)" tells."""
    return next((role for role in ROLE_KEYS if str(text).split(" ")[0] == role), "unknown")


def _part(content: dict[str, Any], key: str, path: Path) -> dict[str, Any]:
    if not isinstance(content.get(key), dict):
        raise UserError(f"{path} has no state dict under '{key}'; it holds {some(content)}")
    return from_reference(content[key])


def _inspect(weights: dict[str, Any], *, predictor: bool = False) -> tuple[TensorSizes | None, list[str]]:
    """Sizes, and all problems, of an encoder's or a predictor's state dict; no sizes only with a problem."""
    problems = tensor_problems(weights)
    tensors = {name: value for name, value in weights.items() if isinstance(value, Tensor)}
    sizes = tensor_sizes(tensors, predictor=predictor)
    if sizes is None:
        return None, [*problems, "its tensors are too few, or not of the shapes, to tell a size"]
    named = weights.keys() - tensors.keys()  # among the problems already
    shapes = expected_shapes(sizes, predictor=predictor)
    expected = {name: shape for name, shape in shapes.items() if name not in named}
    return sizes, problems + shape_differences(shapes_of(tensors), expected)


def _refusal(problems: list[str], source: str) -> UserError:
    return UserError(
        f"{source} does not hold what I-JEPA's weights must be, {len(problems)} problems; get the file again, or from "
        f"a tool that keeps all tensors:{listing(problems)}"
    )
