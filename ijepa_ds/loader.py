"""The loader: FFCV's pipeline with our crops and masks drawn inside its compiled code. All of ffcv is imported here.

A batch of a step depends on (seed, step, sample) alone: the order yields ``sample | step << 32``, FFCV hands these
through untouched, and every operation masks the sample out and uses the whole number as the key of its random
streams. So the same images, crops and masks arrive for any world size, micro-batch, worker count, and after a resume.

Shapes: B images of a micro-batch, K context tokens, M target blocks, T tokens of a target block, H x W pixels.
"""

from __future__ import annotations

import math
import os
import queue
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numba
import numpy as np
import torch
from ffcv.fields import FloatField, IntField, RGBImageField
from ffcv.fields.decoders import FloatDecoder, IntDecoder
from ffcv.libffcv import imdecode, resize_crop
from ffcv.loader import Loader as FFCVLoader
from ffcv.loader.epoch_iterator import EpochIterator
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.compiler import Compiler
from ffcv.pipeline.operation import Operation
from ffcv.pipeline.pipeline_spec import PipelineSpec
from ffcv.reader import Reader
from ffcv.traversal_order.base import TraversalOrder
from numba import njit

from ijepa_ds import masks
from ijepa_ds.errors import UserError
from ijepa_ds.random_streams import CROP, permutation, stream, uniform

_STEP_SHIFT = np.uint64(32)
_SAMPLE = np.uint64(0xFFFFFFFF)
_STALL_SECONDS = 1.0  # how often a waiting consumer looks whether the loading thread is still alive
_BATCHES_AHEAD = 3


def _hide_finalizers_of_numba() -> None:
    """numba reports a harmless KeyError when a compiled pipeline is collected; nobody should have to read it."""
    report = sys.unraisablehook

    def hook(unraisable) -> None:
        if not (unraisable.exc_type is KeyError and isinstance(unraisable.object, weakref.finalize)):
            report(unraisable)

    sys.unraisablehook = hook


_hide_finalizers_of_numba()


class DecodeError(UserError):
    """An image of a .beton that cannot be decoded; the message names the sample."""


class LoaderError(RuntimeError):
    """The loading thread died; its own error is the cause."""


@dataclass
class Batch:
    """One micro-batch. The arrays live in the loader's ring of buffers: use them before the next batch is asked for."""

    images: torch.Tensor  # uint8 [B, H, W, 3]
    context_block: torch.Tensor  # int64 [B, K]
    target_blocks: torch.Tensor  # int64 [M, B, T]
    samples: np.ndarray  # int64 [B]

    def to(self, device: torch.device) -> Batch:
        """The batch on ``device``, copied asynchronously where the loader's buffers are pinned."""
        return replace(
            self,
            images=self.images.to(device, non_blocking=True),
            context_block=self.context_block.to(device, non_blocking=True),
            target_blocks=self.target_blocks.to(device, non_blocking=True),
        )


# --------------------------------------------------------------------------------------------- what is in a .beton


@dataclass(frozen=True)
class Dataset:
    """What a .beton holds, read from its header."""

    path: str
    num_samples: int
    label_fields: tuple[str, ...]


def inspect_dataset(path: str | os.PathLike) -> Dataset:
    """Read the header of a .beton and refuse one that is missing, truncated or of other fields (:class:`UserError`)."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist; make it with: python data_prep/to_ffcv.py SOURCE {path}")
    cure = f"convert it again: python data_prep/to_ffcv.py SOURCE {path}"
    try:
        reader = Reader(str(path))
        table = reader.alloc_table
    except (OSError, ValueError, LookupError, AssertionError, TypeError, MemoryError, OverflowError) as error:
        raise UserError(f"{path} is not a complete .beton ({type(error).__name__}: {error}); {cure}") from error
    end = int((table["ptr"] + table["size"]).max()) if len(table) else 0
    if reader.num_samples == 0 or len(reader.metadata) < reader.num_samples or end == 0:
        raise UserError(f"{path} holds no complete samples; {cure}")
    table_start = int(reader.header["alloc_table_ptr"])
    image_fields = [name for name, field in reader.handlers.items() if isinstance(field, RGBImageField)]
    if image_fields != ["image"]:
        fields = ", ".join(f"{name} ({type(field).__name__})" for name, field in reader.handlers.items())
        raise UserError(f"{path} must have one image field named 'image', but has: {fields}; {cure}")
    pointers = reader.metadata[f"f{list(reader.handlers).index('image')}"]["data_ptr"]
    if end > table_start or not np.isin(pointers, table["ptr"]).all():
        raise UserError(f"{path} is truncated or damaged: images lie outside of its data region; {cure}")
    labels = tuple(name for name, field in reader.handlers.items() if isinstance(field, (IntField, FloatField)))
    return Dataset(str(path), int(reader.num_samples), labels)


# ------------------------------------------------------------------------------------------- operations, compiled


@njit
def random_crop(height, width, key, scale, ratio):
    """Random resized crop as torchvision has it: top, left, rows, columns. ``scale`` is a share of the area."""
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for attempt in range(10):
        area = height * width * (scale[0] + uniform(key, 4 * attempt) * (scale[1] - scale[0]))
        aspect = math.exp(log_low + uniform(key, 4 * attempt + 1) * (log_high - log_low))
        columns = round(math.sqrt(area * aspect))
        rows = round(math.sqrt(area / aspect))
        if 0 < columns <= width and 0 < rows <= height:
            top = int(uniform(key, 4 * attempt + 2) * (height - rows + 1))
            left = int(uniform(key, 4 * attempt + 3) * (width - columns + 1))
            return top, left, rows, columns
    columns, rows = width, height
    if width / height < ratio[0]:
        rows = min(height, round(width / ratio[0]))
    elif width / height > ratio[1]:
        columns = min(width, round(height * ratio[1]))
    return (height - rows) // 2, (width - columns) // 2, rows, columns


@njit
def center_crop(height, width, key, scale, ratio):
    """The largest centred crop of the output's shape, ``scale[0]`` of it a side; ``ratio[0]`` is width over height."""
    columns = min(float(width), height * ratio[0])
    rows = min(float(height), width / ratio[0])
    rows, columns = max(1, round(rows * scale[0])), max(1, round(columns * scale[0]))
    return (height - rows) // 2, (width - columns) // 2, rows, columns


class _DecodeCrop(Operation):
    """Decode, crop, resize. Gives the images and, beside them, each decoder's return code, which stock FFCV ignores."""

    def __init__(self, image_size: tuple[int, int], crop, *, seed: int, scale, ratio):
        super().__init__()
        self.image_size, self.crop, self.seed = image_size, crop, np.uint64(seed)
        self.scale, self.ratio = (float(scale[0]), float(scale[1])), (float(ratio[0]), float(ratio[1]))

    def declare_state_and_memory(self, previous_state):
        pixels = int(self.metadata["height"].max()) * int(self.metadata["width"].max()) * 3
        shape, byte = (*self.image_size, 3), np.dtype("u1")
        allocation = (AllocationQuery(shape, byte), AllocationQuery((pixels,), byte), AllocationQuery((1,), byte))
        return replace(previous_state, jit_mode=True, shape=shape, dtype=byte), allocation

    def generate_code(self):
        read, iterator = self.memory_read, Compiler.get_iterator()
        decode_jpeg, resize = Compiler.compile(imdecode), Compiler.compile(resize_crop)
        crop, seed, scale, ratio = self.crop, self.seed, self.scale, self.ratio

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
                    draw = stream(seed, CROP, key >> _STEP_SHIFT, sample)
                    top, left, rows, columns = crop(height, width, draw, scale, ratio)
                    source = pixels.reshape((height, width, 3))
                    resize(source, top, top + rows, left, left + columns, images[position])
            return images[: len(batch_indices)], failed[: len(batch_indices)]

        decode.is_parallel = True
        return decode


class _SampleMasks(Operation):
    """Masks drawn on the loader. A row holds: number of context tokens, the context tokens, M target blocks."""

    def __init__(self, sampler: masks.MaskSampler):
        super().__init__()
        self.sampler = sampler
        self.target_room = sampler.max_target_tokens()

    def declare_state_and_memory(self, previous_state):
        row = 1 + self.sampler.context_room + self.sampler.num_targets * self.target_room
        return replace(previous_state, jit_mode=True, shape=(row,), dtype=np.dtype("i4")), AllocationQuery(
            (row,), np.dtype("i4")
        )

    def generate_code(self):
        iterator, sampler = Compiler.get_iterator(), self.sampler
        seed, room, num_targets, limit = (
            np.uint64(sampler.seed),
            sampler.context_room,
            sampler.num_targets,
            sampler.limit,
        )
        sizes_of, draw_image = sampler.sizes_of, sampler.draw_image
        grid, target_scale, aspect_ratio, context_scale = sampler.geometry

        def sample_masks(batch_indices, rows, metadata, storage_state):
            for position in iterator(len(batch_indices)):
                step, sample = batch_indices[position] >> _STEP_SHIFT, batch_indices[position] & _SAMPLE
                one, two, three = masks.size_numbers(seed, step)
                sizes = sizes_of(one, two, three, grid, target_scale, aspect_ratio, context_scale)
                tokens = sizes[0] * sizes[1]
                row = rows[position]
                targets = row[1 + room : 1 + room + num_targets * tokens].reshape((num_targets, tokens))
                row[0] = draw_image(seed, step, sample, grid, sizes[:2], sizes[2:], limit, row[1 : 1 + room], targets)
            return rows[: len(batch_indices)]

        sample_masks.is_parallel = True
        return sample_masks


class _ToTensors(Operation):
    """numpy to torch, for one array or a tuple of them; no copy."""

    def generate_code(self):
        def to_tensors(arrays, _):
            return tuple(map(torch.from_numpy, arrays)) if isinstance(arrays, tuple) else torch.from_numpy(arrays)

        return to_tensors

    def declare_state_and_memory(self, previous_state):
        return replace(previous_state, jit_mode=False), None


class _KeyOrder(TraversalOrder):
    """Hands FFCV the numbers it is given. FFCV wants an instance that gives itself when called with the loader."""

    def __init__(self, keys: np.ndarray):
        self.keys = keys

    def __call__(self, loader):
        return self

    def sample_order(self, epoch: int) -> np.ndarray:
        return self.keys


class _Traversal(EpochIterator):
    """FFCV's loading thread, watched: its death reaches the consumer, who would wait for ever otherwise."""

    error: BaseException | None = None

    def run(self) -> None:
        try:
            super().run()
        except BaseException as error:  # whatever ended the thread is raised again in the consumer
            self.error = error

    def __next__(self):
        while True:
            try:
                result = self.output_queue.get(timeout=_STALL_SECONDS)
                break
            except queue.Empty:
                if not self.is_alive() and self.output_queue.empty():
                    raise LoaderError(f"the loading thread died: {self.error!r}") from self.error
        if result is None:
            self.close()
            raise StopIteration
        slot, arrays = result
        if torch.cuda.is_available():
            self.current_stream.wait_stream(self.cuda_streams[slot])
        return arrays


class _Pipeline:
    """An FFCV loader over given keys, in order. Compiling it takes seconds, so it's made once and traversed often."""

    def __init__(self, dataset: Dataset, pipelines: dict, *, batch_size: int, num_workers: int):
        self.batch_size = batch_size
        self.num_workers = max(1, min(num_workers, numba.config.NUMBA_NUM_THREADS))
        reader = Reader(dataset.path)
        unused = {name: None for name in reader.handlers if name not in pipelines}
        with _torch_threads_kept():
            self.ffcv = FFCVLoader(
                dataset.path,
                batch_size=batch_size,
                num_workers=self.num_workers,
                os_cache=True,
                order=_KeyOrder(np.arange(1, dtype=np.uint64)),
                pipelines={**pipelines, **unused},
                batches_ahead=_BATCHES_AHEAD,
            )

    def traverse(self, keys: np.ndarray) -> Iterator[tuple]:
        """The outputs for ``keys`` uint64 [n] in batches, the last of which may be smaller."""
        threads = torch.get_num_threads()
        Compiler.set_num_threads(self.num_workers)  # numba's number is each thread's own; FFCV sets torch's with it
        traversal = _Traversal(self.ffcv, keys)
        torch.set_num_threads(threads)
        try:
            for position, outputs in enumerate(traversal):
                if position == 0:
                    torch.set_num_threads(threads)  # the loading thread has set it meanwhile
                yield outputs
        finally:
            traversal.close()


@contextmanager
def _torch_threads_kept():
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _ahead_on(device: torch.device, batches: Iterator[Batch]) -> Iterator[Batch]:
    """The batches on ``device``; on a GPU each is copied by a stream of its own while the one before is used."""
    if device.type != "cuda":
        yield from batches
        return
    copies, ahead = torch.cuda.Stream(device), None
    for batch in batches:
        with torch.cuda.stream(copies):
            copied = batch.to(device)
        done = copies.record_event()
        if ahead is not None:
            yield ahead
        done.synchronize()  # before the loader may write over the buffers that were copied
        for tensor in (copied.images, copied.context_block, copied.target_blocks):
            tensor.record_stream(torch.cuda.current_stream(device))
        ahead = copied
    if ahead is not None:
        yield ahead


def _refuse_failed(failed: torch.Tensor, samples: np.ndarray, path: str) -> None:
    if failed.any():
        bad = ", ".join(str(int(sample)) for sample in samples[failed.numpy()[:, 0] != 0][:8])
        raise DecodeError(
            f"{path}: sample {bad} cannot be decoded; find all with: python data_prep/to_ffcv.py --verify {path}"
        )


# ------------------------------------------------------------------------------------------------- what is used


class PretrainingLoader:
    """Images and masks for pretraining, step by step.

    A step's global batch is cut into micro-batches over accumulation, then ranks, so that its content is the same for
    any world size and micro-batch. Images that do not fill a global batch at the end of an epoch are left out.
    """

    def __init__(
        self,
        dataset: Dataset,
        sampler: masks.MaskSampler,
        *,
        image_size: tuple[int, int],
        crop_scale: tuple[float, float],
        crop_ratio: tuple[float, float],
        seed: int,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 1,
    ):
        self.dataset, self.sampler, self.seed = dataset, sampler, seed
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.rank, self.world_size = rank, world_size
        self.steps_per_epoch = dataset.num_samples // global_batch
        self.micro_batches_per_step = global_batch // (micro_batch * world_size)
        self._masks = _SampleMasks(sampler)
        pipelines = {
            "image": PipelineSpec(
                "image",
                decoder=_DecodeCrop(image_size, random_crop, seed=seed, scale=crop_scale, ratio=crop_ratio),
                transforms=[_ToTensors()],
            ),
            "masks": PipelineSpec("image", decoder=self._masks, transforms=[_ToTensors()]),
        }
        self.pipeline = _Pipeline(dataset, pipelines, batch_size=micro_batch, num_workers=num_workers)

    def from_step(self, step: int, end: int, device: torch.device | str = "cpu") -> Iterator[Iterator[Batch]]:
        """For each step in [step, end) an iterator over this rank's micro-batches on ``device``, to be used up."""
        while step < end:
            epoch, first = divmod(step, self.steps_per_epoch)
            last = min(self.steps_per_epoch, first + end - step)
            order = permutation(self.seed, epoch, self.dataset.num_samples)
            batches = _ahead_on(torch.device(device), self._epoch(order, epoch * self.steps_per_epoch, first, last))
            for _ in range(first, last):
                yield (next(batches) for _ in range(self.micro_batches_per_step))
            step += last - first
            batches.close()

    def step_samples(self, step: int) -> np.ndarray:
        """The samples of a step's global batch in order, int64 [global batch]."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = permutation(self.seed, epoch, self.dataset.num_samples)
        return order[position * self.global_batch : (position + 1) * self.global_batch]

    def _epoch(self, order: np.ndarray, epoch_start: int, first: int, last: int) -> Iterator[Batch]:
        shape = (last - first, self.micro_batches_per_step, self.world_size, self.micro_batch)
        slots = order[first * self.global_batch : last * self.global_batch].reshape(shape)
        steps = np.arange(epoch_start + first, epoch_start + last, dtype=np.uint64)
        keys = slots.astype(np.uint64) | (steps << _STEP_SHIFT)[:, None, None, None]
        outputs = self.pipeline.traverse(np.ascontiguousarray(keys[:, :, self.rank]).reshape(-1))
        for position, ((images, failed), rows) in enumerate(outputs):
            step, micro = divmod(position, self.micro_batches_per_step)
            samples = slots[step, micro, self.rank]
            _refuse_failed(failed, samples, self.dataset.path)
            group = self._truncation_group(slots[step].reshape(-1), micro)
            yield self._batch(images, rows, samples, epoch_start + first + step, group)

    def _truncation_group(self, step_samples: np.ndarray, micro: int) -> np.ndarray:
        """The images over which the reference sampler cuts the context: they may lie on several ranks."""
        size = getattr(self.sampler, "truncation_group", self.micro_batch)
        slot = (micro * self.world_size + self.rank) * self.micro_batch
        start = slot // size * size
        return step_samples[start : start + size]

    def _batch(self, images, rows: torch.Tensor, samples: np.ndarray, step: int, group: np.ndarray) -> Batch:
        context_tokens = self.sampler.context_count(step, group)
        num_targets, room = self.sampler.num_targets, self.sampler.context_room
        tokens = self.sampler.block_sizes(step).target_tokens
        targets = rows[:, 1 + room : 1 + room + num_targets * tokens].reshape(len(rows), num_targets, tokens)
        return Batch(
            images=images,
            context_block=rows[:, 1 : 1 + context_tokens].long(),
            target_blocks=targets.transpose(0, 1).contiguous().long(),
            samples=samples,
        )


class EvaluationLoader:
    """Centre crops and labels in file order, sharded over ranks by stride; no randomness.

    ``crop_share`` is the centre crop's side over the image's shorter side (0.875 = resize 256, crop 224).
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        image_size: tuple[int, int],
        batch_size: int,
        num_workers: int = 1,
        crop_share: float = 1.0,
        label_fields: tuple[str, ...] | None = None,
    ):
        self.dataset = dataset
        self.label_fields = dataset.label_fields if label_fields is None else label_fields
        missing = [name for name in self.label_fields if name not in dataset.label_fields]
        if missing:
            has = ", ".join(dataset.label_fields) or "none"
            raise UserError(f"{dataset.path} has no label field '{missing[0]}' (it has: {has}); choose one of these")
        ratio = image_size[1] / image_size[0]
        decoder = _DecodeCrop(image_size, center_crop, seed=0, scale=(crop_share, 1.0), ratio=(ratio, ratio))
        pipelines = {"image": PipelineSpec("image", decoder=decoder, transforms=[_ToTensors()])}
        fields = Reader(dataset.path).handlers
        self._order = [name for name in fields if name in self.label_fields]  # of FFCV's outputs: the file's
        for name in self._order:
            label_decoder = IntDecoder() if isinstance(fields[name], IntField) else FloatDecoder()
            pipelines[name] = PipelineSpec(name, decoder=label_decoder, transforms=[_ToTensors()])
        self.pipeline = _Pipeline(dataset, pipelines, batch_size=batch_size, num_workers=num_workers)

    def batches(self, samples: np.ndarray) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
        """uint8 images [B, H, W, 3] and labels {field: [B]} of the given samples; use each before the next."""
        position = 0
        for outputs in self.pipeline.traverse(np.asarray(samples, np.uint64)):
            images, failed = outputs[0]
            _refuse_failed(failed, samples[position : position + len(images)], self.dataset.path)
            position += len(images)
            yield images, {name: label[:, 0].clone() for name, label in zip(self._order, outputs[1:], strict=True)}


def read_labels(dataset: Dataset, field: str) -> np.ndarray:
    """All labels of a field, [num_samples], straight from the file's metadata."""
    reader = Reader(dataset.path)
    return np.array(reader.metadata[f"f{list(reader.handlers).index(field)}"]).reshape(-1)


def integer_label_fields(dataset: Dataset) -> tuple[str, ...]:
    """The label fields that hold classes."""
    fields = Reader(dataset.path).handlers
    return tuple(name for name in dataset.label_fields if isinstance(fields[name], IntField))
