"""Training a grid on features: the answer is scikit-learn's, and batches are those that were asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ijepa_ds.data.beton import inspect_dataset
from ijepa_ds.data.crops import flips_of
from ijepa_ds.data.image_loader import ImageLoader
from ijepa_ds.distributed import Process
from ijepa_ds.errors import UserError
from ijepa_ds.evaluation.candidates import PIXELS, Encoder, small_pixels
from ijepa_ds.evaluation.inputs import AugmentedFeatures, CachedFeatures
from ijepa_ds.evaluation.labels import Classes
from ijepa_ds.evaluation.probes.head_training import train_heads
from ijepa_ds.evaluation.probes.recipes import Recipe

CPU = torch.device("cpu")
ALONE = Process(0, 1, CPU)
WIDTH = 24


def encoder_of_width(width: int) -> Encoder:
    return Encoder("pixels", 0, width, {"pixels": slice(None)}, small_pixels)


@pytest.fixture(scope="module")
def problem() -> tuple[torch.Tensor, torch.Tensor, Classes]:
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(4000, WIDTH, generator=draw)
    scores = rows @ torch.randn(WIDTH, 4, generator=draw) + 3 * torch.randn(4000, 4, generator=draw)
    labels = scores.argmax(dim=1)
    return rows[:2000], rows[2000:], Classes(labels[:2000], labels[2000:], list("abcd"))


def test_the_heads_find_scikit_learns_answer(problem):
    linear_model = pytest.importorskip("sklearn.linear_model")
    train, validation, classes = problem
    reference = linear_model.LogisticRegression(C=1 / (5e-4 * len(train)), tol=1e-6, max_iter=5000)
    theirs = 100 * reference.fit(train.numpy(), classes.train.numpy()).score(
        validation.numpy(), classes.validation.numpy()
    )
    source = CachedFeatures(train, None, seed=0, device=CPU)
    recipe = Recipe("sgd", 60, 250, (0.1,), (5e-4,), None, lr_scales=("as given",))
    trained = train_heads(source, validation, classes, encoder_of_width(WIDTH), recipe, process=ALONE, seed=0)
    assert 40 < theirs < 90
    for head in trained.grid:
        assert head["value"] == pytest.approx(theirs, abs=0.3), head
    assert trained.images == 60 * 2000
    best = max(head["value"] for head in trained.grid)
    assert 100 * float((trained.predictions == classes.validation).float().mean()) == pytest.approx(best)


def test_mirrored_features_are_drawn_anew_each_epoch():
    values, mirrored = torch.zeros(40, 3), torch.ones(40, 3)
    source = CachedFeatures(values, mirrored, seed=3, device=CPU)
    batches = np.random.default_rng(0).permutation(40).reshape(4, 10)
    first, second = (torch.cat(list(source.epoch(epoch, batches)))[:, 0] for epoch in (0, 1))
    assert first.bool().tolist() == flips_of(3, 0, batches.reshape(-1)).tolist() and first.tolist() != second.tolist()
    assert 8 < first.sum() < 32 and not values.any()  # the kept ones stay as they are


def test_micro_batches_are_joined_to_the_batches_asked_for(beton):
    samples = np.arange(2, 28)  # some of the file: positions count among these
    loader = ImageLoader(inspect_dataset(beton), image_size=(32, 32), batch_size=4, augment=True, seed=1)
    source = AugmentedFeatures(encoder_of_width(3 * PIXELS**2), loader, samples, CPU)
    batches = np.random.default_rng(0).permutation(26)[:24].reshape(3, 8)
    whole = torch.cat([small_pixels(images) for images in loader.batches(samples, 5)])
    found = list(source.epoch(5, batches))
    assert len(found) == 3
    for rows, positions in zip(found, batches, strict=True):
        assert torch.equal(rows, whole[positions])
    # Batches smaller than a micro-batch, as one of many processes has them.
    small = list(source.epoch(5, batches.reshape(-1, 3)))
    assert torch.equal(torch.cat(small), torch.cat(found)) and {len(rows) for rows in small} == {3}


def test_features_that_are_not_finite_are_refused(problem):
    train, validation, classes = problem
    recipe = Recipe("sgd", 1, 100, (0.1,), (0.0,), None)

    def refused(match: str, train: torch.Tensor, validation: torch.Tensor) -> None:
        source = CachedFeatures(train, None, seed=0, device=CPU)
        with pytest.raises(UserError, match=match):
            train_heads(source, validation, classes, encoder_of_width(WIDTH), recipe, process=ALONE, seed=0)

    broken = train.clone()
    broken[7, 3] = torch.inf
    refused("training features hold NaN or infinity", broken, validation)
    refused("1 of 2000 rows of the validation features", train, broken)
