"""Copies to a GPU against the loader's ring of buffers: no buffer is written over before its copy is done.

Without a GPU: FFCV's real loading thread and buffers, and a stand-in for CUDA whose copies run as late as CUDA may let
them run: when the host waits for them, and after the loading thread has gone on as far as the queue lets it.
"""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from ffcv.loader.epoch_iterator import EpochIterator

from ijepa_ds.data import copy_ahead
from ijepa_ds.data.beton import inspect_dataset
from ijepa_ds.data.image_loader import ImageLoader

SAMPLES = np.tile(np.arange(28), 3)  # in batches of 4: a buffer never gets what it held before
AHEAD = 4  # batches that the thread loads beyond those taken: three in the queue, one that waits for a place in it


class LateCuda:
    """One stream of copies, as a list of what is still to be done."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []

    def Stream(self, device):
        return self

    def stream(self, stream):
        return contextlib.nullcontext()

    def current_stream(self, device):
        return "main"

    def record_event(self):
        return Event(self, list(self.waiting))


class Event:
    def __init__(self, cuda: LateCuda, before: list[Callable[[], None]]) -> None:
        self.cuda, self.before = cuda, before

    def synchronize(self) -> None:
        for copy in self.before:
            if copy in self.cuda.waiting:
                self.cuda.waiting.remove(copy)
                copy()


class Copied:
    """What has arrived on the device; nothing before the copy has run."""

    content: torch.Tensor | None = None
    streams: tuple = ()

    def record_stream(self, stream) -> None:
        self.streams += (stream,)


class Late:
    """A batch in FFCV's buffers, copied when the stream gets to it."""

    def __init__(self, images: torch.Tensor, cuda: LateCuda, wait_for_loading: Callable[[], None]) -> None:
        self.images, self.cuda, self.wait_for_loading = images, cuda, wait_for_loading

    def to(self, device: torch.device, *, non_blocking: bool) -> Copied:
        assert non_blocking and device.type == "cuda"
        copied = Copied()

        def copy() -> None:
            self.wait_for_loading()
            copied.content = self.images.clone()

        self.cuda.waiting.append(copy)
        return copied


@pytest.fixture(scope="module")
def loader(beton: Path) -> ImageLoader:
    return ImageLoader(inspect_dataset(beton), image_size=(16, 24), batch_size=4)


@pytest.fixture(scope="module")
def expected(loader: ImageLoader) -> list[torch.Tensor]:
    return [images.clone() for images in loader.batches(SAMPLES)]


def on_device(cuda: LateCuda, *changes: tuple[str, str]) -> Callable:
    """The function under test on a stand-in for CUDA, with pieces of its source replaced."""
    source = inspect.getsource(copy_ahead.on_device)
    for old, new in changes:
        assert source.count(old) == 1
        source = source.replace(old, new)
    namespace = {**vars(copy_ahead), "torch": SimpleNamespace(cuda=cuda)}
    exec(source, namespace)
    return namespace["on_device"]


def wrong_batches(loader: ImageLoader, expected: list[torch.Tensor], *changes: tuple[str, str]) -> list[int]:
    """Positions of the batches that had not arrived, or not whole, or could be freed too early when they were given."""
    cuda, loaded, taken, load = LateCuda(), [], [], EpochIterator.run_pipeline

    def counted(self, *arguments):
        loaded.append(result := load(self, *arguments))
        return result

    def wait_for_loading() -> None:
        end, deadline = min(len(taken) + AHEAD, len(expected)), time.monotonic() + 50
        while len(loaded) < end:
            assert time.monotonic() < deadline, "the loading thread stands still"
            time.sleep(0.001)

    def read() -> Iterator[Late]:
        for images in loader.batches(SAMPLES):
            taken.append(images)
            yield Late(images, cuda, wait_for_loading)

    def is_right(copied: Copied, images: torch.Tensor) -> bool:
        return copied.streams == ("main",) and copied.content is not None and torch.equal(copied.content, images)

    with mock.patch.object(EpochIterator, "run_pipeline", counted):
        given = on_device(cuda, *changes)(read(), torch.device("cuda", 0))
        right = [is_right(copied, images) for copied, images in zip(given, expected, strict=True)]
    return [position for position, batch in enumerate(right) if not batch]


def test_no_buffer_is_written_over_before_its_copy_is_done(loader, expected):
    assert wrong_batches(loader, expected) == []


WAIT, RECORD, COPY = (
    "        done.synchronize()\n",
    "        done = copies.record_event()\n",
    "        with torch.cuda.stream",
)
MISTAKES = {
    "no wait": [(WAIT, "")],
    "the wait is for the copy before": [(RECORD, ""), (COPY, RECORD + COPY)],
    "the memory is not kept for the consumer's stream": [("        copied.record_stream", "        str")],
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_stand_in_finds_mistakes(loader, expected, mistake):
    assert len(wrong_batches(loader, expected, *MISTAKES[mistake])) == len(expected)


def test_a_batch_is_used_while_the_next_is_copied(loader, expected):
    """When a batch is given out, the copy of the next has been queued; all but the last's."""
    cuda = LateCuda()
    batches = (Late(images, cuda, lambda: None) for images in expected)
    queued = [len(cuda.waiting) for _ in on_device(cuda)(batches, torch.device("cuda", 0))]
    assert queued == [1] * (len(expected) - 1) + [0]
