"""Batches: whose rows they hold, on one process and on two, and that crops and flips are drawn anew each epoch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from ijepa_ds.data.beton import inspect_dataset
from ijepa_ds.data.crops import flips_of
from ijepa_ds.data.image_loader import ImageLoader
from ijepa_ds.distributed import Process
from ijepa_ds.evaluation.candidates import small_pixels
from ijepa_ds.evaluation.inputs import AugmentedInputs, CachedInputs, Inputs, central_crops
from ijepa_ds.random_streams import permutation

SAMPLES = np.arange(2, 28)  # some of the file: positions count among these
LABELS = torch.from_numpy(SAMPLES)  # each stands by its own image


def process(rank: int = 0, world_size: int = 1) -> Process:
    return Process(rank, world_size, torch.device("cpu"))


@pytest.fixture(scope="module")
def loaders(beton) -> list[ImageLoader]:
    """Of batches smaller than a step's, and larger."""
    dataset = inspect_dataset(beton)
    return [ImageLoader(dataset, image_size=(32, 32), batch_size=size, augment=True, seed=1) for size in (4, 20)]


def augmented(loader: ImageLoader, of: Process | None = None, *, batch: int = 8) -> AugmentedInputs:
    return AugmentedInputs(loader, SAMPLES, LABELS, small_pixels, batch=batch, seed=7, process=of or process())


def steps_of(inputs: Inputs, epoch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    steps = list(inputs.epoch(epoch))
    assert len(steps) == inputs.steps
    return steps


def rows_of(loader: ImageLoader, epoch: int) -> torch.Tensor:
    return torch.cat([small_pixels(images) for images in loader.batches(SAMPLES, epoch)])


def test_batches_of_the_loader_are_joined_to_those_of_the_steps(loaders):
    whole, order = rows_of(loaders[0], 5), permutation(7, 5, 26)
    for loader in loaders:
        for batch in (8, 3, 26):
            steps = steps_of(augmented(loader, batch=batch), 5)
            assert len(steps) == 26 // batch and {len(rows) for rows, _ in steps} == {batch}
            taken = order[: len(steps) * batch]
            assert torch.equal(torch.cat([rows for rows, _ in steps]), whole[taken])
            assert torch.equal(torch.cat([labels for _, labels in steps]), LABELS[taken])


def test_the_batches_of_two_processes_are_those_of_one(loaders):
    whole = steps_of(augmented(loaders[0]), 0)
    cached = steps_of(CachedInputs(rows_of(loaders[0], 0), LABELS, batch=8, seed=7, process=process()), 0)
    for rank in (0, 1):
        half = steps_of(augmented(loaders[0], process(rank, 2)), 0)
        for (rows, labels), (all_rows, all_labels), (same_rows, same_labels) in zip(half, whole, cached, strict=True):
            assert torch.equal(labels, all_labels[rank::2]) and torch.equal(rows, all_rows[rank::2])
            assert torch.equal(same_labels, all_labels) and torch.equal(same_rows, all_rows)


def test_an_epoch_is_the_same_again_and_another_one_is_not(loaders):
    first, again, other = (steps_of(augmented(loaders[0]), epoch) for epoch in (0, 0, 1))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, again, strict=True))
    labels, other_labels = (torch.cat([labels for _, labels in steps]) for steps in (first, other))
    assert len(labels.unique()) == 24 and not torch.equal(labels, other_labels)


def test_of_mirrored_rows_one_is_drawn_for_each_epoch():
    values, mirrored = torch.zeros(40, 3), torch.ones(40, 3)
    inputs = CachedInputs(values, torch.arange(40), mirrored, batch=10, seed=3, process=process())
    drawn = []
    for epoch in (0, 1):
        steps = steps_of(inputs, epoch)
        rows, positions = (torch.cat(part) for part in zip(*steps, strict=True))
        assert rows[:, 0].bool().tolist() == flips_of(3, epoch, positions.numpy()).tolist()
        drawn.append(rows[:, 0].tolist())
    assert drawn[0] != drawn[1] and 8 < sum(drawn[0]) < 32 and not values.any()  # the kept ones stay as they are


def test_more_images_in_a_batch_than_there_are_is_one_step_of_all():
    inputs = CachedInputs(torch.zeros(5, 2), torch.arange(5), batch=5, seed=0, process=process())
    assert inputs.steps == 1 and len(next(iter(inputs.epoch(0)))[0]) == 5


def test_central_crops_go_round_the_processes(beton: Path):
    loader = ImageLoader(inspect_dataset(beton), image_size=(32, 32), batch_size=4)

    def crops(rank: int, world_size: int) -> torch.Tensor:
        batches: Iterator[torch.Tensor] = central_crops(loader, SAMPLES, small_pixels, process(rank, world_size))
        return torch.cat(list(batches))

    whole = crops(0, 1)
    assert len(whole) == 26 and torch.equal(crops(1, 2), whole[1::2])
