"""The online probe: what it finds, and that nothing which it meets ends a run."""

from __future__ import annotations

import pytest
import torch
from distributed_runs import tiny_config

from ijepa_ds.config import parse_config
from ijepa_ds.distributed import Process
from ijepa_ds.evaluation.online import OnlineProbe, probe


def rows_of(labels: list[int], *, noise: float = 0.1) -> torch.Tensor:
    """Rows that tell their class."""
    draw = torch.Generator().manual_seed(0)
    return torch.eye(8)[torch.tensor(labels) % 8] + noise * torch.randn(len(labels), 8, generator=draw)


def probed(train: list[int], validation: list[int], say) -> dict[str, float]:
    labels = [torch.tensor(train), torch.tensor(validation)]
    return probe([rows_of(train), rows_of(validation)], labels, "label", say)


def test_both_accuracies_and_labels_that_do_not_begin_at_zero():
    said: list[str] = []
    accuracies = probed([3, 4, 5] * 20, [3, 4, 5] * 5, said.append)
    assert accuracies == {"knn/label": 100.0, "linear/label": 100.0} and not said


def test_images_of_a_class_that_train_lacks_are_errors_and_it_is_said():
    said: list[str] = []
    accuracies = probed([0, 1] * 20, [0, 1, 2, 7] * 5, said.append)
    assert accuracies == pytest.approx({"knn/label": 50.0, "linear/label": 50.0})
    assert len(said) == 1 and "label 2, 7 as errors" in said[0] and "knn_train_images" in said[0]
    assert probed([0, 1] * 20, [2] * 5, said.append)["knn/label"] == 0.0


def test_a_single_class_is_left_out():
    assert probed([4] * 20, [4] * 5, print) == {}


def test_features_that_are_no_numbers_are_said_once_and_end_no_run(make_beton, tmp_path):
    path = str(make_beton(tmp_path / "a.beton", 8, (32, 32), {"label": [0, 1] * 4}))
    changes = {"ijepa__data__train": path, "ijepa__data__validation": path, "ijepa__monitor": {"knn_epochs": 1}}
    said: list[str] = []
    online = OnlineProbe(parse_config(tiny_config(**changes)), Process(0, 1, torch.device("cpu")), said.append)
    assert online.fields == ["label"] and online.due(1, 9, False) and not online.due(2, 9, False)

    def broken(images: torch.Tensor) -> torch.Tensor:
        return torch.full((len(images), 4, 6), torch.nan)

    assert online.accuracy(broken) == online.accuracy(broken) == {}
    assert len(said) == 1 and "the online probe is left out: the features of 8 of 8 images hold NaN" in said[0]

    def colours(images: torch.Tensor) -> torch.Tensor:
        return images.float().flatten(1, 2)

    assert online.accuracy(colours).keys() == {"knn/label", "linear/label"}
