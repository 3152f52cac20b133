"""Augmented training images: random crops and flips as functions of (seed, epoch, sample), of the right pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ijepa_ds.data.beton import image_sizes, inspect_dataset
from ijepa_ds.data.crops import is_flipped, random_crop
from ijepa_ds.data.ffcv_pipeline import DecodeCrop, Pipeline, Request, image_spec
from ijepa_ds.data.image_loader import AREA, RATIO, ImageLoader
from ijepa_ds.random_streams import CROP, stream

SIZE, SEED = (16, 24), 5
ALL = np.arange(28)


@pytest.fixture(scope="module")
def augmented(beton) -> ImageLoader:
    return loader_of_seed(beton, SEED)


def loader_of_seed(beton: Path, seed: int, **changes) -> ImageLoader:
    options = {"image_size": SIZE, "batch_size": 4, "augment": True, "seed": seed}
    return ImageLoader(inspect_dataset(beton), **(options | changes))


def read(loader: ImageLoader, samples: np.ndarray, epoch: int = 0) -> torch.Tensor:
    return torch.cat([images.clone() for images in loader.batches(samples, epoch)])


def test_an_image_depends_on_seed_epoch_and_sample_alone(beton, augmented):
    whole = read(augmented, ALL, 3)
    order = np.random.default_rng(0).permutation(28)
    assert torch.equal(read(augmented, order, 3), whole[order])
    assert torch.equal(read(augmented, ALL[1::2], 3), whole[1::2])
    other = loader_of_seed(beton, SEED, batch_size=7, num_workers=2)
    assert torch.equal(read(other, ALL, 3), whole)
    for different in (read(augmented, ALL, 4), read(loader_of_seed(beton, SEED + 1), ALL, 3)):
        assert (different != whole).flatten(1).any(dim=1).float().mean() > 0.9


def test_about_half_of_the_images_are_mirrored_and_nothing_else_changes(beton, augmented):
    decoder = DecodeCrop(SIZE, random_crop, seed=SEED, scale=AREA, ratio=RATIO)
    plain = Pipeline(inspect_dataset(beton), {"image": image_spec(decoder)}, batch_size=4, num_workers=1)
    requests = (Request(part, 2) for part in np.split(ALL, 7))
    expected = torch.cat([images.clone() for _, ((images, _),) in plain.traverse(requests)])
    found = read(augmented, ALL, 2)
    flips = torch.tensor([is_flipped(np.uint64(SEED), np.uint64(2), np.uint64(s)) for s in ALL])
    assert 5 < int(flips.sum()) < 23
    assert torch.equal(found[flips], expected[flips].flip(2)) and torch.equal(found[~flips], expected[~flips])
    many = [is_flipped(np.uint64(s), np.uint64(e), np.uint64(9)) for s in range(40) for e in range(50)]
    assert 900 < sum(many) < 1100


def test_crops_are_the_drawn_ones(beton, augmented):
    """The mean colour of each image against that of its crop, cut from the whole image by hand."""
    dataset = inspect_dataset(beton)
    heights, widths = image_sizes(dataset)
    found = read(augmented, ALL, 1)
    for size in {(int(h), int(w)) for h, w in zip(heights, widths, strict=True)}:
        of_size = [s for s in ALL if (heights[s], widths[s]) == size]
        loader = ImageLoader(dataset, image_size=size, batch_size=4)
        whole = read(loader, np.array(of_size))
        for sample, image in zip(of_size, whole, strict=True):
            key = stream(np.uint64(SEED), CROP, np.uint64(1), np.uint64(sample))
            top, left, rows, columns = random_crop(*size, np.uint64(key), AREA, RATIO)
            cut = image[top : top + rows, left : left + columns].float()
            assert (found[sample].float().mean(dim=(0, 1)) - cut.mean(dim=(0, 1))).abs().max() < 6


def test_image_sizes_are_those_stored(beton):
    heights, widths = image_sizes(inspect_dataset(beton))
    assert list(zip(heights.tolist(), widths.tolist(), strict=True))[:4] == [(40, 56), (64, 48), (24, 36), (30, 30)]
