"""The online probe: what it finds, and that nothing which it meets ends a run."""

from __future__ import annotations

import pytest
import torch

from ijepa_ds.errors import UserError
from ijepa_ds.evaluation.features import Features
from ijepa_ds.evaluation.online import probe


def features(labels: list[int], *, noise: float = 0.1) -> Features:
    """Rows that tell their class."""
    wanted = torch.tensor(labels)
    rows = torch.eye(8)[wanted % 8] + noise * torch.randn(len(labels), 8, generator=torch.Generator().manual_seed(0))
    return Features(rows, {"label": wanted})


def test_both_accuracies_and_labels_that_do_not_begin_at_zero():
    said: list[str] = []
    found = probe(features([3, 4, 5] * 20), features([3, 4, 5] * 5), "label", said.append)
    assert found == {"knn/label": 100.0, "linear/label": 100.0} and not said


def test_images_of_a_class_that_train_lacks_are_errors_and_it_is_said():
    said: list[str] = []
    found = probe(features([0, 1] * 20), features([0, 1, 2, 7] * 5), "label", said.append)
    assert found == pytest.approx({"knn/label": 50.0, "linear/label": 50.0})
    assert len(said) == 1 and "label 2, 7 as errors" in said[0] and "knn_train_images" in said[0]
    assert probe(features([0, 1] * 20), features([2] * 5), "label", said.append)["knn/label"] == 0.0


def test_features_that_are_not_finite_are_refused_for_the_caller_to_say():
    broken = features([0, 1] * 20)
    broken.values[3, 2] = torch.nan
    with pytest.raises(UserError, match="hold NaN"):
        probe(broken, features([0, 1]), "label", print)
