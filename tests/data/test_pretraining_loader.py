"""The loader: the same batches however a run is spread or resumed, right pixels and labels, errors instead of hangs.

Compiling an FFCV pipeline takes seconds, so loaders that differ in rank or world size alone share one; everything else
of a loader is built anew by its own constructor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import queue
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from ffcv.loader.epoch_iterator import EpochIterator
from ffcv.memory_managers.os_cache import OSCacheManager
from ffcv.pipeline.graph import Graph
from ffcv.reader import Reader
from ffcv.types import ALLOC_TABLE_TYPE, FieldDescType, HeaderType

from ijepa_ds.data import ffcv_pipeline, pretraining_loader
from ijepa_ds.data.beton import inspect_dataset, integer_label_fields, read_labels
from ijepa_ds.data.crops import Crops, center_crop, flips_of, random_crop
from ijepa_ds.data.ffcv_pipeline import PLAIN, DecodeError, Draws, LoaderError, Request
from ijepa_ds.data.image_loader import ImageLoader
from ijepa_ds.data.pretraining_loader import Batch, PretrainingLoader
from ijepa_ds.errors import UserError
from ijepa_ds.method.mask_draws import CORRECTIONS
from ijepa_ds.method.masks import MultiblockSampler, ReferenceSampler
from ijepa_ds.random_streams import CROP, permutation, stream

IMAGE_SIZE, GRID = (16, 24), (4, 6)  # rows and columns; patches of 4 pixels
GLOBAL_BATCH, STEPS_PER_EPOCH = 8, 3  # of 28 images: 4 of them are left out in each epoch
SEED = 5
SAMPLERS = {
    "multiblock": MultiblockSampler(seed=SEED, grid=GRID, context_tokens=6),
    "reference": ReferenceSampler(seed=SEED, grid=GRID, min_keep=1, truncation_group=8),
}
SCALE, RATIO = (0.3, 1.0), (0.75, 4 / 3)


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """A test that waits for a batch that never comes fails after a minute."""

    def fail(*_) -> None:
        raise TimeoutError("the loader hangs")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="session")
def own_beton(beton, tmp_path_factory) -> Path:
    """A copy of the shared file for this file's tests alone, since some of them damage it for a while."""
    return Path(shutil.copy(beton, tmp_path_factory.mktemp("loader") / "mixed.beton"))


@pytest.fixture(scope="session")
def make_loader(own_beton) -> Callable[..., PretrainingLoader]:
    pipelines = {}

    def make(sampler="multiblock", micro_batch=8, *, rank=0, world_size=1, num_workers=1, **more) -> PretrainingLoader:
        loader = PretrainingLoader(
            inspect_dataset(own_beton),
            SAMPLERS[sampler],
            image_size=IMAGE_SIZE,
            crops=Crops(SCALE, RATIO, more.pop("flip", False)),
            global_batch=more.pop("global_batch", GLOBAL_BATCH),
            micro_batch=micro_batch,
            share=(rank, world_size),
            num_workers=num_workers,
            draws=more.get("draws", PLAIN),
        )
        kind = sampler, micro_batch, num_workers, loader.draws, loader.crops
        loader.pipeline = pipelines.setdefault(kind, loader.pipeline)
        return loader

    return make


@pytest.fixture(scope="session")
def evaluation(own_beton) -> ImageLoader:
    return ImageLoader(inspect_dataset(own_beton), image_size=IMAGE_SIZE, batch_size=4, crop_share=0.75)


def kept(batch: Batch) -> Batch:
    """A copy that outlives the loader's buffers."""
    tensors = batch.images.clone(), batch.context_block.clone(), batch.target_blocks.clone()
    return Batch(*tensors, batch.samples.copy(), None if batch.keys is None else batch.keys.clone())


def read(loader: PretrainingLoader, step: int = 0, end: int = 6) -> list[list[Batch]]:
    """For each step this rank's micro-batches."""
    return [[kept(batch) for batch in batches] for batches in loader.from_step(step, end)]


def joined(batches: list[Batch]) -> Batch:
    """Micro-batches one after the other."""
    return Batch(
        torch.cat([batch.images for batch in batches]),
        torch.cat([batch.context_block for batch in batches]),
        torch.cat([batch.target_blocks for batch in batches], dim=1),
        np.concatenate([batch.samples for batch in batches]),
    )


def global_batches(loaders: list[PretrainingLoader], step: int = 0, end: int = 6) -> list[Batch]:
    """The global batch of each step: over accumulation, then ranks."""
    ranks = [read(loader, step, end) for loader in loaders]
    return [
        joined([batch for same_micro in zip(*same_step, strict=True) for batch in same_micro])
        for same_step in zip(*ranks, strict=True)
    ]


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert (a.samples == b.samples).all()
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.context_block, b.context_block)
        assert torch.equal(a.target_blocks, b.target_blocks)


@pytest.fixture(scope="session")
def whole(make_loader) -> dict[str, list[Batch]]:
    """Two epochs of one process with one micro-batch a step: what every other way to run must give."""
    return {name: global_batches([make_loader(name)]) for name in SAMPLERS}


# ------------------------------------------------------------------------------- the same batches, whoever reads them


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    ("world_size", "micro_batch"), [(2, 4), (4, 2), (1, 4), (2, 2), (1, 2)], ids=lambda number: str(number)
)
def test_batches_do_not_depend_on_ranks_and_micro_batch(make_loader, whole, sampler, world_size, micro_batch):
    """2 x 4 and 4 x 2 (ranks x micro-batch), and the same with two and four micro-batches accumulated."""
    loaders = [make_loader(sampler, micro_batch, rank=rank, world_size=world_size) for rank in range(world_size)]
    for loader in loaders:
        assert loader.micro_batches_per_step == GLOBAL_BATCH // (world_size * micro_batch)
        assert [len(batches) for batches in read(loader, 0, 2)] == [loader.micro_batches_per_step] * 2
    assert_same(global_batches(loaders), whole[sampler])


def test_batches_do_not_depend_on_the_number_of_workers(make_loader, whole):
    loader = make_loader("multiblock", num_workers=2)
    if loader.pipeline.num_workers < 2:
        pytest.skip("numba has one thread here")
    assert_same(global_batches([loader]), whole["multiblock"])


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_starting_at_a_step_gives_what_going_on_would_have_given(make_loader, whole, sampler, step):
    assert_same(global_batches([make_loader(sampler)], step), whole[sampler][step:])


def test_a_run_may_end_anywhere_and_nothing_is_left_over(make_loader, whole):
    loader = make_loader()
    assert_same(global_batches([loader], 1, 2), whole["multiblock"][1:2])
    assert_same(global_batches([loader], 2, 5), whole["multiblock"][2:5])
    assert read(loader, 4, 4) == []


def test_a_run_of_any_length_is_one_traversal_whose_batches_are_asked_for_one_by_one(make_loader, whole, monkeypatch):
    """Buffers are allocated once, and a list of this run's batches would not fit into any memory."""
    allocated, allocate = [], Graph.allocate_memory
    monkeypatch.setattr(Graph, "allocate_memory", lambda *sizes: allocated.append(sizes) or allocate(*sizes))
    steps = make_loader().from_step(0, 10**15)
    batches = [kept(batch) for step in itertools.islice(steps, 6) for batch in step]
    steps.close()
    assert_same(batches, whole["multiblock"])
    assert len(allocated) == 1


def test_the_next_epochs_order_is_made_beside_the_loading_thread_before_it_is_needed(make_loader, monkeypatch):
    makers, second = {}, threading.Event()

    def watched(seed: int, epoch: int, num_samples: int) -> np.ndarray:
        makers[epoch] = threading.current_thread()
        if epoch == 1:
            second.set()
        return permutation(seed, epoch, num_samples)

    monkeypatch.setattr(pretraining_loader, "permutation", watched)
    steps = make_loader("multiblock", 2).from_step(0, 9)
    next(next(steps))  # of 12 micro-batches of this epoch no more than five are asked for
    assert second.wait(timeout=30)
    steps.close()
    assert makers.keys() == {0, 1}
    assert not any(isinstance(thread, EpochIterator) for thread in makers.values())


def test_an_iteration_that_was_left_early_disturbs_no_other(make_loader, whole):
    loader = make_loader()
    for batches in loader.from_step(0, 6):
        next(batches)
        break
    assert_same(global_batches([loader]), whole["multiblock"])


def test_a_batch_stays_as_it_is_until_the_next_is_asked_for(make_loader):
    """The loading thread goes on meanwhile, and must not write over the buffers that the consumer has."""
    for batches in make_loader("multiblock", 2).from_step(0, 2):
        for batch in batches:
            copy = kept(batch)
            time.sleep(0.05)  # enough for all batches of the step
            assert_same([batch], [copy])


# ------------------------------------------------------------------------------------------------ what a batch is


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_epoch_holds_each_image_at_most_once_in_the_order_of_its_permutation(make_loader, whole, sampler):
    loader = make_loader(sampler)
    assert loader.steps_per_epoch == STEPS_PER_EPOCH
    for epoch in (0, 1):
        batches = whole[sampler][epoch * STEPS_PER_EPOCH : (epoch + 1) * STEPS_PER_EPOCH]
        samples = np.concatenate([batch.samples for batch in batches])
        assert len(set(samples.tolist())) == 24 and samples.max() < 28
        assert (samples == permutation(SEED, epoch, 28)[:24]).all()
    for step, batch in enumerate(whole[sampler]):
        assert (loader.step_samples(step) == batch.samples).all()


def test_epochs_differ_in_order_crops_and_masks(whole):
    batches = whole["multiblock"]
    seen = []
    for epoch in (batches[:3], batches[3:]):
        pairs = [pair for batch in epoch for pair in zip(batch.samples.tolist(), batch.images, strict=True)]
        seen.append(dict(pairs))
    orders = [list(epoch) for epoch in seen]
    assert orders[0] != orders[1]
    both = seen[0].keys() & seen[1].keys()
    assert len(both) >= 20 and not any(torch.equal(seen[0][sample], seen[1][sample]) for sample in both)
    assert len({tuple(batch.context_block.flatten().tolist()) for batch in batches}) == 6


@pytest.mark.parametrize("name", SAMPLERS)
def test_masks_are_the_samplers_own(whole, name):
    """The masks drawn in the compiled pipeline, against those drawn in Python."""
    sampler = SAMPLERS[name]
    for step, batch in enumerate(whole[name]):
        assert batch.context_block.dtype == batch.target_blocks.dtype == torch.int64
        assert batch.target_blocks.shape == (4, 8, sampler.block_sizes(step).target_tokens)
        assert batch.target_blocks.is_contiguous()
        drawn = [sampler.draw(step, int(sample)) for sample in batch.samples]
        tokens = min(len(context) for context, _ in drawn)  # of the truncation group: here the whole batch
        assert batch.context_block.shape == (8, tokens)
        for b, (context, targets) in enumerate(drawn):
            assert batch.context_block[b].tolist() == context[:tokens].tolist()
            assert batch.target_blocks[:, b].tolist() == targets.tolist()


def test_reference_masks_are_cut_within_their_group_alone(make_loader):
    """A global batch of 16 holds two groups of 8, each with a number of context tokens of its own."""
    counts = []
    for micro_batch, world_size in [(8, 2), (4, 2)]:
        loaders = [
            make_loader("reference", micro_batch, rank=rank, world_size=world_size, global_batch=16)
            for rank in range(world_size)
        ]
        ranks = [read(loader, 0, 4) for loader in loaders]
        for step in range(4):
            of_step = [
                batch for same_micro in zip(*(rank[step] for rank in ranks), strict=True) for batch in same_micro
            ]
            samples = loaders[0].step_samples(step).reshape(2, 8)
            smallest = [min(len(SAMPLERS["reference"].draw(step, int(s))[0]) for s in group) for group in samples]
            per_image = [batch.context_block.shape[1] for batch in of_step for _ in range(micro_batch)]
            assert per_image == [smallest[0]] * 8 + [smallest[1]] * 8
            counts.append(tuple(smallest))
    assert any(first != second for first, second in counts)


def test_the_loader_draws_corrected_masks(make_loader, monkeypatch):
    """Compiled into its pipeline, and cut as the released code's are: the first of a random order stay."""
    corrections = frozenset(CORRECTIONS)
    sampler = ReferenceSampler(seed=SEED, grid=GRID, min_keep=1, truncation_group=8, corrections=corrections)
    monkeypatch.setitem(SAMPLERS, "corrected", sampler)
    for step, batch in enumerate(global_batches([make_loader("corrected")])):
        drawn = [sampler.draw(step, int(sample)) for sample in batch.samples]
        kept = min(len(context) for context, _ in drawn)
        assert batch.context_block.tolist() == [context[:kept].tolist() for context, _ in drawn]
        assert batch.target_blocks.transpose(0, 1).tolist() == [targets.tolist() for _, targets in drawn]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_two_whole_buffers_of_a_batch_go_to_a_device_and_are_cut_there(make_loader, whole, monkeypatch, sampler):
    """FFCV's buffers are pinned, what is cut out of them on the host would not be."""
    sent, send = [], torch.Tensor.to

    def watched(tensor, target, *more, **options):
        if target == torch.device("meta"):
            sent.append(tensor)
        return send(tensor, target, *more, **options)

    monkeypatch.setattr(torch.Tensor, "to", watched)
    for expected, batches in zip(whole[sampler], make_loader(sampler).from_step(0, 6, "meta"), strict=True):
        (batch,) = batches
        for name in ("images", "context_block", "target_blocks"):
            moved, there = getattr(batch, name), getattr(expected, name)
            assert moved.is_meta and moved.is_contiguous()
            assert (moved.shape, moved.dtype) == (there.shape, there.dtype)
        images, rows = sent
        assert images.is_contiguous() and rows.is_contiguous()
        assert torch.equal(images, expected.images)
        assert torch.equal(rows[:, 1 : 1 + expected.context_block.shape[1]].long(), expected.context_block)
        sent.clear()


def test_buffers_that_are_not_pinned_are_one_line(make_loader, monkeypatch, capsys):
    with contextlib.closing(make_loader().pipeline.traverse(iter([Request(np.arange(8), 0)]))) as batches:
        _, outputs = next(batches)
    (images, _), rows = outputs
    for pageable in ([images], [rows], [images, rows]):
        pages = {tensor.data_ptr() for tensor in pageable}
        monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor, pages=pages: tensor.data_ptr() not in pages)
        ffcv_pipeline.warn_of_pageable(outputs)
        assert capsys.readouterr().out.startswith("warning: the loader's buffers could not be pinned")
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: True)
    ffcv_pipeline.warn_of_pageable(outputs)
    assert capsys.readouterr().out == ""


def test_the_loading_thread_works_on_the_consumers_device(monkeypatch):
    """A thread begins on device 0, where every rank would make a context of its own."""
    order = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", order.append)
    monkeypatch.setattr(EpochIterator, "run", lambda self: order.append("load"))
    traversal = object.__new__(ffcv_pipeline._Traversal)
    traversal.terminate_event, traversal.closed, traversal.output_queue = threading.Event(), True, queue.Queue()
    traversal.requests, traversal.current_stream = iter(()), SimpleNamespace(device=torch.device("cuda", 3))
    traversal.run()
    assert order == [torch.device("cuda", 3), "load"] and traversal.error is None


def test_where_samples_lie_is_what_ffcv_finds(own_beton, evaluation):
    """Without the sets of pages that FFCV keeps of all samples."""
    ours, theirs = evaluation.pipeline.ffcv.memory_manager, OSCacheManager(Reader(str(own_beton)))
    assert (ours.ptrs == theirs.ptrs).all() and (ours.sizes == theirs.sizes).all()
    assert ours.ptrs.dtype == theirs.ptrs.dtype and ours.ptrs.flags.c_contiguous and ours.sizes.flags.c_contiguous
    assert len(theirs.sample_to_pages) == 28 and not hasattr(ours, "sample_to_pages")


def test_torchs_threads_are_left_alone(own_beton):
    """FFCV sets torch's number of threads for the whole process, when a loader is made and when it is read."""
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            loader = ImageLoader(inspect_dataset(own_beton), image_size=IMAGE_SIZE, batch_size=4, num_workers=2)
            assert torch.get_num_threads() == threads
            assert list(loader.batches(np.arange(0))) == [] and torch.get_num_threads() == threads
            seen = [torch.get_num_threads() for _ in loader.batches(np.arange(8))] if threads == 3 else []
            assert set(seen) <= {threads} and torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)


# --------------------------------------------------------------------------------------------------------- pixels


def stored_image(path: Path, sample: int) -> tuple[np.ndarray, bool]:
    """An image decoded by OpenCV from the bytes in the file, and whether it was stored without loss."""
    reader = Reader(str(path))
    field = reader.metadata["f0"][sample]
    (size,) = reader.alloc_table["size"][reader.alloc_table["ptr"] == field["data_ptr"]]
    data = np.fromfile(path, np.uint8, count=int(size), offset=int(field["data_ptr"]))
    if field["mode"]:
        return data.reshape(field["height"], field["width"], 3), True
    return cv2.cvtColor(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB), False


def resized(pixels: np.ndarray) -> np.ndarray:
    return cv2.resize(pixels, IMAGE_SIZE[::-1], interpolation=cv2.INTER_AREA)


def numpy_crop(height: int, width: int, numbers: Iterator[float]) -> tuple[int, int, int, int]:
    """Random resized crop as torchvision draws it, from given uniform numbers."""
    for _ in range(10):
        scale, turn, down, right = (next(numbers) for _ in range(4))
        area = height * width * (SCALE[0] + scale * (SCALE[1] - SCALE[0]))
        ratio = np.exp(np.log(RATIO[0]) + turn * (np.log(RATIO[1]) - np.log(RATIO[0])))
        columns, rows = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < columns <= width and 0 < rows <= height:
            return int(down * (height - rows + 1)), int(right * (width - columns + 1)), rows, columns
    raise AssertionError("these shapes never need the fallback")


def splitmix64(state: int) -> Iterator[float]:
    while True:
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        bits = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB % 2**64
        yield ((bits ^ (bits >> 31)) >> 11) / 2**53


def test_images_are_the_drawn_crops_resized(own_beton, whole):
    """JPEGs and raw images of four shapes, against OpenCV on a crop that was drawn here once more."""
    lossless = 0
    for step, batch in enumerate(whole["multiblock"]):
        assert batch.images.shape == (8, *IMAGE_SIZE, 3) and batch.images.dtype == torch.uint8
        for image, sample in zip(batch.images.numpy(), batch.samples, strict=True):
            pixels, exact = stored_image(own_beton, sample)
            key = int(stream(np.uint64(SEED), CROP, step, int(sample)))
            top, left, rows, columns = numpy_crop(*pixels.shape[:2], splitmix64(key))
            expected = resized(np.ascontiguousarray(pixels[top : top + rows, left : left + columns]))
            difference = np.abs(image.astype(int) - expected.astype(int))
            assert difference.max() <= (0 if exact else 12) and difference.mean() < 1.5  # two JPEG decoders
            lossless += exact
    assert 10 < lossless < 38


def test_crops_stay_inside_and_cover_what_they_should():
    seed = np.uint64(0)
    for height, width in [(40, 56), (500, 333), (7, 7), (1, 1), (10, 1000), (1000, 10)]:
        for sample in range(500):
            top, left, rows, columns = random_crop(height, width, stream_key(seed, sample), SCALE, RATIO)
            assert rows >= 1 and columns >= 1 and top >= 0 and left >= 0
            assert top + rows <= height and left + columns <= width
            if 0.8 < width / height < 1.6 and height > 30:
                assert 0.29 < rows * columns / (height * width) <= 1.0
                assert 0.72 < columns / rows < 1.39


def stream_key(seed: np.uint64, sample: int) -> np.uint64:
    return np.uint64(stream(seed, CROP, 0, sample))


def test_crops_are_distributed_as_torchvisions():
    from torchvision.transforms import RandomResizedCrop

    image = torch.empty(3, 60, 80)
    torch.manual_seed(0)
    theirs = np.array([RandomResizedCrop.get_params(image, list(SCALE), list(RATIO)) for _ in range(2_000)])
    ours = np.array([random_crop(60, 80, stream_key(np.uint64(1), n), SCALE, RATIO) for n in range(2_000)])
    for quantile in (0.05, 0.25, 0.5, 0.75, 0.95):
        assert np.quantile(ours, quantile, axis=0) == pytest.approx(np.quantile(theirs, quantile, axis=0), abs=2)
    assert np.corrcoef(ours.T) == pytest.approx(np.corrcoef(theirs.T), abs=0.1)


def test_a_shape_that_no_crop_fits_gets_torchvisions_central_one():
    assert random_crop(10, 1000, stream_key(np.uint64(0), 0), SCALE, RATIO) == (0, (1000 - 13) // 2, 10, 13)
    assert random_crop(1000, 10, stream_key(np.uint64(0), 0), SCALE, RATIO) == ((1000 - 13) // 2, 0, 13, 10)


@pytest.mark.parametrize(
    ("image", "share", "ratio", "crop"),
    [
        ((256, 341), 0.875, 1.0, (16, 58, 224, 224)),  # resize 256, crop 224
        ((480, 640), 1.0, 1.0, (0, 80, 480, 480)),
        ((640, 480), 1.0, 1.0, (80, 0, 480, 480)),
        ((100, 100), 1.0, 2.0, (25, 0, 50, 100)),
        ((100, 100), 0.5, 0.5, (25, 37, 50, 25)),
        ((3, 500), 0.1, 1.0, (1, 249, 1, 1)),
    ],
)
def test_the_central_crop_has_the_outputs_shape_and_its_share_of_the_shorter_side(image, share, ratio, crop):
    assert center_crop(*image, 0, (share, 1.0), (ratio, ratio)) == pytest.approx(crop, abs=1)


# ------------------------------------------------------------------------------------------------------ evaluation


def test_evaluation_gives_central_crops_in_the_order_asked_for(own_beton, evaluation):
    samples = np.array([3, 0, 27, 14, 9, 2, 2, 26, 1, 5])  # any order, repeated, and a last batch of two
    sizes, position = [], 0
    for images in evaluation.batches(samples):
        sizes.append(len(images))
        for image in images.numpy():
            pixels, exact = stored_image(own_beton, samples[position])
            top, left, rows, columns = center_crop(*pixels.shape[:2], 0, (0.75, 1.0), (1.5, 1.5))
            expected = resized(np.ascontiguousarray(pixels[top : top + rows, left : left + columns]))
            difference = np.abs(image.astype(int) - expected.astype(int))
            assert difference.max() <= (0 if exact else 12) and difference.mean() < 1.5
            position += 1
    assert sizes == [4, 4, 2]


def test_shards_by_stride_hold_every_image_once(evaluation):
    """As ranks read them: sample r, r + world, ...; more than one pass over the same pipeline."""
    whole = torch.cat([images.clone() for images in evaluation.batches(np.arange(28))])
    for world_size in (2, 3):
        for rank in range(world_size):
            shard = np.arange(rank, 28, world_size)
            images = torch.cat([images.clone() for images in evaluation.batches(shard)])
            assert torch.equal(images, whole[shard])


def test_no_samples_are_no_batches(evaluation):
    assert list(evaluation.batches(np.arange(0))) == []


def test_labels_can_be_read_without_the_images(own_beton):
    dataset = inspect_dataset(own_beton)
    assert read_labels(dataset, "label").tolist() == [sample % 5 for sample in range(28)]
    assert read_labels(dataset, "distance").tolist() == [sample / 4 for sample in range(28)]
    assert integer_label_fields(dataset) == ("label",)


# ---------------------------------------------------------------------------------------------------------- errors


@contextlib.contextmanager
def damaged(path: Path, sample: int, damage: Callable[[bytes], bytes]) -> Iterator[None]:
    """The stored bytes of an image changed for a while, in place: the loader's map of the file shows it."""
    reader = Reader(str(path))
    pointer = int(reader.metadata["f0"]["data_ptr"][sample])
    (size,) = reader.alloc_table["size"][reader.alloc_table["ptr"] == pointer]
    with path.open("r+b") as file:
        file.seek(pointer)
        before = file.read(int(size))
        file.seek(pointer)
        file.write(damage(before))
        file.flush()
        try:
            yield
        finally:
            file.seek(pointer)
            file.write(before)


DAMAGE = {
    "zeros": lambda data: bytes(len(data)),
    "no start mark": lambda data: b"\0\0" + data[2:],
    "random bytes": lambda data: np.random.default_rng(0).bytes(len(data)),
    "zeros after the first third": lambda data: data[: len(data) // 3] + bytes(len(data) - len(data) // 3),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_jpeg_is_an_error_that_names_the_sample(own_beton, evaluation, damage):
    with damaged(own_beton, 9, DAMAGE[damage]):
        assert len(list(evaluation.batches(np.array([8, 10])))) == 1
        with pytest.raises(DecodeError, match=r"mixed\.beton: sample 9 cannot be decoded; .*--verify"):
            list(evaluation.batches(np.arange(4, 12)))
    assert len(list(evaluation.batches(np.arange(28)))) == 7


def test_a_damaged_jpeg_stops_the_pretraining_step_that_holds_it(own_beton, make_loader):
    loader = make_loader("multiblock", 4)
    sample = next(int(s) for s in loader.step_samples(1) if s % 4 < 2)  # these two sizes are stored as JPEGs
    reached = 0
    error = pytest.raises(DecodeError, match=f"sample {sample} cannot be decoded")
    with damaged(own_beton, sample, DAMAGE["zeros"]), error:
        for batches in loader.from_step(0, 3):
            list(batches)
            reached += 1
    assert reached == 1


def test_all_damaged_samples_of_a_batch_are_named(own_beton, evaluation):
    error = pytest.raises(DecodeError, match="sample 8, 9 cannot be decoded")
    with damaged(own_beton, 8, DAMAGE["zeros"]), damaged(own_beton, 9, DAMAGE["zeros"]), error:
        list(evaluation.batches(np.arange(8, 12)))


@pytest.mark.parametrize("error", [RuntimeError("broken"), SystemExit(3)], ids=["error", "exit"])
@pytest.mark.parametrize("batch", [0, 2])
def test_a_loading_thread_that_dies_raises_in_the_consumer(make_loader, monkeypatch, error, batch):
    """Stock FFCV's consumer waits for ever. What was loaded before the death still arrives."""
    load = EpochIterator.run_pipeline

    def dying(self, position, *arguments):
        if position == batch:
            raise error
        return load(self, position, *arguments)

    loader = make_loader("multiblock", 4)
    monkeypatch.setattr(EpochIterator, "run_pipeline", dying)
    arrived, start = 0, time.monotonic()
    with pytest.raises(LoaderError, match="the loading thread died: ") as raised:
        for batches in loader.from_step(0, 3):
            for _ in batches:
                arrived += 1
    assert arrived == batch and raised.value.__cause__ is error
    assert time.monotonic() - start < 20
    monkeypatch.undo()
    assert len(read(loader, 0, 3)) == 3  # the loader itself is as good as before


def test_loading_threads_end_with_their_iteration(make_loader):
    loader = make_loader()
    before = threading.active_count()
    for _ in range(3):
        read(loader, 0, 3)
        for batches in loader.from_step(0, 4):  # left when the queue is full of the rest
            next(batches)
            time.sleep(0.05)
            break
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() <= before


def test_two_traversals_at_once_do_not_meet(own_beton, make_loader, whole):
    """Training and a probe. Numba would end the process here had it no layer of threads that several may use."""
    training = make_loader("multiblock", num_workers=2)
    if training.pipeline.num_workers < 2:
        pytest.skip("numba has one thread here")
    probe = ImageLoader(inspect_dataset(own_beton), image_size=IMAGE_SIZE, batch_size=4, num_workers=2)
    alone = [images.clone() for images in probe.batches(np.arange(28))]
    steps, again, batches = training.from_step(0, 6), probe.batches(np.arange(28)), []
    for first, images in zip(alone, again, strict=True):
        assert torch.equal(first, images)
        batches += [kept(batch) for step in itertools.islice(steps, 1) for batch in step]
    assert_same(batches, whole["multiblock"])


# ------------------------------------------------------------------------------------------- files that are no good


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as raised:
        inspect_dataset(path)
    message = str(raised.value)
    assert str(path) in message and "python data_prep/to_ffcv.py SOURCE" in message  # which file, and the cure
    assert "\n" not in message
    return message


@pytest.fixture
def copy(beton, tmp_path) -> Path:
    return Path(shutil.copy(beton, tmp_path / "copy.beton"))


def test_a_good_file_is_described(beton):
    dataset = inspect_dataset(str(beton))
    assert (dataset.path, dataset.num_samples, dataset.label_fields) == (str(beton), 28, ("label", "distance"))


def test_a_file_that_is_missing_or_a_folder_is_refused(tmp_path):
    assert "does not exist" in refusal(tmp_path / "none.beton")
    assert "does not exist" in refusal(tmp_path)


def test_a_file_cut_anywhere_is_refused(copy):
    size = copy.stat().st_size
    table = int(Reader(str(copy)).header["alloc_table_ptr"])
    lengths = {1, 10, HeaderType.itemsize, HeaderType.itemsize + FieldDescType.itemsize, 4000, table // 2, table}
    lengths |= {table + 1, table + ALLOC_TABLE_TYPE.itemsize, size - ALLOC_TABLE_TYPE.itemsize, size - 1}
    for length in sorted(lengths, reverse=True):
        with copy.open("r+b") as file:
            file.truncate(length)
        assert refusal(copy)


def test_an_empty_file_zeros_random_bytes_and_text_are_refused(tmp_path):
    path = tmp_path / "bad.beton"
    for content in (b"", bytes(100), bytes(100_000), np.random.default_rng(0).bytes(100_000), b"not a beton\n" * 1000):
        path.write_bytes(content)
        assert "not a complete .beton" in refusal(path) or "no complete samples" in refusal(path)


def test_random_bytes_behind_a_right_version_are_refused(tmp_path):
    path = tmp_path / "bad.beton"
    for seed in range(30):
        path.write_bytes(b"\2\0" + np.random.default_rng(seed).bytes(5_000))
        assert refusal(path)


def test_a_header_with_any_changed_byte_is_refused_or_read_as_it_stands(copy):
    """No other error than ours, whichever byte is damaged; a changed label name is not to be noticed."""
    whole = bytearray(copy.read_bytes()[: HeaderType.itemsize + 3 * FieldDescType.itemsize + 200])
    generator = np.random.default_rng(0)
    descriptors = [HeaderType.itemsize + n * FieldDescType.itemsize + byte for n in range(3) for byte in range(20)]
    refused = 0
    with copy.open("r+b", buffering=0) as file:
        for position in [*range(HeaderType.itemsize), *descriptors]:
            for value in (0, 255, int(generator.integers(256))):
                file.seek(position)
                file.write(bytes([value]))
                try:
                    inspect_dataset(copy)
                except UserError:
                    refused += 1
            file.seek(position)
            file.write(whole[position : position + 1])
    assert refused > 60
    assert inspect_dataset(copy).num_samples == 28


def test_an_image_that_lies_outside_of_the_data_is_refused(copy):
    reader = Reader(str(copy))
    start = HeaderType.itemsize + reader.field_descriptors.nbytes
    metadata = np.memmap(copy, reader.metadata_type, "r+", offset=start, shape=(28,))
    metadata["f0"]["data_ptr"][7] = copy.stat().st_size + 5
    metadata.flush()
    assert "truncated or damaged" in refusal(copy)


def test_other_fields_are_refused_with_what_was_found(make_beton, tmp_path):
    other = make_beton(tmp_path / "other.beton", 3, labels={"label": [0, 1, 2]}, image_field="picture")
    assert "one image field named 'image', but has: picture (RGBImageField), label (IntField)" in refusal(other)


def test_a_file_without_labels_is_good_for_pretraining(make_beton, tmp_path):
    dataset = inspect_dataset(make_beton(tmp_path / "plain.beton", 3))
    assert (dataset.num_samples, dataset.label_fields) == (3, ())


# ------------------------------------------------------------------------------------------------------------- options


def test_further_contexts_leave_the_first_as_it_was_and_are_drawn_alike(make_loader, whole):
    more = Draws(contexts=3)
    batches = global_batches([make_loader(draws=more)], 0, 3)
    for batch, plain in zip(batches, whole["multiblock"], strict=False):
        count, tokens = len(batch.images), plain.context_block.shape[1]
        contexts = batch.context_block.reshape(3, count, tokens)
        blocks = batch.target_blocks.unflatten(1, (3, count))
        assert torch.equal(batch.images, plain.images)
        assert torch.equal(contexts[0], plain.context_block) and torch.equal(blocks[:, 0], plain.target_blocks)
        for one, other in ((0, 1), (0, 2), (1, 2)):
            assert (contexts[one] != contexts[other]).any(1).all()
            assert (blocks[:, one] != blocks[:, other]).any()
        for context in range(3):  # a context sees nothing of its own targets
            seen = contexts[context, :, :, None, None] == blocks[:, context].permute(1, 0, 2)[:, None]
            assert not seen.any()


def test_contexts_and_keys_do_not_depend_on_ranks_and_micro_batch(make_loader):
    draws = Draws(contexts=2, keys=True)
    [one] = read(make_loader(draws=draws), 2, 3)
    images, tokens = GLOBAL_BATCH, one[0].context_block.shape[1]
    contexts, keys = one[0].context_block.reshape(2, images, tokens), one[0].keys.reshape(2, images)
    assert len(torch.unique(keys)) == 2 * images
    for rank in range(2):
        [two] = read(make_loader(micro_batch=2, rank=rank, world_size=2, draws=draws), 2, 3)
        for micro, batch in enumerate(two):
            own = slice(4 * micro + 2 * rank, 4 * micro + 2 * rank + 2)
            assert torch.equal(batch.context_block.reshape(2, 2, tokens), contexts[:, own])
            assert torch.equal(batch.keys.reshape(2, 2), keys[:, own])


def test_every_other_image_is_mirrored_by_chance(make_loader, whole):
    flipped = global_batches([make_loader(flip=True)])
    for step, (batch, plain) in enumerate(zip(flipped, whole["multiblock"], strict=True)):
        flips = flips_of(SAMPLERS["multiblock"].seed, step, batch.samples)
        for image, before, flip in zip(batch.images, plain.images, flips, strict=True):
            assert torch.equal(image, before.flip(1) if flip else before)
        assert torch.equal(batch.context_block, plain.context_block)
    assert 0.2 < np.mean([flips_of(0, step, np.arange(8)) for step in range(20)]) < 0.8


def test_a_share_of_each_target_block_is_predicted(own_beton):
    sampler = dataclasses.replace(SAMPLERS["multiblock"], predict_share=0.5)
    loader = PretrainingLoader(
        inspect_dataset(own_beton),
        sampler,
        image_size=IMAGE_SIZE,
        crops=Crops(SCALE, RATIO),
        global_batch=GLOBAL_BATCH,
        micro_batch=8,
    )
    for step, [batch] in enumerate(read(loader, 0, 3)):
        for position, sample in enumerate(batch.samples):
            context, targets = sampler.draw(step, int(sample))
            assert batch.context_block[position].tolist() == context.tolist()
            assert batch.target_blocks[:, position].tolist() == targets.tolist()
