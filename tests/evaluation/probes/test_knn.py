"""The nearest-neighbour classifier against scikit-learn's, and its limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ijepa_ds.errors import UserError
from ijepa_ds.evaluation.probes import knn
from ijepa_ds.evaluation.probes.knn import knn_accuracy, nearest_neighbours


def clusters(
    num_rows: int, *, seed: int, num_classes: int = 5, noise: float = 1.2
) -> tuple[torch.Tensor, torch.Tensor]:
    centres = torch.randn(num_classes, 16, generator=torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_rows) % num_classes
    return centres[labels] + noise * torch.randn(num_rows, 16, generator=draw), labels


def test_agrees_with_scikit_learn():
    neighbors = pytest.importorskip("sklearn.neighbors")
    bank, bank_labels = clusters(300, seed=1)
    queries, labels = clusters(200, seed=2)
    ours = knn_accuracy(bank, bank_labels, queries, labels, ks=(1, 10, 50))
    assert len(set(ours.values())) > 1  # the features are hard enough for k to matter

    def weights(distances: np.ndarray) -> np.ndarray:
        return np.exp((1 - distances) / 0.07)

    for k, accuracy in ours.items():
        reference = neighbors.KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=weights)
        reference.fit(bank.numpy(), bank_labels.numpy())
        assert accuracy == pytest.approx(100 * reference.score(queries.numpy(), labels.numpy()), abs=0.51)


def test_neighbours_are_scikit_learns():
    neighbors = pytest.importorskip("sklearn.neighbors")
    (bank, _), (queries, _) = clusters(300, seed=1), clusters(20, seed=2)
    reference = neighbors.NearestNeighbors(n_neighbors=7, metric="cosine", algorithm="brute").fit(bank.numpy())
    expected = torch.from_numpy(reference.kneighbors(queries.numpy(), return_distance=False))
    assert torch.equal(nearest_neighbours(bank, queries, k=7), expected)
    assert nearest_neighbours(bank[:4], queries, k=7).shape == (20, 4)


def test_chunks_and_length_and_dtype_do_not_change_the_answer(monkeypatch):
    bank, bank_labels = clusters(100, seed=1)
    queries, labels = clusters(60, seed=2)
    whole = knn_accuracy(bank, bank_labels, queries, labels, ks=(5, 20))
    monkeypatch.setattr(knn, "CHUNK_ELEMENTS", 700)
    assert knn_accuracy(bank * torch.rand(100, 1) + 0, bank_labels, queries * 9, labels.int(), ks=(20, 5)) == whole
    assert set(knn_accuracy(bank.bfloat16(), bank_labels, queries.bfloat16(), labels)) == {10, 20, 100}


def test_a_small_bank_clips_k_and_says_so():
    bank, bank_labels = clusters(30, seed=1)
    said: list[str] = []
    accuracy = knn_accuracy(bank, bank_labels, bank, bank_labels, say=said.append)
    assert list(accuracy) == [10, 20, 30]
    assert said == ["kNN: the bank has 30 images, so k = 100, 200 becomes 30"]


def test_a_tiny_temperature_is_the_nearest_neighbour():
    bank, bank_labels = clusters(100, seed=1)
    assert knn_accuracy(bank, bank_labels, bank, bank_labels, ks=(50,), temperature=1e-4) == {50: 100.0}


def test_a_class_only_in_val_and_bad_rows_are_refused():
    bank, bank_labels = clusters(50, seed=1)
    with pytest.raises(UserError, match="class 5 is in val but has no image in train"):
        knn_accuracy(bank, bank_labels, bank, bank_labels.clone().index_fill_(0, torch.tensor([0]), 5))
    bank[3, 2] = torch.nan
    with pytest.raises(UserError, match="1 of 50 rows of the train features hold NaN"):
        knn_accuracy(bank, bank_labels, bank, bank_labels)
