"""Classes from raw labels: which images fall into which, and what is refused."""

from __future__ import annotations

import pytest
import torch

from ijepa_ds.errors import UserError
from ijepa_ds.evaluation.labels import CLEVR_EDGES, Classes, bin_edges, binned, classes_of


def test_classes_are_numbered_from_those_in_train():
    classes = classes_of("count", torch.tensor([3, 10, 5, 5]), torch.tensor([10, 3]))
    assert classes.train.tolist() == [0, 2, 1, 1] and classes.validation.tolist() == [2, 0]
    assert classes.names == ["3", "5", "10"] and classes.num_classes == 3


def test_clevrs_bins():
    depths = torch.tensor([5.0, 8.0, 8.1, 8.5, 9.0, 9.2, 10.0, 12.0])
    classes = binned("depth", depths, depths, edges=CLEVR_EDGES)
    assert classes.train.tolist() == [0, 0, 1, 1, 2, 3, 4, 5]  # a value on an edge is below it, as in VTAB
    assert classes.names == ["<= 8", "8-8.5", "8.5-9", "9-9.5", "9.5-10", "> 10"]
    with pytest.raises(UserError, match=r"a 'depth' of > 10: these bins are CLEVR's; .* --bins equal"):
        binned("depth", depths[:-1], depths, edges=CLEVR_EDGES)


def test_other_depths_get_bins_of_equal_population():
    depths = torch.arange(60).double() / 7
    classes = binned("depth", depths, depths[:5])
    assert torch.bincount(classes.train).tolist() == [10] * 6 and classes.num_classes == 6


def test_classes_that_train_lacks_are_named():
    with pytest.raises(UserError, match="2 classes of 'label' of which no training image is used: cat, 9; convert"):
        classes_of("label", torch.tensor([0, 2]), torch.tensor([1, 2, 9]), ["ant", "cat", "dog"])
    with pytest.raises(UserError, match="all training images have 'label' = ant: there is nothing to tell apart"):
        classes_of("label", torch.tensor([0, 0]), torch.tensor([0]), ["ant"])


def test_bins_are_about_equal_and_defined_by_train():
    train = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    edges = bin_edges(train)
    assert torch.allclose(edges, torch.quantile(train.double(), torch.arange(1, 6, dtype=torch.float64) / 6))
    others = torch.cat([torch.tensor([-99.0, 99.0]).double(), edges])
    classes = binned("depth", train, others)
    counts = torch.bincount(classes.train)
    assert len(counts) == 6 and counts.max() - counts.min() <= 2
    assert classes.validation.tolist() == [0, 5, 0, 1, 2, 3, 4]  # on an edge: the lower bin
    with pytest.raises(UserError, match="100 training images have 2 different values of 'size', which do not fill 6"):
        binned("size", (torch.arange(100) % 2).double(), others)


def test_accuracy_and_confusion_of_predictions():
    classes = Classes(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 1, 2]), ["a", "b", "c"])
    predictions = torch.tensor([0, 1, 2, 2])
    assert classes.accuracy(predictions) == 75.0
    assert classes.confusion(predictions) == [[1, 0, 0], [0, 1, 1], [0, 0, 1]]
    many = Classes(torch.arange(101), torch.arange(101), list(map(str, range(101))))
    assert many.accuracy(torch.arange(101)) == 100.0 and many.confusion(torch.arange(101)) is None
