"""Batches copied to the device while the one before is used."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any, Protocol, TypeVar

import torch


class Copied(Protocol):
    """A tensor, or what behaves like one here."""

    def to(self, device: torch.device, *, non_blocking: bool) -> Any:
        """A copy on ``device``."""

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory until ``stream`` has used it."""


Item = TypeVar("Item", bound=Copied)


def on_device(batches: Iterator[Item], device: torch.device) -> Generator[Item, None, None]:
    """The batches on ``device``; on a GPU each is copied by a stream of its own while the one before is used."""
    if device.type != "cuda":
        yield from batches
        return
    copies, ahead = torch.cuda.Stream(device), None
    for batch in batches:
        with torch.cuda.stream(copies):
            copied = batch.to(device, non_blocking=True)
        done = copies.record_event()
        if ahead is not None:
            yield ahead
        done.synchronize()  # before the loader may write over the buffers that were copied
        copied.record_stream(torch.cuda.current_stream(device))
        ahead = copied
    if ahead is not None:
        yield ahead
