"""Where a piece of code makes the host wait for the device: reads of single values, synchronisations, pageable copies.

It counts without a GPU too, by what is called: a value that is read on a CPU would be waited for on a GPU. Reads within
torch's compiled code do not show there; on a GPU torch itself refuses them while :class:`HostReads` is on.
"""

from __future__ import annotations

import contextlib
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ijepa_ds.files import PROJECT

_READING_METHODS = ("cpu", "numpy", "tolist")


class HostReads(TorchDispatchMode):
    """A context that lists in ``found`` what made the host wait, as ``kind at file:line``; this thread's alone.

    ``accelerator``: whose ``synchronize`` is watched besides torch.cuda's, such as DeepSpeed's.
    """

    def __init__(self, accelerator: Any = None) -> None:
        super().__init__()
        self.found: list[str] = []
        self._accelerator, self._thread = accelerator, threading.get_ident()
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> HostReads:
        with contextlib.ExitStack() as undo:
            for name in _READING_METHODS:
                undo.enter_context(self._watched(Tensor, name, f"Tensor.{name}()"))
            undo.enter_context(self._watched(Tensor, "masked_fill_", "masked_fill_ with a tensor", _has_tensor_value))
            undo.enter_context(self._watched(torch, "tensor", "torch.tensor(device=)", _has_device))
            undo.enter_context(self._watched(torch, "as_tensor", "torch.as_tensor(device=)", _has_device))
            undo.enter_context(self._watched(torch.cuda, "synchronize", "torch.cuda.synchronize()"))
            undo.enter_context(self._watched(torch.cuda.Stream, "synchronize", "Stream.synchronize()"))
            if self._accelerator is not None:
                undo.enter_context(self._watched(self._accelerator, "synchronize", "synchronize()"))
            if torch.cuda.is_available():
                undo.enter_context(_sync_refused())
            self._undo = undo.pop_all()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._undo.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            self._note("a value is read")
        elif func is torch.ops.aten._to_copy.default or func is torch.ops.aten.copy_.default:
            self._look_at_copy(func, args, kwargs)
        return func(*args, **kwargs)

    def _look_at_copy(self, func: Any, args: tuple, kwargs: dict) -> None:
        """Note a copy between devices that is not asynchronous."""
        copied_in_place = func is torch.ops.aten.copy_.default
        source = args[1] if copied_in_place else args[0]
        device = args[0].device if copied_in_place else kwargs.get("device") or source.device
        blocking = not (kwargs.get("non_blocking") or (copied_in_place and len(args) > 2 and args[2]))
        if torch.device(device).type == source.device.type:
            return
        if source.device.type == "cpu" and not source.is_pinned():
            self._note("a copy from pageable memory")
        elif blocking:
            self._note("a copy that is waited for")

    @contextlib.contextmanager
    def _watched(
        self, owner: Any, name: str, kind: str, waits: Callable[..., bool] = lambda *_, **__: True
    ) -> Iterator[None]:
        """Note the calls of ``owner.name`` that wait."""
        own = vars(owner).get(name)
        original = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            if waits(*args, **kwargs):
                self._note(kind)
            return original(*args, **kwargs)

        setattr(owner, name, watched)
        try:
            yield
        finally:
            if own is None:
                delattr(owner, name)  # an inherited method, which the wrapper hid
            else:
                setattr(owner, name, own)

    def _note(self, kind: str) -> None:
        if threading.get_ident() == self._thread:
            self.found.append(f"{kind} at {_caller()}")


def _has_tensor_value(tensor: Tensor, mask: Tensor, value: object) -> bool:
    """``masked_fill_`` reads a value that is a tensor."""
    return isinstance(value, Tensor)


def _has_device(*_: object, device: object = None, **__: object) -> bool:
    """Values of the host go to the device from pageable memory."""
    return device is not None


@contextlib.contextmanager
def _sync_refused() -> Iterator[None]:
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def _caller() -> str:
    """The innermost line of this project or of DeepSpeed."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        ours = path.is_relative_to(PROJECT) and "site-packages" not in path.parts
        if path != Path(__file__) and (ours or "deepspeed" in path.parts):
            return f"{path.name}:{frame.lineno}"
    return "?"
