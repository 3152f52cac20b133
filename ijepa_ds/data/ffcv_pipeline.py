"""FFCV's pipeline with our crops, flips and masks drawn inside its compiled code.

FFCV's indices are ``sample | time << 32``, where the time is a step or an epoch; FFCV hands these numbers through
untouched, and every operation masks the sample out and uses the whole number as the key of its random streams. So the
same pixels arrive for any world size, micro-batch, worker count, and after a resume, and one traversal may go on over
any number of epochs.
"""

from __future__ import annotations

import itertools
import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TypeVar
from unittest import mock

import numba
import numpy as np
import torch
from ffcv.libffcv import imdecode, resize_crop
from ffcv.loader import Loader as FFCVLoader
from ffcv.loader import loader as loader_of_ffcv
from ffcv.loader.epoch_iterator import EpochIterator
from ffcv.memory_managers.os_cache import OSCacheContext, OSCacheManager
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.compiler import Compiler
from ffcv.pipeline.operation import Operation
from ffcv.pipeline.pipeline_spec import PipelineSpec
from ffcv.pipeline.state import State

from ijepa_ds.activity import doing
from ijepa_ds.data.beton import Dataset, Tables
from ijepa_ds.data.crops import is_flipped, mirror
from ijepa_ds.data.mapped_files import map_files
from ijepa_ds.errors import UserError, hide_finalizers_of_numba, some
from ijepa_ds.method import mask_draws
from ijepa_ds.method.masks import MaskSampler
from ijepa_ds.random_streams import CROP, NOISE, stream

TIME_SHIFT = np.uint64(32)
_SAMPLE = np.uint64(0xFFFFFFFF)
_STALL_SECONDS = 1.0  # how often a waiting consumer looks whether the loading thread is still alive
_BATCHES_AHEAD = 3


class DecodeError(UserError):
    """An image of a .beton that cannot be decoded; the message names the sample."""


class LoaderError(RuntimeError):
    """The loading thread died; its own error is the cause."""


class DecodeCrop(Operation):
    """Decode, crop, resize. Gives the images and, beside them, each decoder's return code, which stock FFCV ignores."""

    def __init__(
        self,
        image_size: tuple[int, int],
        crop: Callable,  # one of ijepa_ds.data.crops
        *,
        seed: int,
        scale: tuple[float, float],
        ratio: tuple[float, float],
        flip: bool = False,
    ) -> None:
        super().__init__()
        self.flip = flip  # mirror every other image, by chance
        self.image_size, self.crop, self.seed = image_size, crop, np.uint64(seed)
        self.scale, self.ratio = (float(scale[0]), float(scale[1])), (float(ratio[0]), float(ratio[1]))

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, tuple[AllocationQuery, ...]]:
        """Three buffers for each image of a batch: its pixels, scratch for the whole image, the return code."""
        pixels = int(self.metadata["height"].max()) * int(self.metadata["width"].max()) * 3
        shape, byte = (*self.image_size, 3), np.dtype("u1")
        allocation = (AllocationQuery(shape, byte), AllocationQuery((pixels,), byte), AllocationQuery((1,), byte))
        return replace(previous_state, jit_mode=True, shape=shape, dtype=byte), allocation

    def generate_code(self) -> Callable:
        """The function that FFCV compiles."""
        read, iterator = self.memory_read, Compiler.get_iterator()
        decode_jpeg, resize = Compiler.compile(imdecode), Compiler.compile(resize_crop)
        crop, seed, scale, ratio, flip = self.crop, self.seed, self.scale, self.ratio, self.flip

        def decode(batch_indices, memory, metadata, storage_state):
            images, scratch, failed = memory
            for position in iterator(len(batch_indices)):
                key = batch_indices[position]
                sample = key & _SAMPLE
                field = metadata[sample]
                data = read(field["data_ptr"], storage_state)
                height, width = np.int64(field["height"]), np.int64(field["width"])
                size = height * width * 3
                failed[position, 0] = 0
                pixels = scratch[position][:size]
                if field["mode"] == 0:  # a JPEG
                    code = decode_jpeg(data, pixels, height, width, height, width, 0, 0, 1, 1, False, False)
                    if code != 0:
                        failed[position, 0] = 1
                elif len(data) == size:
                    pixels = data
                else:
                    failed[position, 0] = 1
                if failed[position, 0] == 0:
                    draw = stream(seed, CROP, key >> TIME_SHIFT, sample)
                    top, left, rows, columns = crop(height, width, draw, scale, ratio)
                    source = pixels.reshape((height, width, 3))
                    resize(source, top, top + rows, left, left + columns, images[position])
                    if flip and is_flipped(seed, key >> TIME_SHIFT, sample):
                        mirror(images[position])
            return images[: len(batch_indices)], failed[: len(batch_indices)]

        decode.is_parallel = True  # type: ignore[attr-defined]  # FFCV looks for it
        return decode


@dataclass(frozen=True)
class Draws:
    """What is drawn for an image of a step beside its crop and one context with target blocks."""

    contexts: int = 1  # with target blocks of their own
    keys: bool = False  # one for each context, from which the device draws more


PLAIN = Draws()


class SampleMasks(Operation):
    """Masks drawn on the loader, a row an image.

    It holds for each context its number of tokens, its tokens, M target blocks and, where asked for, a key of 64 bits.
    """

    def __init__(self, sampler: MaskSampler, draws: Draws = PLAIN) -> None:
        super().__init__()
        self.sampler, self.draws = sampler, draws
        self.target_room = sampler.block_room()

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        """A row for each image of a batch."""
        row = 1 + self.sampler.context_room + self.sampler.num_targets * self.target_room
        row = self.draws.contexts * (row + 2 * self.draws.keys)
        return replace(previous_state, jit_mode=True, shape=(row,), dtype=np.dtype("i4")), AllocationQuery(
            (row,), np.dtype("i4")
        )

    def generate_code(self) -> Callable:
        """The function that FFCV compiles."""
        iterator, sampler = Compiler.get_iterator(), self.sampler
        seed, room, num_targets, limit = (
            np.uint64(sampler.seed),
            sampler.context_room,
            sampler.num_targets,
            sampler.least_tokens,
        )
        sizes_of, draw_image = sampler.sizes_of, sampler.draw_image
        grid, target_scale, aspect_ratio, context_scale = sampler.geometry
        contexts, keys, share = self.draws.contexts, self.draws.keys, sampler.predict_share

        def sample_masks(batch_indices, rows, metadata, storage_state):
            step = batch_indices[0] >> TIME_SHIFT  # a batch has one
            one, two, three = mask_draws.size_numbers(seed, step)
            sizes = sizes_of(one, two, three, grid, target_scale, aspect_ratio, context_scale)
            tokens = sizes[0] * sizes[1]
            predicted = max(1, round(tokens * share))
            for position in iterator(len(batch_indices)):
                sample = batch_indices[position] & _SAMPLE
                for context in range(contexts):
                    row = rows[position].reshape((contexts, -1))[context]
                    own = mask_draws.seed_of_context(seed, context)
                    targets = row[1 + room : 1 + room + num_targets * tokens].reshape((num_targets, tokens))
                    row[0] = draw_image(
                        own, step, sample, grid, sizes[:2], sizes[2:], limit, row[1 : 1 + room], targets
                    )
                    if predicted < tokens:
                        mask_draws.thin(own, step, sample, targets, predicted)
                    if keys:
                        row[-2:].view(np.uint64)[0] = stream(own, NOISE, step, sample)
            return rows[: len(batch_indices)]

        sample_masks.is_parallel = True  # type: ignore[attr-defined]
        return sample_masks


class ToTensors(Operation):
    """numpy to torch, for one array or the images of (images, return codes); no copy."""

    def generate_code(self) -> Callable:
        """The function that FFCV calls."""

        def to_tensors(arrays, _):
            if isinstance(arrays, tuple):
                return torch.from_numpy(arrays[0]), arrays[1]  # the host alone reads the codes
            return torch.from_numpy(arrays)

        return to_tensors

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, None]:
        """No memory; not compiled."""
        return replace(previous_state, jit_mode=False), None


@dataclass(frozen=True)
class Request:
    """A batch that is asked of the loading thread."""

    samples: np.ndarray  # int64 [B]
    time: int  # a step or an epoch

    @property
    def keys(self) -> np.ndarray:
        """What FFCV is handed for each sample: ``sample | time << 32``, uint64 [B]."""
        return np.asarray(self.samples, np.uint64) | (np.uint64(self.time) << TIME_SHIFT)


AnyRequest = TypeVar("AnyRequest", bound=Request)


class _Traversal(EpochIterator):
    """FFCV's loading thread, which takes its batches from an iterator and is watched.

    FFCV would hold a list of all batches, which is gigabytes for a long run. And its consumer would wait for ever where
    the thread has died.
    """

    error: BaseException | None = None
    loading: Request | None = None  # what the thread is at

    def __init__(self, loader: FFCVLoader, requests: Iterator[Request], dataset: Dataset) -> None:
        self.requests, self.dataset = requests, dataset
        super().__init__(loader, order=())  # starts the thread

    def run(self) -> None:
        """Load, and keep what ended it."""
        try:
            if torch.cuda.is_available():  # a thread begins on device 0, and would make a context there on every rank
                torch.cuda.set_device(self.current_stream.device)
            self.iter_ixes = itertools.takewhile(lambda _: not self.terminate_event.is_set(), self.requests)
            super().run()
        except BaseException as error:  # whatever ended the thread is raised again in the consumer
            self.error = error

    def run_pipeline(self, position: int, request: Request, *slot_and_event) -> tuple[Request, tuple]:
        """A batch, with the request that it answers."""
        self.loading = request
        return request, super().run_pipeline(position, request.keys, *slot_and_event)

    def __next__(self) -> tuple[Request, tuple]:
        with doing("waiting for a batch", own=True, detail=self.describe_files):
            result = self._wait_for_result()
        if result is None:
            self.close()
            raise StopIteration
        slot, answer = result
        if torch.cuda.is_available():
            self.current_stream.wait_stream(self.cuda_streams[slot])
        return answer

    def _wait_for_result(self) -> tuple | None:
        while True:
            try:
                return self.output_queue.get(timeout=_STALL_SECONDS)
            except queue.Empty:
                if not self.is_alive() and self.output_queue.empty():
                    raise LoaderError(f"the loading thread died: {self.error!r}") from self.error

    def describe_files(self) -> str:
        """From which files the batch under way comes."""
        request = self.loading
        if request is None:
            return ""
        return f"from {some(sorted({self.dataset.locate(int(sample))[0] for sample in request.samples}), shown=3)}"

    def close(self) -> None:
        """Let the thread end, which may be waiting for room in the queue."""
        super().close()
        with suppress(queue.Empty):
            while True:
                self.output_queue.get_nowait()


class _SetContext(OSCacheContext):
    """All files of the set, mapped when they are first needed."""

    mmap: np.ndarray | None

    def __enter__(self) -> _SetContext:
        if self.mmap is None:
            self.mmap = map_files(self.manager.reader.paths)
        return self


class _FileMap(OSCacheManager):
    """Where each image lies, alone: FFCV's own also keeps Python sets of pages, which nothing reads."""

    def __init__(self, reader: Tables) -> None:
        self.reader, self.ptrs, self.sizes = reader, reader.ptrs, reader.sizes
        self.context = _SetContext(self)


class Pipeline:
    """An FFCV loader for any batches, in order. Compiling it takes seconds, so it's made once and traversed often."""

    def __init__(self, dataset: Dataset, pipelines: dict[str, PipelineSpec], *, batch_size: int, num_workers: int):
        hide_finalizers_of_numba()
        self.dataset, self.batch_size = dataset, batch_size
        most: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
        self.num_workers = max(1, min(num_workers, most))
        tables = Tables(dataset)
        unused = {name: None for name in tables.handlers if name not in pipelines}
        with (
            _torch_threads_kept(),
            mock.patch.multiple(loader_of_ffcv, Reader=lambda *_: tables, OSCacheManager=_FileMap),
        ):
            self.ffcv = FFCVLoader(
                dataset.path,
                batch_size=batch_size,
                num_workers=self.num_workers,
                os_cache=True,
                indices=np.zeros(1, np.uint64),  # never read: each traversal brings its own
                pipelines={**pipelines, **unused},
                batches_ahead=_BATCHES_AHEAD,
            )

    def traverse(self, requests: Iterator[AnyRequest]) -> Iterator[tuple[AnyRequest, tuple]]:
        """Each request of at most ``batch_size`` samples with its outputs; the loading thread draws the requests."""
        threads = torch.get_num_threads()
        Compiler.set_num_threads(self.num_workers)  # numba's number is each thread's own; FFCV sets torch's with it
        traversal = _Traversal(self.ffcv, requests, self.dataset)
        torch.set_num_threads(threads)
        try:
            for position, (request, outputs) in enumerate(traversal):
                if position == 0:
                    torch.set_num_threads(threads)  # the loading thread has set it meanwhile
                    if torch.cuda.is_available():
                        warn_of_pageable(outputs)
                yield request, outputs
        finally:
            traversal.close()


@contextmanager
def _torch_threads_kept() -> Iterator[None]:
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def warn_of_pageable(outputs: tuple) -> None:
    """One line where a batch's buffers are not pinned: FFCV says nothing when it could not have them so."""
    parts = itertools.chain.from_iterable(part if isinstance(part, tuple) else (part,) for part in outputs)
    if not all(part.is_pinned() for part in parts if isinstance(part, torch.Tensor)):
        print(
            "warning: the loader's buffers could not be pinned, so each copy of a batch to the GPU holds up the "
            "process; is the limit of locked memory (ulimit -l) too low?",
            flush=True,
        )


def image_spec(operation: Operation) -> PipelineSpec:
    """A pipeline from the image field through ``operation`` to tensors."""
    return PipelineSpec("image", decoder=operation, transforms=[ToTensors()])


def refuse_failed(failed: np.ndarray, samples: np.ndarray, dataset: Dataset) -> None:
    """Name the ``samples`` [B] whose decoding ``failed`` [B, 1], if any (:class:`DecodeError`)."""
    if failed.any():
        places = [dataset.locate(int(sample)) for sample in samples[failed[:, 0] != 0]]
        path = places[0][0]
        bad = some(sample for file, sample in places if file == path)
        raise DecodeError(
            f"{path}: sample {bad} cannot be decoded; find all with: python data_prep/to_ffcv.py --verify {path}"
        )
