"""Classes and depths of patches, and mean IoU, against numbers that were worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ijepa_ds.evaluation.probes.patch_scores import (
    by_patch,
    confusion,
    held_out_images,
    intersection_over_union,
    majority,
    mean_iou,
    nearest_pixels,
    patch_means,
    pixel_accuracy,
    upsampled_classes,
)

NONE = 255


def test_pixels_are_grouped_by_patch_row_by_row() -> None:
    pixels = np.arange(4 * 6).reshape(4, 6)
    assert by_patch(pixels, 2).tolist()[:4] == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11], [12, 13, 18, 19]]


def test_a_patch_has_the_most_frequent_class_and_ignored_pixels_have_no_vote() -> None:
    classes = np.array(
        [
            [3, 3, 1, 0, NONE, NONE],
            [3, 2, 0, 1, NONE, 7],
            [NONE, NONE, 5, 5, 254, 0],
            [NONE, NONE, 6, 6, 254, 254],
        ],
        np.uint8,
    )
    assert majority(classes, 2, ignored=NONE).tolist() == [3, 0, 7, NONE, 5, 254]


def test_a_patch_has_the_mean_of_the_depths_that_are_known() -> None:
    depth = np.array([[1.0, 2.0, np.nan, np.nan], [3.0, np.nan, np.nan, np.nan]])
    np.testing.assert_allclose(patch_means(depth, 2), [2.0, np.nan])


def test_the_nearest_pixel_is_taken_up_and_down() -> None:
    values = np.array([[1, 2], [3, 4]])
    assert nearest_pixels(values, (4, 2)).tolist() == [[1, 2], [1, 2], [3, 4], [3, 4]]
    assert nearest_pixels(np.arange(6)[None], (1, 2)).tolist() == [[1, 4]]
    assert nearest_pixels(values, (2, 2)).tolist() == values.tolist()


def test_mean_iou_by_hand() -> None:
    truth = torch.tensor([[0, 0, 0, 1], [1, 1, 1, NONE]])
    predicted = torch.tensor([[0, 0, 1, 1], [1, 1, 3, 2]])
    counts = confusion(truth, predicted, 4, ignored=NONE)
    assert counts.tolist() == [[2, 1, 0, 0], [0, 3, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    # Class 0: 2 hit of 3 true and 2 predicted; class 1: 3 of 4 and 4. 2 and 3 have no true pixel: no part of the mean.
    expected = [100 * 2 / 3, 100 * 3 / 5]
    ious = intersection_over_union(counts)
    assert ious[:2].tolist() == pytest.approx(expected) and ious[2:].isnan().all()
    assert mean_iou(counts) == pytest.approx(sum(expected) / 2)
    assert pixel_accuracy(counts) == pytest.approx(100 * 5 / 7)


def test_scores_are_enlarged_bilinearly_before_the_class_is_chosen() -> None:
    # Along a row of two patches the scores are 3 to 0 and 0 to 1. Enlarged by four their shares of the second patch are
    # 0, 0, 1/8, 3/8, 5/8, 7/8, 1, 1, and 3 (1 - s) = s at s = 3/4: the border moves into the unsure patch.
    scores = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    assert upsampled_classes(scores, (1, 2), (1, 8)).tolist() == [[0, 0, 0, 0, 0, 1, 1, 1]]
    scores = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    enlarged = F.interpolate(scores.T.reshape(1, 5, 3, 4), size=(17, 9), mode="bilinear", align_corners=False)
    assert torch.equal(upsampled_classes(scores, (3, 4), (17, 9)), enlarged[0].argmax(dim=0))
    rows = torch.eye(6)  # six patches, a class each, in 2 rows of 3
    assert upsampled_classes(rows, (2, 3), (2, 3)).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_whole_images_are_held_out_and_no_class_with_them() -> None:
    images, labels = np.repeat(np.arange(40), 5), np.tile([0, 1, 2, 0, 1], 40)
    held_out = held_out_images(images, labels, seed=3)
    assert held_out.sum() == 6 * 5 and len(np.unique(images[held_out])) == 6
    assert not np.array_equal(held_out, held_out_images(images, labels, seed=4))
    labels[images == images[held_out][0]] = 3  # a class of a held-out image alone
    kept = held_out_images(images, labels, seed=3)
    assert kept.sum() == 5 * 5 and not kept[labels == 3].any()
    assert not held_out_images(np.zeros(9, int), np.arange(9), seed=0).any()
