"""Files that nobody vouches for: read as tensors and plain values, never executed; what is damaged is refused."""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ijepa_ds.errors import UserError

_PLAIN = (dict, list, tuple, set, str, bytes, int, float, complex, type(None), Tensor, torch.dtype, torch.device)


def read_pickle(path: Path) -> dict[str, Any]:
    """The dictionary that ``torch.save`` wrote, with numpy's scalars as Python's numbers.

    Tensors are on the CPU, mapped from the file; beside them it may hold numbers, strings, lists, tuples, sets and
    dictionaries.

    Raises:
        UserError: a truncated or damaged file, or one that carries anything else. Nothing in it has been called.
    """
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if foreign is None:
            raise _damaged(path, error) from None
        raise _carries(path, foreign[1]) from None
    except MemoryError:
        raise
    except Exception as error:  # whatever the parser meets in a damaged file; it knows no type of its own for it
        raise _damaged(path, error) from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors; save a state dict")
    waiting, seen = [content], set()
    while waiting:
        value = waiting.pop()
        if not isinstance(value, _PLAIN):
            raise _carries(path, f"a {type(value).__name__}")
        if isinstance(value, dict | list | tuple | set) and id(value) not in seen:
            seen.add(id(value))
            waiting += [*value, *value.values()] if isinstance(value, dict) else value
    return content


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a ``.safetensors`` file and its metadata; :class:`UserError` where it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from None


def tensor_problems(tensors: dict[Any, Any]) -> list[str]:
    """What keeps the values of a state dict from being weights: no plain tensor of floats, or NaN or infinity in it."""
    problems = []
    for name, value in tensors.items():
        if type(value) not in (Tensor, torch.nn.Parameter):
            problems.append(f"{name} is a {type(value).__name__}, not a tensor")
        elif value.layout != torch.strided or value.device.type != "cpu" or not value.dtype.is_floating_point:
            problems.append(f"{name} is no plain tensor of floats ({value.dtype}, {value.layout}, {value.device.type})")
        elif not torch.isfinite(value).all():
            problems.append(f"{name} holds NaN or infinity")
    return problems


def _carries(path: Path, what: str) -> UserError:
    return UserError(
        f"{path} carries {what}, which is neither a tensor nor a plain container, and nothing of it was executed; get "
        "the file from a source you trust, or save its state dicts alone"
    )


def _damaged(path: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split()).split(". ")[0] or type(error).__name__
    return UserError(f"{path} cannot be read: it is truncated, damaged or no file of weights ({reason}); get it again")


class _Dtype:
    """What stands for ``numpy.dtype`` in a pickle: the type's code and byte order, and no behaviour."""

    def __init__(self, code: str, *_: object):
        if not re.fullmatch("[biuf][1248]", code):
            raise ValueError(f"{code} is no type of plain numbers")
        self.code, self.order = code, "<"

    def __setstate__(self, state: tuple) -> None:
        self.order = {"<": "<", ">": ">", "|": "|"}[state[1]]


def _number(dtype: _Dtype, data: bytes) -> float | int | bool:
    """What stands for numpy's scalar constructor: the bytes of one number, as Python's."""
    return np.frombuffer(data, np.dtype(dtype.order + dtype.code), count=1)[0].item()


# The released training code keeps learning rates and losses that may be numpy's scalars. numpy's own constructors are
# not let in: these stand in for them, under their names of numpy 1 and 2.
_STAND_INS: list[Any] = [
    (_Dtype, "numpy.dtype"),
    (_number, "numpy.core.multiarray.scalar"),
    (_number, "numpy._core.multiarray.scalar"),
]
