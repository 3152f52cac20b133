"""The health signals against what they are defined to be on features whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch

from ijepa_ds.run.health import context_views, feature_std, health, lidar, mean_cosine, rankme, token_variance


def look(tokens: torch.Tensor) -> dict[str, float]:
    """All signals, the views being halves of the patches."""
    num_patches = tokens.shape[1]
    generator = torch.Generator().manual_seed(7)
    blocks = torch.stack([torch.randperm(num_patches, generator=generator)[: num_patches // 2] for _ in range(8)])
    return health(tokens, blocks)


@pytest.fixture
def spread() -> torch.Tensor:
    """Features without any collapse: 512 images, 32 independent features."""
    return torch.randn(512, 32, generator=torch.Generator().manual_seed(0))


def test_rankme_counts_the_directions_that_are_used(spread):
    orthogonal = torch.linalg.qr(spread).Q  # equal singular values: the entropy of a uniform distribution
    assert rankme(orthogonal) == pytest.approx(32, rel=1e-3)
    assert rankme(orthogonal[:, :5] @ torch.randn(5, 32)) <= 5.01
    assert rankme(torch.ones(512, 32)) == pytest.approx(1, abs=1e-3)
    assert rankme(torch.zeros(512, 32)) == pytest.approx(1, abs=1e-3)


def test_rankme_is_the_formula_of_the_paper(spread):
    s = torch.linalg.svdvals(spread.double())
    p = s / s.sum()
    assert rankme(spread) == pytest.approx(float(torch.exp(-(p * p.log()).sum())), rel=1e-4)


def test_feature_std_tells_spread_from_collapse(spread):
    assert feature_std(spread) == pytest.approx(1 / math.sqrt(32), rel=0.02)
    assert feature_std(torch.ones(512, 32) * torch.rand(512, 1)) == pytest.approx(0, abs=1e-6)


def test_mean_cosine_is_the_mean_over_pairs_of_different_images(spread):
    few = spread[:7] + 0.5
    pairs = [torch.cosine_similarity(few[i], few[j], dim=0) for i in range(7) for j in range(7) if i != j]
    assert mean_cosine(few) == pytest.approx(float(torch.stack(pairs).mean()), abs=1e-6)
    assert mean_cosine(torch.ones(9, 4)) == pytest.approx(1, abs=1e-6)


def test_token_variance_looks_within_an_image_only():
    same_within_an_image = torch.randn(8, 1, 16).expand(8, 10, 16)
    assert token_variance(same_within_an_image) == pytest.approx(0, abs=1e-9)
    assert token_variance(torch.tensor([[[0.0], [2.0]]])) == 1.0


def views_of(separate: int, *, classes: int = 200, width: int = 32) -> torch.Tensor:
    """50 views of each image, spread within it in all directions; images differ in the first ``separate`` alone."""
    generator = torch.Generator().manual_seed(1)
    means = torch.zeros(classes, 1, width)
    means[..., :separate] = torch.randn(classes, 1, separate, generator=generator)
    return means + 0.1 * torch.randn(classes, 50, width, generator=generator)


def test_lidar_counts_the_directions_in_which_images_differ_more_than_their_views():
    assert lidar(views_of(5)) == pytest.approx(5, abs=0.3)
    assert lidar(views_of(20)) == pytest.approx(20, abs=2)
    nuisance = views_of(5)
    nuisance[..., 5:] += 30 * torch.randn(200, 50, 27, generator=torch.Generator().manual_seed(2))
    # Which RankMe cannot tell: views that differ wildly fill its dimensions.
    assert lidar(nuisance) == pytest.approx(5, abs=0.3) and rankme(nuisance.flatten(0, 1)) > 20
    assert lidar(torch.ones(200, 50, 32)) == pytest.approx(1, abs=1e-3)


def test_lidar_is_the_formula_of_the_paper():
    views = torch.randn(40, 6, 8, generator=torch.Generator().manual_seed(3)).double()
    views += torch.randn(40, 1, 8, generator=torch.Generator().manual_seed(4))
    within, between, means = torch.zeros(8, 8).double(), torch.zeros(8, 8).double(), views.mean(dim=1)
    for image in range(40):
        apart = means[image] - means.mean(dim=0)
        between += torch.outer(apart, apart) / 40
        for view in views[image]:
            within += torch.outer(view - means[image], view - means[image]) / (40 * 6)
    values, vectors = torch.linalg.eigh(within + 1e-4 * torch.eye(8))
    root = vectors @ torch.diag(values**-0.5) @ vectors.T
    p = torch.linalg.eigvalsh(root @ between @ root)
    p = p / p.sum() + 1e-7
    assert lidar(views.float()) == pytest.approx(float(torch.exp(-(p * p.log()).sum())), rel=1e-3)


def test_views_are_means_over_the_context_blocks_of_the_batch():
    tokens = torch.arange(2 * 6 * 1.0).reshape(2, 6, 1)
    views = context_views(tokens, torch.tensor([[0, 1], [2, 5], [3, 4]]))
    assert views.squeeze(-1).tolist() == [[0.5, 3.5, 3.5], [6.5, 9.5, 9.5]]
    assert context_views(tokens, torch.zeros(80, 2, dtype=torch.int64)).shape == (2, 50, 1)


def test_scale_changes_token_variance_alone(spread):
    tokens = spread.reshape(32, 16, 32)
    before, after = look(tokens), look(tokens * 1e-2)
    assert after.pop("token_variance") == pytest.approx(before.pop("token_variance") * 1e-4, rel=1e-4)
    # The paper's delta is a fixed number, so features as small as its root would change LiDAR: a norm prevents them.
    before.pop("lidar"), after.pop("lidar")
    assert after == pytest.approx(before, rel=1e-3)


def test_bfloat16_gives_the_float32_answer(spread):
    tokens = spread.reshape(32, 16, 32).bfloat16()
    assert look(tokens) == look(tokens.float())


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_extreme_scales_neither_overflow_nor_vanish(spread, scale):
    assert rankme(spread * scale) == pytest.approx(rankme(spread), rel=1e-3)
    assert feature_std(spread * scale) == pytest.approx(feature_std(spread), rel=1e-3)
    assert mean_cosine(spread * scale) == pytest.approx(mean_cosine(spread), abs=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_features_that_are_not_finite_give_nan(bad):
    tokens = torch.randn(4, 6, 8)
    tokens[1, 2, 3] = bad
    answer = look(tokens)
    assert set(answer) == {"rankme", "lidar", "feature_std", "mean_cosine", "token_variance"}
    assert all(math.isnan(value) for value in answer.values())


def test_one_image_has_no_other_to_compare_with():
    assert math.isnan(feature_std(torch.ones(1, 4))) and math.isnan(mean_cosine(torch.ones(1, 4)))
    assert math.isnan(lidar(torch.ones(1, 5, 4))) and math.isnan(lidar(torch.ones(5, 1, 4)))


def test_no_gradient_is_kept():
    tokens = torch.randn(4, 6, 8, requires_grad=True)
    assert all(isinstance(value, float) for value in look(tokens).values())
