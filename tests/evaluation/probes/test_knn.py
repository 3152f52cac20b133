"""The nearest-neighbour classifier against scikit-learn's, and its limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ijepa_ds.evaluation.probes import knn
from ijepa_ds.evaluation.probes.knn import nearest_neighbours, usable, vote


def clusters(
    num_rows: int, *, seed: int, num_classes: int = 5, noise: float = 1.2
) -> tuple[torch.Tensor, torch.Tensor]:
    centres = torch.randn(num_classes, 16, generator=torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_rows) % num_classes
    return centres[labels] + noise * torch.randn(num_rows, 16, generator=draw), labels


def accuracies(
    bank: torch.Tensor, bank_labels: torch.Tensor, queries: torch.Tensor, labels: torch.Tensor, ks: list[int]
) -> dict[int, float]:
    cosine, index = nearest_neighbours(bank, queries, k=max(ks))
    votes = {k: vote(cosine, bank_labels[index], k=k) for k in ks}
    return {k: 100.0 * float((classes == labels).double().mean()) for k, classes in votes.items()}


def test_agrees_with_scikit_learn():
    neighbors = pytest.importorskip("sklearn.neighbors")
    bank, bank_labels = clusters(300, seed=1)
    queries, labels = clusters(200, seed=2)
    ours = accuracies(bank, bank_labels, queries, labels, [1, 10, 50])
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
    distances, expected = reference.kneighbors(queries.numpy())
    cosine, index = nearest_neighbours(bank, queries, k=7)
    assert torch.equal(index, torch.from_numpy(expected))
    torch.testing.assert_close(cosine, torch.from_numpy(1 - distances).float())


def test_chunks_and_length_and_dtype_do_not_change_the_answer(monkeypatch):
    bank, bank_labels = clusters(100, seed=1)
    queries, labels = clusters(60, seed=2)
    whole = accuracies(bank, bank_labels, queries, labels, [5, 20])
    monkeypatch.setattr(knn, "CHUNK_ELEMENTS", 700)
    lengths = torch.rand(100, 1, generator=torch.Generator().manual_seed(3)) + 0.1
    assert accuracies(bank * lengths, bank_labels, queries * 9, labels, [5, 20]) == whole
    done: list[int] = []
    cosine, _ = nearest_neighbours(bank.bfloat16(), queries.bfloat16(), k=3, tick=done.append)
    assert cosine.dtype == torch.float32 and done == [*range(7, 60, 7), 60]


def test_a_small_bank_clips_k_and_says_so():
    said: list[str] = []
    assert usable((10, 20, 100, 200), 30, said.append) == [10, 20, 30]
    assert said == ["kNN: the bank has 30 images, so k = 100, 200 becomes 30"]
    assert usable((10, 20), 20, said.append) == [10, 20] and len(said) == 1


def test_a_tiny_temperature_is_the_nearest_neighbour():
    bank, bank_labels = clusters(100, seed=1)
    cosine, index = nearest_neighbours(bank, bank, k=50)
    classes = vote(cosine, bank_labels[index], k=50, temperature=1e-4)
    assert torch.equal(classes, bank_labels)
