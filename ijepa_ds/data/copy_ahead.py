"""Batches copied to the device while the one before is used."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Protocol, TypeVar

import torch


class Streamed(Protocol):
    """A tensor, or what behaves like one here."""

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory until ``stream`` has used it."""


Copy = TypeVar("Copy", bound=Streamed, covariant=True)


class Loaded(Protocol[Copy]):
    """What lies in the loader's buffers."""

    def to(self, device: torch.device, *, non_blocking: bool) -> Copy:
        """What a consumer gets, on ``device``."""


def on_device(batches: Iterator[Loaded[Copy]], device: torch.device) -> Generator[Copy, None, None]:
    """The batches on ``device``; on a GPU each is copied by a stream of its own while the one before is used."""
    if device.type != "cuda":
        for batch in batches:
            yield batch.to(device, non_blocking=False)
        return
    copies, ahead = torch.cuda.Stream(device), None
    for batch in batches:
        with torch.cuda.stream(copies):
            copied = batch.to(device, non_blocking=True)
        done = copies.record_event()
        if ahead is not None:
            yield ahead
        # FFCV's threads write over a batch's buffers once the next batch was taken from its queue: it has two more sets
        # of buffers than places in the queue. Its own guard, an event, holds up GPU work and no processor. So what
        # protects the copy is that the host has waited for it here, before it asks for the next batch.
        done.synchronize()
        copied.record_stream(torch.cuda.current_stream(device))
        ahead = copied
    if ahead is not None:
        yield ahead
