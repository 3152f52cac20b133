"""Tensor names of other projects against ours, which are timm's and the released code's.

The released code writes ``module.`` before each name. transformers' ``IJepaModel`` has other names and keeps query, key
and value apart. The names here are those of its files; the library maps them to those of its version.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

REFERENCE_PREFIX = "module."
_TRANSFORMERS = {
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
_TRANSFORMERS_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_QKV = ("query", "key", "value")


def to_transformers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """An encoder's state dict under the names of transformers' files; ``attn.qkv`` [3 D, ...] in thirds."""
    renamed = {}
    for name, tensor in weights.items():
        stem, kind = _split(name)
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", stem)
        if block is None:
            renamed[_TRANSFORMERS[stem] + kind] = tensor
        elif block[2] == "attn.qkv":
            for part, third in zip(_QKV, tensor.chunk(3), strict=True):
                theirs = f"encoder.layer.{block[1]}.attention.attention.{part}{kind}"
                renamed[theirs] = third.clone()  # no shared storage
        else:
            renamed[f"encoder.layer.{block[1]}.{_TRANSFORMERS_BLOCK[block[2]]}{kind}"] = tensor
    return renamed


def from_transformers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """An encoder's state dict under timm's names, from transformers'; the thirds become ``attn.qkv``.

    What has no counterpart, or no three thirds of one shape, keeps its name: a check will name it.
    """
    outer = {theirs: ours for ours, theirs in _TRANSFORMERS.items()}
    inner = {theirs: ours for ours, theirs in _TRANSFORMERS_BLOCK.items()}
    renamed: dict[str, Tensor] = {}
    thirds: dict[str, dict[str, tuple[str, Tensor]]] = {}
    for name, tensor in weights.items():
        stem, kind = _split(name)
        block = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", stem)
        part = re.fullmatch(r"attention\.attention\.(query|key|value)", block[2]) if block else None
        if block is not None and part is not None:
            thirds.setdefault(f"blocks.{block[1]}.attn.qkv{kind}", {})[part[1]] = (name, tensor)
        elif block is not None and block[2] in inner:
            renamed[f"blocks.{block[1]}.{inner[block[2]]}{kind}"] = tensor
        else:
            renamed[outer[stem] + kind if stem in outer else name] = tensor
    for name, parts in thirds.items():
        if parts.keys() == set(_QKV) and len({tensor.shape for _, tensor in parts.values()}) == 1:
            renamed[name] = torch.cat([parts[part][1] for part in _QKV])
        else:
            renamed |= dict(parts.values())
    return renamed


def to_reference(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict under the released code's names."""
    return {f"{REFERENCE_PREFIX}{name}": tensor for name, tensor in weights.items()}


def from_reference(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict under our names; names without the prefix, as some tools leave them, stay."""
    return {str(name).removeprefix(REFERENCE_PREFIX): tensor for name, tensor in weights.items()}


def _split(name: str) -> tuple[str, str]:
    """``norm.weight`` -> (``norm``, ``.weight``); ``pos_embed`` -> (``pos_embed``, ``""``)."""
    stem, dot, kind = name.rpartition(".")
    return (stem, dot + kind) if kind in ("weight", "bias") else (name, "")
